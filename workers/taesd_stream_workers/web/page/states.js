// What each state looks like and says: one table for tiles and for the opened stream.

import { agoText, clockText, fpsText, msText, sigmaText, spanText } from "./format.js"

const DEGRADED = ["Skipping 1 in 2", "Small pictures", "Decoding on CPU", "Colours approximate"]
const APPROXIMATE = /^(linear|nano)/

/** The one thing that is worse than usual about these pictures, the worst first. */
function degradedText({ note, decoder }) {
  if (note && (DEGRADED.includes(note) || /^Skipping 1 in \d+$/.test(note))) return note
  return APPROXIMATE.test(decoder ?? "") ? "Colours approximate" : "Small pictures"
}

function liveNumbers({ data, numbers }) {
  const parts = []
  if (numbers.sigma !== null) parts.push(`σ ${sigmaText(numbers.sigma)}`)
  if (data.fps !== null && data.fps !== undefined) parts.push(`${fpsText(data.fps)} fps`)
  return parts.join(" · ")
}

const msOf = ({ latency_ms }) => (latency_ms === null || latency_ms === undefined ? "" : msText(latency_ms))

/**
 * Of an Item: `look` (its data-look), `state` (a word for the opened stream), `bar` (its class), `level` and `icon` of
 * what line 2 says (`left`), `right` (its small end; `ms`: it is a latency), `note` (in place of a picture).
 */
export function stateOf(item, now_s = Date.now() / 1000) {
  const { data, numbers } = item
  const right = { right: msOf(data), ms: true }
  const ago = data.ended ? agoText(now_s - data.ended) : ""
  if (item.stopping) return { look: "stopping", state: "Stopping…", bar: "still", left: "", right: "" }
  switch (data.state) {
    case "waiting": {
      const missing = data.note?.startsWith("No ") ? data.note : null
      const age = clockText(now_s - data.started)
      return { look: "waiting", state: "Waiting", bar: "none", left: "No step yet", right: age, note: missing ?? "Waiting for the first step", missing }
    }
    case "done": {
      const span = data.ended && data.started ? ` in ${spanText(data.ended - data.started)}` : ""
      return { look: "done", state: `Done${span}`, bar: "still", full: true, left: `Done${span}`, right: ago }
    }
    case "stopped": return { look: "stopped", state: "Stopped by you", bar: "still", left: "Stopped by you", right: ago }
    case "failed": {
      const at = numbers.number === null ? "Sampler failed" : `Sampler failed at ${numbers.number}`
      return { look: "failed", state: at, bar: "danger", level: "danger", icon: "fail", left: at, right: ago }
    }
    case "lost": return { look: "gone", state: "Sampler left", bar: "danger", level: "danger", icon: "fail", left: "Sampler left", right: ago }
  }
  if (data.note?.startsWith("No ")) {
    return { look: "live", state: data.note, bar: "warn", level: "warn", icon: "warn", left: data.note, note: item.drawn ? "" : data.note, missing: data.note, ...right }
  }
  if (data.flags.includes("stalled")) {
    const since_s = (performance.now() - item.moved_ms) / 1000
    const left = `No step for ${spanText(Math.floor(since_s)).replace(".0 s", " s")}`
    return { look: "stalled", state: left, bar: "warn", level: "warn", icon: "clock", left, ...right }
  }
  if (data.flags.includes("degraded")) {
    const left = degradedText(data)
    return { look: "live", state: left, bar: "warn", level: "warn", icon: "warn", left, ...right }
  }
  return { look: "live", state: "Live", bar: "", left: liveNumbers(item), ...right }
}

/** How far it is, 0 to 1, or null where nobody knows. */
export function progressOf({ numbers: { number, total } }) {
  return number === null || !total ? null : Math.min(1, number / total)
}

export const isVideo = (data) => data.kind === "live"

/** "Step 17 of 28", "Frame 112". */
export function stepText({ data, numbers: { number, total } }) {
  if (number === null) return ""
  return `${isVideo(data) ? "Frame" : "Step"} ${number}${total ? ` of ${total}` : ""}`
}

export function badgeOf({ data, ended }) {
  if (!ended && data.record === "all") return { text: "REC", dot: true }
  if (!ended && data.record === "last") return { text: "Keeps last", dot: false }
  return data.files.length ? { text: "Kept", dot: false } : null
}

/** Everything about a stream in one sentence, for a screen reader. */
export function spokenState(item) {
  const { data, numbers } = item
  const state = stateOf(item)
  const parts = [item.name, state.look === "live" && !state.level ? "live" : state.state, stepText(item)]
  if (numbers.sigma !== null && !item.ended) parts.push(`sigma ${sigmaText(numbers.sigma)}`)
  if (data.fps && !item.ended) parts.push(`${fpsText(data.fps)} frames a second`)
  if (badgeOf(item)?.dot) parts.push("recording")
  return parts.filter(Boolean).join(", ")
}
