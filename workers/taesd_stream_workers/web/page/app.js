// The page: what it shows (the address says which), the keys, and the line to the daemon.

import { Actions } from "./actions.js"
import { $, $$, copyText, make, setAttribute, setHidden, setText, store, stored } from "./dom.js"
import { msText } from "./format.js"
import { Notices } from "./notices.js"
import { RecordingList } from "./recordings.js"
import { Stage } from "./stage.js"
import { spokenState } from "./states.js"
import { Streams } from "./streams.js"
import { listenToTools, tellTools, Wall } from "./wall.js"

const LOOK_MS = 250 // how often text follows the pictures
const HIDDEN_MS = 5000 // a page in the background stops its pictures after this long
const BANNER_MS = 800
const GIVEN_UP_MS = 30000
const LOOPBACK = /^(localhost|127(\.\d+){3}|\[::1\])$/
const host = location.host

const streams = new Streams()
const notices = new Notices()
const actions = new Actions(notices, () => changed())
const line = { online: false, daemon: null, lost_at: 0, lost_ms: 0, retry_at_ms: 0, version: "", old_page: false, first: true }
let recordings = []
let alerts = []
let dismissed = new Set()
let stats = null
let paused = false
let asleep = false
let rendition = "VideoDecoder" in self ? "live" : "jpeg"
let why_jpeg = self.isSecureContext ? "this browser has no video decoder" : "this page is not on https or 127.0.0.1"

// --- pictures: in a worker that owns the canvases, or here where canvases cannot be given away ---

const pictures = await openPictures({
  url: `${location.protocol === "https:" ? "wss" : "ws"}://${host}/ws`,
  loopback: LOOPBACK.test(location.hostname),
  reduced: matchMedia("(prefers-reduced-motion: reduce)").matches,
})

async function openPictures(settings) {
  if ("OffscreenCanvas" in self && "transferControlToOffscreen" in HTMLCanvasElement.prototype) {
    const worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" })
    worker.onmessage = ({ data }) => take(data)
    worker.postMessage(settings)
    return {
      tell: (message) => worker.postMessage(message),
      give(message, canvas) {
        const given = canvas.transferControlToOffscreen()
        worker.postMessage({ ...message, canvas: given }, [given])
      },
    }
  }
  const { Pictures } = await import("./pictures.js")
  const here = new Pictures((message) => setTimeout(take, 0, message), settings)
  return { tell: (message) => here.take(message), give: (message, canvas) => here.take({ ...message, canvas }) }
}

// --- parts ---

const wall = new Wall(streams, {
  canvas: (stream, canvas) => pictures.give({ do: "tile", stream }, canvas),
  gone: (stream) => pictures.tell({ do: "drop", stream }),
  watch: () => watch(),
  act: (kind, item) => act(kind, item),
})
const stage = new Stage({
  canvas: (canvas) => pictures.give({ do: "stage-canvas" }, canvas),
  open: (stream) => pictures.tell({ do: "open", stream }),
  act: (kind, subject) => act(kind, subject),
})
const list = new RecordingList((recording) => actions.remove(recording))

function act(kind, subject, at_once = false) {
  switch (kind) {
    case "record": return actions.record(subject)
    case "stop": return actions.stop(subject, at_once)
    case "undo": return actions.undo(subject)
    case "link": return copyLink()
    case "delete":
      actions.remove(subject)
      location.hash = "#/recordings"
  }
}

async function copyLink() {
  notices.toast((await copyText(location.href)) ? "Link copied" : `Copy this address: ${location.href}`)
}

// --- what the worker and the daemon say ---

function take(message) {
  switch (message.type) {
    case "hello": return takeHello(message)
    case "state": return takeState(message)
    case "closed": return takeClosed(message)
    case "picture": return stage.picture(message)
    case "drawn": return message.list.forEach((news) => news.on === "tile" && wall.drawn(news))
    case "error": return notices.fail(message.text)
    case "no-live":
      rendition = "jpeg"
      why_jpeg = message.reason
      return watch()
  }
}

function takeHello({ daemon, page, version }) {
  const mine = $("meta[name=page-version]").content
  const restarted = line.daemon !== null && line.daemon !== daemon
  Object.assign(line, { online: true, daemon, version, lost_at: 0, old_page: !mine.startsWith("__") && page !== mine })
  document.body.dataset.link = "on"
  if (restarted) notices.toast("taesd-stream restarted. Earlier runs show their last picture.")
  tellFacts()
  tellBanners()
}

function takeClosed({ retry_at_ms }) {
  if (!line.lost_at) Object.assign(line, { lost_at: Date.now(), lost_ms: performance.now() })
  Object.assign(line, { online: false, retry_at_ms })
}

