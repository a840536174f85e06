// What the address says is shown: the wall, the recordings, a stream, a run and its step, a recording, two runs.

/** What it says of {kind, name, id, run, seq, runs, mode}; what may be a run may be a stream's name, too. */
export function parse(hash) {
  let path = hash.replace(/^#\/?/, "")
  try {
    path = decodeURIComponent(path)
  } catch {} // "50%" is itself
  const [, one, other, place, mode] = path.match(/^compare\/([0-9a-f]{16})\/([0-9a-f]{16})(?:\/(\d+|live)\/(wipe|side))?$/) ?? []
  if (one) return { kind: "compare", id: `${one} ${other}`, runs: [one, other], seq: /\d/.test(place) ? Number(place) : null, mode }
  const [, run = null, seq] = path.match(/^s\/([0-9a-f]{16})(?:\/(\d+))?$/) ?? []
  if (path.startsWith("s/")) return { kind: "stage", name: path.slice(2), run, seq: seq ? Number(seq) : null }
  if (path.startsWith("r/")) return { kind: "playing", id: path.slice(2) }
  return { kind: path === "recordings" ? path : "wall" }
}
