// Single keys. Everything that a key does has a button too.

import { $ } from "./dom.js"

const ONCE = ["r", "x"] // a held key is one press

/** do: what each key calls; `subject()` is the stream that a letter acts on, or null. */
export function listenToKeys(on) {
  const anywhere = {
    "?": on.help,
    1: () => on.go("#/"),
    2: () => on.go("#/recordings"),
    "/": on.filter,
    p: on.pause,
    f: on.fullscreen,
    z: on.undo,
    Escape: on.back,
  }
  const of_stream = {
    r: (item, event) => on.act("record", item, event.shiftKey ? "last" : undefined),
    x: (item, event) => on.act("stop", item, event.shiftKey),
    c: (item) => on.act("compare", item),
    s: (item) => on.act("say", item),
  }
  const by = (event) => (event.shiftKey ? 5 : 1)
  const walk = {
    ArrowLeft: (_, event) => on.walk("step", -by(event)),
    ArrowRight: (_, event) => on.walk("step", by(event)),
    Home: () => on.walk("first"),
    End: () => on.walk("follow"),
    l: () => on.walk("follow"),
    " ": () => on.walk("play"),
    y: () => on.act("link"),
  }
  const opened = { ...walk, "[": () => on.neighbour(-1), "]": () => on.neighbour(1) }

  document.addEventListener("keydown", (event) => {
    const { target, key } = event
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("#help").open) return
    if (key === " " && target.matches("button, a")) return
    if (target.matches("input:not([type=range]), textarea, select, video")) {
      if (key === "Escape" && target.id === "filter") leaveFilter(target)
      return
    }
    if (target.dataset.part === "wipe" && key.length > 2 && key !== "Escape") return
    const single = key.length === 1 ? key.toLowerCase() : key
    if (key.length === 1 && !$("#keys-on").checked) return
    if (event.repeat && ONCE.includes(single)) return
    if (on.move(key)) return event.preventDefault()
    const item = on.subject()
    const run = anywhere[single] ?? (item && of_stream[single]) ?? (on.stage() && opened[single])
    if (!run) return
    event.preventDefault()
    run(item, event)
  })
}

function leaveFilter(field) {
  if (!field.value) return field.blur()
  field.value = ""
  field.oninput()
}
