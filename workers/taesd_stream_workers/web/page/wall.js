// The wall of tiles: each stream has its place, which it keeps; only text, bars and pictures change.

import { $, $$, setAttribute, setBar, setClass, setHidden, setIcon, setText } from "./dom.js"
import { plural } from "./format.js"
import { SHOWS } from "./streams.js"
import { badgeOf, progressOf, stateOf, stepText } from "./states.js"

const GRACE_MS = 500 // a tile scrolled out of sight keeps its pictures this long
const HOLD_MS = 450
const ASPECTS = [16 / 9, 3 / 2, 1, 2 / 3, 9 / 16]
const FIT = { least_px: 128, most_px: 384, text_px: 52, gap_px: 20 }

class Tile {
  constructor(item, index) {
    this.item = item
    this.root = $("#tile").content.firstElementChild.cloneNode(true)
    this.article = $("article", this.root)
    this.canvas = $("canvas", this.root)
    this.name = $(".name", this.root)
    this.parts = {
      box: $(".box-note", this.root), badge: $(".badge", this.root), plate: $(".plate", this.root), bar: $(".bar", this.root),
      number: $(".step b", this.root), total: $(".step span", this.root), say: $(".say", this.root), undo: $(".undo", this.root),
      aside: $(".aside", this.root), record: $("[data-act=record]", this.root), stop: $("[data-act=stop]", this.root),
    }
    this.visible = false
    this.left_ms = -Infinity
    const { name } = item
    this.root.dataset.name = name
    Object.assign(this.canvas.dataset, { stream: name, rendition: "thumb", seq: "", pictures: "0" })
    this.canvas.setAttribute("aria-label", `Preview of ${name}`)
    Object.assign(this.name, { id: `tile-${index}`, href: `#/s/${name}`, textContent: name, title: name, tabIndex: -1 })
    this.article.setAttribute("aria-labelledby", this.name.id)
    this.parts.bar.setAttribute("aria-label", `Progress of ${name}`)
    this.parts.undo.setAttribute("aria-label", `Undo stopping ${name}`)
    this.parts.undo.dataset.act = "undo"
  }

  update() {
    const { item, parts, article } = this
    const state = stateOf(item)
    const { number, total } = item.numbers
    if (article.dataset.look !== state.look) article.dataset.look = state.look
    setText(parts.box, item.drawn && !state.missing ? "" : (state.note ?? ""))
    setHidden(parts.plate, state.look !== "stopping")
    const badge = badgeOf(item)
    setHidden(parts.badge, !badge)
    if (badge) setHidden(parts.badge.firstElementChild, !badge.dot)
    if (badge) setText(parts.badge.lastElementChild, badge.text)
    setBar(parts.bar, { kind: state.bar, progress: state.full ? 1 : progressOf(item), text: stepText(item) })
    setText(parts.number, number === null ? "" : `${number}`)
    setText(parts.total, number !== null && total ? `/${total}` : "")
    setClass(parts.say, `say ${state.level ?? ""}`.trim())
    setIcon(parts.say.firstElementChild, state.icon)
    setText(parts.say.lastElementChild, state.left)
    setAttribute(parts.say, "title", state.left.length > 24 ? state.left : null)
    setText(parts.aside, state.right)
    setClass(parts.aside, state.ms ? "aside ms" : "aside")
    setHidden(parts.undo, !item.stop_held)
    this.updateButtons()
  }

  updateButtons() {
    const { item, parts } = this
    const { record, stop } = parts
    const recording = item.data.record === "all"
    setHidden(record, item.ended)
    setHidden(stop, item.ended)
    setAttribute(record, "aria-pressed", recording)
    setAttribute(record, "aria-busy", item.record_busy || null)
    setAttribute(record, "aria-label", `Record ${item.name}`)
    setAttribute(record, "title", recording ? "End the recording (R)" : "Record (R)")
    const cannot = !item.data.stoppable
    setAttribute(stop, "aria-disabled", cannot || null)
    setAttribute(stop, "aria-label", cannot ? `Stop ${item.name}: this sampler cannot be stopped from here` : `Stop ${item.name}`)
    setAttribute(stop, "title", cannot ? "This sampler cannot be stopped from here" : "Stop the sampler (X)")
  }
}

