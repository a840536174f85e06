// H.264 of one opened stream by WebCodecs: every picture as soon as it is decoded, never a queue that grows.

const QUEUE_MAX = 2 // beyond it drop to the newest keyframe
const SILENT_BEATS = 4 // hardware has few sessions: one too many is silent
const BEAT_MS = 500
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

/** Tells of a decoder that is silent for 2 s, in beats: a machine that sleeps has none. */
export class Watchdog {
  constructor(silent) {
    Object.assign(this, { silent, timer: 0, beats: 0 })
  }

  /** Something went in, and nothing has come out since. */
  wait() {
    this.timer ||= setInterval(() => this.beat(), BEAT_MS)
  }

  beat() {
    if (++this.beats < SILENT_BEATS) return
    this.rest()
    this.silent(new Error("the decoder gave no picture in 2 s"))
  }

  rest() {
    clearInterval(this.timer)
    Object.assign(this, { timer: 0, beats: 0 })
  }
}

export class LiveDecoder {
  /** on: {picture(frame, header), keyframe(), failed(reason)}. A picture's frame belongs to the callee, who closes it. */
  constructor(on) {
    Object.assign(this, { on, decoder: null, codec: null, waiting: true, count: 0, headers: new Map() })
    this.patient = false // fed at a pace
    this.software = false
    this.asked_ms = -ASK_MS
    this.errors = 0
    this.watchdog = new Watchdog(({ message }) => this.step_down(message))
  }

  get queued() {
    return this.decoder?.decodeQueueSize ?? 0
  }

  get behind() {
    return !this.patient && this.queued > QUEUE_MAX
  }

  /** header.silent: not shown, decoded for those behind it. */
  feed(header, bytes) {
    const behind = this.behind
    this.late = behind && (header.keyframe ? [header, bytes] : this.late)
    if (behind || (this.waiting && !header.keyframe)) return this.skip()
    if (header.keyframe && !this.configure(bytes)) return
    this.waiting = false
    const timestamp = ++this.count * 1000 // pts repeat where a picture is sent again
    this.headers.set(timestamp, header)
    this.watchdog.wait()
    const type = header.keyframe ? "key" : "delta"
    try {
      this.decoder.decode(new EncodedVideoChunk({ type, timestamp, data: bytes }))
    } catch (error) {
      this.broken(error)
    }
  }

  /** After a gap wait for a keyframe, and ask for it (not at each picture). */
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
    this.watchdog.rest()
    this.errors = 0
    const header = this.headers.get(frame.timestamp)
    for (const timestamp of this.headers.keys()) if (timestamp <= frame.timestamp) this.headers.delete(timestamp)
    if (header && !header.silent) this.on.picture(frame, header)
    else frame.close()
    if (!this.late || this.behind) return
    this.feed(...this.late)
    this.waiting = true
  }

  broken(error) {
    this.drop()
    if (++this.errors <= 2) return this.skip()
    this.step_down(String(error?.message ?? error))
  }

  /** First the browser's own decoder, not the device's, then no WebCodecs. */
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
    this.watchdog.rest()
    this.waiting = true
  }

  close() {
    this.drop()
  }
}
