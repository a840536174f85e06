// Walking through the steps that were shown: the sigma curve, a strip of small pictures, and a playhead over both.

import { $, make, put } from "./dom.js"
import { sigmaText } from "./format.js"

const LOAD_MS = 500
const LATER_MS = 5000 // where nobody tells of more
const PLAY_MS = 125
const CELL_PX = 11
const CURVE = { width: 1000, height: 36, edge: 4 }

/** The steps of one run's film, as the daemon has them: rows of {at, seq, step, of, sigma, ms}; at: its number. */
export class Steps {
  constructor(run) {
    Object.assign(this, { run, rows: [], head: null, busy: false, next_ms: 0 })
  }

  /** Ask for what is new; told: its last seq, null: nobody knows. Returns whether something was. */
  async load(told) {
    if (this.busy || performance.now() < this.next_ms || (told ?? Infinity) <= (this.last?.seq ?? -1)) return false
    this.busy = true
    let news = []
    try {
      const answer = await fetch(`/api/v1/runs/${this.run}/film?after=${this.last?.seq ?? -1}`)
      if (answer.ok) news = (this.head = await answer.json()).steps
    } catch {
      // The line is lost: that is said elsewhere.
    }
    for (const [seq, step, of, sigma, ms] of news) this.rows.push({ at: this.rows.length, seq, step, of, sigma, ms })
    this.next_ms = performance.now() + (told === null ? LATER_MS : LOAD_MS)
    this.busy = false
    return news.length > 0
  }

  get last() {
    return this.rows.at(-1)
  }

  get total() {
    return this.last?.of ?? null
  }

  /** Where a row stands: its step where the total is known, else its number among the rows. */
  place(row) {
    return this.total ? row.step : row.at
  }

  number(row) {
    return (row.step < 0 ? row.seq : row.step) + 1
  }

  nearest(key, value) {
    return this.rows.reduce((best, row) => (!best || Math.abs(key(row) - value) <= Math.abs(key(best) - value) ? row : best), null)
  }

  /** The row of another film that shows the same: the same step, or where the totals differ the nearest sigma. */
  like(row, other) {
    const by_sigma = this.total !== other.total && row.sigma !== null && this.last?.sigma !== null
    if (by_sigma) return this.nearest(({ sigma }) => sigma, row.sigma)
    const place = other.place(row)
    if (!this.total) return this.rows[Math.max(0, Math.min(place, this.rows.length - 1))] // which may be very many
    return this.nearest((one) => this.place(one), place)
  }
}

export class Scrubber {
  films = [] // Steps; the first one leads
  row = null // of the first film, where the playhead was put; null: it follows what is live
  timer = 0

  /**
   * on: {strip(index, canvas), cells(index, {run, cells, width, height}), show(rows or null, released)}: rows of all
   * films, in their order; null: follow what is live; live(): whether more steps may come.
   */
  constructor(root, on, count = 1) {
    const part = (selector) => $(selector, root)
    Object.assign(this, { root, on, range: part("input"), past: part(".past"), future: part(".future"), here: part(".here"), live: part(".live-mark") })
    this.strips = Array.from({ length: count }, (_, index) => {
      const canvas = make("canvas", { class: "strip", "aria-hidden": "true" })
      part(".strips").append(canvas)
      on.strip(index, canvas)
      return canvas
    })
    this.range.oninput = () => this.go(this.at(Number(this.range.value)), false)
    this.range.onchange = () => this.go(this.row, true)
    this.buttons = { play: part("[data-scrub=play]"), back: part("[data-scrub=back]"), on: part("[data-scrub=on]") }
    this.buttons.play.onclick = () => this.play()
    this.buttons.back.onclick = () => this.step(-1)
    this.buttons.on.onclick = () => this.step(1)
    new ResizeObserver(() => this.lay()).observe(root)
  }

  get lead() {
    return this.films[0]
  }

  get ready() {
    return this.films.length > 0 && this.films.every((film) => film.rows.length > 0)
  }

  /** The last row that all films have come to. */
  get end() {
    if (this.films.length < 2) return this.lead.last
    const [one, other] = this.films
    const like = other.like(one.last, one)
    return other.place(like) < one.place(one.last) ? one.like(like, other) : one.last
  }

  open(runs) {
    this.stop()
    Object.assign(this, { films: runs.map((run) => new Steps(run)), row: null, laid: "" })
    put(this.root, { hidden: true })
  }

  async refresh(itemOf) {
    const { films } = this
    const told = (item) => (item ? item.data.film ?? -1 : null)
    const news = await Promise.all(films.map((film) => film.load(told(itemOf(film.run)))))
    if (films !== this.films || !this.ready || !news.some(Boolean)) return false
    put(this.root, { hidden: false })
    this.lay()
    if (this.row === null) this.on.show(null, false)
    this.tell()
    return true
  }

