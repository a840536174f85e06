// The list of recordings: what was kept, to play, to take away, to delete.

import { $, make, setAttribute, setClass, setHidden, setText } from "./dom.js"
import { bytesText, clockText, plural, whenText } from "./format.js"

const ENDS_EARLY = "Ends early: the daemon stopped while recording."

export class RecordingList {
  /** remove(recording): delete was pressed. */
  constructor(remove) {
    this.list = $("#recordings")
    this.rows = new Map()
    this.shown = []
    this.list.addEventListener("click", (event) => {
      const button = event.target.closest("[data-act=delete]")
      const recording = button && this.shown.find(({ id }) => id === button.closest("li").dataset.id)
      if (!recording) return
      const next = button.closest("li").nextElementSibling ?? button.closest("li").previousElementSibling
      remove(recording)
      ;($(".rec-open", next ?? this.list) ?? $("#view-recordings h1")).focus()
    })
  }

  /** recordings: those to show, in the daemon's order; the newest comes first here. */
  update(recordings) {
    this.shown = recordings.toSorted((a, b) => b.started - a.started)
    const ids = new Set(this.shown.map(({ id }) => id))
    for (const [id, row] of this.rows) {
      if (ids.has(id)) continue
      row.remove()
      this.rows.delete(id)
    }
    this.shown.forEach((recording, index) => {
      const row = this.rows.get(recording.id) ?? this.add(recording)
      if (this.list.children[index] !== row) this.list.insertBefore(row, this.list.children[index] ?? null)
      this.write(row, recording)
    })
    setHidden($("#no-recordings"), this.shown.length > 0)
    setHidden($("#view-recordings > h1"), !this.shown.length)
  }

  add({ id, stream, name }) {
    const row = $("#recording").content.firstElementChild.cloneNode(true)
    row.dataset.id = id
    const path = `/api/v1/recordings/${encodeURIComponent(id)}`
    $(".rec-open", row).href = `#/r/${id}`
    setText($("b", row), stream)
    Object.assign($("[data-act=download]", row), { download: name, title: "Download" })
    $("[data-act=download]", row).setAttribute("aria-label", `Download ${name}`)
    $("[data-act=delete]", row).setAttribute("aria-label", `Delete ${name}`)
    $("[data-act=delete]", row).title = "Delete"
    const image = $("img", row)
    image.onerror = () => setHidden(image, true)
    image.dataset.src = `${path}/thumb`
    this.rows.set(id, row)
    return row
  }

  write(row, recording) {
    const { id, state, frames, duration_s, bytes, started, meta, error } = recording
    const growing = state === "recording" || state === "finishing"
    setClass(row, growing ? "recording growing" : "recording")
    const failed = state === "failed"
    const line = $(".rec-name span", row)
    setClass(line, failed ? "danger" : "")
    setText(line, failed ? error || ENDS_EARLY : String(meta?.prompt ?? "").split("\n")[0])
    const length = $(".rec-length", row)
    const span_s = state === "recording" ? Date.now() / 1000 - started : duration_s
    const words = { recording: "Recording", finishing: "Finishing" }[state] ?? plural(frames, "frame")
    const text = span_s ? `${words}, ${clockText(span_s)}` : words
    if (state === "recording" && !$(".rec-dot", length)) length.replaceChildren(make("i", { className: "rec-dot" }), make("span"))
    if (state !== "recording" && !(length.children.length === 1)) length.replaceChildren(make("span"))
    setText(length.lastElementChild, text)
    setText($(".rec-size", row), bytesText(bytes))
    const time = $("time", row)
    setText(time, whenText(started))
    setAttribute(time, "datetime", new Date(started * 1000).toISOString())
    const download = $("[data-act=download]", row)
    setAttribute(download, "href", growing ? null : `/api/v1/recordings/${encodeURIComponent(id)}/file`)
    setAttribute(download, "aria-disabled", growing || null)
    setHidden($("[data-act=delete]", row), growing)
    const image = $("img", row)
    // The picture of a run is its last one: asked for when there is one, and again when the run has ended.
    const source = `${image.dataset.src}${growing ? "" : `?frames=${frames}`}`
    if (frames && image.getAttribute("src") !== source) {
      setHidden(image, false)
      image.src = source
    }
  }
}
