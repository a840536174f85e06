"""The page in a real Chromium over a real daemon: what a person sees of latents that a sampler publishes."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, ViewportSize, expect

from taesd_stream import LatentPublisher
from taesd_stream_workers.commands.demo import DemoSamplers
from tests.daemon import Daemon, once_in_three, wait_for
from tests.page_fixture import Colour, Open, await_colour, chromium_path, middle_of, opening
from tests.pictures import PATCHES, decode_file, sd1_latents_of

WAIT_S = 30.0
GREY = (120, 120, 120)
RED, BLUE, MAGENTA = PATCHES["red"], PATCHES["blue"], PATCHES["magenta"]
NO_DECODER = "delete self.VideoDecoder"
SINKS = [pytest.param("", "live", id="webcodecs"), pytest.param(NO_DECODER, "jpeg", id="jpeg")]

expect.set_options(timeout=WAIT_S * 1000)


@pytest.fixture
def opened(browser: Browser, daemon: Daemon) -> Iterator[Open]:
    """Open the daemon's page at a hash; errors of its scripts fail the test."""
    with opening(browser, daemon.web) as open_page:
        yield open_page


@contextlib.contextmanager
def painting(daemon: Daemon, stream: str) -> Iterator[LatentPublisher]:
    """A sampler that publishes another colour at each step, about ten a second, until the block ends."""
    stop = threading.Event()
    shades = [sd1_latents_of((40 + 16 * shade, 200 - 12 * shade, 90), 16, 16) for shade in range(12)]

    def paint() -> None:
        step = 0
        while not stop.wait(0.1):
            publisher.publish(shades[step % len(shades)], step=step, total_steps=100_000)
            step += 1

    with LatentPublisher(daemon.broker, stream=stream, latent_format="sd1", record="off") as publisher:
        thread = threading.Thread(target=paint)
        thread.start()
        try:
            yield publisher
        finally:
            stop.set()
            thread.join()


def await_step(daemon: Daemon, publisher: LatentPublisher, seq: int) -> None:
    """Wait until the daemon has this publish of the run."""

    def is_there() -> bool:
        row = daemon.streams().get(publisher.stream, {})
        return (row.get("run"), row.get("seq")) == (publisher.run, seq)

    wait_for(is_there, WAIT_S, of=f"step {seq} of {publisher.stream}")


def require_h264(page: Page) -> None:
    """Skip where this Chromium was built without the decoder that the claim is about."""
    asked = "VideoDecoder.isConfigSupported({codec: 'avc1.42001f'}).then(answer => answer.supported)"
    if not page.evaluate(asked):
        pytest.skip("this Chromium has no H.264 decoder")


def tile_canvas(page: Page, stream: str) -> str:
    """Selector of a stream's canvas on the wall, scrolled into sight: only those get pictures."""
    page.locator(f"[data-name='{stream}']").scroll_into_view_if_needed(timeout=WAIT_S * 1000)
    return f"#wall canvas[data-stream='{stream}']"


def await_picture(page: Page, canvas: str, more: str = "") -> None:
    """Wait until the canvas has drawn one; more: of its data attributes, as a selector."""
    expect(page.locator(f"{canvas}:not([data-pictures='0']){more}")).to_be_attached()


def await_motion(page: Page, canvas: str, step: str) -> None:
    """Wait until the canvas, read again and again, has had several colours, and the text of the step with it."""
    await_picture(page, canvas)
    colours: set[Colour] = set()
    steps: set[str] = set()

    def moved() -> bool:
        colours.add(middle_of(page, canvas))
        steps.add(page.locator(step).inner_text())
        return len(colours) > 3 and len(steps) > 3

    wait_for(moved, WAIT_S, of="moving pictures")


def record_some(daemon: Daemon, page: Page, button: str, run: str) -> None:
    """Press Record, press again after some frames; the file is finished, and holds every frame it says."""
    record = page.locator(button)
    record.click()
    expect(record).to_have_attribute("aria-pressed", "true")

    def frames() -> bool:
        rows = daemon.json("/api/v1/recordings")["recordings"]
        return any(row["run"] == run and row["frames"] >= 5 for row in rows)

    wait_for(frames, WAIT_S, of="5 recorded frames")
    record.click()
    expect(record).to_have_attribute("aria-pressed", "false")
    recording = daemon.recording(run)
    assert len(decode_file(daemon.file(recording["id"]))) == recording["frames"] >= 5