  at(place) {
    return this.lead.nearest((row) => this.lead.place(row), place)
  }

  /** Put the playhead on a row; on the last one it follows. released: it stays there. */
  go(row, released = true, follow = true) {
    if (!row && !this.ready) return
    const at_end = !row || (follow && row === this.end)
    this.row = at_end ? null : row
    this.tell()
    this.on.show(this.row && this.matched(this.row), released)
  }

  matched(row) {
    return this.films.map((film) => (film === this.lead ? row : film.like(row, this.lead)))
  }

  step(by) {
    if (!this.ready) return
    this.stop()
    const { rows } = this.lead
    const { end } = this
    this.go(rows[Math.max(0, Math.min(end.at, (this.row ?? end).at + by))])
  }

  first() {
    if (this.ready) this.go(this.lead.rows[0])
  }

  follow() {
    this.stop()
    this.go(null)
  }

  play() {
    if (this.timer || !this.ready) return this.stop()
    if (this.row === null) this.go(this.lead.rows[0], false)
    this.timer = setInterval(() => {
      const { rows } = this.lead
      const next = rows[this.row ? this.row.at + 1 : 0]
      this.go(next ?? null, false)
      if (this.row === null) this.stop()
    }, PLAY_MS)
    this.tell()
  }

  stop() {
    clearInterval(this.timer)
    this.timer = 0
    this.tell()
  }

  // --- what is seen ---

  get span() {
    return Math.max(1, this.lead.total ?? this.lead.rows.length)
  }

  tell() {
    if (!this.ready) return
    const { lead, span, end } = this
    const row = this.row ?? end
    const word = lead.total ? "Step" : "Frame"
    const text = `${word} ${lead.number(row)}`
    const sigma = row.sigma === null ? "" : `, sigma ${sigmaText(row.sigma)}`
    put(this.range, { max: span - 1, "aria-valuetext": `${text}${lead.total ? ` of ${lead.total}` : ""}${sigma}` })
    this.range.value = lead.place(row)
    const left = (one) => `${((lead.place(one) + 0.5) / span) * 100}%`
    this.here.style.left = left(row)
    this.here.firstElementChild.style.translate = `-${left(row)}`
    this.live.style.left = left(end)
    put(this.here.firstElementChild, { text: this.row || !this.on.live() ? text : `Live, ${text.toLowerCase()}` })
    put(this.buttons.play, { "aria-pressed": this.timer !== 0 })
    put(this.buttons.play.lastElementChild, { text: this.timer ? "Pause" : "Play steps" })
  }

  lay() {
    if (!this.ready || this.root.hidden) return
    this.layCurve()
    const ratio = devicePixelRatio
    this.strips.forEach((canvas, index) => {
      const film = this.films[index]
      const [width, height] = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)]
      if (!film || !width) return
      const cell = width / this.span
      const every = Math.ceil((CELL_PX * ratio) / cell)
      const cells = this.cellRows(film, every)
        .map(([place, { seq }]) => ({ seq, x: Math.round(place * cell), width: Math.round((place + every) * cell) - Math.round(place * cell) - 1 }))
      this.on.cells(index, { run: film.run, cells, width, height })
    })
  }

  /** [place, row] of a film's cells: under each step of the first film stands what is shown with it. */
  cellRows(film, every) {
    const { lead } = this
    const rows = lead.rows.filter((row) => lead.place(row) % every === 0)
    if (film === lead) return rows.map((row) => [film.place(row), row])
    const end = lead.place(this.end)
    return rows.filter((row) => lead.place(row) <= end).map((row) => [lead.place(row), film.like(row, lead)])
  }

  layCurve() {
    const { lead, span } = this
    const rows = lead.rows.filter(({ sigma }) => sigma !== null)
    const most = rows.reduce((most, { sigma }) => Math.max(most, sigma), 0)
    const x = (place) => (((place + 0.5) / span) * CURVE.width).toFixed(1)
    const y = (sigma) => (CURVE.height - CURVE.edge - (Math.log1p(sigma) / Math.log1p(most || 1)) * (CURVE.height - 2 * CURVE.edge)).toFixed(1)
    const points = rows.map((row) => `${x(lead.place(row))} ${y(row.sigma)}`)
    put(this.past, { d: points.length ? `M${points.join("L")}` : null })
    const more = points.length && lead.total && lead.place(lead.last) < span - 1
    put(this.future, { d: more ? `M${points.at(-1)}L${x(span - 1)} ${y(0)}` : null })
  }
}
