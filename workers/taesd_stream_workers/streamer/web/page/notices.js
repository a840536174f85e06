// What the page says beside the pictures: one toast, banners under the header, and the two spoken regions.

import { $, icon, make, put } from "./dom.js"
import { plural } from "./format.js"

const MERGE_MS = 5000

export class Notices {
  constructor() {
    this.box = $("#toast")
    ;[this.act, this.cross] = this.box.querySelectorAll("button")
    this.key = null
    this.left_ms = 0
    this.news = { started: [], ended: [] }
    this.news_timer = 0
    this.act.onclick = () => this.run()
    this.cross.onclick = () => this.clear(this.key)
    // Reading or pointing at it stops its clock.
    setInterval(() => {
      if (this.box.hidden || this.left_ms === Infinity || this.box.matches(":hover, :focus-within")) return
      this.left_ms -= 250
      if (this.left_ms <= 0) this.clear(this.key)
    }, 250)
  }

  /** gone(): it is closed, or replaced. */
  toast(text, { key = "note", action = null, last_ms = 5000, gone = null } = {}) {
    this.gone?.()
    Object.assign(this, { key, action, gone, left_ms: last_ms })
    put(this.box, { hidden: false })
    put(this.box.firstElementChild, { text })
    put(this.act, { hidden: !action, text: action?.label ?? "" })
    put(this.cross, { hidden: key === "held" })
    if (key !== "error") this.say(text)
  }

  run() {
    const { action } = this
    this.clear(this.key)
    action?.run?.()
  }

  clear(key) {
    if (this.key !== key) return
    this.gone?.()
    this.key = this.gone = null
    put(this.box, { hidden: true })
  }

  /** Something went wrong with what was asked: stays until it is dismissed. */
  fail(text, again) {
    this.toast(text, { key: "error", action: again ? { label: "Try again", run: again } : null, last_ms: Infinity })
    this.alarm(text)
  }

  say(text) {
    $("#status").textContent = text
  }

  alarm(text) {
    $("#alert").textContent = text
  }

  /** Starts and ends are said together, once in five seconds. */
  announce({ started, ended }) {
    this.news.started.push(...started)
    this.news.ended.push(...ended)
    if (!started.length && !ended.length) return
    this.news_timer ||= setTimeout(() => {
      const says = Object.entries(this.news).filter(([, names]) => names.length)
      this.say(says.map(([verb, names]) => `${names.length === 1 ? names[0] : plural(names.length, "stream")} ${verb}`).join(", "))
      this.news = { started: [], ended: [] }
      this.news_timer = 0
    }, MERGE_MS)
  }

  /** banners: [{key, text, label, run}]; built anew only where they changed. A new one is an alarm too. */
  banners(banners) {
    const root = $("#banners")
    const shown = new Map([...root.children].map((banner) => [banner.dataset.key, banner]))
    const news = []
    for (const { key, text, label, run } of banners) {
      const banner = shown.get(key) ?? make("div", { class: "banner", "data-key": key }, icon("warn"), make("p"), make("button", { class: "button" }))
      if (!shown.delete(key)) {
        root.append(banner)
        news.push(text)
      }
      put($("p", banner), { text })
      put($("button", banner), { text: label })
      $("button", banner).onclick = run
    }
    for (const banner of shown.values()) banner.remove()
    if (news.length) this.alarm(news.join(" "))
    document.body.style.setProperty("--banners", `${root.offsetHeight}px`)
  }
}
