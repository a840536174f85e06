"""The page in a real Chromium, against a host whose state the test writes: what it shows, and what it asks for."""

from __future__ import annotations

import gzip
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, Route, expect

from tests.page_fixture import PAGE, Json, Open, PageHost, await_colour, opening, recording, serving, stream

pytestmark = pytest.mark.browser

RED, GREEN, BLUE = (220, 30, 30), (30, 180, 60), (40, 60, 220)


def solid(colour: tuple[int, int, int], width: int = 64, height: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.full((height, width, 3), colour, np.uint8)


def jpeg(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(solid(colour)).save(out, "JPEG", quality=95)
    return out.getvalue()


def annex_b(colour: tuple[int, int, int]) -> bytes:
    """One H.264 keyframe, BT.709 limited, with its parameter sets in front."""
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width = encoder.height = 64
    encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 90000)
    encoder.options = {"tune": "zerolatency", "crf": "10", "threads": "1", "x264-params": "colormatrix=bt709"}
    frame = av.VideoFrame.from_ndarray(solid(colour), "rgb24")
    planes = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
    planes.pts, planes.time_base = 0, Fraction(1, 90000)
    return b"".join(bytes(packet) for packet in [*encoder.encode(planes), *encoder.encode(None)])


def one_colour(colours: dict[str, tuple[int, int, int]]) -> Any:
    """A picture source: each stream has its colour, JPEG or H.264 as asked for."""
    made = {(name, live): (annex_b if live else jpeg)(colour) for name, colour in colours.items() for live in (0, 1)}
    return lambda name, rendition, _key: ({}, made[name, int(rendition == "live")]) if name in colours else None


@pytest.fixture
def host() -> Iterator[PageHost]:
    with serving(PageHost()) as started:
        yield started


@pytest.fixture
def opened(browser: Browser, host: PageHost) -> Iterator[Open]:
    """Open the page at a hash and wait for its first state."""
    with opening(browser, host.url) as open_page:

        def open_and_wait(at: str = "", **options: Any) -> Page:
            page = open_page(at, **options)
            expect(page.locator("#tab-live .count")).not_to_be_empty()  # the first state has come
            expect(page.locator("body[data-link=on]")).to_be_attached()  # and by its socket too
            return page

        yield open_and_wait


PRESS = "document.querySelector('#banners button')?.click()"


def until(
    condition: Callable[[], object], page: Page, meanwhile: str = "() => new Promise(requestAnimationFrame)"
) -> None:
    """Let the page run, or do something again and again, until a condition of the host's side holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "the page did not do it in 10 s"
        page.evaluate(meanwhile)


def last_watch(host: PageHost) -> Json:
    watches = [message["streams"] for message in host.messages if message["type"] == "watch"]
    return watches[-1] if watches else {}


# --- pictures ---


@pytest.mark.parametrize("script", ["", "delete HTMLCanvasElement.prototype.transferControlToOffscreen"])
def test_each_tile_shows_its_own_picture(host: PageHost, opened: Open, script: str) -> None:
    """Three streams at once: each canvas holds its own stream's colour; also where no worker can own canvases."""
    colours = {"red": RED, "green": GREEN, "nested/blue": BLUE}
    host.streams = [stream(name, seq=5) for name in colours]
    host.source = one_colour(colours)
    page = opened(script=script)
    for name, colour in colours.items():
        canvas = f"canvas[data-stream='{name}'][data-seq='5']"
        expect(page.locator(canvas)).to_be_attached()
        await_colour(page, canvas, colour)


@pytest.mark.parametrize(("script", "rendition"), [("", "live"), ("delete self.VideoDecoder", "jpeg")])
def test_opened_stream_shows_its_colour(host: PageHost, opened: Open, script: str, rendition: str) -> None:
    """An opened stream comes as H.264, or as JPEG where the browser has no VideoDecoder, in the same colour."""
    host.streams = [stream("green"), stream("red")]
    host.source = one_colour({"green": GREEN, "red": RED})
    page = opened("#/s/green", script=script)
    canvas = f"#stage-canvas[data-stream=green][data-rendition={rendition}][data-seq='16']"
    expect(page.locator(canvas)).to_be_attached()
    await_colour(page, canvas, GREEN)
    assert last_watch(host) == {"green": rendition}


OVER_THE_BOUND = """async () => {
  const { Streams } = await import("/page/streams.js")
  const row = (name, state, record = "off") => ({ name, run: name, state, record, seq: 0 })
  const rows = [
    ...Array.from({ length: 150 }, (_, at) => row(`live${at}`, "live")),
    ...Array.from({ length: 64 }, (_, at) => row(`done${at}`, "done")),
  ]
  const streams = new Streams()
  streams.take(rows)
  const first = [...streams.values()]
  streams.take(rows)
  const second = [...streams.values()]
  streams.take(rows.map((one) => ({ ...one, state: "live" })))
  const again = streams.size
  const over = streams.take(rows.map((one) => ({ ...one, state: "done" }))).ended.length
  const kept = new Streams()
  for (let at = 0; at < 400; at += 1) kept.take([row(`kept${at}`, "done", "all")])
  return { size: first.length, is_same: first.every((item, at) => item === second[at]), again, over, kept: kept.size }
}"""


def test_more_streams_than_tiles(opened: Open) -> None:
    """The oldest ended ones go, and stay away while they are over; what is kept goes once nobody lists it."""
    page = opened("")
    assert page.evaluate(OVER_THE_BOUND) == {"size": 200, "is_same": True, "again": 214, "over": 214, "kept": 200}


def test_credit_brings_the_next_picture(host: PageHost, opened: Open) -> None:
    """A drawn picture returns its credit: the next one follows, and the canvas counts both."""
    host.streams = [stream("red", seq=0), stream("green")]
    host.source = one_colour({"red": RED})
    page = opened()
    expect(page.locator("canvas[data-stream=red][data-pictures='1']")).to_be_attached()
    until(lambda: {"type": "credit", "stream": "red", "rendition": "thumb"} in host.messages, page)
    host.streams[0]["seq"] = 1
    host.draw("red")
    expect(page.locator("canvas[data-stream=red][data-pictures='2'][data-seq='1']")).to_be_attached()


def test_an_overloaded_browser_waits_for_a_keyframe(host: PageHost, opened: Open) -> None:
    """While the decoder's queue is too long no delta goes in, and a keyframe is asked for at most twice a second."""
    host.streams = [stream("red"), stream("b")]
    whole = annex_b(RED)
    host.source = lambda _name, _rendition, key: ({"keyframe": key}, whole)
    script = """
      const Real = VideoDecoder
      self.fed = []
      self.VideoDecoder = class extends Real {
        get decodeQueueSize() { return self.behind ? 3 : super.decodeQueueSize }
        decode(chunk) { fed.push(chunk.type); super.decode(chunk) }
      }"""
    page = opened("#/s/red", script=ON_PAGE + script)
    expect(page.locator("#stage-canvas[data-pictures='1']")).to_be_attached()
    page.evaluate("self.behind = true")
    host.source = lambda _name, _rendition, _key: ({"keyframe": False}, whole)
    asked: list[Json] = []
    began_s = time.monotonic()

    def asked_again() -> bool:
        host.draw("red")
        asked[:] = [message for message in host.messages if message["type"] == "keyframe"]
        return len(asked) >= 3

    until(asked_again, page)
    assert time.monotonic() - began_s >= 2 * 0.5 - 0.05
    assert page.evaluate("self.fed") == ["key"]
    page.evaluate("self.behind = false")
    host.source = lambda _name, _rendition, _key: ({"keyframe": True}, whole)
    host.draw("red")
    expect(page.locator("#stage-canvas[data-pictures='2']")).to_be_attached()


def test_of_keyframes_too_the_newest_waits_for_an_overloaded_browser(host: PageHost, opened: Open) -> None:
    """Keyframes that come while the queue is full do not make it longer: the newest is shown once there is room."""
    host.streams = [stream("red"), stream("b")]
    script = """
      const Real = VideoDecoder
      self.held = null
      self.fed = 0
      self.VideoDecoder = class extends Real {
        get decodeQueueSize() { return held?.length ?? super.decodeQueueSize }
        decode(chunk) { fed++; if (held) held.push(() => super.decode(chunk)); else super.decode(chunk) }
      }"""
    host.source = one_colour({"red": RED})
    page = opened("#/s/red", script=ON_PAGE + script)
    await_colour(page, "#stage-canvas", RED)
    page.evaluate("self.held = []")
    coming = iter([annex_b(colour) for colour in [GREEN] * 6 + [BLUE]])
    host.source = lambda _name, _rendition, _key: ({}, next(coming))
    for _ in range(7):
        host.draw("red")
    host.alerts = [{"code": "disk_full", "text": "All of them are there."}]
    host.push()
    expect(page.get_by_role("alert")).to_have_text("All of them are there.")
    page.evaluate("const all = self.held; self.held = null; all.forEach((decode) => decode())")
    await_colour(page, "#stage-canvas", BLUE)
    assert page.evaluate("self.fed") == 5


def test_the_next_clip_goes_on_where_the_former_was(host: PageHost, opened: Open) -> None:
    """A clip of four pictures, ten a second: the next step's clip takes over at the third, not at its first."""
    page = opened(clock=True)
    page.evaluate("""async () => {
      const { ClipLoop } = await import("/page/playback.js")
      self.shown = []
      self.loop = new ClipLoop(({ header }) => void shown.push(`${header.seq}.${header.index}`))
      self.send = (seq) => { for (let index = 0; index < 4; index++) {
        loop.take({ header: { run: "r", seq, index, count: 4, pts: index * 9000 }, bytes: null }) } }
    }""")
    page.clock.pause_at(time.time() + 60)
    page.evaluate("send(0)")
    page.clock.run_for(220)
    assert page.evaluate("shown") == ["0.0", "0.1", "0.2"]
    page.evaluate("send(1)")
    page.clock.run_for(200)
    assert page.evaluate("shown") == ["0.0", "0.1", "0.2", "1.3", "1.0"]


def test_numbers_never_run_ahead_of_the_picture(host: PageHost, opened: Open) -> None:
    """While the daemon is at step 21, or done, and the tile shows the picture of step 17, the tile says 17."""
    host.streams = [stream("red", step=16, seq=16), stream("blue")]
    host.source = one_colour({"red": RED})
    page = opened()
    expect(page.locator("canvas[data-stream=red][data-seq='16']")).to_be_attached()
    host.streams[0].update(step=20, seq=20)
    host.streams[1].update(step=20, seq=20)
    host.push()
    expect(page.locator("[data-name=blue] .step")).to_have_text("21/28")
    expect(page.locator("[data-name=red] .step")).to_have_text("17/28")
    host.streams[0].update(state="done", step=27, seq=27, ended=time.time())
    host.push()
    expect(page.locator("[data-name=red] .say")).to_contain_text("Done in")
    expect(page.locator("[data-name=red] .step")).to_have_text("17/28")


def test_a_new_run_is_live_at_its_first_picture(host: PageHost, opened: Open) -> None:
    """A picture of the next run before the state tells of that run: the tile, done before, shows its step as live."""
    host.streams = [stream("red", state="done", seq=27, step=27, ended=time.time()), stream("b")]
    picture = jpeg(RED)
    run: Json = {}
    host.source = lambda name, _rendition, _key: (run, picture) if name == "red" else None
    page = opened()
    tile = page.locator("[data-name=red]")
    expect(tile.locator("article")).to_have_attribute("data-look", "done")
    expect(tile.locator("canvas[data-pictures='1']")).to_be_attached()
    until(lambda: {"type": "credit", "stream": "red", "rendition": "thumb"} in host.messages, page)
    run |= {"run": "f" * 16, "seq": 0, "step": 0}
    host.draw("red")
    expect(tile.locator("article")).to_have_attribute("data-look", "live")
    expect(tile.locator(".step")).to_have_text("1/28")


def test_a_new_run_has_no_numbers_before_its_picture(host: PageHost, opened: Open) -> None:
    """While the tile still shows the former run's picture, no step of the new run stands beside it."""
    host.streams = [stream("red", state="done", seq=27, step=27, ended=time.time()), stream("b")]
    host.source = one_colour({"red": RED})
    page = opened()
    tile = page.locator("[data-name=red]")
    expect(tile.locator("canvas[data-pictures='1']")).to_be_attached()
    expect(tile.locator(".step")).to_have_text("28/28")
    host.streams[0].update(run="f" * 16, state="live", seq=0, step=0, ended=None)
    host.push()
    expect(tile.locator(".say")).to_have_text("New run")
    expect(tile.locator(".step")).to_have_text("")


def test_only_tiles_in_sight_are_watched(host: PageHost, opened: Open) -> None:
    """Of 80 streams the page asks for those on screen; scrolled down, for the last and no more for the first."""
    host.streams = [stream(f"s{index:02}") for index in range(80)]
    page = opened()
    until(lambda: "s00" in last_watch(host), page)
    assert "s79" not in last_watch(host)
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    until(lambda: "s79" in last_watch(host) and "s00" not in last_watch(host), page)


def test_pause_stops_the_pictures(host: PageHost, opened: Open) -> None:
    """P asks for no pictures at all, says so, and a second P asks again."""
    host.streams = [stream("a"), stream("b")]
    page = opened()
    until(lambda: last_watch(host) == {"a": "thumb", "b": "thumb"}, page)
    page.keyboard.press("p")
    expect(page.get_by_text("Pictures paused").first).to_be_visible()
    until(lambda: last_watch(host) == {}, page)
    page.keyboard.press("p")
    until(lambda: "a" in last_watch(host), page)


def test_shown_is_told_on_the_daemons_clock(host: PageHost, opened: Open) -> None:
    """A drawn picture is reported with a time of the daemon's clock, after it was sent and not in the future."""
    host.streams = [stream("red"), stream("b")]
    host.source = one_colour({"red": RED})
    page = opened()
    before_us = time.monotonic_ns() // 1000
    shown: list[Json] = []

    def reported() -> bool:
        host.streams[0]["seq"] += 1
        host.draw("red")
        shown[:] = [message for message in host.messages if message["type"] == "shown"]
        return bool(shown)

    until(reported, page)
    assert shown[0]["stream"] == "red"
    assert before_us - 1_000_000 < shown[0]["shown_us"] <= time.monotonic_ns() // 1000 + 50_000


# --- states and words ---

NOW = 2_000_000_000  # unix seconds, where the page's clock is put
WORDS: list[tuple[Json, str, str, str]] = [
    ({"step": 16, "sigma": 3.417, "fps": 8.12, "latency_ms": 21.3}, "live", "σ 3.42 · 8.1 fps", "21 ms"),
    ({"state": "waiting", "step": None, "seq": None, "started": NOW - 6}, "waiting", "No step yet", "0:06"),
    ({"flags": ["degraded"], "note": "Skipping 1 in 2"}, "live", "Skipping 1 in 2", "21 ms"),
    ({"flags": ["degraded"], "decoder": "linear"}, "live", "Colours approximate", "21 ms"),
    ({"flags": ["stalled"], "updated": NOW - 18}, "stalled", "No step for 18 s", "21 ms"),
    ({"state": "done", "started": NOW - 22.2, "ended": NOW - 8}, "done", "Done in 14.2 s", "8 s ago"),
    ({"state": "stopped", "ended": NOW - 8}, "stopped", "Stopped by you", "8 s ago"),
    ({"state": "failed", "step": 8, "ended": NOW - 8}, "failed", "Sampler failed at 9", "8 s ago"),
    ({"state": "lost", "ended": NOW - 8}, "gone", "Sampler left", "8 s ago"),
    ({"flags": ["stopping"]}, "stopping", "", ""),
    ({"note": "No decoder for foo"}, "live", "No decoder for foo", "21 ms"),
]


def test_each_state_has_its_words(host: PageHost, browser: Browser) -> None:
    """Every state and flag shows the words that the design gives it."""
    host.streams = [stream(f"s{index}", **fields) for index, (fields, *_) in enumerate(WORDS)]
    page = browser.new_page()
    page.clock.set_fixed_time(NOW)
    page.goto(host.url)
    for index, (_, look, left, right) in enumerate(WORDS):
        tile = page.locator(f"[data-name=s{index}]")
        expect(tile.locator("article")).to_have_attribute("data-look", look)
        expect(tile.locator(".say")).to_have_text(left)
        expect(tile.locator(".second .aside")).to_have_text(right)
    expect(page.locator("[data-name=s1] .box-note")).to_have_text("Waiting for the first step")
    page.close()


def test_an_opened_stream_tells_what_it_makes_and_when(host: PageHost, opened: Open) -> None:
    """Prompt, seed, seconds a step and the time that is left stand beside the picture."""
    host.streams = [stream("a", fps=2.0, meta={"prompt": "a red dune", "seed": 4711}), stream("b")]
    page = opened("#/s/a")
    expect(page.locator(".prose")).to_have_text("a red dune")
    facts = page.locator(".facts")
    expect(facts.locator("dt", has_text="Seed").locator("xpath=following-sibling::dd[1]")).to_have_text("4711")
    figure = page.locator(".figures dt", has_text="Step time").locator("xpath=following-sibling::dd[1]")
    expect(figure).to_have_text("0.50 s")
    expect(page.locator("[data-part=left]")).to_have_text("about 6 s left")  # eleven steps, two a second


def test_tiles_keep_their_places(host: PageHost, opened: Open) -> None:
    """A new stream comes last, one that ends or is no longer listed stays where it was."""
    host.streams = [stream("a"), stream("b"), stream("c")]
    page = opened()
    names = page.locator("#wall .name")
    expect(names).to_have_text(["a", "b", "c"])
    host.streams = [stream("d"), stream("c"), stream("b", state="done", ended=time.time())]
    host.push()
    expect(names).to_have_text(["a", "b", "c", "d"])
    expect(page.locator("[data-name=a] .say")).to_have_text("Sampler left")


def test_words_of_others_stay_text(host: PageHost, opened: Open) -> None:
    """Markup in a prompt or an error is shown as it is and makes no element."""
    evil = "<img src=x onerror=document.title='owned'><b>bold</b>"
    host.streams = [
        stream("a", meta={"prompt": evil, "x": evil}, state="failed", end_text=evil, note=evil),
        stream("b"),
    ]
    host.recordings = [recording("a", meta={"prompt": evil})]
    page = opened("#/s/a")
    expect(page.locator(".prose")).to_have_text(evil)
    assert page.locator(".inspector img, .inspector b").count() == 0
    page.goto(host.url + "#/recordings")
    expect(page.locator(".rec-name span")).to_have_text(evil)
    assert page.locator(".rec-name img").count() == 0
    assert "owned" not in page.title()


def test_empty_page_shows_the_lines_of_the_file(host: PageHost, opened: Open) -> None:
    """With no stream the page shows the three lines of connect.json, its own address, and where samplers connect."""
    page = opened()
    ways = json.loads((PAGE / "connect.json").read_text())
    expect(page.get_by_role("heading", name="No streams yet")).to_be_visible()
    assert page.locator("#empty code").inner_text().split("\n") == ways[0]["lines"]
    expect(page.locator("#empty .quiet")).to_contain_text(f"Listening on 127.0.0.1:{host.port}.")
    expect(page.locator("#empty .quiet")).to_contain_text("set TAESD_STREAM_ADDRESS=tcp://127.0.0.1:5999.")
    host.streams = [stream("a"), stream("b")]
    host.push()
    expect(page.locator("#empty")).to_be_hidden()


def test_a_single_stream_is_opened(host: PageHost, opened: Open) -> None:
    """Opened without a hash while one stream is there, the page opens that stream."""
    host.streams = [stream("only/one")]
    page = opened()
    expect(page.get_by_role("heading", name="only/one")).to_be_visible()
    assert page.url.endswith("#/s/only/one")


def test_filter_and_chips(host: PageHost, opened: Open) -> None:
    """The filter looks at names and prompts; without a hit it says so and can be cleared."""
    host.streams = [
        stream("a", meta={"prompt": "a red dune"}),
        stream("b"),
        stream("c", state="done", ended=time.time()),
    ]
    page = opened()
    page.keyboard.press("/")
    page.keyboard.type("DUNE")
    expect(page.locator("#wall li:not([hidden])")).to_have_count(1)
    page.keyboard.type("x")
    expect(page.get_by_text('Nothing matches "DUNEx".')).to_be_visible()
    page.get_by_role("button", name="Clear filter").click()
    page.locator("[data-show=ended]").click()
    expect(page.locator("#wall li:not([hidden]) .name")).to_have_text(["c"])


# --- what is asked of the daemon ---


def test_record_is_the_daemons_word(host: PageHost, opened: Open) -> None:
    """Record asks for every frame; the dot comes on with the daemon's state, not with the click."""
    host.streams = [stream("nested/a"), stream("b")]
    page = opened()
    page.locator("[data-name='nested/a']").hover()
    button = page.get_by_role("button", name="Record nested/a")
    button.click()
    until(lambda: host.requests == [("POST", "streams/nested/a/record", {"mode": "all"})], page)
    expect(button).to_have_attribute("aria-pressed", "false")
    host.streams[0]["record"] = "all"
    host.push()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.locator("[data-name='nested/a'] .badge")).to_have_text("REC")
    button.click()
    until(lambda: host.requests[-1][2] == {"mode": "off"}, page)