export class Wall {
  /** on: {canvas(name, canvas), gone(name), watch(), act(kind, item, event)} */
  constructor(streams, on) {
    Object.assign(this, { streams, on, tiles: new Map(), made: 0, words: [], show: "all", current: null, unseen: new Set() })
    this.list = $("#wall")
    this.boxes = ""
    this.observer = new IntersectionObserver((entries) => this.crossed(entries), { rootMargin: "200px" })
    this.list.addEventListener("click", (event) => this.clicked(event))
    this.list.addEventListener("focusin", (event) => this.focused(event.target.closest("li")))
    this.list.addEventListener("focusout", () => requestAnimationFrame(() => this.tellFocus()))
    this.listenForHolds()
    $("#new-below").onclick = () => this.revealNew()
    addEventListener("resize", () => this.fit())
  }

  // --- what is there ---

  /** Streams came or went, or the filter changed. */
  update() {
    for (const [name, tile] of this.tiles) if (!this.streams.items.has(name)) this.remove(name, tile)
    const first = !this.tiles.size
    for (const item of this.streams.items.values()) if (!this.tiles.has(item.name)) this.add(item, first)
    for (const tile of this.tiles.values()) setHidden(tile.root, !this.passes(tile.item))
    if (!this.tiles.has(this.current)) this.setCurrent(this.tiles.keys().next().value ?? null)
    this.chooseBox()
    this.fit()
    this.refresh(true)
    this.tellNew()
  }

  passes(item) {
    return SHOWS[this.show](item) && item.matches(this.words)
  }

  add(item, first) {
    const tile = new Tile(item, this.made++)
    this.tiles.set(item.name, tile)
    this.list.append(tile.root)
    this.observer.observe(tile.root)
    this.on.canvas(item.name, tile.canvas)
    if (!first) this.unseen.add(item.name)
  }

  remove(name, tile) {
    const had_focus = tile.root.contains(document.activeElement)
    const next = tile.root.nextElementSibling ?? tile.root.previousElementSibling
    this.observer.unobserve(tile.root)
    this.tiles.delete(name)
    this.unseen.delete(name)
    tile.root.remove()
    this.on.gone(name)
    if (this.current === name) this.setCurrent(next?.dataset.name ?? null)
    if (had_focus) this.focus(this.current)
  }

  /** Text, bars and buttons; only of tiles in sight unless `all`. */
  refresh(all = false) {
    for (const tile of this.tiles.values()) if (all || tile.visible) tile.update()
    this.tellFocus()
  }

  /** News of pictures that the worker drew. */
  drawn({ stream, seq, pictures, ...rest }) {
    const tile = this.tiles.get(stream)
    if (!tile) return
    tile.canvas.dataset.seq = seq
    tile.canvas.dataset.pictures = pictures
    tile.item.drawn = { seq, ...rest }
  }

  /** What the wall wants to see now: {name: "thumb"}. */
  wanted() {
    const now = performance.now()
    const wanted = {}
    for (const [name, tile] of this.tiles) if (tile.visible || now - tile.left_ms < GRACE_MS) wanted[name] = "thumb"
    return wanted
  }

  crossed(entries) {
    for (const { target, isIntersecting } of entries) {
      const tile = this.tiles.get(target.dataset.name)
      if (!tile) continue
      if (tile.visible && !isIntersecting) {
        tile.left_ms = performance.now()
        setTimeout(() => this.on.watch(), GRACE_MS + 10)
      }
      tile.visible = isIntersecting
      if (isIntersecting) {
        this.unseen.delete(tile.item.name)
        tile.update()
      }
    }
    this.on.watch()
    this.tellNew()
  }

  // --- layout ---

