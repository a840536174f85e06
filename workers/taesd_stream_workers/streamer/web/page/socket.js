// One WebSocket that comes back by itself. By its pings a silent line is known from a quiet one, and the daemon's clock.

const WAITS_MS = [500, 1000, 2000, 4000, 8000, 15000]
const PING_MS = 2000
const TRIPS = 16 // that are remembered
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

/** The daemon's clock, as this page estimates it: the round trip with the least delay tells the offset best. */
export class DaemonClock {
  constructor() {
    this.trips = [] // {rtt_us, offset_us}, newest last
  }

  /** Take one answered ping: when it left (this page's ms), and what the daemon's clock said. */
  take(sent_ms, daemon_us) {
    const now_ms = performance.now()
    const rtt_us = (now_ms - sent_ms) * 1000
    this.trips.push({ rtt_us, offset_us: daemon_us - (sent_ms + now_ms) * 500 })
    if (this.trips.length > TRIPS) this.trips.shift()
  }

  /** The daemon's clock now, in microseconds, or null before the first answer. */
  now_us() {
    if (!this.trips.length) return null
    const best = this.trips.reduce((a, b) => (b.rtt_us < a.rtt_us ? b : a))
    return performance.now() * 1000 + best.offset_us
  }

  /** A daemon that restarted, or a network that changed, has other delays. */
  forget() {
    this.trips.length = 0
  }
}
