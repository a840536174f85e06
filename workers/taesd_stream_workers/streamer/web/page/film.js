// A film: the steps of a run as the daemon keeps them. One group of pictures is fetched once, and decoded from its
// keyframe on as a person drags through it.

import { codecOf, Watchdog } from "./decoder.js"

const GROUPS_MAX = 6 // fetched ones, compressed
const THUMB_PX = 80
const AGAIN_MS = 1000

class DecoderError extends Error {}

/** Raises: TypeError where nobody answers; Error where there is nothing. */
async function ask(path) {
  const answer = await fetch(path)
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`)
  return answer.arrayBuffer()
}

/** The pictures around a step: [{seq, index, keyframe, pts, bytes}], bytes as they are decoded. */
async function fetchGroup(run, seq, part) {
  const buffer = await ask(`/api/v1/runs/${run}/film/${seq}${part ? `?part=${part}` : ""}`)
  const length = new DataView(buffer).getUint32(0)
  let offset = 4 + length
  return JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length))).pictures.map((row) => {
    const bytes = new Uint8Array(buffer, offset, row.bytes)
    offset += row.bytes
    return { ...row, bytes }
  })
}

/** Decodes one picture after the other; only the wanted one is kept. Raises: DecoderError. */
class Walker {
  constructor() {
    Object.assign(this, { decoder: null, group: null, at: -1, wait: null, count: 0, software: false })
    this.watchdog = new Watchdog((error) => this.close(error))
  }

  /** The frame of picture `to` of a group; the caller closes it. each(frame, picture): of every one on the way. */
  async frame(group, to, each) {
    const asked = Promise.withResolvers()
    try {
      if (group !== this.group || to <= this.at || this.decoder?.state !== "configured") this.begin(group)
      this.wait = asked
      this.each = each
      while (this.at < to) {
        const picture = group[++this.at]
        const timestamp = ++this.count
        this.sent.set(timestamp, [picture, this.at === to])
        this.decoder.decode(new EncodedVideoChunk({ type: picture.keyframe ? "key" : "delta", timestamp, data: picture.bytes }))
      }
    } catch (error) {
      throw new DecoderError(error.message)
    }
    this.watchdog.wait()
    return asked.promise
  }

  begin(group) {
    this.close()
    Object.assign(this, { group, at: -1, sent: new Map() })
    this.decoder = new VideoDecoder({ output: (frame) => this.output(frame), error: (error) => this.close(error) })
    const hardwareAcceleration = this.software ? "prefer-software" : "no-preference"
    this.decoder.configure({ codec: codecOf(group[0].bytes), hardwareAcceleration, optimizeForLatency: true })
  }

  output(frame) {
    const [picture, is_last] = this.sent.get(frame.timestamp) ?? []
    this.sent.delete(frame.timestamp)
    this.watchdog.rest()
    if (picture) this.each?.(frame, picture)
    if (is_last) return this.wait.resolve(frame)
    this.watchdog.wait()
    frame.close()
  }

  close({ message } = { message: "closed" }) {
    this.watchdog.rest()
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close()
    this.wait?.reject(new DecoderError(message))
    Object.assign(this, { decoder: null, wait: null })
  }
}

/** One run on one canvas, and its strip of small pictures. */
export class Film {
  /** on: {picture(image, width, height, seq), clip([{header, bytes}]), strip(seq, image)}; each image is closed behind the call. */
  constructor(run, on) {
    Object.assign(this, { run, on, groups: new Map(), wanted: null, shown: null, busy: false, thumbs: new Set(), strip_busy: false })
    this.part = null // of a batch whose pictures have a film each: which one, from 1
    this.walker = new Walker()
    this.strip_walker = new Walker()
    this.decodes = "VideoDecoder" in self
  }

  /** The group that holds a step, fetched at most once; again only where it has grown since. */
  async group(seq) {
    for (const [key, group] of this.groups) {
      if (!group.some((picture) => picture.seq === seq)) continue
      this.groups.delete(key)
      this.groups.set(key, group) // the one that was used last goes last
      return group
    }
    const { part } = this
    const group = await fetchGroup(this.run, seq, part)
    if (part !== this.part) return group
    this.groups.set(group[0].seq, group)
    while (this.groups.size > GROUPS_MAX) this.groups.delete(this.groups.keys().next().value)
    return group
  }

  /** Show a step; of several asked for while one is on its way, the last. */
  async show(seq, part = null) {
    if (part !== this.part) this.groups.clear()
    if (part !== this.part) this.shown = null
    Object.assign(this, { wanted: seq, part })
    if (this.busy) return
    this.busy = true
    while (this.wanted !== null && this.wanted !== this.shown) {
      const { wanted: seq, part } = this
      try {
        if (this.decodes) await this.decoded(seq)
        else await this.image(seq)
        if (part === this.part) this.shown = seq
      } catch (error) {
        if (error instanceof DecoderError) this.stepDown()
        else if (error instanceof TypeError) await new Promise((done) => setTimeout(done, AGAIN_MS)) // the line is lost
        else break
      }
    }
    this.busy = false
  }

  /** First the browser's own decoder, then images that the daemon makes. */
  stepDown() {
    this.decodes = !this.walker.software
    for (const walker of [this.walker, this.strip_walker]) walker.software = true
    this.walker.close()
  }

  async decoded(seq) {
    const group = await this.group(seq)
    if (this.wanted !== seq) return
    const pictures = group.filter((picture) => picture.seq === seq)
    const frame = await this.walker.frame(group, group.indexOf(pictures[0]))
    if (this.wanted === seq) this.on.picture(frame, frame.displayWidth, frame.displayHeight, seq)
    frame.close()
    if (this.wanted !== seq || pictures.length === 1) return
    const header = { run: this.run, seq, count: pictures.length }
    this.on.clip(pictures.map(({ bytes, keyframe, pts, index }) => ({ header: { ...header, keyframe, pts, index }, bytes })))
  }

  async image(seq) {
    const picture = await ask(`/api/v1/runs/${this.run}/film/${seq}.jpg${this.part ? `?part=${this.part}` : ""}`)
    const image = await createImageBitmap(new Blob([picture]))
    if (this.wanted === seq) this.on.picture(image, image.width, image.height, seq)
    image.close()
  }

  /** Make small pictures of these steps, those that have none yet; one group after the other. */
  async strip(seqs) {
    this.strip_wanted = seqs
    if (this.strip_busy || !this.decodes) return
    this.strip_busy = true
    try {
      for (let seq; (seq = this.strip_wanted?.find((seq) => !this.thumbs.has(seq))) !== undefined; ) {
        const group = await this.group(seq)
        const last = group.findLastIndex((picture) => this.strip_wanted?.includes(picture.seq) && !this.thumbs.has(picture.seq))
        const frame = await this.strip_walker.frame(group, last, (frame, picture) => this.thumb(frame, picture))
        frame.close()
        this.thumbs.add(seq) // also one that gave no picture is not asked for again
      }
    } catch {
      // The strip stays as it is: it is an ornament of the scrubber.
    }
    this.strip_busy = false
  }

  thumb(frame, { seq, index }) {
    if (index > 0 || this.thumbs.has(seq)) return
    this.thumbs.add(seq)
    const scale = THUMB_PX / Math.max(frame.displayWidth, frame.displayHeight)
    const small = new OffscreenCanvas(Math.max(1, frame.displayWidth * scale), Math.max(1, frame.displayHeight * scale))
    small.getContext("2d", { alpha: false }).drawImage(frame, 0, 0, small.width, small.height)
    this.on.strip(seq, small)
  }

  close() {
    this.wanted = this.strip_wanted = null
    this.walker.close()
    this.strip_walker.close()
    this.groups.clear()
  }
}
