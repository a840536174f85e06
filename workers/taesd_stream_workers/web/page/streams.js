// What the page knows of each stream: the daemon's word, what was drawn last, and what the person just asked for.

export const TILES_MAX = 200
const ENDED = new Set(["done", "stopped", "failed", "lost"])

export class Item {
  constructor(entry) {
    this.name = entry.name
    this.data = entry
    this.moved_ms = performance.now() // when its seq last changed, as far as this page saw
    this.drawn = null // {run, seq, step, total_steps, sigma, …} of the picture on its tile
    this.stop_held = false // Stop was pressed and can still be undone
    this.stop_sent_ms = 0
    this.record_busy = false
  }

  get ended() { return ENDED.has(this.data.state) }
  get kept() { return this.data.record !== "off" || this.data.files.length > 0 }
  get stopping() { return !this.ended && (this.stop_held || this.stop_sent_ms > 0 || this.data.flags.includes("stopping")) }

  /** Step, total and sigma of the picture that is seen: numbers never run ahead of it while the stream lives. */
  get numbers() {
    const { drawn, data } = this
    const seen = drawn && drawn.run === data.run && !this.ended ? drawn : data
    const at = seen.step ?? seen.seq
    const total = seen.total_steps ?? null
    return { number: at === null || at === undefined ? null : at + 1, total, sigma: seen.sigma ?? null }
  }

  take(entry) {
    if (entry.run !== this.data.run) Object.assign(this, { drawn: null, stop_held: false, stop_sent_ms: 0 })
    if (entry.run !== this.data.run || entry.seq !== this.data.seq) this.moved_ms = performance.now()
    if (ENDED.has(entry.state)) this.stop_sent_ms = 0
    this.data = entry
  }

  /** The daemon no longer lists it: its tile stays, with its last picture. */
  leave() {
    if (!this.ended) this.data = { ...this.data, state: "lost", flags: [], ended: Date.now() / 1000 }
  }

  matches(words) {
    if (!words.length) return true
    const text = `${this.name} ${this.data.meta.prompt ?? ""} ${this.data.latent_format}`.toLowerCase()
    return words.every((word) => text.includes(word))
  }
}

export class Streams {
  constructor() {
    this.items = new Map() // name -> Item, in the order of the wall: the first seen comes first, and stays there
    this.cleared = new Set() // runs that `Clear ended` took off the wall
  }

  /** Take the daemon's whole list. Returns the names that started and that ended with it. */
  take(entries) {
    const news = { started: [], ended: [] }
    const listed = new Set()
    for (const entry of entries) {
      if (this.cleared.has(entry.run)) continue
      listed.add(entry.name)
      const item = this.items.get(entry.name)
      const was = item ? { run: item.data.run, ended: item.ended } : null
      if (item) item.take(entry)
      else this.items.set(entry.name, new Item(entry))
      const ended = ENDED.has(entry.state)
      if (!ended && (!was || was.run !== entry.run)) news.started.push(entry.name)
      if (ended && was && !was.ended) news.ended.push(entry.name)
    }
    for (const item of this.items.values()) if (!listed.has(item.name)) item.leave()
    this.trim()
    return news
  }

  trim() {
    for (const item of this.items.values()) {
      if (this.items.size <= TILES_MAX) return
      if (item.ended && !item.kept) this.items.delete(item.name)
    }
  }

  clearEnded() {
    for (const item of [...this.items.values()].filter((item) => item.ended)) {
      this.cleared.add(item.data.run)
      this.items.delete(item.name)
    }
  }

  count(test) {
    let count = 0
    for (const item of this.items.values()) count += test(item)
    return count
  }
}

export const SHOWS = {
  all: () => true,
  live: (item) => !item.ended,
  kept: (item) => item.kept,
  ended: (item) => item.ended,
}
