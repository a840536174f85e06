// The page: what it shows (the address says which), and the line to the daemon.

import { Actions } from "./actions.js"
import { parse } from "./address.js"
import { Compare } from "./compare.js"
import { $, $$, copyText, put, store, stored } from "./dom.js"
import { fillEmpty } from "./empty.js"
import { msText } from "./format.js"
import { listenToKeys } from "./keys.js"
import { listen, tell } from "./line.js"
import { Link } from "./link.js"
import { Notices } from "./notices.js"
import { RecordingList } from "./recordings.js"
import { Stage } from "./stage.js"
import { spokenState } from "./states.js"
import { SHOWS, Streams } from "./streams.js"
import { Wall } from "./wall.js"

const LOOK_MS = 250 // how often text follows the pictures
const HIDDEN_MS = 5000 // a hidden page stops its pictures after this long
const { host } = location

const streams = new Streams()
const notices = new Notices()
const actions = new Actions(notices, () => changed())
const link = new Link(notices, () => tell({ do: "retry" }))
const nowhere = { name: null, id: null, run: null, seq: null }
const view = { kind: "wall", ...nowhere, scroll: 0, depth: 0 }
let daemon = { growing: [], alerts: [], stats: null }
let finished = new Map() // recordings, by id
let paused = false
let asleep = false
let rendition = "VideoDecoder" in self ? "live" : "jpeg"
let why_jpeg = self.isSecureContext ? "this browser has no video decoder" : "this page is not on https or 127.0.0.1"

const wall = new Wall(streams, {
  canvas: (stream, canvas) => tell({ do: "tile", stream, canvas }),
  gone: (stream) => tell({ do: "drop", stream }),
  watch: () => watch(),
  act,
})
const stage = new Stage({ tell, act, moved })
const compare = new Compare({ tell, moved: (hash) => history.replaceState(null, "", hash) })
let picked = null // the run that waits for another to be compared with
const list = new RecordingList((id) => actions.remove(recordings().find((recording) => recording.id === id)))

const recordings = () => [...daemon.growing, ...finished.values()].filter(({ id }) => !actions.removed.has(id))

/** how: what to record; whether to stop at once. */
function act(kind, subject, how) {
  if (kind === "record") actions.record(subject, how)
  if (kind === "stop") actions.stop(subject, how)
  if (kind === "undo") actions.undo(subject)
  if (kind === "keep") actions.keep(subject.data?.run ?? subject.run, subject.name)
  if (kind === "compare") pick(subject.data?.run ?? subject.run, subject.name)
  if (kind === "toast") notices.toast(subject)
  if (kind === "next") {
    watch()
    notices.key ?? notices.toast(`${subject} began its next run.`, { key: "next", action: { label: "Watch it", run: () => (location.hash = `#/s/${subject}`) }, last_ms: 60000 })
  }
  if (kind === "say") notices.say(spokenState(subject))
  if (kind === "link") copyText(location.href).then((done) => notices.toast(done ? "Link copied" : `Copy this address: ${location.href}`))
  if (kind !== "delete") return
  actions.remove(subject)
  location.hash = "#/recordings"
}

/** The first of two waits for the second. */
function pick(run, name) {
  const first = picked
  notices.clear("pick")
  if (first && first !== run) location.hash = `#/compare/${first}/${run}`
  if (first) return
  picked = run
  if (view.kind !== "wall") location.hash = "#/"
  notices.toast(`Compare ${name} with: press the other one, or C on it.`, { key: "pick", action: { label: "Cancel" }, last_ms: 60000, gone: () => (picked = null) })
}

$("#wall").addEventListener("click", (event) => {
  const link = event.target.closest(".name")
  if (!picked || !link) return
  event.preventDefault()
  const { item } = wall.tiles.get(link.closest("li").dataset.name)
  pick(item.data.run, item.name)
})

// --- what the worker and the daemon say ---