def test_the_last_frame_alone_can_be_kept(host: PageHost, opened: Open) -> None:
    """The menu beside Record, and Shift+R, ask for the last frame; both show what the daemon says, and end it."""
    host.streams = [stream("a"), stream("b")]
    page = opened("#/s/a")
    menu = page.get_by_role("combobox", name="What is kept of this stream")
    expect(menu).to_have_value("off")
    menu.select_option("last")
    until(lambda: host.requests == [("POST", "streams/a/record", {"mode": "last"})], page)
    host.streams[0]["record"] = "last"
    host.push()
    expect(menu).to_have_value("last")
    expect(page.locator("#view-stage .badge")).to_have_text("Keeps last")
    page.get_by_role("heading", name="a", exact=True).focus()
    page.keyboard.press("Shift+R")
    until(lambda: host.requests[1:] == [("POST", "streams/a/record", {"mode": "off"})], page)
    host.streams[0]["record"] = "off"
    host.push()
    expect(menu).to_have_value("off")
    page.keyboard.press("Shift+R")
    until(lambda: len(host.requests) == 3 and host.requests[2][2] == {"mode": "last"}, page)


def test_what_could_not_be_recorded_is_offered_as_latents(host: PageHost, opened: Open) -> None:
    """A recording that waits, for a full disk say, offers the run's latents; a finished one does not."""
    host.recordings = [recording("a", state="failed", error="The disk is full."), recording("b")]
    page = opened(f"#/r/{host.recordings[0]['id']}")
    link = page.get_by_role("link", name="Download the latents")
    expect(link).to_have_attribute("href", f"/api/v1/runs/{host.recordings[0]['run']}/latents")
    page.evaluate(f"location.hash = '#/r/{host.recordings[1]['id']}'")
    expect(page.get_by_role("heading", name="b", exact=True)).to_be_visible()
    expect(link).to_have_count(0)


