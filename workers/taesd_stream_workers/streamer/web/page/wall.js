// The wall of tiles: each stream has its place, which it keeps; only text, bars and pictures change.

import { $, put, stamp } from "./dom.js"
import { putBadge, putBar, putButtons, putSay, stateOf } from "./states.js"
import { SHOWS } from "./streams.js"

const GRACE_MS = 500 // a tile scrolled out of sight keeps its pictures this long
const HOLD_MS = 450
const GUESSED = 12 // tiles that are in sight on most screens, before the browser has said which are
const ASPECTS = [16 / 9, 3 / 2, 1, 2 / 3, 9 / 16]
const FIT = { least_px: 128, most_px: 384, below_px: 72, gap_px: 12, side_px: 24 }

class Tile {
  constructor(item, index) {
    const { name } = item
    const root = stamp("#tile")
    const part = (selector) => $(selector, root)
    Object.assign(this, { item, root, article: part("article"), canvas: part("canvas"), link: part(".name"), visible: false, guessed: false, left_ms: -Infinity })
    this.parts = {
      first: part("img"), note: part(".box-note"), badge: part(".badge"), plate: part(".plate"), bar: part(".bar"), number: part(".step b"), total: part(".step span"),
      say: part(".say"), undo: part(".undo"), aside: part(".aside"), record: part("[data-act=record]"), stop: part("[data-act=stop]"),
    }
    root.dataset.name = name
    Object.assign(this.canvas.dataset, { stream: name, rendition: "thumb", seq: "", pictures: "0" })
    put(this.canvas, { "aria-label": `Preview of ${name}` })
    put(this.link, { id: `tile-${index}`, href: `#/s/${name}`, text: name, title: name })
    put(this.article, { "aria-labelledby": this.link.id })
    put(this.parts.bar, { "aria-label": `Progress of ${name}` })
    put(this.parts.record, { "aria-label": `Record ${name}` })
    put(this.parts.undo, { "aria-label": `Undo stopping ${name}` })
    this.focusable(false)
  }

  focusable(on) {
    const { record, stop, undo } = this.parts
    for (const element of [this.link, record, stop, undo]) element.tabIndex = on ? 0 : -1
  }

  update() {
    const { item, parts } = this
    const state = stateOf(item)
    const numbers = item.numbers()
    put(this.article, { "data-look": state.look })
    // The first picture is an ordinary image too: a screenshot tool waits for those, not for sockets nor for frames.
    if ((this.visible || this.guessed) && !item.drawn && item.data.seq !== null && !state.missing) {
      put(parts.first, { src: `/streams/${item.name}/latest.jpg?rendition=thumb` })
    }
    put(parts.note, { text: item.drawn && !state.missing ? "" : (state.note ?? "") })
    put(parts.plate, { hidden: state.look !== "stopping" })
    putBadge(parts.badge, item)
    putBar(parts.bar, item, state, numbers)
    put(parts.number, { text: numbers.number ?? "" })
    put(parts.total, { text: numbers.number && numbers.total ? `/${numbers.total}` : "" })
    putSay(parts.say, "say", state, state.left)
    put(parts.aside, { text: state.right, class: state.ms ? "aside ms" : "aside" })
    put(parts.undo, { hidden: !item.stop_held })
    putButtons(parts.record, parts.stop, item)
    put(parts.stop, { "aria-label": `Stop ${item.name}${item.data.stoppable ? "" : ": this sampler cannot be stopped from here"}` })
  }
}

export class Wall {
  show = "all" // a key of SHOWS
  words = [] // of the filter, in lower case
  current = null // the name whose tile is the wall's one tab stop
  tiles = new Map() // name -> Tile
  unseen = new Set() // new ones that were not in sight yet
  made = 0
  shape = { streams: "", aspect: 1 }

