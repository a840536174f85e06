// The worker's entry: the first message has the settings, each later one is for Pictures.

import { Pictures } from "./pictures.js"

let pictures = null
self.onmessage = ({ data }) => {
  if (pictures) pictures.take(data)
  else pictures = new Pictures((message) => self.postMessage(message), data)
}
