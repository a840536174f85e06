// One opened stream, or one recording, on the stage; its numbers beside it.

import { $, copyText, icon, make, setAttribute, setBar, setClass, setHidden, setIcon, setText } from "./dom.js"
import { bytesText, clockText, fpsText, msText, plural, sigmaText, spanText, whenText } from "./format.js"
import { badgeOf, isVideo, progressOf, stateOf, stepText } from "./states.js"

const WINDOW_MS = 5000
const SPANS = [
  ["Receive", "sent_us", "received_us"],
  ["Wait for a batch", "received_us", "started_us"],
  ["Decode", "started_us", "decoded_us"],
  ["Encode", "decoded_us", "encoded_us"],
  ["Send and draw", "encoded_us", "shown_us"],
]
const FACT_NAMES = { cfg: "Guidance", guidance_scale: "Guidance", cfg_scale: "Guidance", negative_prompt: "Negative" }
const FACTS_MAX = 24

const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)]

/** Latency by stage, over the pictures of the last five seconds. */
class Latency {
  constructor() {
    this.pictures = [] // {at_ms, stamps}
    this.seq = null
  }

  take({ seq, run, stamps }, shown_us) {
    const key = `${run} ${seq}`
    // The first picture, and one sent again for a late viewer, waited for a viewer and not for us.
    const counts = this.seq !== null && this.seq !== key && shown_us !== null && stamps
    this.seq = key
    if (counts) this.pictures.push({ at_ms: performance.now(), stamps: { ...stamps, shown_us } })
  }

  /** {rows: [[name, ms or null]], total_ms, p95_ms, differ}; null when nothing was measured. */
  summary() {
    const since = performance.now() - WINDOW_MS
    this.pictures = this.pictures.filter(({ at_ms }) => at_ms > since)
    if (!this.pictures.length) return null
    const spans = ([, from, to]) => this.pictures.filter(({ stamps }) => stamps[from] && stamps[to]).map(({ stamps }) => (stamps[to] - stamps[from]) / 1000)
    const totals = spans(["", "sent_us", "shown_us"]).sort((a, b) => a - b)
    let differ = totals.length > 0 && totals[0] < 0
    const rows = SPANS.map((span) => {
      const found = spans(span)
      if (!found.length) return [span[0], null]
      const ms = median(found)
      differ ||= ms < -1
      return [span[0], differ ? null : Math.max(0, ms)]
    })
    if (!totals.length) return { rows, total_ms: null, differ: false }
    return { rows, total_ms: median(totals), p95_ms: totals[Math.min(totals.length - 1, Math.floor(totals.length * 0.95))], differ }
  }
}

/** name, value pairs of the meta that a person may want to read; prompts are shown apart. */
function factsOf(meta) {
  const facts = []
  const sampler = [meta.sampler, meta.scheduler].filter(Boolean).join(", ")
  if (sampler) facts.push(["Sampler", sampler])
  const from = [meta.pid && `pid ${meta.pid}`, meta.host && (meta.pid ? `on ${meta.host}` : meta.host)].filter(Boolean).join(" ")
  for (const [key, value] of Object.entries(meta)) {
    if (["prompt", "sampler", "scheduler", "pid", "host"].includes(key) || value === null || value === "") continue
    const words = key.replaceAll("_", " ")
    facts.push([FACT_NAMES[key] ?? words[0].toUpperCase() + words.slice(1), typeof value === "object" ? JSON.stringify(value) : String(value)])
  }
  if (from) facts.push(["From", from])
  return facts.slice(0, FACTS_MAX)
}

const factList = (facts) => make("dl", { className: "facts" }, ...facts.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]))

function section(title, ...children) {
  return make("section", {}, make("h2", {}, title), ...children)
}

function promptSection(prompt) {
  const copy = make("button", { type: "button", title: "Copy the prompt", "aria-label": "Copy the prompt" }, icon("copy"))
  copy.onclick = () => copyText(prompt)
  const part = section("Prompt", make("p", { className: "prose", dir: "auto", textContent: prompt }))
  part.firstElementChild.append(copy)
  return part
}