function takeState(state) {
  const before = streams.items.size
  const news = streams.take(state.streams)
  recordings = state.recordings ?? []
  alerts = state.alerts ?? []
  stats = state.stats
  if (line.first && !location.hash && streams.items.size === 1) {
    history.replaceState(null, "", `#/s/${streams.items.keys().next().value}`)
  }
  if (!line.first) notices.announce(news)
  const first = line.first
  line.first = false
  if (first || before !== streams.items.size || news.started.length || news.ended.length) wall.update()
  if (first) route()
  changed()
}

/** Something that decides what is shown changed: look at everything once. */
function changed() {
  tellTools(wall, streams)
  tellCounts()
  list.update(recordings.filter(({ id }) => !actions.removed.has(id)))
  if (view.kind === "stage" && !stage.item && view.name) openStream(view.name)
  if (view.kind === "playing" && !stage.recording) openRecording(view.id)
  look()
}

function look() {
  wall.refresh()
  stage.update()
  tellBanners()
}
setInterval(look, LOOK_MS)

function tellCounts() {
  const live = streams.count((item) => !item.ended)
  const shown = recordings.filter(({ id }) => !actions.removed.has(id)).length
  setText($("#tab-live .count"), line.first ? "" : `${live}`)
  setText($("#tab-recordings .count"), line.first ? "" : `${shown}`)
  setHidden($("#empty"), line.first || streams.items.size > 0)
  setHidden($("#tools"), !streams.items.size)
  const measured = live > 0 && stats?.latency_ms != null
  setHidden($("#pulse"), !paused && !measured)
  setHidden($("#pulse [data-part=numbers]"), paused || !measured)
  setHidden($("#pulse [data-part=paused]"), !paused)
  if (!measured) return
  setText($("#pulse [data-part=rate]"), (stats.pictures_per_s ?? 0).toFixed(0))
  setText($("#pulse [data-part=behind]"), msText(stats.latency_ms))
}

function tellBanners() {
  const banners = []
  const lost_ms = line.lost_at ? performance.now() - line.lost_ms : 0
  const offline = lost_ms > BANNER_MS
  if (offline && document.body.dataset.link !== "off") {
    document.body.dataset.link = "off"
    notices.alarm(`Lost the connection to ${host}.`)
  }
  if (offline) banners.push({ key: "lost", text: lostText(lost_ms), action: { label: "Try now", run: () => pictures.tell({ do: "retry" }) } })
  if (line.old_page) banners.push({ key: "old", text: "This page is older than the daemon.", action: { label: "Reload", run: () => location.reload() } })
  const heard = new Set(alerts.map(({ code, text }) => `${code} ${text}`))
  dismissed = new Set([...dismissed].filter((key) => heard.has(key)))
  for (const { code, text } of alerts) {
    const key = `${code} ${text}`
    if (dismissed.has(key)) continue
    const dismiss = () => {
      dismissed.add(key)
      tellBanners()
    }
    if (![...$$("#banners > *")].some((banner) => banner.dataset.key === key)) notices.alarm(text)
    banners.push({ key, text, action: { label: "Dismiss", run: dismiss } })
  }
  notices.banners(banners)
}

function lostText(lost_ms) {
  if (lost_ms > GIVEN_UP_MS) {
    return `Nothing answers at ${host}. If taesd-stream was stopped, start it again; this page reconnects by itself.`
  }
  const wait_s = Math.ceil((line.retry_at_ms - Date.now()) / 1000)
  const next = wait_s > 0 ? `Trying again in ${wait_s} s.` : "Trying again now."
  if (line.first) return `No connection to ${host}. ${next}`
  return `Lost the connection to ${host}. These pictures are from ${new Date(line.lost_at).toLocaleTimeString()}. ${next}`
}

// --- what is watched ---

function watch() {
  const wanted = {}
  if (!paused && !asleep) {
    if (view.kind === "stage" && stage.item) wanted[stage.item.name] = rendition
    else if (view.kind === "wall") Object.assign(wanted, wall.wanted())
  }
  pictures.tell({ do: "watch", streams: wanted })
}

let sleep_timer = 0
document.addEventListener("visibilitychange", () => {
  clearTimeout(sleep_timer)
  const sleep = (on) => {
    asleep = on
    watch()
  }
  if (document.hidden) sleep_timer = setTimeout(sleep, HIDDEN_MS, true)
  else {
    if (asleep) sleep(false)
    pictures.tell({ do: "retry" })
  }
})
addEventListener("online", () => pictures.tell({ do: "retry" }))
matchMedia("(prefers-reduced-motion: reduce)").onchange = ({ matches }) => pictures.tell({ do: "reduced", on: matches })

