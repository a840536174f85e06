// What the page knows of each stream: the daemon's word, what was drawn last, and what the person just asked for.

const TILES_MAX = 200
const ENDED = ["done", "stopped", "failed", "lost"]

export class Item {
  constructor(entry) {
    this.name = entry.name
    this.data = entry
    this.moved_ms = performance.now() // when its seq last changed, as far as this page saw
    this.drawn = null // header of the picture on its tile
    this.run_seen = null // run of the newest picture
    this.run_before = null // the run that this one replaced
    this.stop_held = false // Stop was pressed and can still be undone
    this.stop_sent = false
    this.record_busy = false
    this.gone = false // the daemon no longer lists it
  }

  get ended() { return ENDED.includes(this.data.state) }
  get recording() { return !this.ended && this.data.record === "all" }
  get kept() { return this.data.record !== "off" || this.data.files.length > 0 }
  get stopping() { return !this.ended && (this.stop_held || this.stop_sent || this.data.flags.includes("stopping")) }

  /** Whether its picture is of a run that the daemon has not told of yet: pictures travel faster than its word. */
  get ahead() { return ![null, this.data.run, this.run_before].includes(this.run_seen) }

  /** Number, total and sigma of the step that is seen: they never run ahead of the picture. */
  numbers(drawn = this.drawn) {
    const mine = drawn && (this.ahead || drawn.run === this.data.run)
    const seen = mine ? drawn : this.run_seen && !this.ended ? {} : this.data // a new run, beside the former's picture
    const at = seen.step ?? seen.seq ?? null
    return { number: at === null ? null : at + 1, total: seen.total_steps ?? null, sigma: seen.sigma ?? null }
  }

  take(entry) {
    const renewed = entry.run !== this.data.run
    if (renewed) {
      const drawn = this.drawn?.run === entry.run ? this.drawn : null
      Object.assign(this, { drawn, run_before: this.data.run, stop_held: false, stop_sent: false })
    }
    if (renewed || entry.seq !== this.data.seq) this.moved_ms = performance.now()
    const { ended } = this
    this.gone = false
    this.data = entry
    if (!this.ended) return
    this.stop_sent = false
    if (!ended) entry.ended ??= Date.now() / 1000
  }

  /** The daemon no longer lists it: its tile stays, with its last picture. */
  leave() {
    this.gone = true
    if (!this.ended) this.data = { ...this.data, state: "lost", flags: [], ended: Date.now() / 1000 }
  }

  matches(words) {
    const { meta, latent_format, daemon } = this.data
    const text = `${this.name} ${meta.prompt ?? ""} ${latent_format} ${daemon ?? ""}`.toLowerCase()
    return words.every((word) => text.includes(word))
  }
}

export const SHOWS = {
  all: () => true,
  live: (item) => !item.ended,
  kept: (item) => item.kept,
  ended: (item) => item.ended,
}

export class Streams extends Map {
  // name -> Item, in the order of the wall: the first seen comes first, and stays there
  cleared = new Set() // runs that are off the wall

  /** Take the daemon's whole list. Returns the names that started and that ended with it. */
  take(entries) {
    const news = { started: [], ended: [] }
    const listed = new Set()
    for (const given of entries) {
      if (!ENDED.includes(given.state)) this.cleared.delete(given.run)
      if (this.cleared.has(given.run)) continue
      const entry = { flags: [], files: [], meta: {}, ...given }
      listed.add(entry.name)
      const item = this.get(entry.name)
      const lived = item && !item.ended && item.data.run === entry.run
      if (item) item.take(entry)
      else this.set(entry.name, new Item(entry))
      const ended = ENDED.includes(entry.state)
      if (ended === Boolean(lived)) news[ended ? "ended" : "started"].push(entry.name)
    }
    for (const item of this.values()) if (!listed.has(item.name)) item.leave()
    const over = ({ ended, gone, kept }) => this.size > TILES_MAX && ended && (gone || !kept)
    for (const item of this.values()) if (over(item)) this.drop(item)
    return news
  }

  ofRun(run) {
    return [...this.values()].find((item) => item.data.run === run)
  }

  clearEnded() {
    for (const item of [...this.values()].filter(SHOWS.ended)) this.drop(item)
  }

  drop(item) {
    this.cleared.add(item.data.run)
    this.delete(item.name)
  }

  count(test) {
    let count = 0
    for (const item of this.values()) count += test(item)
    return count
  }
}
