"""From publish() to the screen in Chromium: our page beside JPEG by WebSocket, MSE and MJPEG, in one run.

    python -m tests.benchmarks.page_latency            (about two minutes; --quick: a smoke run)

One real daemon, one stream whose pictures tell their number in black and white bars. In each animation frame the page
reads the bars of what its element shows, and notes when a number is first there: so a figure holds decoding, encoding,
the way, drawing, and up to one 60 Hz frame of waiting. Ways: `webcodecs` is our player (`embed`); `jpeg` the same
without VideoDecoder; `mjpeg` an <img> on live.mjpeg; `mse` a <video> fed by a WebSocket with one fragment a picture, at
evenly spaced times, held at its newest frame, which is how MSE does best with pictures that come unevenly.
`grid`: 25 streams at 10 a second on the wall: pictures made, those never drawn, and tasks over 100 ms; where the others
were lost: `publisher` before they were sent, `broker` replaced by a newer one there, `worker` (and its way to the
streamer) and `page` behind it. Films that were made beside them: `--grid --set recording.film=off` is without. Last
line: JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from playwright.sync_api import Browser, Page

from taesd_stream import LatentPublisher
from taesd_stream.frames import CLOCK_HZ
from taesd_stream.media.fragments import Sample, fragment, init_segment, parameter_sets
from tests.daemon import Daemon, wait_for
from tests.page_fixture import LONG_TASKS, chromium
from tests.page_socket import PageSocket
from tests.pictures import sd1_latents_of

BITS: Final = 10
CELL: Final = 4  # latents a bar is wide: 32 pixels
SIDE: Final = BITS * CELL  # 320x320 pixels
WAYS: Final = ("webcodecs", "jpeg", "mse", "mjpeg")
STREAM: Final = "bench"
GRID: Final = 25

READER: Final = """selector => {
  const small = document.createElement("canvas")
  Object.assign(small, {width: BITS, height: 1})
  const context = small.getContext("2d", {willReadFrequently: true})
  window.seen = {}
  const look = () => {
    requestAnimationFrame(look)
    const element = document.querySelector(selector)
    if (!element || !(element.naturalWidth ?? element.videoWidth ?? element.width)) return
    context.drawImage(element, 0, 0, BITS, 1)
    const data = context.getImageData(0, 0, BITS, 1).data
    let number = 0
    for (let bit = 0; bit < BITS; bit++) number |= (data[4 * bit] > 128) << bit
    window.seen[number] ??= performance.timeOrigin + performance.now()
  }
  look()
}""".replace("BITS", str(BITS))

MSE_PAGE: Final = """<video muted></video><script>
const video = document.querySelector("video"), source = new MediaSource(), queue = []
let buffer = null
video.src = URL.createObjectURL(source)
const pump = () => {
  if (!buffer || buffer.updating || !queue.length) return
  buffer.appendBuffer(queue.shift())
}
source.onsourceopen = () => {
  buffer = source.addSourceBuffer(CODEC)
  buffer.onupdateend = () => {
    const end = buffer.buffered.length ? buffer.buffered.end(buffer.buffered.length - 1) : 0
    if (end) video.currentTime = end - 0.001
    pump()
  }
  pump()
}
window.feed = (text) => { queue.push(Uint8Array.from(atob(text), (c) => c.charCodeAt(0))); pump() }
</script>"""


def bars(number: int) -> np.ndarray[Any, Any]:
    """Latents of a picture that tells a number: a white bar for each 1."""
    white, black = (sd1_latents_of(colour, SIDE, CELL) for colour in ((235, 235, 235), (20, 20, 20)))
    return np.concatenate([white if number >> bit & 1 else black for bit in range(BITS)], axis=2)


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few pictures: does it run at all")
    parser.add_argument("--grid", action="store_true", help="the wall of 25 alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the daemon, as `up` has it")
    asked = parser.parse_args()
    quick = asked.quick
    results: dict[str, Any] = {"machine": platform.processor() or platform.machine()}
    with tempfile.TemporaryDirectory() as name, Daemon(Path(name), *asked.set) as daemon, chromium() as browser:
        for way in () if asked.grid else WAYS:
            results[way] = measure(daemon, browser, way, 15 if quick else 120)
            sys.stdout.write(f"{way:<10} {results[way]}\n")
        results["grid"] = measure_grid(daemon, browser, 3.0 if quick else 10.0)
        sys.stdout.write(f"grid       {results['grid']}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def _publisher(daemon: Daemon, stream: str) -> LatentPublisher:
    return LatentPublisher(daemon.broker, stream=stream, latent_format="sd1", record="off")


def measure(daemon: Daemon, browser: Browser, way: str, count: int) -> dict[str, float]:
    """Latency in ms of `count` pictures at 10 a second, and of three behind gaps of 2.5 s; how many were never seen."""
    with ExitStack() as stack:
        publisher = stack.enter_context(_publisher(daemon, STREAM))
        page = browser.new_context().new_page()
        stack.callback(page.context.close)
        publisher.publish(bars(0), step=0)
        wait_for(lambda: STREAM in daemon.streams(), of="the stream")
        pump = _PLAYERS[way](daemon, page, stack)
        sent: dict[int, float] = {}

        def publish(number: int, wait_s: float) -> None:
            sent[number] = time.time() * 1000
            publisher.publish(bars(number), step=number)
            deadline_s = time.monotonic() + wait_s
            while (left_s := deadline_s - time.monotonic()) > 0:
                pump(left_s)

        for number in range(1, 6):  # warm up
            publish(number, 0.2)
        sent.clear()
        for number in range(6, 6 + count):
            publish(number, 0.1)
        gaps = range(6 + count, 9 + count)
        for number in gaps:
            publish(number, 2.5)
        seen = {int(number): at_ms for number, at_ms in page.evaluate("window.seen").items()}
    late = sorted(seen[number] - sent[number] for number in sent if number in seen and number not in gaps)
    behind_gap = sorted(seen[number] - sent[number] for number in gaps if number in seen)
    return {
        "p50_ms": round(late[len(late) // 2], 1) if late else -1,
        "p95_ms": round(late[int(len(late) * 0.95)], 1) if late else -1,
        "after_gap_ms": round(behind_gap[len(behind_gap) // 2], 1) if behind_gap else -1,
        "unseen": sum(number not in seen for number in sent),
        "of": len(sent),
    }


def _wait(page: Page) -> Callable[[float], None]:
    return lambda left_s: page.wait_for_timeout(max(1.0, left_s * 1000))


def _webcodecs(daemon: Daemon, page: Page, _stack: ExitStack) -> Callable[[float], None]:
    page.goto(f"{daemon.web}/streams/{STREAM}/embed")
    page.evaluate(READER, "canvas:not([hidden])")
    page.wait_for_selector("canvas:not([hidden])", state="attached")
    return _wait(page)


def _jpeg(daemon: Daemon, page: Page, stack: ExitStack) -> Callable[[float], None]:
    page.add_init_script("delete self.VideoDecoder")
    return _webcodecs(daemon, page, stack)


def _mjpeg(daemon: Daemon, page: Page, _stack: ExitStack) -> Callable[[float], None]:
    page.goto(f"{daemon.web}/page/icon.svg")
    page.goto(f"{daemon.web}/healthz")
    page.evaluate(
        "name => { const img = new Image(); img.src = name; document.body.append(img) }",
        f"/streams/{STREAM}/live.mjpeg",
    )
    page.evaluate(READER, "img")
    return _wait(page)


def _mse(daemon: Daemon, page: Page, stack: ExitStack) -> Callable[[float], None]:
    viewer = stack.enter_context(PageSocket(daemon))
    viewer.watch({STREAM: "live"})
    header, payload = viewer.picture()
    sets = parameter_sets(payload)
    assert sets is not None
    codec = f'video/mp4; codecs="avc1.{sets[0][1:4].hex()}"'
    page.set_content(MSE_PAGE.replace("CODEC", json.dumps(codec)))
    page.evaluate(READER, "video")
    init = init_segment({}, width=header["width"], height=header["height"], sps=sets[0], pps=sets[1])
    numbers = iter(range(1 << 30))

    def feed(data: bytes) -> None:
        page.evaluate("text => feed(text)", base64.b64encode(data).decode())

    def show(header: dict[str, Any], payload: bytes) -> None:
        number = next(numbers)
        feed(fragment(number, [Sample(pts=number * CLOCK_HZ // 60, is_keyframe=header["keyframe"], payload=payload)]))

    feed(init)
    show(header, payload)

    def pump(left_s: float) -> None:
        with suppress(TimeoutError):
            show(*viewer.picture(timeout_s=max(0.001, left_s)))

    return pump


_PLAYERS: Final = {"webcodecs": _webcodecs, "jpeg": _jpeg, "mse": _mse, "mjpeg": _mjpeg}


_COUNTS: Final = {
    "made": 'packets_total{rendition="thumb"}',
    "films": 'packets_total{rendition="film"}',
    "received": 'broker{count="live_frames"}',
    "replaced": 'broker{count="live_replaced"}',
}


def _counts(daemon: Daemon) -> dict[str, float]:
    """How many pictures of tiles and films were made so far, frames came in at the broker, were replaced there."""
    text = daemon.get("/metrics")[1].decode()
    found = {key: text.partition(f"\ntaesd_stream_{name} ")[2].partition("\n")[0] for key, name in _COUNTS.items()}
    return {key: float(value or 0) for key, value in found.items()}


@contextmanager
def _painting(daemon: Daemon) -> Iterator[list[int]]:
    """25 streams at 10 pictures a second, and how many of each were sent so far."""
    stop = threading.Event()
    sent = [0] * GRID
    with ExitStack() as stack:
        publishers = [stack.enter_context(_publisher(daemon, f"grid/{n:02}")) for n in range(GRID)]
        shades = [sd1_latents_of((40 + 16 * shade, 90, 90), 32, 32) for shade in range(10)]

        def paint() -> None:
            step = 0
            while not stop.wait(0.1):
                for number, publisher in enumerate(publishers):
                    publisher.publish(shades[step % len(shades)], step=step)
                    sent[number] += 1
                step += 1

        thread = threading.Thread(target=paint)
        thread.start()
        stack.callback(thread.join)
        stack.callback(stop.set)
        yield sent


def measure_grid(daemon: Daemon, browser: Browser, measure_s: float) -> dict[str, float]:
    """25 streams at 10 pictures a second on the wall: drawn of sent, and the page's long tasks."""
    with ExitStack() as stack:
        sent = stack.enter_context(_painting(daemon))
        page = browser.new_context(viewport={"width": 1600, "height": 1400}).new_page()
        stack.callback(page.context.close)
        page.add_init_script(LONG_TASKS)
        page.goto(daemon.web + "/#/")
        canvases = "#wall canvas[data-stream^='grid/']:not([data-pictures='0'])"
        wait_for(lambda: page.locator(canvases).count() == GRID, 60.0, of="25 tiles")
        count = f'[...document.querySelectorAll("{canvases}")].reduce((sum, c) => sum + Number(c.dataset.pictures), 0)'
        page.evaluate("self.long_tasks.length = 0")
        before, sent_before, counts_before, began_s = page.evaluate(count), sum(sent), _counts(daemon), time.monotonic()
        page.wait_for_timeout(measure_s * 1000)
        counts = {key: value - counts_before[key] for key, value in _counts(daemon).items()}
        drawn, published, took_s = page.evaluate(count) - before, sum(sent) - sent_before, time.monotonic() - began_s
        long = page.evaluate("self.long_tasks")
    return {
        "published_per_s": round(published / took_s, 1),
        "made_per_s": round(counts["made"] / took_s, 1),
        "drawn_per_s": round(drawn / took_s, 1),
        "unseen": max(0, published - drawn),
        "of": published,
        "lost_publisher": round(published - counts["received"]),
        "lost_broker": round(counts["replaced"]),
        "lost_worker": round(counts["received"] - counts["replaced"] - counts["made"]),
        "lost_page": round(counts["made"] - drawn),
        "films_per_s": round(counts["films"] / took_s, 1),
        "tasks_over_100_ms": sum(one > 100 for one in long),
        "longest_task_ms": round(max(long, default=0.0)),
    }


if __name__ == "__main__":
    main()