function take(message) {
  switch (message.type) {
    case "hello":
      link.hello(message)
      finished = new Map()
      return tellFacts()
    case "state": return takeState(message)
    case "closed": return link.closed(message)
    case "picture": return stage.picture(message)
    case "step": return message.screen === "stage" ? stage.stepped(message) : compare.stepped(message)
    case "drawn": return message.list.forEach(({ header, pictures }) => wall.drawn(header, pictures))
    case "error": return notices.fail(message.text)
    case "no-live":
      rendition = "jpeg"
      why_jpeg = message.reason
      tellFacts()
      watch()
  }
}

function takeState(state) {
  const before = streams.size
  const news = streams.take(state.streams)
  const { first } = link
  link.first = false
  daemon = { ...daemon, ...state }
  for (const row of state.recordings ?? []) finished.set(row.id, row)
  for (const id of state.gone ?? []) finished.delete(id)
  if (first && !location.hash && streams.size === 1) history.replaceState(null, "", `#/s/${streams.keys().next().value}`)
  if (!first) notices.announce(news)
  if (before !== streams.size || news.started.length || news.ended.length) wall.update()
  if (first) route()
  changed()
}

/** Something changed: look at everything once. */
function changed() {
  tellTools()
  tellCounts()
  if (view.kind === "recordings") list.update(recordings())
  if (view.kind === "stage" && !stage.item && found()) openStream()
  if (view.kind === "playing" && !stage.recording) openRecording()
  look()
}

function look() {
  wall.refresh()
  stage.update()
  compare.update((run) => streams.ofRun(run))
  link.tell(daemon.alerts ?? [])
}
setInterval(look, LOOK_MS)

function tellTools() {
  for (const button of $$("[data-show]")) {
    const { show } = button.dataset
    put(button, { "aria-pressed": wall.show === show })
    put($(".count", button), { text: streams.count(SHOWS[show]) })
  }
  put($("#tools"), { hidden: !streams.size })
  put($("#clear-ended"), { hidden: !streams.count(SHOWS.ended) })
  const typed = $("#filter").value.trim()
  const none = { live: "No stream is live.", kept: "Nothing is kept yet.", ended: "No stream has ended." }[wall.show]
  put($("#no-match"), { hidden: !streams.size || wall.shown.length > 0 })
  put($("#no-match span"), { text: typed ? `Nothing matches "${typed}".` : none })
  put($("#no-match button"), { text: typed ? "Clear filter" : "Show all" })
}

function tellCounts() {
  const live = streams.count(SHOWS.live)
  const { stats } = daemon
  const measured = !paused && (view.kind === "wall" || stage.item) && live > 0 && stats?.latency_ms != null
  put($("#tab-live .count"), { text: link.first ? "" : live })
  put($("#tab-recordings .count"), { text: link.first ? "" : recordings().length })
  put($("#empty"), { hidden: link.first || streams.size > 0 })
  put($("#pulse"), { hidden: !measured })
  put($("#paused"), { hidden: !paused })
  if (!measured) return
  put($("#pulse b"), { text: (stats.pictures_per_s ?? 0).toFixed(0) })
  put($("#pulse b:last-of-type"), { text: msText(stats.latency_ms) })
}

// --- what is watched ---

function watch() {
  const wall_wants = view.kind === "wall" ? wall.wanted() : {}
  const pair = (compare.runs ?? []).map((run) => streams.ofRun(run)).filter((item) => item && !item.ended)
  const films = Object.fromEntries(pair.map(({ name }) => [name, "thumb"])) // a film has what somebody watches
  const wanted = stage.item ? { [stage.item.name]: rendition } : { ...wall_wants, ...films }
  tell({ do: "watch", streams: paused || asleep ? {} : wanted })
}

function sleep(on) {
  asleep = on
  watch()
}

let sleep_timer = 0
document.addEventListener("visibilitychange", () => {
  clearTimeout(sleep_timer)
  if (document.hidden) sleep_timer = setTimeout(sleep, HIDDEN_MS, true)
  else sleep(false)
  tell({ do: "retry" })
})
addEventListener("online", () => tell({ do: "retry" }))

