// A bare player of one stream, for an iframe, a notebook or OBS.

import { listen, tell } from "./line.js"

const LOST_MS = 800
const name = decodeURIComponent(location.pathname.replace(/^\/streams\//, "").replace(/\/embed$/, ""))
const canvas = document.querySelector("canvas")
const first = document.querySelector("img")
const words = document.querySelector("p")
let rendition = "VideoDecoder" in self ? "live" : "jpeg"
let lost = 0

const say = (text) => words.textContent !== text && (words.textContent = text)
const watch = () => tell({ do: "watch", streams: { [name]: rendition } })

function takeState({ streams }) {
  const row = streams.find((row) => row.name === name)
  const note = row?.note?.startsWith("No ") ? row.note : ""
  const waits = canvas.hidden && first.hidden
  say(!row ? `No stream is called ${name} now.` : note || (waits ? "Waiting for the first step" : row.flags.includes("stalled") ? "No new step for a while" : ""))
}

canvas.setAttribute("aria-label", `Picture of ${name}`)
document.title = name
first.onload = () => (first.hidden = !canvas.hidden)
first.src = `/streams/${name}/latest.jpg`
tell({ do: "screen", screen: "stage", canvas })
tell({ do: "open", screen: "stage", stream: name })
watch()
listen((message) => {
  if (message.type === "state") takeState(message)
  if (message.type === "hello") clearTimeout(lost)
  if (message.type === "closed") lost = setTimeout(say, LOST_MS, "Lost the connection. Trying again.")
  if (message.type === "no-live") {
    rendition = "jpeg"
    watch()
  }
  if (message.type !== "picture") return
  canvas.hidden = false
  first.hidden = true
  Object.assign(canvas.dataset, { seq: message.header.seq, pictures: message.pictures })
})