function figure(name) {
  const [main, small] = [make("span"), make("small")]
  return { name: make("dt", { textContent: name }), main, small, root: make("div", {}, make("dt", { textContent: name }), make("dd", {}, main, small)) }
}

export class Stage {
  /** on: {canvas(canvas), open(name or null), act(kind, item)} */
  constructor(on) {
    this.on = on
    this.root = $("#view-stage")
    this.canvas = $("#stage-canvas")
    this.video = $("#stage-video")
    this.inspector = $(".inspector", this.root)
    this.item = null
    this.recording = null
    this.root.addEventListener("click", (event) => this.clicked(event))
    this.video.onerror = () => this.video.getAttribute("src") && this.note("This file cannot be played here. Download it instead.")
    on.canvas(this.canvas)
  }

  clicked(event) {
    const button = event.target.closest("[data-act]")
    if (!button || button.tagName === "A" || button.getAttribute("aria-disabled") === "true") return
    this.on.act(button.dataset.act, this.item ?? this.recording, event)
  }

  note(text) {
    setText($(".stage-note", this.root), text)
    setHidden($(".stage-note", this.root), !text)
  }

  // --- streams ---

  openStream(item, rendition) {
    this.close()
    this.item = item
    this.key = null
    this.latency = new Latency()
    this.last = null
    Object.assign(this.canvas.dataset, { stream: item.name, rendition, seq: "", pictures: "0" })
    this.canvas.setAttribute("aria-label", `Picture of ${item.name}`)
    this.heading(item.name, "Live", "#/")
    this.on.open(item.name)
    this.update()
  }

  /** A name that the daemon does not know (yet): a link may be older than the stream. */
  openUnknown(name) {
    this.close()
    this.heading(name, "Live", "#/")
    this.note(`No stream is called ${name} now. It shows up here when it starts.`)
    this.showActions({})
    setHidden($(".state", this.root), true)
    setHidden($(".under-stage", this.root), true)
    this.inspector.replaceChildren()
  }

  heading(name, back, href) {
    setText($("h1", this.root), name)
    setText($(".back span", this.root), back)
    $(".back", this.root).href = href
    setAttribute($(".back", this.root), "aria-label", `Back to ${back}`)
    setHidden($(".state", this.root), false)
  }

  showActions({ record, download, stop, remove, link }) {
    const of = (act) => $(`.actions [data-act=${act}]`, this.root)
    const shown = { record, download, stop, delete: remove, link }
    for (const [act, show] of Object.entries(shown)) setHidden(of(act), !show)
  }

  close() {
    if (this.item) this.on.open(null)
    this.item = this.recording = null
    this.note("")
    this.video.removeAttribute("src")
    this.video.load()
    setHidden(this.video, true)
    setHidden(this.canvas, false)
    setHidden($(".stage .badge", this.root), true)
    setHidden($(".stage .plate", this.root), true)
    setHidden($(".under-stage", this.root), false)
    this.root.dataset.look = ""
  }

  picture({ header, shown_us, pictures }) {
    if (header.stream !== this.item?.name) return
    this.last = header
    this.latency.take(header, shown_us)
    Object.assign(this.canvas.dataset, { rendition: header.rendition, seq: header.seq, pictures })
    this.tellNumbers()
  }

  /** The item with the numbers of the picture on the stage. */
  seen() {
    const { item, last } = this
    return { data: item.data, numbers: Object.create(item, { drawn: { value: last ?? item.drawn } }).numbers }
  }

  update() {
    const { item } = this
    if (!item) return
    const state = stateOf(item)
    this.root.dataset.look = state.look
    const line = $(".state", this.root)
    setClass(line, `state ${state.level ?? ""}`.trim())
    setHidden($(".dot", line), state.look !== "live" || Boolean(state.level))
    setIcon($("svg", line), state.icon)
    setText($("span", line), state.state)
    this.note(this.last || (item.drawn && !state.missing) ? "" : (state.note ?? ""))
    const badge = badgeOf(item)
    const mark = $(".stage .badge", this.root)
    setHidden(mark, !badge)
    if (badge) setHidden(mark.firstElementChild, !badge.dot)
    if (badge) setText(mark.lastElementChild, badge.text)
    this.tellPlate(item)
    this.tellActions(item)
    this.tellNumbers()
    this.inspect(item)
  }

