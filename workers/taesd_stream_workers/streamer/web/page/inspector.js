// Parts of the inspector beside the stage: facts, big numbers, the prompt, latency by stage.

import { copyText, icon, make, put } from "./dom.js"
import { msText } from "./format.js"
import { STAGES } from "./latency.js"

const FACT_NAMES = { latent_format: "Latents", cfg: "Guidance", guidance_scale: "Guidance", cfg_scale: "Guidance", negative_prompt: "Negative" }
const TOLD_APART = ["prompt", "kind", "sampler", "scheduler", "pid", "host"]
const FACTS_MAX = 24

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
