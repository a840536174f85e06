// What the address says is shown: the wall, the recordings, a stream, a run and its step, a recording, two runs.

/** {kind, name, id, run, seq} of a location's hash; of a comparison also runs and mode. */
export function parse(hash) {
  const path = decodeURIComponent(hash.replace(/^#\/?/, ""))
  const [, run, seq] = path.match(/^s\/([0-9a-f]{16})(?:\/(\d+))?$/) ?? []
  if (run) return { kind: "stage", name: null, id: null, run, seq: seq ? Number(seq) : null }
  const [, one, other, place, mode] = path.match(/^compare\/([0-9a-f]{16})\/([0-9a-f]{16})(?:\/(\d+|live)\/(wipe|side))?$/) ?? []
  if (one) return { kind: "compare", name: null, id: `${one} ${other}`, runs: [one, other], seq: /\d/.test(place) ? Number(place) : null, mode }
  if (path.startsWith("s/")) return { kind: "stage", name: path.slice(2), id: null }
  if (path.startsWith("r/")) return { kind: "playing", name: null, id: path.slice(2) }
  return { kind: path === "recordings" ? "recordings" : "wall", name: null, id: null }
}
