// What a person asks of the daemon. Stop and Delete are held back for some seconds, so that they can be undone.

const STOP_HOLD_MS = 3000
const DELETE_HOLD_MS = 5000
const STOP_ANSWER_MS = 5000

const pathOf = (name) => name.split("/").map(encodeURIComponent).join("/")

/** Call the API; raises Error with the daemon's own words. */
async function call(method, path, body) {
  const init = { method, keepalive: true } // keepalive: what was held still goes out when the page is left
  if (body) Object.assign(init, { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } })
  const answer = await fetch(`/api/v1/${path}`, init)
  if (answer.ok) return
  const words = await answer.json().catch(() => ({}))
  throw new Error(words.text || `The daemon answered ${answer.status}.`)
}

export class Actions {
  /** notices: the Notices; changed(): something local changed, look again. */
  constructor(notices, changed) {
    Object.assign(this, { notices, changed, held: [], removed: new Set() })
    addEventListener("pagehide", () => this.held.splice(0).forEach((act) => act.commit()))
  }

  /** wanted: what to keep; what is kept already, no more. */
  async record(item, wanted = "all") {
    if (item.ended || item.record_busy) return
    item.record_busy = true
    const mode = wanted === item.data.record ? "off" : wanted
    const of = `of ${item.name}`
    try {
      await call("POST", `streams/${pathOf(item.name)}/record`, { mode })
      this.notices.say({ all: `Recording ${item.name}`, last: `Keeping the last frame ${of}`, off: `Recording ${of} ended` }[mode])
    } catch (error) {
      const what = { all: "start the recording", last: "keep the last frame", off: "end the recording" }[mode]
      this.notices.fail(`Could not ${what} ${of}: ${error.message}`, () => this.record(item, wanted))
    }
    item.record_busy = false
    this.changed()
  }

  /** Keep the film of a run that is over. */
  async keep(run, name) {
    try {
      await call("POST", `runs/${run}/keep`)
      this.notices.toast(`${name} is kept under Recordings.`)
    } catch (error) {
      this.notices.fail(`Could not keep ${name}: ${error.message}`)
    }
    this.changed()
  }

  stop(item, at_once = false) {
    if (item.ended || !item.data.stoppable || item.stop_sent) return
    const held = this.held.find((act) => act.item === item)
    if (held) return at_once ? this.release(held) : undefined
    item.stop_held = !at_once
    const run = item.data.run
    const act = {
      item,
      commit: () => {
        item.stop_held = false
        if (item.data.run === run && !item.ended) this.sendStop(item, run)
      },
      cancel: () => (item.stop_held = false),
    }
    if (at_once) act.commit()
    else this.hold(act, STOP_HOLD_MS)
    this.changed()
  }

  async sendStop(item, run) {
    item.stop_sent = true
    const failed = (why) => {
      if (item.data.run !== run || item.ended) return
      item.stop_sent = false
      this.notices.fail(`Could not stop ${item.name}: ${why}`, () => this.stop(item, true))
      this.changed()
    }
    // A sampler reads the wish at its next step, so slow ones have longer.
    const wait_ms = Math.max(STOP_ANSWER_MS, item.data.fps ? 3000 / item.data.fps : 0)
    try {
      await call("POST", `streams/${pathOf(item.name)}/stop`)
      setTimeout(() => failed(`the sampler did not answer in ${Math.round(wait_ms / 1000)} s.`), wait_ms)
    } catch (error) {
      failed(error.message)
    }
  }

  remove(recording) {
    this.removed.add(recording.id)
    const act = {
      recording,
      commit: async () => {
        try {
          await call("DELETE", `recordings/${encodeURIComponent(recording.id)}`)
          setTimeout(() => this.removed.delete(recording.id), DELETE_HOLD_MS)
        } catch (error) {
          this.removed.delete(recording.id)
          this.notices.fail(`Could not delete ${recording.name}: ${error.message}`)
          this.changed()
        }
      },
      cancel: () => this.removed.delete(recording.id),
    }
    this.hold(act, DELETE_HOLD_MS)
    this.changed()
  }

  hold(act, hold_ms) {
    act.timer = setTimeout(() => this.release(act), hold_ms)
    this.held.push(act)
    this.tellHeld(hold_ms)
  }

  release(act) {
    clearTimeout(act.timer)
    this.held = this.held.filter((other) => other !== act)
    act.commit()
    this.tellHeld()
    this.changed()
  }

  /** Take back one held act: that of `item`, or the newest. */
  undo(item) {
    const act = item ? this.held.find((act) => act.item === item) : this.held.at(-1)
    if (!act) return false
    clearTimeout(act.timer)
    this.held = this.held.filter((other) => other !== act)
    act.cancel()
    this.notices.say(act.item ? `${act.item.name} goes on` : `${act.recording.name} is kept`)
    this.tellHeld()
    this.changed()
    return true
  }

  tellHeld(hold_ms = STOP_HOLD_MS) {
    const last = this.held.at(-1)
    if (!last) return this.notices.clear("held")
    const same = this.held.filter((act) => Boolean(act.item) === Boolean(last.item))
    const what = same.length > 1 ? `${same.length}` : last.item ? last.item.name : last.recording.name
    const text = `${last.item ? "Stopping" : "Deleted"} ${what}.`
    const action = { label: same.length > 1 ? "Undo last" : "Undo", run: () => this.undo() }
    this.notices.toast(text, { key: "held", action, last_ms: hold_ms })
  }
}
