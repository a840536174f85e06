// Parts of the inspector beside the stage: facts, big numbers, the prompt; and latency by stage, over the pictures of
// the last five seconds.

import { copyText, icon, make, put } from "./dom.js"
import { msText } from "./format.js"

const FACT_NAMES = { latent_format: "Latents", cfg: "Guidance", guidance_scale: "Guidance", cfg_scale: "Guidance", negative_prompt: "Negative" }
const TOLD_APART = ["prompt", "kind", "sampler", "scheduler", "pid", "host"]
const FACTS_MAX = 24
const WINDOW_MS = 5000
const SPANS = [
  ["Receive", "sent_us", "received_us"],
  ["Wait for a batch", "received_us", "started_us"],
  ["Decode", "started_us", "decoded_us"],
  ["Encode", "decoded_us", "encoded_us"],
  ["Send and draw", "encoded_us", "shown_us"],
]
const STAGES = SPANS.map(([name]) => name)

/** name, value pairs of the meta that a person may want to read; daemon: the page of another one that has the run. */
export function factsOf(meta, daemon = null) {
  const facts = [["Sampler", [meta.sampler, meta.scheduler].filter(Boolean).join(", ")]]
  for (const [key, value] of Object.entries(meta)) {
    if (TOLD_APART.includes(key)) continue
    const words = key.replaceAll("_", " ")
    const text = value !== null && typeof value === "object" ? JSON.stringify(value) : `${value ?? ""}`
    facts.push([FACT_NAMES[key] ?? words[0]?.toUpperCase() + words.slice(1), text])
  }
  facts.push(["From", [meta.pid && `pid ${meta.pid}`, meta.host && `on ${meta.host}`].filter(Boolean).join(" ")])
  const where = daemon ? [["Daemon", new URL(daemon).host]] : []
  return [...facts.filter(([, text]) => text).slice(0, FACTS_MAX), ...where]
}

export const section = (title, ...children) => make("section", {}, make("h2", { text: title }), ...children)
export const notice = (level, text) => make("p", { class: `notice ${level}` }, icon(level === "danger" ? "fail" : "warn"), make("span", { text }))
export const pairs = (name, list) => make("dl", { class: name }, ...list.flatMap(([term, text]) => [make("dt", { text: term }), make("dd", { text })]))

/** Four big numbers: {root, tell({name: [main, small]})}. */
export function figures(names) {
  const parts = Object.fromEntries(names.map((name) => [name, [make("span"), make("small")]]))
  const root = make("dl", { class: "figures" }, ...names.map((name) => make("div", {}, make("dt", { text: name }), make("dd", {}, ...parts[name]))))
  const tell = (values) => {
    for (const [name, texts] of Object.entries(values)) parts[name].forEach((part, index) => put(part, { text: texts[index] ?? "" }))
  }
  return { root, tell }
}

export function promptSection(prompt) {
  const copy = make("button", { title: "Copy the prompt", "aria-label": "Copy the prompt" }, icon("copy"))
  const part = section("Prompt", make("p", { class: "prose", dir: "auto", text: prompt }))
  copy.onclick = () => copyText(prompt)
  part.firstElementChild.append(copy)
  return part
}

// --- latency ---

const at = (sorted, share) => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))]

export class Latency {
  pictures = [] // {at_ms, stamps}
  last = null

  take({ run, seq, stamps }, shown_us) {
    // The first picture, and one sent again for a late viewer, waited for a viewer and not for us.
    const counts = this.last !== null && this.last !== `${run} ${seq}` && shown_us !== null && stamps
    this.last = `${run} ${seq}`
    if (counts) this.pictures.push({ at_ms: performance.now(), stamps: { ...stamps, shown_us } })
  }

  /** {stages_ms: [median or null, as STAGES], total_ms, p95_ms, differ: clocks of two hosts}, null: nothing measured. */
  summary() {
    const since_ms = performance.now() - WINDOW_MS
    this.pictures = this.pictures.filter(({ at_ms }) => at_ms > since_ms)
    if (!this.pictures.length) return null
    const sorted = (from, to) =>
      this.pictures
        .filter(({ stamps }) => stamps[from] && stamps[to])
        .map(({ stamps }) => (stamps[to] - stamps[from]) / 1000)
        .sort((a, b) => a - b)
    const stages = SPANS.map(([, from, to]) => at(sorted(from, to), 0.5) ?? null)
    const totals = sorted("sent_us", "shown_us")
    const differ = totals[0] < 0 || stages.some((ms) => ms < -1)
    const stages_ms = stages.map((ms) => (ms === null || ms < -1 ? null : Math.max(0, ms)))
    return { stages_ms, total_ms: at(totals, 0.5) ?? null, p95_ms: at(totals, 0.95) ?? null, differ }
  }
}

/** The table of stages, and one bar of them: {root, tell(summary)}. */
export function latencySection() {
  const bars = STAGES.map(() => make("i"))
  const cells = STAGES.map(() => make("td"))
  const rows = STAGES.map((text, index) => make("tr", {}, make("th", { scope: "row", text }), cells[index]))
  const total = make("td")
  const foot = make("tfoot", {}, make("tr", {}, make("th", { scope: "row", text: "Sampler to screen" }), total))
  const bar = make("div", { class: "spans", "aria-hidden": "true" }, ...bars)
  const root = section("Latency, last 5 s", bar, make("table", {}, make("tbody", {}, ...rows), foot))
  const tell = (found) => {
    const stages_ms = found?.stages_ms ?? STAGES.map(() => null)
    const slowest = Math.max(...stages_ms)
    put(bar, { hidden: !found || found.differ })
    stages_ms.forEach((ms, index) => {
      const name = ms > 0 && ms === slowest ? "slow" : ""
      put(bars[index], { class: name })
      bars[index].style.flexGrow = ms ?? 0
      put(rows[index], { class: name })
      put(cells[index], { text: ms === null ? "–" : msText(ms) })
    })
    const none = found?.total_ms == null ? "–" : found.differ ? "clocks differ" : null
    put(total, { text: none ?? `${msText(found.total_ms)} · p95 ${msText(found.p95_ms)}` })
  }
  return { root, tell }
}