  /** One shape of box for all, if most streams share it; never while somebody points at the wall. */
  chooseBox() {
    const items = [...this.streams.items.values()].filter(({ data }) => data.width && data.height)
    const boxes = items.map(({ data }) => `${data.name} ${data.width}x${data.height}`).join()
    if (boxes === this.boxes || this.list.matches(":hover, :focus-within")) return
    this.boxes = boxes
    const near = ({ data }) => ASPECTS.findIndex((aspect) => Math.abs(Math.log(data.width / data.height / aspect)) < 0.06)
    const counts = ASPECTS.map((_, index) => items.filter((item) => near(item) === index).length)
    const best = counts.indexOf(Math.max(...counts))
    const aspect = items.length && counts[best] > (items.length * 2) / 3 ? ASPECTS[best] : 1
    this.list.style.setProperty("--box", aspect.toFixed(4))
    this.aspect = aspect
  }

  /** In the fullscreen wall: the largest tiles for which all are in sight. */
  fit() {
    const kiosk = document.body.classList.contains("kiosk")
    if (!kiosk) return void this.list.style.removeProperty("--tile")
    const count = [...this.tiles.values()].filter((tile) => !tile.root.hidden).length
    const [width, height] = [innerWidth - 48, innerHeight - 32]
    let tile_px = FIT.least_px
    for (let size = FIT.most_px; size >= FIT.least_px; size -= 4) {
      const columns = Math.max(1, Math.floor((width + 12) / (size + 12)))
      const row = (width - 12 * (columns - 1)) / columns / (this.aspect ?? 1) + FIT.text_px + FIT.gap_px
      if (Math.ceil(count / columns) * row - FIT.gap_px > height) continue
      tile_px = size
      break
    }
    this.list.style.setProperty("--tile", `${tile_px}px`)
  }

  tellNew() {
    const below = [...this.unseen].filter((name) => !this.tiles.get(name).root.hidden)
    const button = $("#new-below")
    setHidden(button, !below.length)
    if (below.length) setText(button, `${below.length} new below`)
  }

  revealNew() {
    const [name] = this.unseen
    this.tiles.get(name)?.root.scrollIntoView({ block: "center", behavior: "instant" })
    this.focus(name)
  }

  // --- pointer ---

  clicked(event) {
    const tile = this.tiles.get(event.target.closest("li")?.dataset.name)
    const button = event.target.closest("[data-act]")
    if (!tile || !button) return
    event.preventDefault()
    if (button.getAttribute("aria-disabled") !== "true") this.on.act(button.dataset.act, tile.item, event)
  }

  /** Fingers have no hover: holding a tile shows its buttons, a tap elsewhere hides them. */
  listenForHolds() {
    let timer = 0
    let swallow = false
    const held = () => $(".tile.held", this.list)
    this.list.addEventListener("pointerdown", (event) => {
      swallow = false
      if (event.pointerType === "mouse") return
      const article = event.target.closest(".tile")
      timer = setTimeout(() => {
        swallow = true
        held()?.classList.remove("held")
        article?.classList.add("held")
      }, HOLD_MS)
    })
    for (const kind of ["pointerup", "pointercancel", "pointermove"]) {
      this.list.addEventListener(kind, (event) => (kind !== "pointermove" || Math.hypot(event.movementX, event.movementY) > 4) && clearTimeout(timer))
    }
    this.list.addEventListener("contextmenu", (event) => matchMedia("(pointer: coarse)").matches && event.preventDefault())
    document.addEventListener("click", (event) => {
      if (swallow) {
        swallow = false
        event.preventDefault()
        event.stopPropagation()
      } else if (!event.target.closest(".held")) held()?.classList.remove("held")
    }, true)
  }

  // --- keyboard ---

  /** The stream whose tile has the focus (or its buttons), or null. */
  get focusedItem() {
    const name = document.activeElement?.closest?.("#wall li")?.dataset.name
    return this.tiles.get(name)?.item ?? null
  }

  focused(root) {
    if (root) this.setCurrent(root.dataset.name)
    this.tellFocus()
  }

