// The daemon's clock, as this page estimates it: the round trip with the least delay tells the offset best.

const KEPT = 16

export class DaemonClock {
  constructor() {
    this.trips = [] // {rtt_us, offset_us}, newest last
  }

  /** Take one answered ping: when it left (this page's ms), and what the daemon's clock said. */
  take(sent_ms, daemon_us) {
    const now_ms = performance.now()
    const rtt_us = (now_ms - sent_ms) * 1000
    this.trips.push({ rtt_us, offset_us: daemon_us - (sent_ms + now_ms) * 500 })
    if (this.trips.length > KEPT) this.trips.shift()
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
