// One WebSocket that comes back by itself, and knows a silent line from a quiet one by its pings.

const WAITS_MS = [500, 1000, 2000, 4000, 8000, 15000]
const PING_MS = 2000
const SILENT_MS = 7000 // four pings unanswered: the line is dead, though no close came

export class Socket {
  /** on: {open(), text(message), binary(buffer), closed({retry_at_ms, code})}; retry_at_ms is Date.now() time. */
  constructor(url, on) {
    Object.assign(this, { url, on, failures: 0, live: null, heard_ms: 0, timer: 0 })
    setInterval(() => this.ping(), PING_MS)
    this.connect()
  }

  connect() {
    clearTimeout(this.timer)
    const socket = new WebSocket(this.url)
    socket.binaryType = "arraybuffer"
    this.live = socket
    this.heard_ms = performance.now()
    socket.onopen = () => {
      this.on.open()
      for (const after_ms of [0, 60, 120, 240]) setTimeout(() => this.ping(), after_ms) // an offset soon
    }
    socket.onmessage = ({ data }) => {
      this.failures = 0
      this.heard_ms = performance.now()
      if (typeof data === "string") this.on.text(JSON.parse(data))
      else this.on.binary(data)
    }
    socket.onclose = ({ code }) => this.live === socket && this.wait(code)
  }

  wait(code) {
    this.live = null
    const wait_ms = WAITS_MS[Math.min(this.failures++, WAITS_MS.length - 1)] * (0.8 + 0.4 * Math.random())
    this.timer = setTimeout(() => this.connect(), wait_ms)
    this.on.closed({ retry_at_ms: Date.now() + wait_ms, code })
  }

  retry() {
    if (!this.live) this.connect()
  }

  ping() {
    if (this.live && performance.now() - this.heard_ms > SILENT_MS) {
      const silent = this.live
      this.wait()
      silent.close()
    }
    this.send({ type: "ping", t: performance.now() })
  }

  /** False while there is no connection: what matters is said again after `open`. */
  send(message) {
    if (this.live?.readyState !== WebSocket.OPEN) return false
    this.live.send(JSON.stringify(message))
    return true
  }
}