// --- the address says what is shown ---

const view = { kind: "wall", name: null, id: null, scroll: 0, depth: 0 }
history.scrollRestoration = "manual"

function parse(hash) {
  const path = decodeURIComponent(hash.replace(/^#\/?/, ""))
  if (path.startsWith("s/")) return { kind: "stage", name: path.slice(2), id: null }
  if (path.startsWith("r/")) return { kind: "playing", name: null, id: path.slice(2) }
  return { kind: path === "recordings" ? "recordings" : "wall", name: null, id: null }
}

function route() {
  const from = { ...view }
  if (from.kind === "wall") view.scroll = scrollY
  Object.assign(view, parse(location.hash))
  const opened = view.kind === "stage" || view.kind === "playing"
  const recording_side = view.kind === "recordings" || view.kind === "playing"
  document.body.dataset.view = opened ? "stage" : view.kind
  setHidden($("#view-wall"), view.kind !== "wall")
  setHidden($("#view-recordings"), view.kind !== "recordings")
  setHidden($("#view-stage"), !opened)
  setAttribute($("#tab-live"), "aria-current", recording_side ? null : "page")
  setAttribute($("#tab-recordings"), "aria-current", recording_side ? "page" : null)
  if (!opened) stage.close()
  if (view.kind === "stage") openStream(view.name)
  if (view.kind === "playing") openRecording(view.id)
  if (document.body.classList.contains("kiosk") && view.kind !== "wall") leaveKiosk()
  tellTitle()
  placeFocus(from)
  watch()
}

function placeFocus(from) {
  if (from.kind === view.kind && from.name === view.name && from.id === view.id) return
  if (view.kind === "wall") {
    scrollTo(0, view.scroll)
    if (from.name) wall.tiles.get(from.name)?.name.focus({ preventScroll: true })
    return
  }
  scrollTo(0, 0)
  if (view.kind === "recordings") {
    const row = from.id && list.rows.get(from.id)
    ;(row ? $(".rec-open", row) : $("#view-recordings h1")).focus()
  } else $("#view-stage h1").focus()
}

function openStream(name) {
  const item = streams.items.get(name)
  if (item) stage.openStream(item, rendition)
  else stage.openUnknown(name)
  watch()
}

function openRecording(id) {
  const recording = recordings.find((entry) => entry.id === id)
  if (recording) stage.openRecording(recording)
  else if (!line.first) location.replace("#/recordings")
}

function tellTitle() {
  const name = view.kind === "stage" ? view.name : stage.recording?.stream
  document.title = name ? `${name} · taesd-stream` : view.kind === "recordings" ? "Recordings · taesd-stream" : "taesd-stream"
}

addEventListener("hashchange", () => {
  view.depth++
  route()
})

function back() {
  if (view.kind === "wall") return
  if (view.depth > 0 && view.kind !== "recordings") history.back()
  else location.hash = view.kind === "playing" ? "#/recordings" : "#/"
}

function openNeighbour(step) {
  const names = [...streams.items.values()].filter((item) => wall.passes(item)).map(({ name }) => name)
  const to = names[names.indexOf(view.name) + step]
  if (to) location.replace(`#/s/${to}`)
}

// --- buttons of the header, help, keys ---

function setPaused(on) {
  paused = on
  setAttribute($("#pause"), "aria-pressed", on)
  $("#pause use").setAttribute("href", on ? "#i-play" : "#i-pause")
  $("#pause").title = on ? "Show pictures again (P)" : "Pause all pictures (P)"
  notices.say(on ? "Pictures paused" : "Pictures go on")
  watch()
  changed()
}

async function toggleFullscreen() {
  if (document.fullscreenElement) return document.exitFullscreen()
  if (view.kind === "stage" || view.kind === "playing") return $(".stage").requestFullscreen()
  if (view.kind !== "wall") return
  await document.documentElement.requestFullscreen()
  document.body.classList.add("kiosk")
  wall.fit()
}

function leaveKiosk() {
  document.body.classList.remove("kiosk")
  wall.fit()
  if (document.fullscreenElement) document.exitFullscreen()
}

document.addEventListener("fullscreenchange", () => document.fullscreenElement || leaveKiosk())
setHidden($("#fullscreen"), !document.fullscreenEnabled)
$("#fullscreen").onclick = toggleFullscreen
$("#pause").onclick = () => setPaused(!paused)
$("#help-open").onclick = () => $("#help").showModal()
$("#help [data-act=close]").onclick = () => $("#help").close()
$("#help").onclick = (event) => event.target === $("#help") && $("#help").close()
$(".skip").onclick = (event) => {
  event.preventDefault()
  if (view.kind === "wall" && wall.current) wall.focus(wall.current)
  else $("#main").focus()
}
$("#clear-ended").onclick = () => {
  streams.clearEnded()
  wall.update()
  changed()
}
listenToTools(wall, {
  changed: () => {
    wall.update()
    changed()
  },
  resized: setSize,
})

function setSize(size) {
  document.body.dataset.size = size
  for (const button of $$("#tools [data-size]")) setAttribute(button, "aria-pressed", button.dataset.size === size)
  store("size", size)
}
setSize(stored("size", "m"))

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme
  else delete document.documentElement.dataset.theme
  for (const button of $$("[data-theme-choice]")) setAttribute(button, "aria-pressed", button.dataset.themeChoice === theme)
  store("theme", theme)
}
for (const button of $$("[data-theme-choice]")) button.onclick = () => setTheme(button.dataset.themeChoice)
setTheme(stored("theme", ""))
$("#keys-on").checked = stored("keys", "on") === "on"
$("#keys-on").onchange = ({ target }) => store("keys", target.checked ? "on" : "off")

function tellFacts() {
  const how = rendition === "live" ? "Pictures: H.264 when opened, JPEG on the wall" : `Pictures: JPEG (${why_jpeg})`
  setText($("#help-facts"), `${how}. taesd-stream ${line.version} at ${host}.`)
}

const KEYS = {
  "?": () => $("#help").showModal(),
  1: () => (location.hash = "#/"),
  2: () => (location.hash = "#/recordings"),
  "/": () => {
    if (view.kind !== "wall" || $("#tools").hidden) return
    if (!$("#filter").offsetParent) $("#more").click()
    $("#filter").focus()
  },
  p: () => setPaused(!paused),
  f: () => toggleFullscreen(),
  z: () => actions.undo(),
  Escape: () => back(),
}
const STREAM_KEYS = {
  r: (item) => act("record", item),
  x: (item, event) => act("stop", item, event.shiftKey),
  s: (item) => notices.say(spokenState(item)),
}
const STAGE_KEYS = { "[": () => openNeighbour(-1), "]": () => openNeighbour(1), y: () => copyLink() }
const NO_REPEAT = new Set(["r", "x"])

document.addEventListener("keydown", (event) => {
  const { target, key } = event
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || $("#help").open) return
  if (target.matches("input, textarea, select, video")) {
    if (key === "Escape" && target.id === "filter") leaveFilter(target)
    return
  }
  const letter = key.length === 1 ? key.toLowerCase() : key
  if (event.repeat && NO_REPEAT.has(letter)) return
  if (key.length === 1 && !$("#keys-on").checked) return
  if (view.kind === "wall" && !document.body.matches(":has(dialog[open])") && wall.move(key)) return event.preventDefault()
  const item = stage.item ?? wall.focusedItem
  const found = KEYS[letter] ?? (item && STREAM_KEYS[letter]) ?? (view.kind === "stage" && STAGE_KEYS[letter])
  if (!found) return
  event.preventDefault()
  found(item, event)
})

