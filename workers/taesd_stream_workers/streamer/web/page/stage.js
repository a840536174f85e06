// One opened stream, or one recording, on the stage; its numbers beside it.

import { $, icon, make, put, stamp } from "./dom.js"
import { bytesText, clockText, fpsText, plural, sigmaText, spanText, whenText } from "./format.js"
import { factsOf, figures, Latency, latencySection, notice, pairs, promptSection, section } from "./inspector.js"
import { fileOf } from "./recordings.js"
import { Scrubber } from "./scrubber.js"
import { putBadge, putBar, putButtons, putSay, stateOf, stepText } from "./states.js"

const DRAG_PX = 12
const GRID_GAP_PX = 4 // as the daemon lays out a batch

export class Stage {
  item = null // the opened stream's Item, or
  recording = null // the opened recording, or
  run = null // the opened run that is no stream's any more
  last = null // header of the live picture on the stage
  row = null // of the film: the step that is shown instead
  film_part = 0 // of a batch whose pictures have a film each: which one

  /** on: {tell(message), act(kind, item or recording or {run, name}, how), moved(run, seq or null)} */
  constructor(on) {
    const part = (selector) => $(`#view-stage ${selector}`)
    const act = (kind) => part(`.actions [data-act=${kind}]`)
    Object.assign(this, { on, root: $("#view-stage"), canvas: $("#stage-canvas"), video: $("#stage-video") })
    this.parts = {
      title: part("h1"), back: part(".back"), state: part(".state"), dot: part(".state .dot"), note: part(".stage-note"), badge: part(".badge"),
      plate: part(".plate"), pill: part(".pill"), grid: part(".parts"), under: part(".under-stage"), bar: part(".bar"), step: part("[data-part=step]"), left: part("[data-part=left]"), inspector: part(".inspector"),
    }
    this.acts = { record: act("record"), modes: part(".modes"), keep: act("keep"), compare: act("compare"), stop: act("stop"), download: act("download"), delete: act("delete") }
    this.root.addEventListener("click", ({ target }) => {
      const button = target.closest("button[data-act]")
      if (button && !button.matches("[aria-disabled=true]")) on.act(button.dataset.act, this.item ?? this.recording ?? { run: this.run, name: this.parts.title.textContent })
    })
    this.acts.modes.lastElementChild.onchange = ({ target }) => on.act("record", this.item, target.value)
    this.video.onerror = () => {
      if (!this.recording) return
      put(this.video, { hidden: true })
      this.note("This file cannot be played here. Download it instead.")
    }
    const screen = "stage"
    on.tell({ do: "screen", screen, canvas: this.canvas })
    const scrubber = stamp("#scrubber")
    this.parts.under.prepend(scrubber)
    this.scrubber = new Scrubber(scrubber, {
      strip: (_, canvas) => on.tell({ do: "strip", screen, canvas }),
      cells: (_, cells) => on.tell({ do: "cells", screen, ...cells }),
      show: (rows, released) => this.replay(rows?.[0] ?? null, released),
      live: () => this.item?.ended === false,
    })
    this.parts.pill.lastElementChild.onclick = () => this.scrubber.follow()
    this.parts.grid.onclick = ({ target }) => target.matches("button") && this.choosePart([...this.parts.grid.children].indexOf(target))
    this.listenForDrags($(".stage", this.root))
  }

