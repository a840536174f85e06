// Small helpers. Text goes in by textContent alone: names and prompts are other people's words.

export const $ = (selector, root = document) => root.querySelector(selector)
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)]

const written = new WeakMap()

/**
 * Write `text`, `class`, `hidden` or any attribute (null: none) of an element, and only what changed since the last
 * time: text is looked at four times a second, for every tile in sight.
 */
export function put(element, wants) {
  if (!written.has(element)) written.set(element, {})
  const had = written.get(element)
  for (const [key, value] of Object.entries(wants)) {
    if (had[key] === value) continue
    had[key] = value
    if (key === "text") element.textContent = value
    else if (key === "hidden") element.toggleAttribute(key, Boolean(value))
    else if (value === null || value === undefined) element.removeAttribute(key)
    else element.setAttribute(key, value)
  }
}

/** An element with what `put` takes, and children. */
export function make(tag, wants = {}, ...children) {
  const element = document.createElement(tag)
  put(element, wants)
  element.append(...children)
  return element
}

/** A copy of what a template holds. */
export const stamp = (id) => $(id).content.firstElementChild.cloneNode(true)

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg")
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"))
  svg.setAttribute("aria-hidden", "true")
  putIcon(svg, name)
  return svg
}

export function putIcon(svg, name) {
  put(svg, { hidden: !name })
  if (name) put(svg.firstElementChild, { href: `#i-${name}` })
}

export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text)
    return true
  } catch {
    // Plain http beyond this machine has no clipboard.
  }
  const field = make("textarea", { class: "unseen" })
  const focused = document.activeElement
  field.value = text
  document.body.append(field)
  field.select()
  const done = document.execCommand("copy")
  field.remove()
  focused?.focus()
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