  /** on: {canvas(name, canvas), gone(name), watch(), act(kind, item)} */
  constructor(streams, on) {
    Object.assign(this, { streams, on, list: $("#wall") })
    this.observer = new IntersectionObserver((entries) => this.crossed(entries), { rootMargin: "200px" })
    this.list.addEventListener("click", (event) => this.clicked(event))
    this.list.addEventListener("focusin", ({ target }) => this.setCurrent(target.closest("li").dataset.name))
    for (const kind of ["focusin", "focusout"]) this.list.addEventListener(kind, () => setTimeout(() => this.tellFocus()))
    this.listenForHolds()
    $("#new-below").onclick = () => this.revealNew()
    addEventListener("resize", () => this.fit())
  }

  get shown() {
    return [...this.tiles.values()].filter((tile) => this.passes(tile.item))
  }

  passes(item) {
    return SHOWS[this.show](item) && item.matches(this.words)
  }

  // --- what is there ---

  /** Streams came or went, or the filter changed. */
  update() {
    const first = !this.tiles.size
    for (const [name, tile] of this.tiles) if (!this.streams.has(name)) this.remove(name, tile)
    for (const item of this.streams.values()) if (!this.tiles.has(item.name)) this.add(item, first)
    for (const tile of this.tiles.values()) put(tile.root, { hidden: !this.passes(tile.item) })
    const { shown } = this
    if (!shown.some((tile) => tile.item.name === this.current)) this.setCurrent(shown[0]?.item.name ?? null)
    this.chooseShape()
    this.fit()
    this.refresh(true)
    this.tellNew()
  }

  add(item, first) {
    const tile = new Tile(item, this.made++)
    this.tiles.set(item.name, tile)
    tile.guessed = first && this.tiles.size <= GUESSED
    this.list.append(tile.root)
    this.observer.observe(tile.root)
    this.on.canvas(item.name, tile.canvas)
    if (!first) this.unseen.add(item.name)
  }

  remove(name, tile) {
    const focused = tile.root.contains(document.activeElement)
    const next = tile.root.nextElementSibling ?? tile.root.previousElementSibling
    this.observer.unobserve(tile.root)
    this.tiles.delete(name)
    this.unseen.delete(name)
    tile.root.remove()
    this.on.gone(name)
    if (focused) this.focus(next?.dataset.name)
  }

  /** Text, bars and buttons; only of tiles in sight unless `all`. */
  refresh(all = false) {
    for (const tile of this.tiles.values()) if (all || tile.visible) tile.update()
    this.tellFocus()
  }

  drawn(header, pictures) {
    const tile = this.tiles.get(header.stream)
    if (!tile) return
    Object.assign(tile.item, { drawn: header, run_seen: header.run })
    Object.assign(tile.canvas.dataset, { seq: header.seq, pictures })
  }

