// A canvas, and what is shown on it. A tile shows whole pictures; a screen also a stream's video, and steps of a film.

import { LiveDecoder } from "./decoder.js"
import { Film } from "./film.js"
import { ClipLoop, VideoTime } from "./playback.js"

const GRID_GAP_PX = 4 // pixels between the pictures of a batch, in the daemon's full size
const BUSY = 30

export class Sink {
  constructor(canvas) {
    Object.assign(this, { canvas, context: canvas.getContext("2d", { alpha: false }), pictures: 0, drawn_ms: 0 })
    this.busy = false
    this.next = null // the newest picture that came while one was being decoded
    this.last = null // Blob of its newest JPEG: an opened stream begins with the last picture of its tile
    this.images = null // ClipLoop of JPEG pictures
    this.credited = null // seq of the frame whose credit went back
  }

  draw(image, width, height) {
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width
      this.canvas.height = height
    }
    this.context.drawImage(image, 0, 0, width, height)
  }

  close() {
    this.images?.close()
    this.images = null
  }
}

export class Screen extends Sink {
  /** on: {shown(header), step(run, seq), keyframe(stream), failed(reason)} */
  constructor(canvas, on) {
    super(canvas)
    Object.assign(this, { on, stream: null, live: null, film: null, replaying: false, parts: 1, part: null, sheet: null, strips: null })
    this.time = new VideoTime((picture, late) => this.play(picture, late))
    this.loop = new ClipLoop((picture, before) => this.play(picture, before))
  }

  /** Put a stream here (null: clear it). */
  open(stream) {
    this.close()
    Object.assign(this, { stream, pictures: 0, next: null, last: null, parts: 1, part: null, sheet: null })
    this.canvas.width = this.canvas.height = 2 // clears it
  }

  close() {
    super.close()
    this.live?.close()
    this.film?.close()
    this.time.close()
    this.loop.close()
    Object.assign(this, { live: null, film: null, replaying: false })
  }

  // --- live ---

  feed(header, bytes) {
    if (this.replaying) return
    const picture = { header, bytes }
    if (header.kind === "clip" && header.count > 1) this.loop.take(picture)
    else if (header.kind === "live") this.time.take(picture)
    else this.decode(header, bytes, false)
  }

  play({ header, bytes }, before) {
    if (this.live?.queued > BUSY) return false
    for (const one of before) this.decode({ ...one.header, silent: true }, one.bytes, true)
    this.decode(header, bytes, true)
  }

  decode(header, bytes, patient) {
    this.live ??= new LiveDecoder({
      picture: (frame, header) => {
        if (header.replayed === this.replaying) {
          this.draw(frame, frame.displayWidth, frame.displayHeight, header)
          if (!this.replaying) this.on.shown(header)
        }
        frame.close() // at once: decoders have few frames to give
      },
      keyframe: () => this.stream && this.on.keyframe(this.stream),
      failed: (reason) => this.on.failed(reason),
    })
    this.live.patient = patient
    this.live.feed({ replayed: false, ...header }, bytes)
  }

  // --- a film ---

  filmOf(run) {
    if (this.film?.run === run) return this.film
    this.film?.close()
    return (this.film = new Film(run, {
      picture: (image, width, height, seq) => {
        if (!this.replaying) return
        this.loop.close()
        if (this.film.part) super.draw(image, width, height)
        else this.draw(image, width, height)
        this.on.step(run, seq)
      },
      clip: (pictures) => this.replaying && pictures.forEach(({ header, bytes }) => this.loop.take({ header: { ...header, replayed: true }, bytes })),
      strip: (seq, image) => this.strips?.add(run, seq, image),
    }))
  }

  /** Show a step of a run; seq null: the live pictures again. part: of a batch whose pictures have a film each, from 1. */
  replay(run, seq, part = null) {
    const was = this.replaying
    this.replaying = seq !== null
    if (was !== this.replaying) {
      this.loop.close()
      this.time.close()
    }
    if (this.replaying) return this.filmOf(run).show(seq, part)
    if (this.film) this.film.wanted = this.film.shown = null
    if (!was || !this.stream) return // else: what came meanwhile was not shown
    if (this.last) this.again(this.last)
    else this.on.keyframe(this.stream)
  }

  async again(blob) {
    const image = await createImageBitmap(blob)
    if (!this.replaying) this.draw(image, image.width, image.height)
    image.close()
  }

  // --- a part of a batch ---

  /** {columns, part}: show one picture of a sheet; null: the whole sheet. */
  crop(part) {
    this.part = part
    if (this.sheet) super.draw(...this.cut(this.sheet))
  }

  draw(image, width, height, header) {
    this.parts = header?.parts ?? this.parts
    if (this.parts > 1) {
      this.sheet ??= new OffscreenCanvas(2, 2)
      if (this.sheet.width !== width || this.sheet.height !== height) Object.assign(this.sheet, { width, height })
      this.sheet.getContext("2d", { alpha: false }).drawImage(image, 0, 0, width, height)
      return super.draw(...this.cut(this.sheet))
    }
    super.draw(image, width, height)
  }

  cut(sheet) {
    if (!this.part || this.part.at >= this.parts) return [sheet, sheet.width, sheet.height]
    const { columns, rows, at, full_width } = this.part
    const gap = (GRID_GAP_PX * sheet.width) / full_width // the sheet may be scaled down
    const [width, height] = [(sheet.width - gap * (columns - 1)) / columns, (sheet.height - gap * (rows - 1)) / rows]
    const [x, y] = [(at % columns) * (width + gap), Math.floor(at / columns) * (height + gap)]
    const cut = new OffscreenCanvas(Math.max(1, Math.round(width)), Math.max(1, Math.round(height)))
    cut.getContext("2d", { alpha: false }).drawImage(sheet, x, y, width, height, 0, 0, cut.width, cut.height)
    return [cut, cut.width, cut.height]
  }
}

/** The small pictures under the scrubber's hand: each stands in the cell of its step. */
export class Strip {
  constructor(canvas) {
    Object.assign(this, { canvas, context: canvas.getContext("2d"), images: new Map(), run: null, cells: [] })
  }

  /** cells: [{seq, x, width}] in pixels of a canvas of that size. */
  lay(run, cells, width, height) {
    if (run !== this.run) Object.assign(this, { run, images: new Map() })
    Object.assign(this, { cells })
    Object.assign(this.canvas, { width, height }) // clears it
    for (const cell of cells) this.drawCell(cell)
  }

  add(run, seq, image) {
    if (run !== this.run) return
    this.images.set(seq, image)
    for (const cell of this.cells) if (cell.seq === seq) this.drawCell(cell)
  }

  drawCell({ seq, x, width }) {
    const image = this.images.get(seq)
    if (!image) return
    const { height } = this.canvas
    const scale = Math.max(width / image.width, height / image.height)
    const [w, h] = [width / scale, height / scale]
    this.context.drawImage(image, (image.width - w) / 2, (image.height - h) / 2, w, h, x, 0, width, height)
  }
}