def test_a_refused_record_says_why(host: PageHost, opened: Open) -> None:
    """An error of the API is shown in the daemon's own words, and can be tried again."""
    host.streams = [stream("a"), stream("b")]
    host.refuse["record"] = (507, "the disk is full")
    page = opened("#/s/a")
    page.get_by_role("button", name="Record", exact=True).click()
    expect(page.locator("#toast")).to_contain_text("Could not start the recording of a: the disk is full")
    host.refuse.clear()
    page.get_by_role("button", name="Try again").click()
    until(lambda: len(host.requests) == 2, page)


def test_stop_waits_for_undo(host: PageHost, opened: Open) -> None:
    """Stop is held for three seconds: Undo takes it back, without it the request goes out."""
    host.streams = [stream("a"), stream("b")]
    page = opened("#/s/a", clock=True)
    expect(page.get_by_role("heading", name="a", exact=True)).to_be_visible()
    page.clock.pause_at(time.time() + 60)
    page.keyboard.press("x")
    expect(page.locator("#toast")).to_contain_text("Stopping a.")
    page.keyboard.press("z")
    page.clock.run_for(4000)
    assert host.requests == []
    page.keyboard.press("x")
    page.clock.run_for(2900)
    assert host.requests == []
    with page.expect_response("**/stop"):
        page.clock.run_for(200)
    assert host.requests == [("POST", "streams/a/stop", None)]


