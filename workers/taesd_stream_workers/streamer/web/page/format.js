// Numbers and times as words. Fixed decimals, so that nothing jitters.

export const sigmaText = (sigma) => (sigma >= 100 ? sigma.toFixed(0) : sigma.toFixed(2))
export const fpsText = (fps) => fps.toFixed(1)
export const msText = (ms) => (ms < 9999.5 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(0)} s`)

/** A span on a clock face: 0:06, 12:40, 1:02:03. */
export function clockText(seconds) {
  const whole = Math.max(0, Math.floor(seconds))
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  return (h ? `${h}:${String(m).padStart(2, "0")}` : m) + ":" + String(s).padStart(2, "0")
}

/** A span in words: 14.2 s, 3 min 20 s, 2 h 5 min. */
export function spanText(seconds, digits = 1) {
  const left = Math.max(0, seconds)
  if (left < 60) return `${left.toFixed(digits)} s`
  if (left < 3600) return `${Math.floor(left / 60)} min ${Math.floor(left % 60)} s`
  return `${Math.floor(left / 3600)} h ${Math.floor((left % 3600) / 60)} min`
}

export function agoText(seconds) {
  const left = Math.max(0, seconds)
  if (left < 60) return `${Math.floor(left)} s ago`
  if (left < 3600) return `${Math.floor(left / 60)} min ago`
  if (left < 86400) return `${Math.floor(left / 3600)} h ago`
  return `${Math.floor(left / 86400)} d ago`
}

export function bytesText(bytes) {
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(0)} kB`
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`
}

// Made once: that takes long.
const [TIME, DAY, YEAR] = [{}, { month: "short", day: "numeric" }, { month: "short", day: "numeric", year: "numeric" }].map(
  (date) => new Intl.DateTimeFormat([], { ...date, hour: "numeric", minute: "2-digit" }),
)

/** When something was, in the reader's own language: 14:02, or Nov 23, 14:02. */
export function whenText(unix_s, now = new Date()) {
  const then = new Date(unix_s * 1000)
  if (then.toDateString() === now.toDateString()) return TIME.format(then)
  return (then.getFullYear() === now.getFullYear() ? DAY : YEAR).format(then)
}

export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`