  tellPlate(item) {
    const plate = $(".stage .plate", this.root)
    setHidden(plate, !item.stopping)
    if (!item.stopping) return
    setText(plate.firstElementChild, "Stopping…")
    setHidden(plate.lastElementChild, !item.stop_held)
  }

  tellActions(item) {
    this.showActions({ record: !item.ended, stop: !item.ended, link: true })
    const record = $(".actions [data-act=record]", this.root)
    const stop = $(".actions [data-act=stop]", this.root)
    const recording = item.data.record === "all"
    setAttribute(record, "aria-pressed", recording)
    setAttribute(record, "aria-busy", item.record_busy || null)
    setText($("span", record), recording ? "Recording" : "Record")
    setAttribute(record, "title", recording ? "End the recording (R)" : "Record from here on (R)")
    setAttribute(stop, "aria-disabled", !item.data.stoppable || item.stopping || null)
    setAttribute(stop, "title", item.data.stoppable ? "Stop the sampler (X)" : "This sampler cannot be stopped from here")
  }

  tellNumbers() {
    const { item } = this
    const seen = this.seen()
    const state = stateOf(item)
    const progress = state.full ? 1 : progressOf(seen)
    setBar($(".under-stage .bar", this.root), { kind: state.bar, progress, text: stepText(seen) })
    setText($(".track [data-part=step]", this.root), stepText(seen))
    const { number, total, sigma } = seen.numbers
    const left_s = !item.ended && state.look !== "stalled" && total && number && item.data.fps > 0 ? (total - number) / item.data.fps : null
    setText($(".track [data-part=left]", this.root), left_s === null || left_s < 1 ? "" : `about ${left_s < 60 ? `${Math.ceil(left_s)} s` : spanText(left_s)} left`)
    if (!this.figures) return
    const { step, noise, rate, size } = this.figures
    setText(step.main, number === null ? "–" : `${number}`)
    setText(step.small, total ? `/ ${total}` : "")
    setText(noise.main, sigma === null ? "–" : sigmaText(sigma))
    setText(rate.main, item.ended || !item.data.fps ? "–" : fpsText(item.data.fps))
    setText(rate.small, item.ended || !item.data.fps ? "" : "/s")
    setText(size.main, item.data.width ? `${item.data.width}` : "–")
    setText(size.small, item.data.height ? `× ${item.data.height}` : "")
  }

  /** The parts of the inspector that change seldom are built when they change; the latency is written in place. */
  inspect(item) {
    const { data } = item
    const key = JSON.stringify([data.run, data.meta, data.note, data.end_text, data.decoder, data.files, data.viewers, data.latent_format, item.ended])
    if (key !== this.key) {
      this.key = key
      this.build(item)
    }
    this.tellLatency()
  }

  build(item) {
    const { data } = item
    this.figures = { step: figure(isVideo(data) ? "Frame" : "Step"), noise: figure("Sigma"), rate: figure("Pictures"), size: figure("Size") }
    const parts = []
    if (data.end_text) parts.push(make("p", { className: "notice danger" }, icon("fail"), make("span", { textContent: data.end_text })))
    if (data.note) parts.push(make("p", { className: "notice" }, icon("warn"), make("span", { textContent: data.note })))
    parts.push(make("dl", { className: "figures" }, ...Object.values(this.figures).map(({ root }) => root)))
    this.table = this.buildLatency()
    parts.push(this.table.root)
    if (data.files.length) parts.push(section("Recording", make("div", { className: "files" }, ...data.files.map((id) => make("a", { href: `#/r/${id}` }, icon("play"), "Play what was recorded")))))
    if (data.meta.prompt) parts.push(promptSection(String(data.meta.prompt)))
    const facts = [...factsOf(data.meta), ["Latents", data.latent_format], ["Decoder", data.decoder ?? "–"], ["Watched by", plural(data.viewers, "page")]]
    parts.push(section("Run", factList(facts.filter(([, value]) => value))))
    this.inspector.replaceChildren(...parts)
    this.tellNumbers()
  }