def test_a_held_stop_goes_out_when_the_page_is_left(host: PageHost, opened: Open) -> None:
    """Closing the page within the three seconds sends the stop."""
    host.streams = [stream("a"), stream("b")]
    page = opened("#/s/a")
    page.keyboard.press("x")
    expect(page.locator("#toast")).to_be_visible()
    page.goto(host.url + "page/icon.svg")
    until(lambda: host.requests == [("POST", "streams/a/stop", None)], page)


def test_a_stop_without_an_answer_is_said(host: PageHost, opened: Open) -> None:
    """A sampler that goes on five seconds after Stop: the page says so and offers to try again."""
    host.streams = [stream("a"), stream("b")]
    page = opened("#/s/a", clock=True)
    page.keyboard.press("Shift+X")
    until(lambda: host.requests, page)
    page.clock.run_for(6000)
    expect(page.locator("#toast")).to_contain_text("Could not stop a: the sampler did not answer in 5 s.")


def test_what_cannot_be_stopped_has_no_stop(host: PageHost, opened: Open) -> None:
    """A sampler that never reads the wish: its button is disabled, says why, and X does nothing."""
    host.streams = [stream("a", stoppable=False), stream("b")]
    page = opened("#/s/a")
    stop = page.locator(".actions [data-act=stop]")
    expect(stop).to_have_attribute("title", "This sampler cannot be stopped from here")
    expect(stop).to_have_attribute("aria-disabled", "true")
    page.keyboard.press("x")
    expect(page.locator("#toast")).to_be_hidden()


