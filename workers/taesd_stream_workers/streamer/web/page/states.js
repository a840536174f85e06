// What each state looks like and says: one table for tiles and for the opened stream.

import { put, putIcon } from "./dom.js"
import { agoText, clockText, fpsText, msText, sigmaText, spanText } from "./format.js"

const APPROXIMATE = /^(linear|nano)/

/** The one thing that is worse than usual about these pictures: the daemon's word, else what the decoder tells. */
function degradedText({ note, decoder }) {
  return note || (APPROXIMATE.test(decoder) ? "Colours approximate" : "Small pictures")
}

function liveNumbers(item) {
  const { number, sigma } = item.numbers()
  const { fps } = item.data
  if (number === null) return "New run"
  return [sigma !== null && `σ ${sigmaText(sigma)}`, fps != null && `${fpsText(fps)} fps`].filter(Boolean).join(" · ")
}

/**
 * Of an Item: `look` (its data-look), `bar` (its class; `full`), `level` and `icon` of what line 2 says (`left`),
 * `right` (its small end; `ms`: it is a latency), `note` (stands where the picture will be; `missing`: there is none to
 * come), `state` (a word for the opened stream, where `left` is numbers).
 */
export function stateOf(item, now_s = Date.now() / 1000) {
  const { data } = item
  const failed = { bar: "danger", level: "danger", icon: "fail" }
  const worse = { look: "live", bar: "warn", level: "warn", icon: "warn", ms: true }
  const right = data.ended ? agoText(now_s - data.ended) : data.latency_ms != null ? msText(data.latency_ms) : ""
  const missing = data.note?.startsWith("No ") ? data.note : null
  if (item.ahead) return { look: "live", bar: "", left: liveNumbers(item), right: "", state: "Live" }
  if (item.stopping) return { look: "stopping", bar: "still", left: "", right: "", state: "Stopping…" }
  switch (data.state) {
    case "waiting": {
      const note = data.note || "Waiting for the first step"
      return { look: "waiting", bar: "none", left: "No step yet", right: clockText(now_s - data.started), note, missing, state: "Waiting" }
    }
    case "done":
      return { look: "done", bar: "still", full: true, left: data.ended ? `Done in ${spanText(data.ended - data.started)}` : "Done", right }
    case "stopped":
      return { look: "stopped", bar: "still", left: "Stopped by you", right }
    case "failed": {
      const at = data.step ?? data.seq
      return { look: "failed", ...failed, left: at === null ? "Sampler failed" : `Sampler failed at ${at + 1}`, right }
    }
    case "lost":
      return { look: "gone", ...failed, left: "Sampler left", right }
  }
  if (missing) return { ...worse, left: missing.split(/[.:;]( |$)/)[0], right, note: missing, missing }
  if (data.flags.includes("stalled")) {
    const still_s = data.updated ? now_s - data.updated : (performance.now() - item.moved_ms) / 1000
    return { ...worse, look: "stalled", icon: "clock", left: `No step for ${spanText(still_s, 0)}`, right }
  }
  if (data.flags.includes("degraded")) return { ...worse, left: degradedText(data), right }
  return { look: "live", bar: "", left: liveNumbers(item), right, ms: true, state: "Live" }
}

/** "Step 17 of 28", "Frame 112". */
export function stepText({ data }, { number, total }) {
  if (number === null) return ""
  return `${data.kind === "live" ? "Frame" : "Step"} ${number}${total ? ` of ${total}` : ""}`
}

/** Everything about a stream in one sentence, for a screen reader. */
export function spokenState(item) {
  const state = stateOf(item)
  const numbers = item.numbers()
  const parts = [item.name, state.state ?? state.left, stepText(item, numbers)]
  if (!item.ended && numbers.sigma !== null) parts.push(`sigma ${sigmaText(numbers.sigma)}`)
  if (!item.ended && item.data.fps) parts.push(`${fpsText(item.data.fps)} frames a second`)
  if (item.recording) parts.push("recording")
  return parts.filter(Boolean).join(", ")
}

// --- what tiles and the opened stream write alike ---

export function putBadge(badge, { data, ended, recording }) {
  const text = recording ? "REC" : !ended && data.record === "last" ? "Keeps last" : data.files.length ? "Kept" : ""
  put(badge, { hidden: !text })
  put(badge.firstElementChild, { hidden: !recording })
  put(badge.lastElementChild, { text })
}

/** `.bar > i`: how far it is; hidden where nobody knows. */
export function putBar(bar, item, state, numbers) {
  const { number, total } = numbers
  const known = state.full || (number !== null && total)
  put(bar, { class: `bar ${known ? state.bar : "none"}`, "aria-valuetext": stepText(item, numbers) || null })
  put(bar, { "aria-valuemax": total, "aria-valuenow": total && number })
  if (known) bar.firstElementChild.style.transform = `scaleX(${state.full ? 1 : Math.min(1, number / total).toFixed(4)})`
}

/** An icon and words, coloured by how bad it is. */
export function putSay(say, name, { level, icon }, text) {
  put(say, { class: `${name} ${level ?? ""}` })
  putIcon(say.querySelector("svg"), icon)
  put(say.lastElementChild, { text, title: text.length > 24 ? text : null })
}

export function putButtons(record, stop, item) {
  const { ended, recording, record_busy, stopping } = item
  const { stoppable } = item.data
  put(record, { hidden: ended, "aria-pressed": recording, "aria-busy": record_busy || null, title: recording ? "End the recording (R)" : "Record (R)" })
  put(stop, { hidden: ended, "aria-disabled": !stoppable || stopping || null, title: stoppable ? "Stop the sampler (X)" : "This sampler cannot be stopped from here" })
}
