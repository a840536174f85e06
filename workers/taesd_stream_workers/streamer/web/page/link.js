// Whether the daemon answers, and the banners under the header: that it does not, and what it warns of.

import { $ } from "./dom.js"

const BANNER_MS = 800 // a short break is nobody's business
const GIVEN_UP_MS = 30000
const TRY_LATER = 1013 // RFC 6455's registry
const { host } = location

export class Link {
  first = true // the daemon has said nothing yet
  version = ""
  daemon = null // which start of it
  lost_ms = null
  lost_at = null
  code = null // why: WebSocket's
  refused = false // the daemon answers, and asks for its token
  retry_at_ms = 0
  old_page = false
  alerts = []
  dismissed = new Set()

  /** retry(): dial again now. */
  constructor(notices, retry) {
    Object.assign(this, { notices, retry })
  }

  hello({ daemon, version, page }) {
    if (this.daemon && this.daemon !== daemon) this.notices.toast("taesd-stream restarted. Earlier runs show their last picture.")
    Object.assign(this, { daemon, version, lost_ms: null, refused: false, old_page: page !== $("meta[name=page-version]").content })
    document.body.dataset.link = "on"
    this.tell()
  }

  closed({ retry_at_ms, code }) {
    if (this.lost_ms === null) Object.assign(this, { lost_ms: performance.now(), lost_at: new Date() })
    Object.assign(this, { retry_at_ms, code })
    this.lookWhy()
  }

  /** A socket tells nothing of a refusal; a request does. */
  async lookWhy() {
    const answer = await fetch("/page/icon.svg", { cache: "no-store" }).catch(() => null)
    this.refused = answer?.status === 401
  }

  tell(alerts = this.alerts) {
    this.alerts = alerts
    const banners = []
    const lost_for_ms = this.lost_ms === null ? 0 : performance.now() - this.lost_ms
    if (lost_for_ms > BANNER_MS) {
      banners.push({ ...this.lostWords(lost_for_ms), label: "Try now", run: this.retry })
      document.body.dataset.link = "off"
    }
    if (this.old_page) banners.push({ key: "old", text: "This page is older than the daemon.", label: "Reload", run: () => location.reload() })
    for (const { code, text } of alerts) {
      const key = `${code} ${text}`
      if (!this.dismissed.has(key)) banners.push({ key, text, label: "Dismiss", run: () => this.dismissed.add(key) && this.tell() })
    }
    this.notices.banners(banners)
  }

  lostWords(lost_for_ms) {
    if (this.refused) return { key: "refused", text: "This address needs a token. Open the link that taesd-stream printed at start." }
    const wait_s = Math.ceil((this.retry_at_ms - Date.now()) / 1000)
    const next = wait_s > 0 ? `Trying again in ${wait_s} s.` : "Trying again now."
    if (this.code === TRY_LATER) return { key: "full", text: `${host} has as many viewers as it takes (web.max_viewers). ${next}` }
    const key = "lost"
    if (lost_for_ms > GIVEN_UP_MS) return { key, text: `Nothing answers at ${host}. If taesd-stream was stopped, start it again; this page reconnects by itself.` }
    if (this.first) return { key, text: `No connection to ${host}. ${next}` }
    return { key, text: `Lost the connection to ${host}. These pictures are from ${this.lost_at.toLocaleTimeString()}. ${next}` }
  }
}