def test_the_page_shows_moving_pictures_and_records(daemon: Daemon, opened: Open) -> None:
    """On the wall, a stream's pixels and its step move, and its Record button yields a file that decodes."""
    with painting(daemon, "page/tile") as publisher:
        page = opened("#/")
        await_motion(page, tile_canvas(page, "page/tile"), "[data-name='page/tile'] .step")
        page.locator("[data-name='page/tile']").hover()
        record_some(daemon, page, "[data-name='page/tile'] [data-act=record]", publisher.run)


@pytest.mark.browser
@pytest.mark.parametrize(("script", "rendition"), SINKS)
def test_an_opened_stream_moves_and_records(daemon: Daemon, opened: Open, script: str, rendition: str) -> None:
    """The opened stream moves as H.264, and as JPEG where VideoDecoder is missing; Record yields a file either way."""
    with painting(daemon, f"page/{rendition}") as publisher:
        page = opened(f"#/s/page/{rendition}", script=script)
        if not script:
            require_h264(page)
        canvas = f"#stage-canvas[data-rendition={rendition}]"
        await_motion(page, canvas, ".figures dd >> nth=0")
        record_some(daemon, page, ".actions [data-act=record]", publisher.run)


@pytest.mark.browser
def test_an_opened_stream_tells_why_this_decoder(daemon: Daemon, opened: Open) -> None:
    """Beside the name of what decodes a stream stands why it is this one, and the way to a better one."""
    with painting(daemon, "page/why"):
        facts = opened("#/s/page/why").locator(".facts")
        expect(facts).to_contain_text("Why this decoder")
        expect(facts).to_contain_text("no weights of taesd were found")


@pytest.mark.browser
def test_colours_are_right_on_tiles(daemon: Daemon, opened: Open) -> None:
    """White, black and six patches read back as themselves from the canvases of the wall."""
    with contextlib.ExitStack() as publishers:
        page = opened("#/")
        for name, colour in PATCHES.items():
            publisher = LatentPublisher(daemon.broker, stream=f"patch/{name}", latent_format="sd1")
            publishers.enter_context(publisher).publish(sd1_latents_of(GREY), step=0, total_steps=9)
            canvas = tile_canvas(page, f"patch/{name}")
            await_colour(page, canvas, GREY)
            publisher.publish(sd1_latents_of(colour), step=1, total_steps=9)
            await_colour(page, canvas, colour)


@pytest.mark.browser
@pytest.mark.parametrize(("script", "rendition"), SINKS)
def test_colours_are_right_when_opened(daemon: Daemon, opened: Open, script: str, rendition: str) -> None:
    """White, black and six patches read back as themselves from the opened stream, as H.264 and as JPEG."""
    page = opened("#/recordings", script=script)
    if not script:
        require_h264(page)
    for name, colour in PATCHES.items():
        stream = f"{rendition}/{name}"
        with LatentPublisher(daemon.broker, stream=stream, latent_format="sd1") as publisher:
            publisher.publish(sd1_latents_of(GREY), step=0, total_steps=9)
            page.goto(f"{daemon.web}/#/s/{stream}")
            canvas = f"#stage-canvas[data-stream='{stream}'][data-rendition={rendition}]"
            await_colour(page, canvas, GREY)
            publisher.publish(sd1_latents_of(colour), step=1, total_steps=9)
            await_colour(page, canvas, colour)


@pytest.mark.browser
@pytest.mark.parametrize("at", ["#/", "#/s/page/late"])
def test_a_late_viewer_sees_the_newest_picture(daemon: Daemon, opened: Open, at: str) -> None:
    """Pages opened between two slow steps show the step that was published last, without another publish."""
    with LatentPublisher(daemon.broker, stream="page/late", latent_format="sd1") as publisher:
        for step, colour in enumerate((RED, BLUE)):
            publisher.publish(sd1_latents_of(colour), step=step, total_steps=9)
            await_step(daemon, publisher, step)
            page = opened(at)
            canvas = tile_canvas(page, "page/late") if at == "#/" else "#stage-canvas"
            await_picture(page, canvas, f"[data-seq='{step}']")
            await_colour(page, canvas, colour)


DRAWN_AT = """
  self.drawn_ms = null
  new MutationObserver(() => {
    if (document.querySelector("canvas[data-pictures]:not([data-pictures='0'])")) drawn_ms ??= performance.now()
  }).observe(document, {subtree: true, childList: true, attributes: true})"""


