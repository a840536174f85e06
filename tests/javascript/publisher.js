// A publisher written from docs/wire.md alone: OPEN, HELLO, FRAME and END, and what the broker answers to them.

import { randomBytes } from "node:crypto"
import { setTimeout as wait } from "node:timers/promises"
import { decode, encode } from "@msgpack/msgpack"
import { Dealer } from "zeromq"

const now = () => Number(process.hrtime.bigint())

export class Publisher {
  run = randomBytes(8).toString("hex")
  stopped = false // a person pressed Stop
  error = null // why the broker refuses the run
  #seq = 0
  #kept = new Map() // seq -> FRAME until it is acked
  #keptFrom = null; #newest = null // the latter of record "last"
  #demand = null; #sentNs = -Infinity; #ended = false
  #trips = [] // [round trip, offset], ns
  #sending = Promise.resolve()

  constructor(address, info) {
    this.info = { ...info, run: this.run, opened_ns: now() }
    this.socket = new Dealer({ immediate: true, linger: 0, sendHighWaterMark: 8, sendTimeout: 500 })
    this.socket.connect(address)
    this.#say("OPEN", this.info)
    this.timer = setInterval(() => this.#hello(), 1000)
    this.#listen()
  }
  async opened(ms = 5000) { // whether the broker has said what it wants
    for (const end = Date.now() + ms; !this.#demand && Date.now() < end; await wait(20));
    return this.#demand !== null
  }
  publish(latents, shape, { step, total_steps = null, sigma = null }) { // Float32Array, C order
    const { level = "idle", max_fps = 0, record } = this.#demand ?? {}, seq = this.#seq++, kept = record === "all"
    const fields = { run: this.run, seq, index: seq, step, total_steps, sigma, dtype: "float32", shape, kept, sent_ns: now() }
    const frame = { fields, payload: Buffer.from(latents.slice().buffer), tried: now() }
    if (kept) this.#kept.set(seq, frame), (this.#keptFrom ??= seq)
    if (record === "last") this.#newest = frame
    const isLast = total_steps !== null && step >= total_steps - 1, pause = max_fps > 0 ? 1e9 / max_fps : Infinity
    if (kept || isLast || level === "every" || now() - this.#sentNs >= pause) this.#send(frame)
  }
  async close(ms = 10000, reason = "done") { // whether all that is kept is safe
    const last = this.#newest
    if (last) this.#kept.set((this.#keptFrom = last.fields.seq), last), (last.fields.kept = true), this.#hello(), this.#send(last)
    for (const end = Date.now() + ms; !this.#ended && Date.now() < end; await wait(100))
      if (this.#kept.size === 0) this.#say("END", { run: this.run, last_seq: this.#seq - 1, reason })
    clearInterval(this.timer)
    await this.#sending
    this.socket.close()
    return this.#ended
  }
  #say(type, fields, ...payload) { // one send at a time; a full queue gives it up
    const parts = [encode({ v: 1, type, ...fields }), ...payload]
    this.#sending = this.#sending.then(() => this.socket.send(parts)).catch(() => {})
  }
  #send(frame) { this.#say("FRAME", frame.fields, frame.payload), (this.#sentNs = frame.tried = now()) }
  #hello() {
    const row = { next_seq: this.#seq, kept_from: [...this.#kept.keys()][0] ?? this.#keptFrom, stoppable: true }
    const [, offset] = this.#trips.reduce((a, b) => (b[0] < a[0] ? b : a), [Infinity, 0])
    this.#say("HELLO", { runs: { [this.run]: row }, echo_ns: now(), offset_ns: Math.round(offset) })
    const frames = [...this.#kept.values()]
    if (frames.some((frame) => now() - frame.tried > 2e9)) frames.forEach((frame) => this.#send(frame))
  }
  async #listen() {
    for await (const [bytes] of this.socket) {
      const { type, ...message } = decode(bytes), trip = now() - message.echo_ns
      if (type === "ECHO") this.#trips = [...this.#trips.slice(-15), [trip, message.now_ns - message.echo_ns - trip / 2]]
      if (message.run !== this.run) continue
      if (type === "DEMAND") this.#demand = message
      if (type === "STOP") this.stopped = true
      if (type === "ACK") this.#ended ||= message.ended ?? false
      if (type === "ACK") this.#kept.forEach((_, seq) => seq <= message.seq && this.#kept.delete(seq))
      if (type !== "REFUSED") continue
      this.info.stream = message.use ?? this.info.stream
      this.error = message.use || message.code === "unknown_run" ? null : message.text
      wait(this.error ? 10000 : 0, null, { ref: false }).then(() => this.#reopen())
    }
  }
  #reopen() { this.#say("OPEN", this.info), this.#hello(), this.#kept.forEach((frame) => this.#send(frame)) }
}