def test_delete_can_be_undone(host: PageHost, opened: Open) -> None:
    """Delete takes the row away at once and asks the daemon five seconds later, unless Undo came."""
    host.recordings = [recording("a", started=2.0), recording("b", started=1.0)]
    page = opened("#/recordings", clock=True)
    rows = page.locator("#recordings li")
    page.get_by_role("button", name="Delete a.mp4").click()
    expect(rows).to_have_count(1)
    page.get_by_role("button", name="Undo").click()
    expect(rows).to_have_count(2)
    page.get_by_role("button", name="Delete a.mp4").click()
    page.clock.run_for(5100)
    until(lambda: [request[:2] for request in host.requests if request[0] == "DELETE"], page)
    assert [entry["stream"] for entry in host.recordings] == ["b"]


def test_a_recording_plays_and_downloads(host: PageHost, opened: Open, tmp_path: Path) -> None:
    """A row opens the file in the stage, where it plays; Download gives its bytes under its name."""
    path = tmp_path / "a.mp4"
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=8)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        for shade in range(8):
            container.mux(video.encode(av.VideoFrame.from_ndarray(solid((shade * 20, 90, 90)), "rgb24")))
        container.mux(video.encode(None))
    host.recordings = [recording("a"), recording("b", state="recording")]
    host.files = {host.recordings[0]["id"]: path}
    page = opened("#/recordings")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download a.mp4").click()
    assert download.value.suggested_filename == "a.mp4"
    assert download.value.path().read_bytes() == path.read_bytes()
    page.locator(f"a[href='#/r/{host.recordings[0]['id']}']").click()
    until(lambda: page.locator("#stage-video").evaluate("video => video.currentTime") > 0, page)
    page.go_back()
    expect(page.get_by_label("Download b.mp4")).to_have_attribute("aria-disabled", "true")