function setPaused(on) {
  paused = on
  put($("#pause"), { "aria-pressed": on, title: on ? "Show pictures again (P)" : "Pause all pictures (P)" })
  put($("#pause use"), { href: on ? "#i-play" : "#i-pause" })
  notices.say(on ? "Pictures paused" : "Pictures go on")
  watch()
  changed()
}

// --- the address says what is shown ---

function route() {
  const from = { ...view }
  if (from.kind === "wall") view.scroll = scrollY
  Object.assign(view, nowhere, parse(location.hash))
  const opened = view.kind === "stage" || view.kind === "playing"
  const kept = view.kind === "recordings" || view.kind === "playing"
  document.body.dataset.view = opened || view.kind === "compare" ? "stage" : view.kind
  put($("#view-wall"), { hidden: view.kind !== "wall" })
  put($("#view-recordings"), { hidden: view.kind !== "recordings" })
  put($("#view-stage"), { hidden: !opened })
  put($("#view-compare"), { hidden: view.kind !== "compare" })
  put($("#tab-live"), { "aria-current": kept ? null : "page" })
  put($("#tab-recordings"), { "aria-current": kept ? "page" : null })
  notices.clear("next")
  if (!opened) stage.close()
  if (view.kind === "recordings") list.open(recordings())
  if (view.kind !== "compare") compare.close()
  else compare.open(view.runs, view.seq, view.mode)
  if (view.kind === "stage") openStream()
  if (view.kind === "playing") openRecording()
  if (view.kind !== "wall") setKiosk(false)
  document.title = [stage.item?.name ?? view.run ?? view.name ?? stage.recording?.stream ?? (kept && "Recordings"), "taesd-stream"].filter(Boolean).join(" · ")
  if (["kind", "name", "run", "id"].some((key) => from[key] !== view[key])) placeFocus(from)
  watch()
}

function placeFocus(from) {
  scrollTo(0, view.kind === "wall" ? view.scroll : 0)
  if (view.kind === "wall") wall.tiles.get(found(from)?.name)?.link.focus({ preventScroll: true })
  else if (view.kind === "recordings") (list.rows.get(from.id)?.querySelector(".rec-open") ?? $("#view-recordings h1")).focus()
  else $(view.kind === "compare" ? "#view-compare h1" : "#view-stage h1").focus()
}

/** The stream that an address means, by its name or by a run of it. */
const found = ({ name, run } = view) => streams.get(name) ?? streams.ofRun(run)

function openStream() {
  const item = found()
  if (item) stage.openStream(item, rendition, item.name === view.name ? null : view.seq)
  else if (view.run) stage.openRun(view.run, view.seq)
  else if (!link.first) openForgotten(view.name)
  watch()
}

/** A name that the daemon does not know: the newest run that films and recordings remember stands there. */
async function openForgotten(name) {
  stage.openUnknown(name)
  const answer = await fetch("/api/v1/films").catch(() => null)
  const films = answer?.ok ? (await answer.json()).films : []
  const newest = [...films, ...recordings()].filter(({ stream }) => stream === name).sort((a, b) => b.started - a.started)[0]
  if (newest && view.kind === "stage" && view.name === name && !stage.item) stage.openRun(newest.run, null)
}

/** The address follows the playhead when it is let go; seq null: live, or the end. */
function moved(run, seq) {
  const live = stage.item ? stage.item.name : run
  history.replaceState(null, "", `#/s/${seq === null ? live : `${run}/${seq}`}`)
  Object.assign(view, parse(location.hash))
}

function openRecording() {
  const recording = recordings().find(({ id }) => id === view.id)
  if (recording) stage.openRecording(recording)
  else if (!link.first) location.replace("#/recordings")
}

history.scrollRestoration = "manual"
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
  const names = wall.shown.map((tile) => tile.item.name)
  const to = names[names.indexOf(stage.item?.name) + step]
  if (to) location.replace(`#/s/${to}`)
}

// --- the header, the toolbar, help ---

function setKiosk(on) {
  document.body.classList.toggle("kiosk", on)
  if (!on && document.fullscreenElement === document.documentElement) document.exitFullscreen()
  wall.fit()
}

