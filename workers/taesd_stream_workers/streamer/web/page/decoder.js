// H.264 of one opened stream by WebCodecs: every picture as soon as it is decoded, never a queue that grows.

const QUEUE_MAX = 2 // beyond it the decoder is behind: drop to the next keyframe
const SILENT_MS = 2000 // hardware sessions are few, and one too many may stay silent
const ASK_MS = 500

/** "avc1.PPCCLL" from the first sequence parameter set of an Annex B buffer, or null. */
export function codecOf(bytes) {
  for (let i = 0; i + 6 < bytes.length; i++) {
    const start = bytes[i] === 0 && bytes[i + 1] === 0 && bytes[i + 2] === 1
    if (!start || (bytes[i + 3] & 31) !== 7) continue
    const profile = bytes.slice(i + 4, i + 7)
    return "avc1." + Array.from(profile, (byte) => byte.toString(16).padStart(2, "0")).join("")
  }
  return null
}

export class LiveDecoder {
  /** on: {picture(frame, header), keyframe(), failed(reason)}. A picture's frame belongs to the callee, who closes it. */
  constructor(on) {
    Object.assign(this, { on, decoder: null, codec: null, waiting: true, count: 0, headers: new Map() })
    this.patient = false // what is fed is paced already
    this.software = false
    this.fed_ms = 0 // when the oldest picture without an answer went in; 0: none
    this.asked_ms = -ASK_MS
    this.errors = 0
    this.watchdog = setInterval(() => this.check(), SILENT_MS / 4)
  }

  get queued() {
    return this.decoder?.decodeQueueSize ?? 0
  }

  /** header.silent: decoded for those behind it, and not shown. */
  feed(header, bytes) {
    if (!header.keyframe && (this.waiting || (!this.patient && this.queued > QUEUE_MAX))) return this.skip()
    if (header.keyframe && !this.configure(bytes)) return
    this.waiting = false
    const timestamp = ++this.count * 1000 // our own: pts may repeat, when a picture is sent again
    this.headers.set(timestamp, header)
    this.fed_ms ||= performance.now()
    const type = header.keyframe ? "key" : "delta"
    try {
      this.decoder.decode(new EncodedVideoChunk({ type, timestamp, data: bytes }))
    } catch (error) {
      this.broken(error)
    }
  }

  /** Pictures after a gap cannot be decoded: wait for a whole one, and ask for it (not at each picture). */
  skip() {
    this.waiting = true
    if (performance.now() - this.asked_ms < ASK_MS) return
    this.asked_ms = performance.now()
    this.on.keyframe()
  }

  configure(bytes) {
    const codec = codecOf(bytes)
    if (!codec) return this.broken(new Error("a keyframe without its parameters")) ?? false
    if (this.decoder?.state === "configured" && codec === this.codec) return true
    this.drop()
    this.decoder = new VideoDecoder({ output: (frame) => this.output(frame), error: (error) => this.broken(error) })
    this.codec = codec
    const hardwareAcceleration = this.software ? "prefer-software" : "no-preference"
    try {
      this.decoder.configure({ codec, hardwareAcceleration, optimizeForLatency: true })
    } catch (error) {
      return this.broken(error) ?? false
    }
    return true
  }

  output(frame) {
    this.fed_ms = 0
    this.errors = 0
    const header = this.headers.get(frame.timestamp)
    for (const timestamp of this.headers.keys()) if (timestamp <= frame.timestamp) this.headers.delete(timestamp)
    if (header && !header.silent) this.on.picture(frame, header)
    else frame.close()
  }

  broken(error) {
    this.drop()
    if (++this.errors <= 2) return this.skip()
    this.step_down(String(error?.message ?? error))
  }

  check() {
    if (this.fed_ms && performance.now() - this.fed_ms > SILENT_MS) this.step_down("the decoder gave no picture in 2 s")
  }

  /** First the browser's own decoder instead of the device's, then no WebCodecs at all. */
  step_down(reason) {
    this.drop()
    if (this.software) return this.on.failed(reason)
    this.software = true
    this.errors = 0
    this.skip()
  }

  drop() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close()
    this.decoder = null
    this.headers.clear()
    this.fed_ms = 0
    this.waiting = true
  }

  close() {
    clearInterval(this.watchdog)
    this.drop()
  }
}