# --- the line to the daemon ---


def test_a_lost_line_is_said_and_comes_back(host: PageHost, opened: Open) -> None:
    """The daemon goes: a banner, the tiles stay. It comes back: the banner goes, the new state is there."""
    host.streams = [stream("a"), stream("b")]
    page = opened()
    host.answers = False
    host.hang_up()
    expect(page.locator("#banners")).to_contain_text(f"Lost the connection to 127.0.0.1:{host.port}.")
    expect(page.locator("#wall li")).to_have_count(2)
    page.get_by_role("button", name="Try now").click()  # in vain, yet; the page goes on by itself
    host.daemon = "second"
    host.streams.append(stream("c"))
    host.answers = True  # last: it may try at any moment
    expect(page.locator("#wall li")).to_have_count(3)
    expect(page.locator("#banners > *")).to_have_count(0)
    expect(page.locator("#toast")).to_contain_text("taesd-stream restarted.")


def test_an_older_page_and_alerts_are_banners(host: PageHost, opened: Open) -> None:
    """Other page files than the daemon's, and what the daemon has to say, stand under the header."""
    host.page = "2"
    host.alerts = [{"code": "disk_full", "text": "Recording stopped: the disk is full. 12.4 MB were saved."}]
    page = opened()
    banners = page.locator(".banner")
    expect(banners).to_have_count(2)
    expect(banners.first).to_contain_text("This page is older than the daemon.")
    page.get_by_role("button", name="Dismiss").click()
    expect(banners).to_have_count(1)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("full", "as many viewers as it takes (web.max_viewers). Trying again"),
        ("token_wanted", "This address needs a token. Open the link that taesd-stream printed at start."),
    ],
)
def test_a_refused_page_says_why(host: PageHost, opened: Open, fault: str, words: str) -> None:
    """Too many viewers, or no token: the banner and the alert say that, and not that nobody answers."""
    host.streams = [stream("a"), stream("b")]
    page = opened()
    setattr(host, fault, True)
    host.hang_up()
    expect(page.locator("#banners")).to_contain_text(words)
    expect(page.locator("#alert")).to_contain_text(words)
    dials = host.dials
    expect(page.get_by_role("button", name="Try now")).to_be_visible()
    until(lambda: host.dials >= dials + 8, page, PRESS)  # by itself the page dials four times in that time
    expect(page.locator("#banners")).to_contain_text(words)  # it was in vain
    setattr(host, fault, False)
    until(lambda: not page.locator("#banners > *").count(), page, PRESS)


@pytest.mark.slow
def test_a_dead_network_is_noticed(host: PageHost, opened: Open) -> None:
    """Nothing arrives any more, nothing is closed: a banner within ten seconds, and the page comes back by itself."""
    host.streams = [stream("a"), stream("b")]
    page = opened()
    # from a regular ping on, not from one of the four at the start
    until(lambda: [message["type"] for message in host.messages].count("ping") > 5, page)
    host.silent = True
    expect(page.locator("#banners")).to_contain_text("Lost the connection", timeout=10_000)
    host.streams.append(stream("c"))
    host.silent = False
    expect(page.locator("#wall li")).to_have_count(3, timeout=20_000)
    expect(page.locator("#banners > *")).to_have_count(0)


def test_what_the_daemon_warns_of_is_an_alert(host: PageHost, opened: Open) -> None:
    """A full disk is told to who cannot see the banner, once."""
    host.streams = [stream("a"), stream("b")]
    page = opened()
    host.alerts = [{"code": "disk_full", "text": "Recording stopped: the disk is full."}]
    host.push()
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("Recording stopped: the disk is full.")
    page.evaluate("document.querySelector('#alert').textContent = ''")
    host.streams.append(stream("c"))
    host.push()
    expect(page.locator("#wall li")).to_have_count(3)
    page.evaluate("() => new Promise(done => setTimeout(done, 300))")  # the page has looked again
    expect(alert).to_have_text("")


# --- films ---

RUN = "0123456789abcdef"
ON_PAGE = "delete HTMLCanvasElement.prototype.transferControlToOffscreen;"  # where a test's script reaches
SILENT = """
  const Real = VideoDecoder
  self.VideoDecoder = class extends Real {
    configure(config) { this.silent = config.hardwareAcceleration !== SPEAKS; super.configure(config) }
    decode(chunk) { if (!this.silent) super.decode(chunk) }
  }"""


def film_of(host: PageHost, colours: list[tuple[int, int, int]], run: str = RUN, first_step: int = 0) -> None:
    """Give the run a film, one step a colour."""
    total = first_step + len(colours)
    host.steps[run] = [[seq, first_step + seq, total, 10.0 - seq, 100 * seq] for seq in range(len(colours))]
    made = {str(seq): annex_b(colour) for seq, colour in enumerate(colours)}
    made |= {f"{seq}.jpg": jpeg(colour) for seq, colour in enumerate(colours)}
    host.film = lambda _run, seq: made.get(seq)


@pytest.mark.parametrize("speaks", ["'prefer-software'", "'never'"])
def test_a_silent_decoder_does_not_hold_a_film_up(host: PageHost, opened: Open, speaks: str) -> None:
    """Steps are shown though the device's decoder stays silent, or every decoder does; and one can go on walking."""
    film_of(host, [RED, GREEN, BLUE])
    page = opened(f"#/s/{RUN}/1", script=ON_PAGE + SILENT.replace("SPEAKS", speaks))
    await_colour(page, "#stage-canvas", GREEN)
    page.get_by_role("slider", name="Step").fill("0")
    await_colour(page, "#stage-canvas", RED)


