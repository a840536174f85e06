// What stands where no stream is yet: the lines that connect a sampler, from the one file that is tested to run.

import { $, copyText, make, put } from "./dom.js"

const COPIED_MS = 1500

export async function fillEmpty({ host, say }) {
  const root = $("#empty")
  const ways = await (await fetch(new URL("./connect.json", import.meta.url))).json()
  const chips = ways.map((way) => make("button", { text: way.title }))
  const choose = (chosen) => {
    put($("[data-part=lead]", root), { text: chosen.lead })
    put($("code", root), { text: chosen.lines.join("\n") })
    chips.forEach((chip, index) => put(chip, { "aria-pressed": ways[index] === chosen }))
  }
  chips.forEach((chip, index) => (chip.onclick = () => choose(ways[index])))
  $(".chips", root).append(...chips)
  choose(ways[0])
  const copy = $("[data-part=copy]", root)
  copy.onclick = async () => {
    const text = (await copyText($("code", root).textContent)) ? "Copied" : "Select and copy"
    put(copy.lastElementChild, { text })
    say(text)
    setTimeout(() => put(copy.lastElementChild, { text: "Copy" }), COPIED_MS)
  }
  const { set } = root.dataset
  const there = set && ` Where the sampler runs, set ${set.replace("*", location.hostname)}.`
  put($("[data-part=listening]", root), { text: `Listening on ${host}. Recordings you make are kept under Recordings.${there}` })
}