function leaveFilter(field) {
  if (field.value) {
    field.value = ""
    field.oninput()
  } else field.blur()
}

// --- nothing there yet ---

async function fillEmpty() {
  const ways = await (await fetch(new URL("./connect.json", import.meta.url))).json()
  const root = $("#empty")
  const chips = $(".chips", root)
  const choose = (way) => {
    setText($("[data-part=lead]", root), way.lead)
    setText($("code", root), way.lines.join("\n"))
    for (const chip of chips.children) setAttribute(chip, "aria-pressed", chip.dataset.way === way.id)
  }
  for (const way of ways) {
    const chip = make("button", { type: "button", textContent: way.title })
    chip.dataset.way = way.id
    chip.onclick = () => choose(way)
    chips.append(chip)
  }
  choose(ways[0])
  const copy = $("[data-part=copy]", root)
  copy.onclick = async () => {
    const done = await copyText($("code", root).textContent)
    setText($("span", copy), done ? "Copied" : "Select and copy")
    notices.say(done ? "Copied" : "Could not copy")
    setTimeout(() => setText($("span", copy), "Copy"), 1500)
  }
  const elsewhere = LOOPBACK.test(location.hostname) ? "" : " Where the sampler runs, set TAESD_STREAM_ADDRESS to this daemon's broker."
  setText($("[data-part=listening]", root), `Listening on ${host}. Recordings you make are kept under Recordings.${elsewhere}`)
}
fillEmpty()
route()
