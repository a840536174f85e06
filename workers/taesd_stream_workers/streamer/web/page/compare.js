// Two runs at the same step, side by side or with a wipe. Both from their films, so that both are locked.

import { $, put, stamp } from "./dom.js"
import { Scrubber } from "./scrubber.js"

const SCREENS = ["a", "b"]
const WORDS_MAX = 24

/** What tells two runs apart, as words of each: "cfg 4.5". */
function differences(metas) {
  const keys = Object.keys({ ...metas[0], ...metas[1] }).filter((key) => JSON.stringify(metas[0][key]) !== JSON.stringify(metas[1][key]))
  const short = keys.filter((key) => metas.every((meta) => `${meta[key] ?? ""}`.length <= WORDS_MAX)).slice(0, 2)
  return metas.map((meta) => short.map((key) => `${key.replaceAll("_", " ")} ${meta[key] ?? "–"}`).join(", "))
}

export class Compare {
  runs = null

  /** on: {tell(message), moved(hash)} */
  constructor(on) {
    const part = (selector) => $(`#view-compare ${selector}`)
    Object.assign(this, { on, root: $("#view-compare"), sought: null, mode: "wipe" })
    this.parts = { stage: part(".pair"), names: part(".state"), labels: [part(".label-a"), part(".label-b")], wipe: part("[data-part=wipe]"), note: part(".stage-note") }
    const scrubber = stamp("#scrubber")
    part(".under-stage").append(scrubber)
    this.canvases = SCREENS.map((screen) => {
      const canvas = part(`#compare-${screen}`)
      on.tell({ do: "screen", screen, canvas })
      return canvas
    })
    this.scrubber = new Scrubber(
      scrubber,
      {
        strip: (index, canvas) => on.tell({ do: "strip", screen: SCREENS[index], canvas }),
        cells: (index, cells) => on.tell({ do: "cells", screen: SCREENS[index], ...cells }),
        show: (rows, released) => this.show(rows, released),
        live: () => this.live,
      },
      2,
    )
    this.parts.wipe.oninput = () => this.wipe()
    part("[data-compare=swap]").onclick = () => this.open(this.runs.toReversed(), this.place, this.mode)
    for (const button of this.root.querySelectorAll("button[data-mode]")) button.onclick = () => this.choose(button.dataset.mode)
  }

  /** place: seq of the first run's step, or null: the newest that both have. */
  open(runs, place, mode) {
    this.close()
    Object.assign(this, { runs, sought: place })
    this.scrubber.open(runs)
    this.choose(mode ?? this.mode)
    this.wipe()
  }

  close() {
    if (this.runs) for (const screen of SCREENS) this.on.tell({ do: "open", screen, stream: null })
    this.scrubber.open([])
    this.runs = null
    put(this.parts.note, { hidden: true })
    for (const canvas of this.canvases) put(canvas, { hidden: true })
  }

  choose(mode) {
    this.mode = mode
    put(this.parts.stage, { "data-mode": mode })
    for (const button of this.root.querySelectorAll("button[data-mode]")) put(button, { "aria-pressed": button.dataset.mode === mode })
    this.tellAddress()
  }

  wipe() {
    const { value } = this.parts.wipe
    put(this.parts.wipe, { "aria-valuetext": `A ${value} %, B ${100 - value} %` })
    this.parts.stage.style.setProperty("--wipe", `${value}%`)
  }

  /** ofRun(run): its stream's Item, while there is one. */
  async update(ofRun) {
    const { scrubber } = this
    if (!this.runs) return
    this.live = this.runs.some((run) => ofRun(run)?.ended === false)
    scrubber.tell()
    const { films } = scrubber
    const news = await scrubber.refresh(ofRun)
    if (films !== scrubber.films) return
    if (!scrubber.ready) {
      const missing = films.find((film) => !film.rows.length && !film.busy)
      return put(this.parts.note, { hidden: !missing, text: `Nothing was kept of ${ofRun(missing?.run)?.name ?? "one of these runs"} yet.` })
    }
    if (!news) return
    put(this.parts.note, { hidden: true })
    if (this.sought !== null) {
      const seq = this.sought
      this.sought = null
      scrubber.go(scrubber.lead.nearest((row) => row.seq, seq), false, false)
    }
    this.tellNames()
  }

  show(rows, released) {
    const { scrubber } = this
    rows ??= scrubber.matched(scrubber.end)
    rows.forEach((row, index) => this.on.tell({ do: "replay", screen: SCREENS[index], run: this.runs[index], seq: row.seq }))
    if (released) this.tellAddress()
  }

  stepped({ screen, seq }) {
    const canvas = this.canvases[SCREENS.indexOf(screen)]
    put(canvas, { hidden: false })
    canvas.dataset.seq = seq
  }

  get place() {
    return this.sought ?? this.scrubber.row?.seq ?? null
  }

  tellNames() {
    const heads = this.scrubber.films.map((film) => film.head)
    const words = differences(heads.map(({ meta }) => meta))
    const [one, other] = heads.map(({ stream }) => stream)
    const { films } = this.scrubber
    const totals = films.map((film) => film.total)
    const by_sigma = totals[0] !== totals[1] ? `. Matched by sigma: ${totals[0]} and ${totals[1]} steps` : ", same step"
    put(this.parts.names.lastElementChild, { text: `${one} with ${other}${by_sigma}` })
    this.parts.labels.forEach((label, index) => put(label, { text: ["AB"[index], heads[index].stream, words[index]].filter(Boolean).join(" · ") }))
    this.canvases.forEach((canvas, index) => put(canvas, { "aria-label": `Picture ${"AB"[index]}: ${heads[index].stream}` }))
  }

  tellAddress() {
    if (this.runs) this.on.moved(`#/compare/${this.runs.join("/")}/${this.place ?? "live"}/${this.mode}`)
  }
}
