// Small helpers. Text goes in by textContent alone: names and prompts are other people's words.

export const $ = (selector, root = document) => root.querySelector(selector)
export const $$ = (selector, root = document) => root.querySelectorAll(selector)

/** An element with properties, attributes (when the name has a dash, or is role) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") element.setAttribute(key, value)
    else element[key] = value
  }
  element.append(...children)
  return element
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  svg.setAttribute("aria-hidden", "true")
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"))
  setIcon(svg, name)
  return svg
}

export function setIcon(svg, name) {
  setHidden(svg, !name)
  if (name) setAttribute(svg.firstElementChild, "href", `#i-${name}`)
}

// Writers that touch the page only when something changed: text is looked at four times a second.
const texts = new WeakMap()
export function setText(element, text) {
  if (texts.get(element) === text) return
  texts.set(element, text)
  element.textContent = text
}

export function setAttribute(element, name, value) {
  if (value === null) element.removeAttribute(name)
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value)
}

/** By attribute: SVG elements have no `hidden` property. */
export function setHidden(element, hidden) {
  if (element.hasAttribute("hidden") !== Boolean(hidden)) element.toggleAttribute("hidden", Boolean(hidden))
}

export function setClass(element, name) {
  if (element.className !== name) element.className = name
}

/** A progress bar of `.bar > i`. */
export function setBar(bar, { kind, progress, text }) {
  setClass(bar, `bar ${progress === null ? "none" : kind}`.trim())
  if (progress === null) return
  const scale = `scaleX(${progress.toFixed(4)})`
  if (bar.firstElementChild.style.transform !== scale) bar.firstElementChild.style.transform = scale
  setAttribute(bar, "aria-valuetext", text)
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    // Plain http beyond this machine has no clipboard.
  }
  const field = make("textarea", { value: text, className: "unseen" })
  const focused = document.activeElement
  document.body.append(field)
  field.select()
  const done = document.execCommand("copy")
  field.remove()
  focused?.focus?.()
  return done
}

export function stored(key, fallback) {
  try {
    return localStorage.getItem(key) ?? fallback
  } catch {
    return fallback
  }
}

export function store(key, value) {
  try {
    localStorage.setItem(key, value)
  } catch {
    // Storage is off: the choice holds until the page is left.
  }
}