async function toggleFullscreen() {
  if (document.fullscreenElement) return document.exitFullscreen()
  if (document.body.dataset.view === "stage") return $(".stage").requestFullscreen()
  await document.documentElement.requestFullscreen()
  setKiosk(view.kind === "wall")
}

function chooseOne(attribute, key, fallback, apply) {
  const buttons = $$(`[${attribute}]`)
  const choose = (value) => {
    apply(value)
    for (const button of buttons) put(button, { "aria-pressed": button.getAttribute(attribute) === value })
    store(key, value)
  }
  for (const button of buttons) button.onclick = () => choose(button.getAttribute(attribute))
  choose(stored(key, fallback))
}

function refilter() {
  wall.words = $("#filter").value.toLowerCase().split(/\s+/).filter(Boolean)
  wall.update()
  changed()
}

function openFilter() {
  if (view.kind !== "wall") return
  $("#tools").classList.add("more")
  put($("#more"), { "aria-expanded": true })
  $("#filter").focus()
}

function tellFacts() {
  const how = rendition === "live" ? "Pictures: H.264 when opened, JPEG on the wall" : `Pictures: JPEG (${why_jpeg})`
  put($("#help-facts"), { text: `${how}. taesd-stream ${link.version} at ${host}.` })
}

const help = $("#help")
put($("#fullscreen"), { hidden: !document.fullscreenEnabled })
document.addEventListener("fullscreenchange", () => document.fullscreenElement || setKiosk(false))
$("#fullscreen").onclick = toggleFullscreen
$("#pause").onclick = () => setPaused(!paused)
$("#help-open").onclick = () => help.showModal()
help.onclick = ({ target }) => (target === help || target.closest("[data-act=close]")) && help.close()
$(".skip").onclick = (event) => {
  event.preventDefault()
  if (view.kind === "wall" && wall.current) wall.focus(wall.current)
  else $("#main").focus()
}
$("#view-compare [data-act=link]").onclick = () => act("link")
for (const button of $$("[data-show]")) {
  button.onclick = () => {
    wall.show = button.dataset.show
    refilter()
  }
}
$("#filter").oninput = refilter
$("#clear-ended").onclick = () => {
  streams.clearEnded()
  refilter()
}
$("#no-match button").onclick = () => {
  $("#filter").value = ""
  wall.show = "all"
  refilter()
  wall.focus(wall.current)
}
$("#more").onclick = () => {
  const open = $("#tools").classList.toggle("more")
  put($("#more"), { "aria-expanded": open })
  if (open) $("#filter").focus()
}
chooseOne("data-size", "size", "m", (size) => (document.body.dataset.tiles = size))
chooseOne("data-theme-choice", "theme", "", (theme) => (document.documentElement.dataset.theme = theme))
$("#keys-on").checked = stored("keys", "on") === "on"
$("#keys-on").onchange = ({ target }) => store("keys", target.checked ? "on" : "off")

listenToKeys({
  subject: () => stage.item ?? wall.focused,
  stage: () => view.kind === "stage" || view.kind === "compare",
  move: (key) => view.kind === "wall" && wall.move(key),
  help: () => help.showModal(),
  go: (hash) => (location.hash = hash),
  filter: openFilter,
  pause: () => setPaused(!paused),
  fullscreen: toggleFullscreen,
  undo: () => actions.undo(),
  back,
  neighbour: openNeighbour,
  walk: (how, by) => (view.kind === "compare" ? compare : stage).scrubber[how](by),
  act,
})
/** The wall stands before its socket does, also where time stands still. */
async function begin() {
  try {
    const whats = view.kind === "wall" ? ["streams"] : ["streams", "recordings"]
    const answers = await Promise.all(whats.map((what) => fetch(`/api/v1/${what}`)))
    const [{ streams }, { recordings } = {}] = await Promise.all(answers.map((answer) => answer.json()))
    if (link.first && streams) takeState({ ...daemon, streams, recordings })
  } catch {
    // Nobody answers: the socket says so, and tries again.
  }
}

fillEmpty({ host, say: (text) => notices.say(text) })
route()
listen(take)
begin()
