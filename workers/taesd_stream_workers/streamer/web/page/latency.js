// Latency by stage, over the pictures of the last five seconds.

const WINDOW_MS = 5000
const SPANS = [
  ["Receive", "sent_us", "received_us"],
  ["Wait for a batch", "received_us", "started_us"],
  ["Decode", "started_us", "decoded_us"],
  ["Encode", "decoded_us", "encoded_us"],
  ["Send and draw", "encoded_us", "shown_us"],
]
export const STAGES = SPANS.map(([name]) => name)

const at = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]

export class Latency {
  pictures = [] // {at_ms, stamps}
  last = null

  take({ run, seq, stamps }, shown_us) {
    // The first picture, and one sent again for a late viewer, waited for a viewer and not for us.
    const counts = this.last !== null && this.last !== `${run} ${seq}` && shown_us !== null && stamps
    this.last = `${run} ${seq}`
    if (counts) this.pictures.push({ at_ms: performance.now(), stamps: { ...stamps, shown_us } })
  }

  /** {stages_ms: [median or null, as STAGES], total_ms, p95_ms, differ: clocks of two hosts}, null: nothing measured. */
  summary() {
    const since_ms = performance.now() - WINDOW_MS
    this.pictures = this.pictures.filter(({ at_ms }) => at_ms > since_ms)
    if (!this.pictures.length) return null
    const sorted = (from, to) =>
      this.pictures
        .filter(({ stamps }) => stamps[from] && stamps[to])
        .map(({ stamps }) => (stamps[to] - stamps[from]) / 1000)
        .sort((a, b) => a - b)
    const stages = SPANS.map(([, from, to]) => at(sorted(from, to), 0.5) ?? null)
    const totals = sorted("sent_us", "shown_us")
    const differ = totals[0] < 0 || stages.some((ms) => ms < -1)
    const stages_ms = stages.map((ms) => (ms === null || ms < -1 ? null : Math.max(0, ms)))
    return { stages_ms, total_ms: at(totals, 0.5) ?? null, p95_ms: at(totals, 0.95) ?? null, differ }
  }
}