def test_a_run_without_a_stream_has_its_steps_in_sight(host: PageHost, opened: Open) -> None:
    """A link to a run that only its film remembers: the scrubber is there, with a small picture of each step."""
    film_of(host, [RED, GREEN, BLUE])
    page = opened(f"#/s/{RUN}/1")
    expect(page.get_by_role("slider", name="Step")).to_be_visible()
    await_colour(page, "#view-stage .strip", GREEN)


def test_a_lost_line_does_not_end_the_decoding_of_films(host: PageHost, opened: Open) -> None:
    """A step that could not be fetched comes once the line is back, as H.264 like those before it."""
    film_of(host, [RED, GREEN, BLUE])
    page = opened(f"#/s/{RUN}/0", script=ON_PAGE)
    await_colour(page, "#stage-canvas", RED)
    film_of(host, [RED, GREEN, BLUE, RED, GREEN], "f" * 16)
    tried: list[str] = []

    def lose(route: Route) -> None:
        tried.append(route.request.url)
        route.abort()

    page.route("**/film/*", lose)
    page.evaluate(f"location.hash = '#/s/{'f' * 16}/3'")
    until(lambda: tried, page)
    page.unroute("**/film/*")
    expect(page.locator("#stage-canvas[data-seq='3']")).to_be_attached()
    assert not any(path.endswith(".jpg") for _, path, _ in host.requests)


def test_a_link_to_a_step_that_is_gone_counts_as_people_do(host: PageHost, opened: Open) -> None:
    """A sampler that counts from step 5000: a link to a step that is not kept names the shown one alone."""
    film_of(host, [RED, GREEN], first_step=4999)
    page = opened(f"#/s/{RUN}/12")
    expect(page.locator("#toast")).to_contain_text("This step is no longer kept. Showing 5001, the nearest.")


def test_a_machine_that_slept_keeps_its_video(host: PageHost, opened: Open) -> None:
    """Suspended twice with a picture in the decoder: the page goes on with H.264, by the same decoder."""
    host.streams = [stream("green"), stream("b")]
    host.source = one_colour({"green": GREEN})
    script = """
      const Real = VideoDecoder
      self.asked = []
      self.held = null
      self.VideoDecoder = class extends Real {
        configure(config) { asked.push(config.hardwareAcceleration); super.configure(config) }
        decode(chunk) { if (held) held.push(() => super.decode(chunk)); else super.decode(chunk) }
      }"""
    page = opened("#/s/green", script=ON_PAGE + script, clock=True)
    for pictures in (1, 2, 3):
        expect(page.locator(f"#stage-canvas[data-pictures='{pictures}']")).to_be_attached()
        page.evaluate("self.held = []")
        host.draw("green")
        until(lambda: page.evaluate("self.held.length"), page)
        page.clock.fast_forward(5000)
        page.evaluate("self.held.splice(0).forEach((decode) => decode()); self.held = null")
    expect(page.locator("#stage-canvas[data-pictures='4'][data-rendition=live]")).to_be_attached()
    assert set(page.evaluate("self.asked")) == {"no-preference"}


# --- much of everything ---

CHANGES = """
  self.changes = 0
  const count = (changes) => self.changes += changes.length
  document.addEventListener("DOMContentLoaded", () => new MutationObserver(count)
    .observe(document.querySelector("#view-recordings"), {subtree: true, childList: true, attributes: true}))
"""


@pytest.mark.parametrize("name", ["a/my run", "Müller", "50%", "a%2Fb", "c#d?e"])
def test_a_recording_of_any_name_is_opened(host: PageHost, opened: Open, name: str) -> None:
    """Files may be called otherwise than ours, or renamed: whatever the id is, its row opens it, and a reload too."""
    host.streams = [stream("a"), stream("b")]
    host.recordings = [recording("shown", id=name)]
    page = opened("#/recordings")
    page.locator(".rec-open").click()
    for _ in range(2):
        expect(page.locator("#view-stage h1")).to_have_text("shown")
        page.reload()


def test_of_thousands_of_recordings_those_in_the_list_are_written(host: PageHost, opened: Open) -> None:
    """Of 3,000 recordings 50 rows are written, and once; all can be reached (`benchmarks/page_lists` has the time)."""
    host.streams = [stream("a"), stream("b")]
    host.recordings = [recording(f"r{index:04}", started=10_000.0 - index) for index in range(3000)]
    host.thumbs = {one["id"]: jpeg(RED) for one in host.recordings}
    page = opened(script=CHANGES)

    def tell_again() -> None:
        for _ in range(4):
            host.streams.append(stream(f"s{len(host.streams)}"))
            host.push()
            expect(page.locator("#tab-live .count")).to_have_text(f"{len(host.streams)}")

    tell_again()
    assert page.locator("#recordings li").count() == 0  # nobody looks at them
    page.evaluate("location.hash = '#/recordings'")
    rows = page.locator("#recordings b")
    expect(rows).to_have_count(50)
    until(lambda: page.evaluate("document.querySelector('#films').hidden"), page)
    before = page.evaluate("self.changes")
    tell_again()
    assert page.evaluate("self.changes") == before  # nothing of them is new
    host.recordings.insert(0, recording("newest", started=20_000.0))
    host.recordings = [one for one in host.recordings if one["stream"] != "r0001"]
    host.push()
    expect(rows.nth(0)).to_have_text("newest")
    expect(rows.nth(2)).to_have_text("r0002")
    expect(rows).to_have_count(50)
    page.get_by_role("button", name="Show 50 of 2950 more").press("Enter")
    expect(rows).to_have_count(100)
    expect(page.locator("#recordings li").nth(50).locator(".rec-open")).to_be_focused()
    assert page.evaluate("self.changes") < 3000  # of the thousands that nobody sees nothing was written