  buildLatency() {
    const rows = SPANS.map(([name]) => ({ bar: make("i"), value: make("td"), row: make("tr", {}, make("th", { scope: "row", textContent: name })) }))
    for (const { row, value } of rows) row.append(value)
    const total = make("td")
    const foot = make("tr", {}, make("th", { scope: "row", textContent: "Sampler to screen" }), total)
    const bars = make("div", { className: "spans", "aria-hidden": "true" }, ...rows.map(({ bar }) => bar))
    const table = make("table", {}, make("tbody", {}, ...rows.map(({ row }) => row)), make("tfoot", {}, foot))
    return { rows, total, bars, root: section("Latency, last 5 s", bars, table) }
  }

  tellLatency() {
    const found = this.latency.summary()
    const { rows, total, bars } = this.table
    setHidden(bars, !found || found.differ)
    const slowest = found ? Math.max(...found.rows.map(([, ms]) => ms ?? 0)) : 0
    rows.forEach(({ bar, value, row }, index) => {
      const ms = found?.rows[index][1] ?? null
      const slow = ms !== null && ms === slowest && slowest > 0
      setClass(bar, slow ? "slow" : "")
      bar.style.flexGrow = ms ?? 0
      setClass(row, slow ? "slow" : "")
      setText(value, ms === null ? "–" : msText(ms))
    })
    const known = found && found.total_ms !== null
    setText(total, !known ? "–" : found.differ ? "clocks differ" : `${msText(found.total_ms)} · p95 ${msText(found.p95_ms)}`)
  }

  // --- recordings ---

  openRecording(recording) {
    this.close()
    this.recording = recording
    this.figures = null
    const { stream, id, name, meta } = recording
    this.heading(stream, "Recordings", "#/recordings")
    const playable = recording.state === "finished" || recording.state === "failed"
    this.showActions({ download: playable, remove: playable, link: true })
    Object.assign($(".actions [data-act=download]", this.root), { href: `/api/v1/recordings/${encodeURIComponent(id)}/file`, download: name })
    setHidden(this.canvas, true)
    setHidden($(".under-stage", this.root), true)
    setHidden(this.video, !playable)
    this.note(playable ? "" : "Still being recorded. It can be played when the run has ended.")
    if (playable) {
      this.video.src = `/api/v1/recordings/${encodeURIComponent(id)}/file?inline=1`
      this.video.setAttribute("aria-label", `Recording of ${stream}`)
      this.video.play().catch(() => {}) // where playing by itself is not allowed, there is a button
    }
    const line = $(".state", this.root)
    setClass(line, "state")
    setHidden($(".dot", line), true)
    setIcon($("svg", line), null)
    setText($("span", line), whenText(recording.started))
    this.inspectRecording(recording, meta ?? {})
  }

  inspectRecording(recording, meta) {
    const { frames, duration_s, width, height, bytes, error, gaps } = recording
    const values = [["Frames", `${frames}`, ""], ["Length", duration_s ? clockText(duration_s) : "–", ""], ["Size", width ? `${width}` : "–", height ? `× ${height}` : ""], ["File", bytesText(bytes), ""]]
    const figures = values.map(([name, main, small]) => {
      const part = figure(name)
      setText(part.main, main)
      setText(part.small, small)
      return part.root
    })
    const parts = []
    if (error) parts.push(make("p", { className: "notice danger" }, icon("fail"), make("span", { textContent: error })))
    parts.push(make("dl", { className: "figures" }, ...figures))
    if (meta.prompt) parts.push(promptSection(String(meta.prompt)))
    const missing = gaps?.length ? [["Missing", plural(gaps.length, "frame")]] : []
    parts.push(section("Run", factList([...factsOf(meta), ...missing, ["Started", new Date(recording.started * 1000).toLocaleString()], ["Name", recording.name]])))
    this.inspector.replaceChildren(...parts)
  }
}
