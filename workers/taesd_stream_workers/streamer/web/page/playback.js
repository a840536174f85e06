// When each picture of a video is due: a clip loops at its own rate, a live video runs in video time.

const BUFFER_MS = 120 // a live picture waits this long, so that uneven arrivals do not show
const BEHIND_MS = 1500 // more than this waiting: the reader was away, and catches up
const HZ_MS = 90 // pts count 1/90000 s
const FRAME_MS = 1000 / 24

/**
 * The pictures of a clip, again and again. When the next step's clip is all there it takes over at the same place.
 * show(picture, before): those before it, in order, that were passed over since the loop began: a decoder needs them, an
 * image does not. It returns false when it is too busy.
 */
export class ClipLoop {
  constructor(show) {
    Object.assign(this, { show, clip: null, next: null, at: -1, began_ms: 0, timer: 0, still: false })
  }

  /** picture: {header, bytes}, in order of their index. */
  take(picture) {
    const { run, seq, index, count } = picture.header
    if (index === 0 || !this.next || this.next.run !== run || this.next.seq !== seq) this.next = { run, seq, count, pictures: [] }
    if (this.next.pictures.length !== index) return // one of them was lost: the next clip is whole
    this.next.pictures.push(picture)
    if (!this.clip || this.clip.run !== run) this.begin()
    else if (this.next !== this.clip && this.next.pictures.length === count) this.turn()
    if (!this.timer) this.tick()
  }

  begin() {
    Object.assign(this, { clip: this.next, at: -1, began_ms: performance.now() })
  }

  turn() {
    Object.assign(this, { clip: this.next, at: -1 })
  }

  tick() {
    const { pictures, count } = this.clip
    const frame_ms = pictures.length > 1 ? (pictures[1].header.pts - pictures[0].header.pts) / HZ_MS : FRAME_MS
    const beats = Math.floor((performance.now() - this.began_ms) / frame_ms)
    const due = Math.min(this.still ? 0 : beats % count, pictures.length - 1)
    if (due !== this.at) {
      const from = due > this.at ? this.at + 1 : 0
      if (this.show(pictures[due], pictures.slice(from, due)) !== false) this.at = due
    }
    if (count === 1 || (this.still && this.at === 0)) return (this.timer = 0)
    const next_ms = this.began_ms + (beats + 1) * frame_ms - performance.now()
    this.timer = setTimeout(() => this.tick(), Math.max(1, next_ms))
  }

  close() {
    clearTimeout(this.timer)
    Object.assign(this, { clip: null, next: null, timer: 0 })
  }
}

/** A live video: each picture at its own time, a little later than it came; late ones move the whole clock. */
export class VideoTime {
  constructor(show) {
    Object.assign(this, { show, queue: [], run: null, base_ms: 0, timer: 0 })
  }

  take(picture) {
    const { run, pts } = picture.header
    const now_ms = performance.now()
    const own_ms = pts / HZ_MS
    if (run !== this.run) Object.assign(this, { run, base_ms: now_ms - own_ms, queue: [] }) // the first one at once
    const due_ms = this.base_ms + own_ms
    if (due_ms < now_ms && !this.queue.length) this.base_ms = now_ms + BUFFER_MS - own_ms
    else if (due_ms - now_ms > BEHIND_MS) this.base_ms = now_ms + BUFFER_MS - own_ms
    this.queue.push(picture)
    if (!this.timer) this.tick()
  }

  tick() {
    const now_ms = performance.now()
    const late = []
    while (this.queue.length && this.base_ms + this.queue[0].header.pts / HZ_MS <= now_ms + 1) late.push(this.queue.shift())
    const newest = late.pop()
    if (newest) this.show(newest, late)
    if (!this.queue.length) return (this.timer = 0)
    this.timer = setTimeout(() => this.tick(), Math.max(1, this.base_ms + this.queue[0].header.pts / HZ_MS - now_ms))
  }

  close() {
    clearTimeout(this.timer)
    Object.assign(this, { queue: [], run: null, timer: 0 })
  }
}