@pytest.mark.browser
@pytest.mark.parametrize("at", ["#/", "#/s/page/soon"])
def test_a_late_viewer_sees_a_picture_at_once(daemon: Daemon, opened: Open, at: str) -> None:
    """Opened between two steps, a page draws the last picture within a second of being asked; one try of three."""
    with LatentPublisher(daemon.broker, stream="page/soon", latent_format="sd1") as publisher:

        def seq() -> int:
            told: int | None = daemon.streams().get(publisher.stream, {}).get("seq")
            return -1 if told is None else told

        def is_sent(before: int) -> bool:
            publisher.publish(sd1_latents_of(RED), step=0)
            return (
                seq() > before
            )  # while nobody watches, a publish within 2 s of the last one that went is only counted

        def drawn_ms(_: int) -> float:
            wait_for(partial(is_sent, seq()), WAIT_S, of="a picture that nobody has seen")
            page = opened(at, script=DRAWN_AT)
            taken_ms = wait_for(lambda: page.evaluate("self.drawn_ms"), WAIT_S, of="a picture")
            page.context.close()
            return float(taken_ms)

        once_in_three(drawn_ms, lambda taken_ms: taken_ms < 1000)


@pytest.mark.browser
@pytest.mark.parametrize("at", ["#/", "#/s/page/again"])
def test_a_stream_that_runs_again_shows_its_new_run(daemon: Daemon, opened: Open, at: str) -> None:
    """An open page goes from the last picture of a run to the pictures of the next run of that name."""
    first = LatentPublisher(daemon.broker, stream="page/again", latent_format="sd1")
    for step in range(3):
        first.publish(sd1_latents_of(RED), step=step, total_steps=3)
    await_step(daemon, first, 2)
    page = opened(at)
    canvas = tile_canvas(page, "page/again") if at == "#/" else "#stage-canvas"
    await_picture(page, canvas, "[data-seq='2']")
    await_colour(page, canvas, RED)
    first.close()
    said = page.locator("[data-name='page/again'] .say" if at == "#/" else "#view-stage .state")
    expect(said).to_contain_text("Done in")
    with LatentPublisher(daemon.broker, stream="page/again", latent_format="sd1") as second:
        second.publish(sd1_latents_of(BLUE), step=0, total_steps=3)
        await_picture(page, canvas, "[data-seq='0']")
        await_colour(page, canvas, BLUE)
        expect(said).not_to_contain_text("Done in")
    assert page.locator("[data-name='page/again']").count() == 1


@pytest.mark.browser
def test_a_recording_is_listed_plays_and_downloads(daemon: Daemon, opened: Open) -> None:
    """The list has a row for a kept run: it plays in the page, and its download is an MP4 of the run's frames."""
    with LatentPublisher(daemon.broker, stream="page/kept", latent_format="sd1", record="all") as publisher:
        pace = threading.Event()  # never set: a film has the times of its sampler, and must last to be seen playing
        for step in range(9):
            publisher.publish(sd1_latents_of((60 + 15 * step, 90, 90)), step=step, total_steps=9)
            pace.wait(0.1)
        assert publisher.wait_until_acked(WAIT_S), publisher.error
    recording = daemon.recording(publisher.run)
    page = opened("#/recordings")
    require_h264(page)
    row = page.locator(f"[data-id='{recording['id']}']")
    expect(row).to_contain_text("9 frames")
    with page.expect_download() as download:
        row.locator("[data-act=download]").click()
    assert download.value.suggested_filename.endswith(".mp4")
    assert len(decode_file(download.value.path())) == 9
    statuses: list[int] = []
    page.on("response", lambda answer: statuses.append(answer.status) if answer.url.endswith("?inline=1") else None)
    row.locator(".rec-open").click()
    video = page.locator("#stage-video")
    wait_for(lambda: video.evaluate("video => video.currentTime") > 0, WAIT_S, of="a playing video")
    assert set(statuses) == {206}  # by ranges: that is how it can jump about in the file


# --- pictures of the page ---


def pixels(path: Path) -> NDArray[np.int16]:
    return np.asarray(Image.open(path).convert("RGB")).astype(np.int16)


