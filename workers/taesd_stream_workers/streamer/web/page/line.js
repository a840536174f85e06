// Opens the line to the daemon before the rest of the page is even loaded: in a worker that owns the canvases, or,
// where canvases cannot be given away, on the page's own thread.

const loopback = /^(localhost|127(\.\d+){3}|\[::1\])$/.test(location.hostname)
const still = matchMedia("(prefers-reduced-motion: reduce)")
const url = `${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`
const early = [] // what came before the page listened
let take = (message) => early.push(message)

async function open() {
  const settings = { url, loopback, reduced: still.matches }
  if ("transferControlToOffscreen" in HTMLCanvasElement.prototype) {
    const worker = new Worker(new URL("./pictures.js", import.meta.url), { type: "module" })
    worker.onmessage = ({ data }) => take(data)
    worker.postMessage(settings)
    return (message) => {
      const canvas = message.canvas?.transferControlToOffscreen()
      worker.postMessage(canvas ? { ...message, canvas } : message, canvas ? [canvas] : [])
    }
  }
  const { Pictures } = await import("./pictures.js")
  const here = new Pictures((message) => setTimeout(() => take(message)), settings)
  return (message) => here.take(message)
}

export const tell = await open()

/** listener(message): of Pictures, from the first one on. */
export function listen(listener) {
  take = listener
  early.splice(0).forEach(listener)
}

still.onchange = () => tell({ do: "reduced", on: still.matches })
