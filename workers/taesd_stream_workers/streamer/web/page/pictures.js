// Everything that happens to a picture between the socket and the screen. It runs in a worker that owns the canvases;
// where canvases cannot be given away (no OffscreenCanvas), the same class runs on the page's own thread.

import { ClipLoop } from "./playback.js"
import { Screen, Sink, Strip } from "./screen.js"
import { DaemonClock, Socket } from "./socket.js"

const BATCH_MS = 100 // how long changes of what is watched, and news of what was drawn, are gathered
const SHOWN_MS = 250
const REDUCED_MS = 500 // two pictures a second for who asked for less motion
const LAN_MS = 250 // four a second over a network, until it proves to be fast
const FAST_US = 60_000

export class Pictures {
  /** tell(message): to the page. settings: {url, loopback, reduced}. */
  constructor(tell, { url, loopback, reduced }) {
    Object.assign(this, { tell, reduced, pace_ms: loopback ? 0 : LAN_MS })
    this.clock = new DaemonClock()
    this.tiles = new Map() // stream -> Sink
    this.screens = new Map() // "stage", "a", "b" -> Screen
    this.wanted = {} // what the page wants
    this.watched = {} // what the daemon was told
    this.watch_timer = 0
    this.watch_ms = -BATCH_MS // when that was
    this.drawn = new Map() // stream -> {header, pictures} of its tile, told to the page at the next batch
    this.reported = new Map() // stream -> when `shown` last went out
    this.socket = new Socket(url, {
      open: () => this.send_watch(),
      text: (message) => this.text(message),
      binary: (buffer) => this.binary(buffer),
      closed: (state) => {
        this.clock.forget()
        this.tell({ type: "closed", ...state })
      },
    })
    setInterval(() => this.flush(), BATCH_MS)
  }

  /** One message of the page. */
  take(message) {
    const screen = this.screens.get(message.screen)
    switch (message.do) {
      case "tile": return this.tiles.set(message.stream, new Sink(message.canvas))
      case "drop": return this.drop(message.stream)
      case "screen": return this.screens.set(message.screen, this.screen(message.screen, message.canvas))
      case "strip": return (screen.strips = new Strip(message.canvas))
      case "open": return this.open(screen, message.stream)
      case "replay": return screen.replay(message.run, message.seq, message.part)
      case "cells": return this.lay(screen, message)
      case "crop": return screen.crop(message.part)
      case "watch": return this.watch(message.streams)
      case "reduced": return this.still(message.on)
      case "retry": return this.socket.retry()
    }
  }

  screen(id, canvas) {
    const screen = new Screen(canvas, {
      shown: (header) => this.shown(screen, header),
      step: (run, seq) => this.tell({ type: "step", screen: id, run, seq }),
      keyframe: (stream) => this.socket.send({ type: "keyframe", stream }),
      failed: (reason) => this.tell({ type: "no-live", reason }),
    })
    screen.loop.still = this.reduced
    return Object.assign(screen, { id })
  }

  drop(stream) {
    this.tiles.get(stream)?.close()
    this.tiles.delete(stream)
  }

  still(on) {
    this.reduced = on
    for (const sink of [...this.tiles.values(), ...this.screens.values()]) {
      for (const loop of [sink.images, sink.loop]) if (loop) loop.still = on
    }
  }

  lay(screen, { run, cells, width, height }) {
    screen.strips.lay(run, cells, width, height)
    screen.filmOf(run).strip(cells.map(({ seq }) => seq))
  }

  // --- what is watched ---

  watch(streams) {
    this.wanted = streams
    const wait_ms = this.watch_ms + BATCH_MS - performance.now()
    if (wait_ms <= 0) this.send_watch()
    else this.watch_timer ||= setTimeout(() => this.send_watch(), wait_ms)
  }

  send_watch() {
    clearTimeout(this.watch_timer)
    this.watch_timer = 0
    this.watch_ms = performance.now()
    this.watched = this.wanted
    this.socket.send({ type: "watch", streams: this.watched })
  }

  /** Put a stream on a screen (null: clear it), with its tile's last picture until a better one comes. */
  open(screen, stream) {
    screen.open(stream)
    const tile = this.tiles.get(stream)
    if (tile?.last) this.placeholder(screen, stream, tile)
  }