  /** What the wall wants to see now: {name: "thumb"}. */
  wanted() {
    const since_ms = performance.now() - GRACE_MS
    const near = [...this.tiles.values()].filter((tile) => tile.visible || tile.left_ms > since_ms)
    return Object.fromEntries(near.map((tile) => [tile.item.name, "thumb"]))
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
      if (!isIntersecting) continue
      this.unseen.delete(tile.item.name)
      tile.update()
    }
    this.on.watch()
    this.tellNew()
  }

  // --- layout ---

  /** One shape of box for all, if most streams share it; it never changes while somebody points at the wall. */
  chooseShape() {
    const sizes = [...this.streams.values()].map(({ data }) => data).filter(({ width, height }) => width && height)
    const streams = sizes.map(({ run, width, height }) => `${run} ${width}x${height}`).join()
    if (streams === this.shape.streams || this.list.matches(":hover, :focus-within")) return
    const near = ({ width, height }, aspect) => Math.abs(Math.log(width / height / aspect)) < 0.06
    const aspect = ASPECTS.find((aspect) => sizes.filter((size) => near(size, aspect)).length > (sizes.length * 2) / 3) ?? 1
    this.shape = { streams, aspect }
    this.list.style.setProperty("--box", aspect.toFixed(4))
  }

  /** In the fullscreen wall: the largest tiles for which all are in sight. */
  fit() {
    this.list.style.removeProperty("--tile")
    if (!document.body.matches(".kiosk")) return
    const count = this.shown.length
    const width = innerWidth - 2 * FIT.side_px + FIT.gap_px
    const fits = (tile_px) => {
      const columns = Math.max(1, Math.floor(width / (tile_px + FIT.gap_px)))
      const row = (width / columns - FIT.gap_px) / this.shape.aspect + FIT.below_px
      return Math.ceil(count / columns) * row <= innerHeight
    }
    let tile_px = FIT.most_px
    while (tile_px > FIT.least_px && !fits(tile_px)) tile_px -= 4
    this.list.style.setProperty("--tile", `${tile_px}px`)
  }

  tellNew() {
    const below = [...this.unseen].filter((name) => this.passes(this.streams.get(name)))
    put($("#new-below"), { hidden: !below.length, text: `${below.length} new below` })
  }

  revealNew() {
    const [name] = this.unseen
    this.tiles.get(name)?.root.scrollIntoView({ block: "center" })
    this.focus(name)
  }

  clicked(event) {
    const button = event.target.closest("[data-act]")
    if (!button) return
    event.preventDefault()
    const { item } = this.tiles.get(button.closest("li").dataset.name)
    if (!button.matches("[aria-disabled=true]")) this.on.act(button.dataset.act, item)
  }

  /** Fingers have no hover: holding a tile shows its buttons, a tap elsewhere hides them. */
  listenForHolds() {
    let timer = 0
    let swallow = false
    const hide = () => $(".held")?.classList.remove("held")
    this.list.addEventListener("pointerdown", ({ pointerType, target }) => {
      swallow = false
      if (pointerType === "mouse") return
      timer = setTimeout(() => {
        swallow = true
        hide()
        target.closest(".tile")?.classList.add("held")
      }, HOLD_MS)
    })
    for (const kind of ["pointerup", "pointercancel"]) this.list.addEventListener(kind, () => clearTimeout(timer))
    this.list.addEventListener("contextmenu", (event) => swallow && event.preventDefault())
    const click = (event) => {
      if (!swallow) return event.target.closest(".held") || hide()
      swallow = false
      event.preventDefault()
      event.stopPropagation()
    }
    document.addEventListener("click", click, true)
  }

  // --- keyboard ---

  /** The stream whose tile has the focus (or its buttons), or null. */
  get focused() {
    return this.tiles.get(document.activeElement?.closest("#wall li")?.dataset.name)?.item ?? null
  }

  setCurrent(name) {
    this.tiles.get(this.current)?.focusable(false)
    this.tiles.get(name)?.focusable(true)
    this.current = name
  }

  /** The info bar tells what a tile has no room for, to who moves by keys. */
  tellFocus() {
    const bar = $("#info")
    const item = this.focused
    const show = item && (!bar.hidden || document.activeElement.matches(":focus-visible"))
    put(bar, { hidden: !show })
    if (!show) return
    const { meta, width, height } = item.data
    const prompt = meta.prompt && `\u2068${meta.prompt}\u2069` // its own direction ends with it
    const facts = [prompt, meta.seed != null && `seed ${meta.seed}`, meta.sampler, width && `${width} × ${height}`]
    put($("b", bar), { text: item.name })
    put($("span", bar), { text: facts.filter(Boolean).join(" · ") })
  }

  focus(name) {
    const tile = this.tiles.get(name)
    ;(tile && this.passes(tile.item) ? tile.link : $("#view-wall h1")).focus()
  }

  /** Arrows go where they point, over rows of any length. Returns whether the key was one of ours. */
  move(key) {
    const { shown } = this
    const at = shown.findIndex((tile) => tile.item.name === this.current)
    if (at < 0) return false
    const tops = shown.map((tile) => tile.root.offsetTop)
    const columns = tops.filter((top) => top === tops[0]).length
    const last = shown.length - 1
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: last - at }
    if (!(key in steps)) return false
    let to = this.focused ? at + steps[key] : at
    if (to > last && tops[at] < tops[last]) to = last // down into a short last row
    if (to >= 0 && to <= last) this.focus(shown[to].item.name)
    return true
  }
}
