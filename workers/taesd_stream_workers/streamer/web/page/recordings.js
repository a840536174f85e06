// The list of recordings: what was kept, to play, to take away, to delete.

import { $, make, put, stamp } from "./dom.js"
import { bytesText, clockText, plural, whenText } from "./format.js"

const FILMS_MAX = 100
const ROWS = 50 // at first, and more at a press
const ENDS_EARLY = "Ends early: the daemon stopped while recording."

export const fileOf = (id) => `/api/v1/recordings/${encodeURIComponent(id)}/file`

export class RecordingList {
  rows = new Map() // id -> its li
  most = ROWS
  recordings = []

  /** remove(id): Delete was pressed. */
  constructor(remove) {
    this.list = $("#recordings")
    this.more = $("#more-recordings")
    this.more.onclick = () => this.writeMore()
    this.list.addEventListener("click", ({ target }) => {
      if (!target.closest("[data-act=delete]")) return
      const row = target.closest("li")
      const next = row.nextElementSibling ?? row.previousElementSibling
      remove(row.dataset.id)
      ;(next ? $(".rec-open", next) : $("#view-recordings h1")).focus()
    })
  }

  open(recordings) {
    this.update(recordings)
    this.lookForFilms()
  }

  /** The films of runs that nobody recorded. */
  async lookForFilms() {
    const answer = await fetch("/api/v1/films").catch(() => null)
    const films = answer?.ok ? (await answer.json()).films : []
    const links = films.slice(0, FILMS_MAX).map(({ run, stream, started, meta }) => {
      const words = make("span", { dir: "auto", text: `${meta?.prompt ?? ""}`.split("\n")[0] })
      const time = make("time", { text: whenText(started), datetime: new Date(started * 1000).toISOString() })
      return make("li", {}, make("a", { href: `#/s/${run}` }, make("b", { text: stream }), words, time))
    })
    $("#films ul").replaceChildren(...links)
    put($("#films"), { hidden: !links.length })
  }

  /** The newest comes first. There may be thousands. */
  update(recordings) {
    this.recordings = recordings
    const shown = recordings.toSorted((a, b) => b.started - a.started).slice(0, this.most)
    const left = new Map(this.rows)
    for (const { id } of shown) left.delete(id)
    for (const [id, row] of left) {
      row.remove()
      this.rows.delete(id)
    }
    let place = this.list.firstElementChild
    for (const recording of shown) {
      const row = this.rows.get(recording.id) ?? this.add(recording)
      if (row === place) place = place.nextElementSibling
      else this.list.insertBefore(row, place)
      this.write(row, recording)
    }
    const behind = recordings.length - shown.length
    put(this.more, { hidden: !behind, text: `Show ${Math.min(ROWS, behind)} of ${behind} more` })
    put($("#no-recordings"), { hidden: shown.length > 0 })
    put($("#view-recordings > h1"), { class: shown.length ? "" : "unseen" })
  }

  writeMore() {
    const last = this.list.lastElementChild
    this.most += ROWS
    this.update(this.recordings)
    $(".rec-open", last.nextElementSibling).focus()
  }

  add({ id, stream, name, part, parts }) {
    const row = stamp("#recording")
    row.dataset.id = id
    put($(".rec-open", row), { href: `#/r/${encodeURIComponent(id)}` })
    put($("b", row), { text: part ? `${stream}, picture ${part} of ${parts}` : stream })
    put($("[data-act=download]", row), { "aria-label": `Download ${name}` })
    put($("[data-act=delete]", row), { "aria-label": `Delete ${name}` })
    $("img", row).onerror = ({ target }) => put(target, { hidden: true })
    this.rows.set(id, row)
    return row
  }

  write(row, { id, state, frames, duration_s, bytes, started, meta, error }) {
    const growing = state === "recording" || state === "finishing"
    const failed = state === "failed"
    put(row, { class: growing ? "recording growing" : "recording" })
    put($(".rec-name span", row), { class: failed ? "danger" : "", text: failed ? error || ENDS_EARLY : `${meta?.prompt ?? ""}`.split("\n")[0] })
    const span_s = state === "recording" ? Date.now() / 1000 - started : duration_s
    const words = { recording: "Recording", finishing: "Finishing" }[state] ?? plural(frames, "frame")
    put($(".rec-length span", row), { text: span_s ? `${words}, ${clockText(span_s)}` : words })
    put($(".rec-length i", row), { hidden: state !== "recording" })
    put($(".rec-size", row), { text: bytesText(bytes) })
    put($("time", row), { text: whenText(started), datetime: new Date(started * 1000).toISOString() })
    put($("[data-act=download]", row), { href: growing ? null : fileOf(id), "aria-disabled": growing || null, title: growing ? "Ready when the run has ended" : "Download" })
    put($("[data-act=delete]", row), { hidden: growing })
    // Its picture is asked for when there is one, and again when the run has ended with a better one.
    const src = `/api/v1/recordings/${encodeURIComponent(id)}/thumb${growing ? "" : `?frames=${frames}`}`
    if (frames && $("img", row).getAttribute("src") !== src) put($("img", row), { hidden: false, src })
  }
}
