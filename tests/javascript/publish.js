// The client in JavaScript at work: publishes frames of one value each, ends at Stop, and says how it went.

// node publish.js ADDRESS STREAM RECORD COUNT

import { setTimeout as wait } from "node:timers/promises"
import { Publisher } from "./publisher.js"

const [address, stream, record, count] = process.argv.slice(2)
const publisher = new Publisher(address, { stream, kind: "steps", latent_format: "sd1", record, meta: { from: "JavaScript" } })
const opened = await publisher.opened()
let step = 0
for (; step < Number(count) && !publisher.stopped; step++) {
  publisher.publish(new Float32Array(4 * 8 * 8).fill(step / count), [4, 8, 8], { step, total_steps: Number(count) })
  await wait(10)
}
const ended = await publisher.close(20000, publisher.stopped ? "stopped" : "done")
console.log(JSON.stringify({ opened, ended, step, run: publisher.run, stream: publisher.info.stream, error: publisher.error }))