  async placeholder(screen, stream, tile) {
    const image = await createImageBitmap(tile.last)
    if (screen.stream === stream && !screen.pictures && !screen.replaying) screen.draw(image, image.width, image.height)
    image.close()
  }

  // --- what arrives ---

  text(message) {
    if (message.type === "pong") this.clock.take(message.t, message.now_us)
    else this.tell(message)
  }

  binary(buffer) {
    const length = new DataView(buffer).getUint32(0)
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
    const bytes = new Uint8Array(buffer, 4 + length)
    if (this.watched[header.stream] !== header.rendition) return // on its way when the page changed its mind
    const screen = [...this.screens.values()].find(({ stream }) => stream === header.stream)
    if (header.rendition === "live") return screen?.feed(header, bytes)
    const sink = header.rendition === "thumb" ? this.tiles.get(header.stream) : screen
    if (!sink) this.credit(header) // its canvas is just going, or coming
    else if (header.kind === "clip" && header.count > 1) this.loop(sink, header, bytes)
    else {
      sink.images?.close()
      if (sink.busy) sink.next = [header, bytes]
      else this.show_jpeg(sink, header, bytes)
    }
  }

  /** A picture of a clip: all of them come for one credit. */
  loop(sink, header, bytes) {
    sink.images ??= Object.assign(new ClipLoop(({ header, bytes }) => !sink.busy && void this.show_jpeg(sink, header, bytes, true)), { still: this.reduced })
    sink.images.take({ header, bytes })
    if (sink.credited !== header.seq) this.credit(header)
    sink.credited = header.seq
  }

  async show_jpeg(sink, header, bytes, looped = false) {
    sink.busy = true
    const blob = new Blob([bytes], { type: "image/jpeg" })
    try {
      const image = await createImageBitmap(blob)
      sink.last = blob
      if (header.rendition === "thumb" || (sink.stream === header.stream && !sink.replaying)) {
        sink.draw(image, image.width, image.height, header)
        this.shown(sink, header)
      }
      image.close()
    } catch {
      // A damaged picture: its credit must go back all the same.
    }
    sink.busy = false
    if (!looped) this.credit(header, sink.drawn_ms)
    const next = sink.next
    sink.next = null
    if (next) this.show_jpeg(sink, ...next)
  }

  /** Ask for the next picture of a stream: at once, or later where pictures must be few. */
  credit({ stream, rendition, stamps }, drawn_ms = performance.now()) {
    const least_ms = this.reduced ? REDUCED_MS : this.pace_ms
    const wait_ms = drawn_ms + least_ms - performance.now()
    const send = () => this.socket.send({ type: "credit", stream, rendition })
    if (wait_ms > 0) setTimeout(send, wait_ms)
    else send()
    const now_us = this.clock.now_us()
    if (!this.pace_ms || now_us === null || !stamps?.streamed_us) return
    const fast = now_us - stamps.streamed_us < FAST_US
    this.pace_ms = Math.max(20, Math.min(LAN_MS, this.pace_ms * (fast ? 0.9 : 1.5)))
  }

  // --- what was shown ---

  shown(sink, header) {
    const { stream, run, seq, rendition } = header
    const now_us = this.clock.now_us()
    sink.drawn_ms = performance.now()
    const pictures = ++sink.pictures
    if (sink instanceof Screen) this.tell({ type: "picture", screen: sink.id, header, shown_us: now_us, pictures })
    else this.drawn.set(stream, { header, pictures })
    if (pictures === 1) this.flush() // the page shows no canvas before
    if (now_us === null || sink.drawn_ms - (this.reported.get(stream) ?? -SHOWN_MS) < SHOWN_MS) return
    this.reported.set(stream, sink.drawn_ms)
    this.socket.send({ type: "shown", stream, run, seq, rendition, shown_us: Math.round(now_us) })
  }

  flush() {
    if (!this.drawn.size) return
    this.tell({ type: "drawn", list: [...this.drawn.values()] })
    this.drawn.clear()
  }
}

// As a worker: the first message has the settings, each later one is for Pictures.
if ("WorkerGlobalScope" in self) {
  let pictures = null
  self.onmessage = ({ data }) => {
    if (pictures) pictures.take(data)
    else pictures = new Pictures((message) => self.postMessage(message), data)
  }
}