@pytest.mark.browser
def test_a_page_without_time_shows_pictures(tmp_path: Path) -> None:
    """A screenshot tool that lets no real time pass, but for what the page loads, gets the tiles' pictures too."""
    chrome = chromium_path()
    if chrome is None:
        pytest.skip("no Chromium in the path")
    options = ["--headless=new", "--no-sandbox", "--window-size=1280,800", "--virtual-time-budget=8000"]
    shot = tmp_path / "page.png"
    with Daemon(tmp_path) as daemon, contextlib.ExitStack() as publishers:
        for stream in ("one", "two"):
            publisher = LatentPublisher(daemon.broker, stream=stream, latent_format="sd1")
            publishers.enter_context(publisher).publish(sd1_latents_of(MAGENTA), step=0, total_steps=9)
            await_step(daemon, publisher, 0)
        subprocess.run([chrome, *options, f"--screenshot={shot}", daemon.web], check=True, capture_output=True)
    shown = int((np.abs(pixels(shot) - np.array(MAGENTA)).max(axis=2) <= 12).sum())
    assert shown > 2 * 128 * 128


ARTIFACTS = Path(__file__).parent.parent / "artifacts" / "page"
SCREENS = {"desktop": (1440, 900), "phone": (390, 844)}
THEMES: tuple[Literal["dark", "light"], ...] = ("dark", "light")
SPREAD = """canvas => {
  const copy = new OffscreenCanvas(16, 16)
  const context = copy.getContext("2d")
  context.drawImage(canvas, 0, 0, 16, 16)
  const data = context.getImageData(0, 0, 16, 16).data
  return Math.max(...data.filter((_, i) => i % 4 === 1)) - Math.min(...data.filter((_, i) => i % 4 === 1))
}"""


def await_scenes(page: Page, canvases: str, least: int) -> None:
    """Wait until this many canvases show a scene, and not one grey."""
    drawn = page.locator(f"{canvases}:not([data-pictures='0'])")

    def are_there() -> bool:
        return len([one for one in drawn.all() if one.evaluate(SPREAD) > 60]) >= least

    wait_for(are_there, WAIT_S, of=f"{least} scenes on {canvases}")


def take(page: Page, name: str) -> None:
    """Write a screenshot to the artefacts; it must show something."""
    path = ARTIFACTS / f"{name}.png"
    page.screenshot(path=path, animations="disabled")
    red, green, blue = pixels(path).astype(np.int32).reshape(-1, 3).T
    colours = np.unique(red << 16 | green << 8 | blue)  # of rows it takes twenty times as long
    assert len(colours) > 20, f"{path} is blank"


@contextlib.contextmanager
def screens(browser: Browser) -> Iterator[dict[str, Page]]:
    """One page for each screen and theme, by name."""
    with contextlib.ExitStack() as contexts:
        pages = {}
        for (screen, (width, height)), theme in itertools.product(SCREENS.items(), THEMES):
            size: ViewportSize = {"width": width, "height": height}
            context = browser.new_context(viewport=size, color_scheme=theme, has_touch=screen == "phone")
            contexts.callback(context.close)
            pages[f"{screen}-{theme}"] = context.new_page()
        yield pages


@pytest.mark.browser
@pytest.mark.timeout(300)
def test_screenshots_show_the_page(browser: Browser, tmp_path: Path) -> None:
    """Empty page, wall, opened stream and recordings, on desktop and phone, dark and light, all show something."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with Daemon(tmp_path) as daemon, screens(browser) as pages, contextlib.ExitStack() as samplers:
        for name, page in pages.items():
            page.goto(daemon.web)
            expect(page.get_by_role("heading", name="No streams yet")).to_be_visible()
            take(page, f"{name}-empty")
            page.goto("about:blank")  # the next one has the machine for itself
        samplers.callback(DemoSamplers(daemon.broker, 0.12).close)
        wait_for(lambda: "quick" in daemon.streams(), WAIT_S, of="the demo's streams")
        recorded = daemon.streams()["quick"]["run"]
        daemon.json("/api/v1/streams/quick/record", method="POST", body={"mode": "all"})
        for name, page in pages.items():
            page.goto(daemon.web)
            await_scenes(page, "#wall canvas", 5)
            expect(page.locator("#wall [data-pictures='0']")).to_have_count(0)
            take(page, f"{name}-wall")
            page.goto(f"{daemon.web}/#/s/lighthouse")
            await_scenes(page, "#stage-canvas", 1)
            expect(page.locator(".inspector tfoot td")).to_contain_text("p95")
            take(page, f"{name}-opened")
            daemon.recording(recorded)
            page.goto(f"{daemon.web}/#/recordings")
            thumb = page.locator("#recordings img").first
            wait_for(lambda thumb=thumb: thumb.evaluate("img => img.naturalWidth"), WAIT_S, of="a thumbnail")  # type: ignore[misc]
            take(page, f"{name}-recordings")
            page.goto("about:blank")