  /** A finger that moves sideways over the picture walks through the steps. */
  listenForDrags(stage) {
    let from = null
    stage.addEventListener("pointerdown", ({ pointerType, clientX }) => (from = pointerType === "touch" ? clientX : null))
    stage.addEventListener("pointermove", ({ clientX }) => {
      const steps = from === null ? 0 : Math.trunc((clientX - from) / DRAG_PX)
      if (!steps) return
      from += steps * DRAG_PX
      this.scrubber.step(steps)
    })
    for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, () => (from = null))
  }

  note(text) {
    put(this.parts.note, { text, hidden: !text })
  }

  /** On a small screen the stage has the shape of its picture. */
  shape(width, height) {
    this.root.style.setProperty("--aspect", width ? width / height : 1)
  }

  open(title, back, href) {
    this.close()
    put(this.parts.title, { text: title })
    put(this.parts.back, { href, "aria-label": `Back to ${back}` })
    put(this.parts.back.lastElementChild, { text: back })
    this.parts.inspector.scrollTop = 0
  }

  close() {
    if (this.item || this.run) this.on.tell({ do: "open", screen: "stage", stream: null })
    Object.assign(this, { item: null, recording: null, run: null, last: null, row: null, film_part: 0, sought: null, part: null, built_parts: "", figures: null })
    this.scrubber.open([])
    this.note("")
    put(this.video, { src: null, hidden: true })
    this.video.load()
    put(this.root, { "data-look": "" })
    for (const element of [this.canvas, this.parts.under]) put(element, { hidden: true })
    for (const element of [this.parts.state, this.parts.badge, this.parts.plate, this.parts.pill, this.parts.grid, ...Object.values(this.acts)]) put(element, { hidden: true })
  }

  // --- streams ---

  /** seq: of a step of its film to begin with, else null. */
  openStream(item, rendition, seq) {
    this.open(item.name, "Live", "#/")
    Object.assign(this, { item, latency: new Latency(), built: "", sought: seq })
    Object.assign(this.canvas.dataset, { stream: item.name, rendition, seq: "", pictures: "0" })
    put(this.canvas, { "aria-label": `Picture of ${item.name}` })
    this.on.tell({ do: "open", screen: "stage", stream: item.name })
    this.scrubber.open([item.data.run])
    put(this.acts.compare, { hidden: false })
    this.update()
  }

  /** A run that only its film remembers. */
  openRun(run, seq) {
    this.open("", "Live", "#/")
    Object.assign(this, { run, sought: seq })
    put(this.canvas, { "aria-label": `Picture of run ${run}` })
    this.parts.inspector.replaceChildren()
    this.scrubber.open([run])
    this.update()
  }

  // --- steps ---

  async refreshSteps() {
    const { scrubber, item } = this
    const lead = scrubber.lead
    if (!lead) return
    if (item && lead.run !== item.data.run) return this.turn(lead.run, scrubber.row?.seq ?? this.sought)
    const news = await scrubber.refresh(() => item)
    if (lead !== scrubber.lead) return
    if (this.run && !lead.busy && (news || !scrubber.ready)) this.tellRun(lead)
    if (scrubber.ready && this.sought !== null) this.seek()
  }

  /** The next run has begun: who looks at a step of the former (seq) stays with it, who looks at none sees the next. */
  turn(before, seq) {
    const { name, data } = this.item
    if (seq !== null) {
      this.openRun(before, seq)
      this.on.moved(before, seq)
      return this.on.act("next", name)
    }
    this.scrubber.open([data.run])
    if (this.row) this.show(null)
  }

  /** Go to the step that the address asks for, or the nearest. */
  seek() {
    const { lead } = this.scrubber
    const seq = this.sought
    this.sought = null
    const row = lead.nearest((one) => one.seq, seq)
    this.scrubber.go(row, false, false)
    if (row.seq !== seq) this.on.act("toast", `This step is no longer kept. Showing ${lead.number(row)}, the nearest.`)
  }

  /** row: of the film, null: what is live again. released: the hand is off. */
  replay(row, released) {
    const { lead } = this.scrubber
    const { item } = this
    if (this.run || item?.gone || (item?.ended && item.data.seq === null)) row ??= this.scrubber.end // no live picture will come
    if (row !== this.row) this.show(row)
    if (released) this.on.moved(lead.run, row?.seq ?? null)
    if (this.item) this.update()
    else if (this.run) this.tellStep()
  }

  show(row) {
    this.row = row
    const part = this.apart ? this.film_part + 1 : null
    this.on.tell({ do: "replay", screen: "stage", run: this.scrubber.lead.run, seq: row?.seq ?? null, part })
    this.tellParts()
  }

  stepped({ seq }) {
    put(this.canvas, { hidden: false })
    Object.assign(this.canvas.dataset, { rendition: "film", seq, pictures: Number(this.canvas.dataset.pictures ?? 0) + 1 })
  }

  tellPill() {
    const { item, row, scrubber } = this
    const away = row && row !== scrubber.end
    put(this.parts.pill, { hidden: !away })
    const which = this.apart ? `, picture ${this.film_part + 1} of ${this.apart}` : ""
    if (away) put(this.parts.pill.firstElementChild, { text: `${stepText(item, this.numbers)}${which}. ${item.ended ? "The last is" : "Live is at"} ${scrubber.lead.number(scrubber.end)}` })
  }

  get numbers() {
    const { row, scrubber, item } = this
    if (row) return { number: scrubber.lead.number(row), total: row.of, sigma: row.sigma }
    return item.numbers(this.last ?? item.drawn)
  }

  /** Seconds that the shown step took: from the one before it, else as the stream goes. */
  get step_s() {
    const { rows } = this.scrubber.lead ?? { rows: [] }
    const at = this.row?.at ?? -1
    if (at > 0) return (rows[at].ms - rows[at - 1].ms) / 1000 / Math.max(1, rows[at].seq - rows[at - 1].seq)
    return !this.row && this.item?.data.fps ? 1 / this.item.data.fps : null
  }

  // --- batches ---

  /** How many pictures a replayed step has in files of their own: they are shown one at a time; 0: it is one picture. */
  get apart() {
    const parts = this.scrubber.lead?.head?.parts ?? 1
    return this.row && parts > 1 ? parts : 0
  }

  /** Over each picture of a batch lies a button that shows it alone; over that one, a button back, or to the next. */
  tellParts() {
    const { grid } = this.parts
    const { apart } = this
    const { parts = 1, columns = 1, width, height } = apart ? { parts: apart } : this.last ?? {}
    const alone = apart > 0 || this.part !== null
    const shown = alone ? { count: 1, aspect: 0 } : { count: parts, aspect: width / height }
    put(grid, { hidden: parts < 2 })
    if (parts < 2) return
    const { clientWidth, clientHeight } = grid.parentElement
    const box = shown.aspect ? Math.min(clientWidth, clientHeight * shown.aspect) : clientWidth
    Object.assign(grid.style, { width: `${box}px`, height: `${shown.aspect ? box / shown.aspect : clientHeight}px`, gridTemplateColumns: `repeat(${alone ? 1 : columns}, 1fr)` })
    const built = `${alone} ${parts} ${apart && this.film_part}`
    if (this.built_parts === built) return
    this.built_parts = built
    const labels = apart ? [`Picture ${this.film_part + 1} of ${apart}. Show the next`] : alone ? [`Show all ${parts} pictures`] : Array.from({ length: parts }, (_, at) => `Show picture ${at + 1} of ${parts} alone`)
    const focused = [...grid.children].find((button) => button === document.activeElement) // it stays, and its focus with it
    for (const button of [...grid.children]) if (button !== focused) button.remove()
    labels.forEach((label, at) => put((at === 0 && focused) || grid.appendChild(make("button")), { "aria-label": label, title: label }))
  }

  choosePart(at) {
    if (this.apart) {
      this.film_part = (this.film_part + 1) % this.apart
      this.show(this.row)
      return this.item && this.tellPill()
    }
    const { parts, columns } = this.last
    this.part = this.part === null ? at : null
    const full_width = this.item.data.width * columns + GRID_GAP_PX * (columns - 1)
    const part = this.part === null ? null : { at, columns, rows: Math.ceil(parts / columns), full_width }
    this.on.tell({ do: "crop", screen: "stage", part })
    this.tellParts()
  }

  // --- a run that is no stream's ---

  tellRun(lead) {
    const { head } = lead
    if (!head) return this.note("This run is no longer kept.")
    const { stream, meta, started } = head
    put(this.parts.title, { text: stream ?? this.run })
    put(this.canvas, { "aria-label": `Picture of ${stream ?? this.run}` })
    putSay(this.parts.state, "state", {}, started ? whenText(started) : "")
    put(this.parts.state, { hidden: false })
    put(this.parts.dot, { hidden: true })
    put(this.acts.keep, { hidden: !head.film })
    put(this.acts.compare, { hidden: false })
    put(this.parts.under, { hidden: !this.scrubber.ready })
    put(this.parts.bar, { class: "bar none" })
    for (const part of [this.parts.step, this.parts.left]) put(part, { text: "" })
    this.figures = figures(["Step", "Sigma", "Step time", "Steps"])
    const parts = [this.figures.root, meta.prompt && promptSection(`${meta.prompt}`), section("Run", pairs("facts", factsOf(meta)))]
    this.parts.inspector.replaceChildren(...parts.filter(Boolean))
    this.tellStep()
  }

  tellStep() {
    const { numbers, step_s } = this
    if (!this.figures || !this.row) return
    this.figures.tell({
      Step: [numbers.number, numbers.total ? `/ ${numbers.total}` : ""],
      Sigma: [numbers.sigma === null ? "–" : sigmaText(numbers.sigma)],
      "Step time": [step_s === null ? "–" : spanText(step_s, 2)],
      Steps: [this.scrubber.lead.rows.length],
    })
  }

  /** A name that the daemon does not know (yet). */
  openUnknown(name) {
    this.open(name, "Live", "#/")
    this.note(`No stream is called ${name} now. It shows up here when it starts.`)
    this.parts.inspector.replaceChildren()
  }

  picture({ header, shown_us, pictures }) {
    if (header.stream !== this.item?.name) return
    this.last = header
    this.item.run_seen = header.run
    this.latency.take(header, shown_us)
    put(this.canvas, { hidden: false })
    Object.assign(this.canvas.dataset, { rendition: header.rendition, seq: header.seq, pictures })
    this.tellNumbers(stateOf(this.item))
  }

  update() {
    this.refreshSteps()
    this.scrubber.tell()
    const { item, parts, acts } = this
    if (!item) return
    const state = stateOf(item)
    const fine = state.look === "live" && !state.level
    put(this.root, { "data-look": state.look })
    putSay(parts.state, "state", state, state.state ?? state.left)
    put(parts.state, { hidden: false })
    put(parts.dot, { hidden: !fine })
    const seen = this.row ?? this.last ?? item.drawn
    put(this.canvas, { hidden: !seen })
    this.note(seen && !state.missing ? "" : (state.note ?? ""))
    putBadge(parts.badge, item)
    put(parts.plate, { hidden: !item.stopping })
    putButtons(acts.record, acts.stop, item)
    put(acts.modes, { hidden: item.ended })
    acts.modes.lastElementChild.value = item.data.record
    put(acts.keep, { hidden: !item.ended || item.data.film == null || item.data.files.length > 0 })
    put(acts.record.lastElementChild, { text: item.recording ? "Recording" : "Record" })
    this.tellParts()
    this.tellPill()
    this.inspect(item, state)
    this.tellNumbers(state)
    this.latencyPart.tell(this.latency.summary())
  }

  /** The numbers belong to the picture that is seen. */
  tellNumbers(state) {
    const { item, parts } = this
    const { width, height, fps } = item.data
    const { numbers, step_s } = this
    const { number, total, sigma } = numbers
    putBar(parts.bar, item, state, numbers)
    put(parts.step, { text: stepText(item, numbers) })
    const moving = !item.ended && fps > 0
    const at = item.numbers(this.last ?? item.drawn).number
    const left_s = moving && state.look === "live" && total && at ? Math.ceil((total - at) / fps) : 0
    put(parts.left, { text: left_s ? `about ${spanText(left_s, 0)} left` : "" })
    put(parts.under, { hidden: !total && !this.scrubber.ready }) // without an end there is no progress, and the number stands beside
    this.shape(width, height)
    this.figures.tell({
      [this.counted]: [number ?? "–", total ? `/ ${total}` : ""],
      ...(this.counted === "Step" && { Sigma: [sigma === null ? "–" : sigmaText(sigma)], "Step time": [step_s === null ? "–" : spanText(step_s, 2)] }),
      Pictures: moving ? [fpsText(fps), "/s"] : ["–"],
      Size: width ? [width, `× ${height}`] : ["–"],
    })
  }

  /** What changes seldom is built anew when it changes. */
  inspect({ data }, state) {
    const { run, kind, meta, note, end_text, decoder, decoder_reason, files, viewers, latent_format, daemon } = data
    const apart = note !== state.left ? note : null
    const built = JSON.stringify([run, kind, meta, apart, end_text, decoder, decoder_reason, files, viewers, latent_format, daemon])
    if (built === this.built) return
    this.counted = kind === "live" ? "Frame" : "Step"
    this.figures = figures(kind === "live" ? ["Frame", "Pictures", "Size"] : ["Step", "Sigma", "Step time", "Pictures", "Size"])
    this.latencyPart = latencySection()
    this.built = built
    const recorded = files.map((id, at) => make("a", { href: `#/r/${encodeURIComponent(id)}` }, icon("play"), files.length > 1 ? `Play recording ${at + 1}` : "Play the recording"))
    const chosen = decoder_reason ? [["Why this decoder", decoder_reason]] : []
    const facts = [...factsOf(meta, daemon), ["Latents", latent_format], ["Decoder", decoder || "–"], ...chosen, ["Watched by", plural(viewers ?? 0, "page")]]
    const parts = [
      end_text && notice("danger", end_text),
      apart && notice("warn", apart),
      this.figures.root,
      this.latencyPart.root,
      recorded.length && section("Recorded", make("div", { class: "files" }, ...recorded)),
      meta.prompt && promptSection(`${meta.prompt}`),
      section("Run", pairs("facts", facts)),
    ]
    this.parts.inspector.replaceChildren(...parts.filter(Boolean))
  }

  // --- recordings ---

  openRecording(recording) {
    const { id, stream, name, state, started, frames, duration_s, width, height, bytes, error, gaps } = recording
    const meta = recording.meta ?? {}
    this.shape(width, height)
    const playable = state === "finished" || state === "failed"
    this.open(stream, "Recordings", "#/recordings")
    this.recording = recording
    putSay(this.parts.state, "state", {}, whenText(started))
    put(this.parts.state, { hidden: false })
    put(this.parts.dot, { hidden: true })
    put(this.acts.download, { hidden: !playable, href: fileOf(id) })
    put(this.acts.delete, { hidden: !playable })
    if (playable) {
      put(this.video, { hidden: false, src: `${fileOf(id)}?inline=1`, "aria-label": `Recording of ${stream}` })
      this.video.play().catch(() => {}) // where a page may not play by itself, there is a button
    } else this.note("Still being recorded. It can be played when the run has ended.")
    const big = figures(["Frames", "Length", "Size", "File"])
    big.tell({ Frames: [frames], Length: [duration_s ? clockText(duration_s) : "–"], Size: width ? [width, `× ${height}`] : ["–"], File: [bytesText(bytes)] })
    const batch = recording.part ? [["Picture", `${recording.part} of ${recording.parts}`]] : []
    const missing = gaps?.length ? [["Missing", plural(gaps.length, "frame")]] : []
    const facts = [...batch, ...factsOf(meta, recording.daemon), ...missing, ["Started", new Date(started * 1000).toLocaleString()], ["Name", name]]
    const files = [make("a", { href: `#/s/${recording.run}/${recording.first_seq}` }, icon("play"), "Walk through the steps")]
    if (state === "failed") files.push(make("a", { href: `/api/v1/runs/${recording.run}/latents`, download: "" }, icon("down"), "Download the latents"))
    const parts = [error && notice("danger", error), big.root, section("Step by step", make("div", { class: "files" }, ...files)), meta.prompt && promptSection(`${meta.prompt}`), section("Run", pairs("facts", facts))]
    this.parts.inspector.replaceChildren(...parts.filter(Boolean))
  }
}