  /** One tab stop for the whole wall: the current tile, then its buttons. */
  setCurrent(name) {
    for (const tile of [this.tiles.get(this.current), this.tiles.get(name)]) {
      if (!tile) continue
      const index = tile.item.name === name ? 0 : -1
      tile.name.tabIndex = tile.parts.record.tabIndex = tile.parts.stop.tabIndex = tile.parts.undo.tabIndex = index
    }
    this.current = name
  }

  /** The info bar tells what a tile has no room for. */
  tellFocus() {
    const item = this.focusedItem
    const bar = $("#info")
    const show = item && (document.activeElement.matches(":focus-visible") || !bar.hidden)
    setHidden(bar, !show)
    if (!show) return
    const { meta, width, height } = item.data
    const size = width && height ? `${width} × ${height}` : ""
    setText($("b", bar), item.name)
    setText($("span", bar), [meta.prompt, meta.seed !== undefined && `seed ${meta.seed}`, meta.sampler, size].filter(Boolean).join(" · "))
  }

  focus(name) {
    const tile = this.tiles.get(name)
    if (tile && !tile.root.hidden) tile.name.focus()
    else $("#view-wall h1").focus()
  }

  /** Arrows go where they point, over rows of any length. Returns whether the key was one of ours. */
  move(key) {
    const shown = [...this.tiles.values()].filter((tile) => !tile.root.hidden)
    const at = shown.findIndex((tile) => tile.item.name === this.current)
    if (!shown.length) return false
    const columns = this.columns(shown)
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }
    const last = shown.length - 1
    let to = key === "Home" ? 0 : key === "End" ? last : at + (steps[key] ?? NaN)
    if (Number.isNaN(to)) return false
    if (!this.focusedItem) to = Math.max(at, 0)
    else if (to > last && key === "ArrowDown" && Math.floor(at / columns) < Math.floor(last / columns)) to = last
    else if (to < 0 || to > last) return true
    this.focus(shown[to].item.name)
    return true
  }

  columns(shown) {
    const top = shown[0].root.offsetTop
    const next = shown.findIndex((tile) => tile.root.offsetTop > top)
    return next < 0 ? shown.length : next
  }
}

/** The toolbar: which streams, which words, which size. */
export function listenToTools(wall, { changed, resized }) {
  for (const button of $$("#tools [data-show]")) {
    button.onclick = () => {
      wall.show = button.dataset.show
      changed()
    }
  }
  for (const button of $$("#tools [data-size]")) button.onclick = () => resized(button.dataset.size)
  const filter = $("#filter")
  filter.oninput = () => {
    wall.words = filter.value.toLowerCase().split(/\s+/).filter(Boolean)
    changed()
  }
  $("#no-match button").onclick = () => {
    filter.value = ""
    wall.show = "all"
    filter.oninput()
    filter.focus()
  }
  $("#more").onclick = () => {
    const open = $("#tools").classList.toggle("more")
    $("#more").setAttribute("aria-expanded", open)
    if (open) filter.focus()
  }
}

export function tellTools(wall, streams) {
  const counts = Object.fromEntries(Object.entries(SHOWS).map(([show, test]) => [show, streams.count(test)]))
  for (const button of $$("#tools [data-show]")) {
    setAttribute(button, "aria-pressed", wall.show === button.dataset.show)
    setText($(".count", button), `${counts[button.dataset.show]}`)
  }
  setHidden($("#clear-ended"), !counts.ended)
  const matching = streams.count((item) => wall.passes(item))
  const typed = $("#filter").value.trim()
  setHidden($("#no-match"), matching > 0 || !streams.items.size)
  const none = { live: "No stream is live.", kept: "Nothing is kept yet.", ended: "No stream has ended." }[wall.show]
  setText($("#no-match span"), typed ? `Nothing matches "${typed}".` : (none ?? ""))
  setText($("#no-match button"), typed ? "Clear filter" : "Show all")
  return plural(matching, "stream")
}