def test_two_long_films_are_laid_side_by_side(host: PageHost, opened: Open) -> None:
    """Two runs of 3,000 steps each, with other totals, are matched by sigma from their ends on."""
    for run, total in (("a" * 16, 3000), ("b" * 16, 3001)):
        host.steps[run] = [[seq, seq, total, 3000.0 - seq, 100 * seq] for seq in range(3000)]
    picture = annex_b(GREEN)
    host.film = lambda _run, _seq: picture
    page = opened(f"#/compare/{'a' * 16}/{'b' * 16}")
    expect(page.locator("#view-compare .state")).to_contain_text("Matched by sigma: 3000 and 3001 steps")
    await_colour(page, "#compare-b", GREEN)
    page.keyboard.press("Home")
    expect(page.locator("#compare-b[data-seq='0']")).to_be_attached()


# --- keys, access, layout ---


def test_the_wall_works_by_keys(host: PageHost, opened: Open) -> None:
    """One tab stop, arrows move by place, Enter opens, Escape comes back to the same tile, R records it."""
    host.streams = [stream(f"s{index}") for index in range(8)]
    page = opened()
    page.locator("[data-name=s0] .name").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    name = page.evaluate("document.activeElement.closest('li').dataset.name")
    columns = page.evaluate("getComputedStyle(wall).gridTemplateColumns.split(' ').length")
    assert name == f"s{1 + columns}"
    assert page.locator("#wall .name[tabindex='0']").count() == 1
    expect(page.locator("#info")).to_contain_text(name)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=name)).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(f"[data-name={name}] .name")).to_be_focused()
    page.keyboard.press("r")
    until(lambda: host.requests == [("POST", f"streams/{name}/record", {"mode": "all"})], page)


def test_single_keys_can_be_turned_off(host: PageHost, opened: Open) -> None:
    """With single-key shortcuts off, X stops nothing; the choice is kept."""
    host.streams = [stream("a"), stream("b")]
    page = opened("#/s/a")
    page.keyboard.press("?")
    page.get_by_role("switch", name="Single-key shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.reload()
    expect(page.get_by_role("heading", name="a", exact=True)).to_be_visible()
    page.keyboard.press("x")
    expect(page.locator("#toast")).to_be_hidden()


def test_every_control_has_a_name(host: PageHost, opened: Open) -> None:
    """No button, link, field or picture without an accessible name, on any view."""
    host.streams = [stream("a"), stream("b", meta={"prompt": "x"})]
    host.recordings = [recording("a")]
    page = opened()
    for view in ("#/", "#/s/b", "#/recordings", f"#/r/{host.recordings[0]['id']}"):
        page.goto(host.url + view)
        until(lambda: page.locator("main").inner_text(), page)
        tree = page.locator("body").aria_snapshot()
        nameless = [line for line in tree.splitlines() if re.search(r"- (button|link|textbox|img|switch)\s*:?$", line)]
        assert nameless == []


@pytest.mark.parametrize("width", [320, 390, 820])
def test_nothing_is_wider_than_the_screen(host: PageHost, opened: Open, width: int) -> None:
    """No view scrolls sideways, down to 320 px."""
    host.streams = [stream("a-name-that-is-much-too-long/for-a-tile-of-any-size"), stream("b", meta={"p": "x" * 300})]
    host.recordings = [recording("a", meta={"prompt": "x" * 300}), recording("b", state="recording")]
    page = opened(viewport={"width": width, "height": 700})
    for view in ("#/", "#/s/b", "#/recordings", f"#/r/{host.recordings[0]['id']}"):
        page.goto(host.url + view)
        expect(page.locator("#view-wall, #view-stage, #view-recordings").locator("visible=true")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_phone_shows_the_picture_from_edge_to_edge(host: PageHost, opened: Open) -> None:
    """On a phone the stage has the width of the screen and the shape of its picture."""
    host.streams = [stream("a", width=640, height=384), stream("b")]
    page = opened("#/s/a", viewport={"width": 390, "height": 844})
    box = page.locator(".stage").bounding_box()
    assert box is not None
    assert (box["x"], box["width"], round(box["height"])) == (0, 390, 234)


def test_less_motion_has_no_transitions(host: PageHost, opened: Open) -> None:
    """Who asks for less motion gets none of the page's own."""
    host.streams = [stream("a"), stream("b")]
    for motion, expected in (("no-preference", "0.08s"), ("reduce", "0s")):
        page = opened(reduced_motion=motion)
        assert page.locator(".acts").first.evaluate("acts => getComputedStyle(acts).transitionDuration") == expected


def test_theme_is_kept(host: PageHost, opened: Open) -> None:
    """The theme of the help dialog beats the system's, and is there again before the first paint."""
    page = opened(color_scheme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("?")
    page.get_by_role("button", name="Light").click()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light != dark


def test_the_page_is_small_and_needs_nobody_else() -> None:
    """All files together are under 64 kB on the wire, and no address of another host is in them."""
    files = [path for path in PAGE.iterdir() if path.is_file()]
    assert sum(len(gzip.compress(path.read_bytes())) for path in files) < 64_000
    for path in files:
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", path.read_text()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, path.name
