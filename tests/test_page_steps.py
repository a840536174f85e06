"""The page in a real Chromium over a real daemon: walking through steps, clips that loop, batches, and comparing."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, once_in_three, wait_for
from tests.page_fixture import PIXEL, Colour, Open, await_colour, middle_of, opening
from tests.page_socket import PageSocket
from tests.pictures import PATCHES, sd1_latents_of
from tests.test_films import steps, watched_run
from tests.test_page_live import NO_DECODER, await_picture, require_h264, tile_canvas

pytestmark = pytest.mark.browser

NAMES = ["red", "green", "blue", "white"]
WAYS = [pytest.param("", id="webcodecs"), pytest.param(NO_DECODER, id="jpeg")]
STAGE = "#stage-canvas"
CAN_STOP = "Stop the sampler (X)"  # until the page knows that, its button has no title, and the key does nothing


@pytest.fixture
def opened(browser: Browser, daemon: Daemon) -> Iterator[Open]:
    """Open the daemon's page at a hash; errors of its scripts fail the test."""
    with opening(browser, daemon.web) as open_page:
        yield open_page


def filmed(daemon: Daemon, stream: str, names: list[str] = NAMES) -> str:
    """A run that is over, one step a colour, all of them in its film."""
    run = watched_run(daemon, stream, [PATCHES[name] for name in names])
    wait_for(lambda: len(steps(daemon, run)) == len(names), of="the film")
    return run


# --- steps ---


@pytest.mark.parametrize("script", WAYS)
def test_steps_are_walked_through_by_keys_and_drag(daemon: Daemon, opened: Open, script: str) -> None:
    """Arrow keys and the range show each step in its colour, and its numbers; the address names the step."""
    stream = f"steps/{'jpeg' if script else 'webcodecs'}"
    run = filmed(daemon, stream)
    page = opened(f"#/s/{stream}", script=script)
    if not script:
        require_h264(page)
    await_colour(page, STAGE, PATCHES["white"])
    scrub = page.get_by_role("slider", name="Step")
    expect(scrub).to_be_visible()  # the film has come, too
    expect(page.locator("#view-stage .here span")).to_have_text("Step 4")  # and not "Live": the run is over
    page.keyboard.press("Home")
    await_colour(page, STAGE, PATCHES["red"])
    page.keyboard.press("ArrowRight")
    await_colour(page, STAGE, PATCHES["green"])
    expect(page.locator(".figures dd").first).to_have_text("2/ 4")
    expect(page.locator(".pill")).to_contain_text("Step 2 of 4. The last is 4")
    assert page.url.endswith(f"#/s/{run}/1")
    scrub.fill("2")
    await_colour(page, STAGE, PATCHES["blue"])
    expect(scrub).to_have_attribute("aria-valuetext", "Step 3 of 4, sigma 7.00")
    page.get_by_role("button", name="Back to live").click()
    await_colour(page, STAGE, PATCHES["white"])
    assert page.url.endswith(f"#/s/{stream}")


def test_a_link_to_a_step_opens_it(daemon: Daemon, opened: Open) -> None:
    """A link to one step shows it in another browser, and after a reload; its meta stands beside it."""
    run = filmed(daemon, "steps/linked")
    page = opened(f"#/s/{run}/1", viewport={"width": 390, "height": 844})
    for _ in range(2):
        await_colour(page, STAGE, PATCHES["green"])
        expect(page.get_by_role("heading", name="steps/linked")).to_be_visible()
        expect(page.locator(".figures dd").first).to_have_text("2/ 4")
        page.reload()


def test_the_sampler_that_goes_on_does_not_move_the_playhead(daemon: Daemon, opened: Open) -> None:
    """While a step is looked at, new ones come: the picture stays, the live mark moves; L shows the newest."""
    with (
        PageSocket(daemon) as viewer,
        LatentPublisher(daemon.broker, stream="steps/moving", latent_format="sd1", record="off") as publisher,
    ):
        viewer.watch({"steps/moving": "thumb"})

        def paint(step: int, name: str) -> None:
            publisher.publish(sd1_latents_of(PATCHES[name]), step=step, total_steps=4)
            wait_for(lambda: len(steps(daemon, str(publisher.run))) == step + 1, of=f"step {step} in the film")

        paint(0, "red")
        paint(1, "green")
        page = opened("#/s/steps/moving")
        await_colour(page, STAGE, PATCHES["green"])
        expect(page.get_by_role("slider", name="Step")).to_be_visible()
        page.keyboard.press("Home")
        await_colour(page, STAGE, PATCHES["red"])
        paint(2, "blue")
        expect(page.locator(".pill")).to_contain_text("Step 1 of 4. Live is at 3")
        assert max(abs(a - b) for a, b in zip(middle_of(page, STAGE), PATCHES["red"], strict=True)) <= 12
        page.keyboard.press("l")
        await_colour(page, STAGE, PATCHES["blue"])


def test_a_step_that_is_looked_at_stays_beside_what_is_its_own(daemon: Daemon, opened: Open) -> None:
    """The next run begins while a step is looked at: picture, prompt and address stay, and no button means the new."""

    def paint(publisher: LatentPublisher, step: int, name: str) -> None:
        publisher.publish(sd1_latents_of(PATCHES[name]), step=step, total_steps=3)
        wait_for(lambda: len(steps(daemon, str(publisher.run))) == step + 1, of=f"step {step} in the film")

    run_of = partial(LatentPublisher, daemon.broker, stream="steps/next", latent_format="sd1", record="off")
    record, prompt = "#view-stage .actions [data-act=record]", "#view-stage .prose"
    with PageSocket(daemon) as viewer:
        viewer.watch({"steps/next": "thumb"})
        with run_of(meta={"prompt": "the first"}) as first:
            paint(first, 0, "red")
            paint(first, 1, "green")
            page = opened("#/s/steps/next")
            await_colour(page, STAGE, PATCHES["green"])
            expect(page.locator("#view-stage .here span")).to_have_text("Live, step 2")
            page.keyboard.press("Home")
            await_colour(page, STAGE, PATCHES["red"])
            expect(page.locator(record)).to_be_visible()
        with run_of(meta={"prompt": "the second"}) as second:
            paint(second, 0, "blue")
            expect(page.locator("#toast")).to_contain_text("steps/next began its next run.")
            await_colour(page, STAGE, PATCHES["red"])
            expect(page.locator(prompt)).to_have_text("the first")
            expect(page.locator(record)).to_be_hidden()
            assert page.url.endswith(f"#/s/{first.run}/0")
            page.get_by_role("button", name="Watch it").click()
            await_colour(page, STAGE, PATCHES["blue"])
            expect(page.locator(prompt)).to_have_text("the second")
            expect(page.locator(record)).to_be_visible()


@pytest.mark.parametrize("name", ["0123456789abcdef", "0123456789abcdef/3"])
def test_a_stream_may_be_called_like_a_run(daemon: Daemon, opened: Open, name: str) -> None:
    """A name of 16 hexadecimal digits, with a number behind it or not, is a name where a stream bears it."""
    with (
        PageSocket(daemon) as viewer,
        LatentPublisher(daemon.broker, stream=name, latent_format="sd1", record="off") as publisher,
    ):
        viewer.watch({name: "thumb"})
        for step, colour in enumerate(("blue", "red")):
            publisher.publish(sd1_latents_of(PATCHES[colour]), step=step, total_steps=3)
            wait_for(lambda: len(steps(daemon, str(publisher.run))) == step + 1, of="the film")  # noqa: B023
        page = opened(f"#/s/{name}")
        await_colour(page, STAGE, PATCHES["red"])
        expect(page.get_by_role("heading", name=name, exact=True)).to_be_visible()
        expect(page.locator("#view-stage .here span")).to_have_text("Live, step 2")  # the number is none of a step


def test_an_address_that_means_nothing_is_said_and_asked_for_once(daemon: Daemon, opened: Open) -> None:
    """A run that is not kept is asked for once, not for ever; a stream's name that is none is no error."""
    page = opened("#/s/50%")
    expect(page.locator("#view-stage .stage-note")).to_contain_text("No stream is called 50% now.")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if "/film" in request.url else None)
    page.goto(f"{daemon.web}/#/s/fedcba9876543210")
    expect(page.locator("#view-stage .stage-note")).to_have_text("This run is no longer kept.")
    page.evaluate("new Promise((done) => setTimeout(done, 2000))")  # it looks four times a second
    assert len([url for url in asked if "fedcba9876543210" in url]) == 1


def test_a_film_is_kept_from_the_page(daemon: Daemon, opened: Open) -> None:
    """An ended run offers Keep; pressed, the run is a recording, and can still be walked through."""
    run = filmed(daemon, "steps/kept")
    page = opened(f"#/s/{run}/0")
    await_colour(page, STAGE, PATCHES["red"])
    page.locator(".actions [data-act=keep]").click()
    daemon.recording(run)
    expect(page.locator(".actions [data-act=keep]")).to_be_hidden()
    page.keyboard.press("ArrowRight")
    await_colour(page, STAGE, PATCHES["green"])


# --- whatever happens ---


def test_a_page_lives_through_a_restart_of_the_daemon(browser: Browser, tmp_path: Path) -> None:
    """The daemon is stopped and started: the page says so, shows the sampler's next picture, and finds the old film."""
    with Daemon(tmp_path) as daemon:
        run = watched_run(daemon, "restart/old", [PATCHES[name] for name in NAMES])
        wait_for(lambda: len(steps(daemon, run)) == len(NAMES), of="the film")
        with (
            LatentPublisher(daemon.broker, stream="restart/on", latent_format="sd1", record="off") as publisher,
            contextlib.closing(browser.new_context()) as context,
        ):
            publisher.publish(sd1_latents_of(PATCHES["red"]), step=0, total_steps=9)
            page = context.new_page()
            page.goto(f"{daemon.web}/#/s/restart/on")
            await_colour(page, STAGE, PATCHES["red"])
            assert daemon.stop() == 0
            expect(page.locator("#banners")).to_contain_text("Lost the connection")
            web, bind = daemon.web.removeprefix("http://"), daemon.broker
            daemon.start(f"web.bind={web}", f"broker.bind={bind}")
            expect(page.locator("#banners > *")).to_have_count(0)
            wait_for(lambda: "restart/on" in daemon.streams(), 30.0, of="the sampler")
            publisher.publish(sd1_latents_of(PATCHES["blue"]), step=1, total_steps=9)
            await_colour(page, STAGE, PATCHES["blue"])
            page.goto(f"{daemon.web}/#/recordings")
            page.get_by_role("link", name="restart/old").click()
            await_colour(page, STAGE, PATCHES["white"])
            page.keyboard.press("Home")
            await_colour(page, STAGE, PATCHES["red"])
            page.goto("about:blank")
            page.goto(f"{daemon.web}/#/s/{run}/1")
            await_colour(page, STAGE, PATCHES["green"])
            page.goto("about:blank")
            page.goto(f"{daemon.web}/#/s/restart/old")  # by its name: the broker knows of no such stream any more
            await_colour(page, STAGE, PATCHES["white"])


def test_sizes_and_uneven_times_are_shown_as_they_come(daemon: Daemon, opened: Open) -> None:
    """A burst, a lone step after a wait, and a run of another size: the opened stream shows each newest picture."""
    with LatentPublisher(daemon.broker, stream="uneven/one", latent_format="sd1", record="off") as publisher:
        publisher.publish(sd1_latents_of(PATCHES["red"]), step=0)
        page = opened("#/s/uneven/one")
        await_colour(page, STAGE, PATCHES["red"])
        for step in range(1, 30):  # as fast as it goes
            publisher.publish(sd1_latents_of(PATCHES["green" if step % 2 else "blue"]), step=step)
        await_colour(page, STAGE, PATCHES["green"])
        page.wait_for_timeout(3000)  # a sampler that is slow: the player must not fall asleep
        publisher.publish(sd1_latents_of(PATCHES["white"]), step=30)
        await_colour(page, STAGE, PATCHES["white"])
        publisher.publish(sd1_latents_of(PATCHES["blue"], 24, 40), step=31)
        await_colour(page, STAGE, PATCHES["blue"])
        shape = page.locator(STAGE).evaluate("canvas => [canvas.width, canvas.height]")
        assert shape == [320, 192]


HIDE = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => window.is_hidden ?? false})"


def test_a_page_in_the_background_asks_for_nothing_and_comes_back(daemon: Daemon, opened: Open) -> None:
    """Hidden for five seconds, the page watches nothing; in front again it shows the newest picture at once."""
    with LatentPublisher(daemon.broker, stream="hidden/one", latent_format="sd1", record="off") as publisher:
        publisher.publish(sd1_latents_of(PATCHES["red"]), step=0)
        page = opened("#/s/hidden/one", script=HIDE)
        await_colour(page, STAGE, PATCHES["red"])
        page.evaluate("window.is_hidden = true; document.dispatchEvent(new Event('visibilitychange'))")
        wait_for(lambda: daemon.streams()["hidden/one"]["viewers"] == 0, of="nobody watching")
        publisher.publish(sd1_latents_of(PATCHES["blue"]), step=1)
        wait_for(lambda: daemon.streams()["hidden/one"]["seq"] == 1, of="the next step")
        page.evaluate("window.is_hidden = false; document.dispatchEvent(new Event('visibilitychange'))")
        await_colour(page, STAGE, PATCHES["blue"])


# --- kinds ---


def test_one_picture_of_a_batch_is_looked_at_alone(daemon: Daemon, opened: Open) -> None:
    """A batch of three is a sheet; a click on the second shows it alone, another click the sheet again."""
    batch = np.stack([sd1_latents_of(PATCHES[name], 16, 16) for name in NAMES[:3]])
    with LatentPublisher(daemon.broker, stream="kinds/batch", latent_format="sd1", record="off") as publisher:
        publisher.publish(batch, step=0, total_steps=2)
        page = opened("#/s/kinds/batch")
        await_picture(page, STAGE)
        parts = page.get_by_role("group", name="Pictures of the batch").get_by_role("button")
        expect(parts).to_have_count(3)
        parts.nth(1).click()
        await_colour(page, STAGE, PATCHES["green"])
        publisher.publish(np.stack([batch[0], batch[2], batch[1]]), step=1, total_steps=2)
        await_colour(page, STAGE, PATCHES["blue"])
        parts.first.click()
        expect(parts).to_have_count(3)


@pytest.mark.parametrize("script", WAYS)
def test_pictures_with_a_file_each_are_walked_through_one_at_a_time(
    browser: Browser, tmp_path: Path, script: str
) -> None:
    """Of a batch recorded picture by picture a step shows one; a click shows the next one; the list has them all."""
    batches = [["red", "green", "blue"], ["white", "magenta", "cyan"], ["red", "red", "red"]]
    with Daemon(tmp_path, "recording.batch=each") as daemon, opening(browser, daemon.web) as opened:
        with LatentPublisher(daemon.broker, stream="kinds/each", latent_format="sd1", record="all") as publisher:
            for step, names in enumerate(batches):
                publisher.publish(clip_of(names), step=step, total_steps=3)
            assert publisher.wait_until_acked(20), publisher.error
        daemon.recording(publisher.run)
        page = opened(f"#/s/{publisher.run}/0", script=script)
        await_colour(page, STAGE, PATCHES["red"])
        page.get_by_role("button", name="Picture 1 of 3. Show the next").click()
        await_colour(page, STAGE, PATCHES["green"])
        page.keyboard.press("ArrowRight")
        await_colour(page, STAGE, PATCHES["magenta"])
        page.get_by_role("button", name="Picture 2 of 3. Show the next").click()
        await_colour(page, STAGE, PATCHES["cyan"])
        page.goto(f"{daemon.web}/#/recordings")
        expect(page.locator("#recordings b")).to_have_text([f"kinds/each, picture {part} of 3" for part in (1, 2, 3)])


def clip_of(names: list[str]) -> np.ndarray[Any, Any]:
    return np.stack([sd1_latents_of(PATCHES[name], 16, 16) for name in names])


@pytest.mark.parametrize("at", ["#/", "#/s/kinds/clip"])
def test_a_clip_loops_with_all_its_pictures(daemon: Daemon, opened: Open, at: str) -> None:
    """Each picture of a clip is seen again and again, on the wall and opened; those of the next step take over."""
    with LatentPublisher(daemon.broker, stream="kinds/clip", latent_format="sd1", kind="clip", fps=4) as publisher:
        publisher.publish(clip_of(["red", "green", "blue"]), step=0, total_steps=2)
        page = opened(at)
        canvas = STAGE if "s/" in at else tile_canvas(page, "kinds/clip")
        await_picture(page, canvas)
        for _ in range(2):
            for name in ("red", "green", "blue"):
                await_colour(page, canvas, PATCHES[name])
        publisher.publish(clip_of(["white", "magenta", "cyan"]), step=1, total_steps=2)
        for _ in range(2):
            for name in ("white", "magenta", "cyan"):
                await_colour(page, canvas, PATCHES[name])


SEEN = f"""() => {{
  self.seen = []
  const middle = {PIXEL}
  const look = () => {{
    seen.push([performance.now(), ...middle(document.querySelector("{STAGE}"))])
    requestAnimationFrame(look)
  }}
  look()
}}"""


def test_a_live_video_plays_in_its_time(daemon: Daemon, opened: Open) -> None:
    """Pictures of a live video that come in one burst are shown one after the other, at their rate."""
    with LatentPublisher(daemon.broker, stream="kinds/live", latent_format="sd1", kind="live", fps=2) as publisher:
        publisher.publish(clip_of(["white"]), step=0)
        page = opened("#/s/kinds/live")

        def gaps_ms(_: int) -> list[float]:
            await_colour(page, STAGE, PATCHES["white"])
            page.evaluate(SEEN)
            publisher.publish(clip_of(["red", "green", "blue"]), step=1)
            await_colour(page, STAGE, PATCHES["blue"])
            for _ in range(2):  # until `look` has seen it, too
                page.evaluate("() => new Promise(requestAnimationFrame)")
            seen = page.evaluate("self.seen")
            publisher.publish(clip_of(["white"]), step=2)
            return between([PATCHES[name] for name in ("red", "green", "blue")], seen)

        once_in_three(gaps_ms, lambda gaps_ms: min(gaps_ms) >= 300)  # a page that stood still passes over what is late


def between(colours: list[Colour], seen: list[list[float]]) -> list[float]:
    """Milliseconds from the first sight of each colour to that of the next; only 0 where one was not seen."""
    times, pictures = np.split(np.array(seen), [1], axis=1)
    firsts = [times[np.abs(pictures - colour).max(axis=1) <= 8] for colour in colours]
    return list(np.diff([float(one[0, 0]) for one in firsts])) if all(map(len, firsts)) else [0.0]


# --- two runs, and a player elsewhere ---


@pytest.mark.parametrize("script", WAYS)
def test_two_runs_are_compared_at_the_same_step(daemon: Daemon, opened: Open, script: str) -> None:
    """C on one tile and C on another opens both, locked to a step; the wipe is a range; the address tells all of it."""
    way = "jpeg" if script else "webcodecs"
    runs = [filmed(daemon, f"compare/{way}-a"), filmed(daemon, f"compare/{way}-b", NAMES[::-1])]
    page = opened("#/", script=script)
    for name in ("a", "b"):
        page.locator(f"[data-name='compare/{way}-{name}'] .name").focus()
        page.keyboard.press("c")
    expect(page.get_by_role("heading", name="Compare")).to_be_visible()
    await_colour(page, "#compare-a", PATCHES["white"])
    await_colour(page, "#compare-b", PATCHES["red"])
    page.keyboard.press("Home")
    await_colour(page, "#compare-a", PATCHES["red"])
    await_colour(page, "#compare-b", PATCHES["white"])
    page.get_by_role("slider", name="Wipe between A and B").fill("30")
    expect(page.get_by_role("slider", name="Wipe between A and B")).to_have_attribute(
        "aria-valuetext", "A 30 %, B 70 %"
    )
    page.get_by_role("button", name="Side by side").click()
    assert page.url.endswith(f"#/compare/{runs[0]}/{runs[1]}/0/side")
    page.reload()
    await_colour(page, "#compare-a", PATCHES["red"])
    await_colour(page, "#compare-b", PATCHES["white"])


def test_the_wipe_parts_the_pictures_where_it_stands(daemon: Daemon, opened: Open) -> None:
    """With the wipe at 40 %, what is left of it has the first run's colour, what is right of it the second's."""
    runs = [filmed(daemon, "compare/left", ["red", "green"]), filmed(daemon, "compare/right", ["blue", "white"])]
    page = opened(f"#/compare/{runs[0]}/{runs[1]}/0/wipe")
    await_colour(page, "#compare-a", PATCHES["red"])
    await_colour(page, "#compare-b", PATCHES["blue"])
    for at in (40, 60):
        page.get_by_role("slider", name="Wipe between A and B").fill(str(at))
        box = page.locator("#compare-a").bounding_box()
        assert box is not None
        seen = np.asarray(Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB"))
        height, width, _ = seen.shape
        for place in (at - 3, at + 3):
            colour = seen[height * 3 // 4, width * place // 100].astype(int)  # below the labels
            expected = PATCHES["red" if place < at else "blue"]
            assert np.abs(colour - expected).max() <= 12, f"wipe at {at} %, at {place} %: {colour}"
    slider = page.locator("[data-part=wipe][type=range]")
    slider.focus()
    before = int(slider.input_value())
    page.keyboard.press("ArrowRight")
    assert int(slider.input_value()) == before + 1  # the arrow is the slider's, not the steps'
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()  # other keys are the page's


def test_each_half_of_the_wipe_has_its_own_run_alone(daemon: Daemon, opened: Open) -> None:
    """Where the shapes differ nothing of a wide first picture is seen beside a tall second one, nor the other way."""
    runs = []
    for name, colour, shape in (("wide", "red", (8, 32)), ("tall", "blue", (32, 8))):
        run = watched_run(daemon, f"shapes/{name}", [PATCHES[colour]], shape=shape)
        wait_for(lambda: len(steps(daemon, run)) == 1, of="the film")  # noqa: B023
        runs.append(run)
    for order in (runs, runs[::-1]):
        page = opened(f"#/compare/{'/'.join(order)}/0/wipe")
        for canvas, run in zip(("#compare-a", "#compare-b"), order, strict=True):
            await_colour(page, canvas, PATCHES["red" if run == runs[0] else "blue"])
        box = page.locator(".pair").bounding_box()
        assert box is not None
        seen = np.asarray(Image.open(io.BytesIO(page.screenshot(clip=box))).convert("RGB")).astype(int)
        height, width, _ = seen.shape
        sides = {"left": seen[height // 2, width // 4], "right": seen[height // 2, width * 3 // 4]}
        wide = "left" if order is runs else "right"
        for side, colour in sides.items():
            is_red = np.abs(colour - PATCHES["red"]).max() <= 12
            assert is_red == (side == wide), f"{side}: {colour}"


@pytest.mark.parametrize("way", ["Dismiss", "Cancel"])
def test_a_comparison_that_is_called_off_is_none(daemon: Daemon, opened: Open, way: str) -> None:
    """Whichever button closes the word that waits for the second run: the next tile that is pressed is just opened."""
    runs = [filmed(daemon, f"off/{way}-{one}", ["red"]) for one in "ab"]
    page = opened("#/")
    page.locator(f"[data-name='off/{way}-a'] .name").focus()
    page.keyboard.press("c")
    expect(page.locator("#toast")).to_contain_text("press the other one")
    page.locator("#toast").get_by_role("button", name=way).click()
    expect(page.locator("#toast")).to_be_hidden()
    page.locator(f"[data-name='off/{way}-b'] .name").click()
    expect(page.get_by_role("heading", name=f"off/{way}-b")).to_be_visible()
    assert runs[0] not in page.url


def test_two_live_runs_are_locked_to_one_step(daemon: Daemon, opened: Open) -> None:
    """While both go on, the faster one waits: both pictures are of the last step that both have come to."""
    with contextlib.ExitStack() as stack:
        viewer = stack.enter_context(PageSocket(daemon))
        streams = ["locked/fast", "locked/slow"]
        fast, slow = (
            stack.enter_context(LatentPublisher(daemon.broker, stream=one, latent_format="sd1", record="off"))
            for one in streams
        )
        viewer.watch(dict.fromkeys(streams, "thumb"))

        def paint(publisher: LatentPublisher, step: int, name: str) -> None:
            publisher.publish(sd1_latents_of(PATCHES[name]), step=step, total_steps=4)
            wait_for(lambda: len(steps(daemon, str(publisher.run))) == step + 1, of=f"step {step} in the film")

        for step, name in enumerate(("red", "green", "blue")):
            paint(fast, step, name)
        paint(slow, 0, "white")
        page = opened(f"#/compare/{fast.run}/{slow.run}")
        await_colour(page, "#compare-a", PATCHES["red"])
        await_colour(page, "#compare-b", PATCHES["white"])
        paint(slow, 1, "magenta")
        await_colour(page, "#compare-b", PATCHES["magenta"])
        await_colour(page, "#compare-a", PATCHES["green"])
        paint(fast, 3, "cyan")
        paint(slow, 2, "red")
        await_colour(page, "#compare-b", PATCHES["red"])
        await_colour(page, "#compare-a", PATCHES["blue"])


def test_embed_is_a_bare_player_that_others_may_frame(daemon: Daemon, opened: Open, tmp_path: Path) -> None:
    """An iframe of another site shows the stream and nothing else; the page itself refuses to be framed."""
    with LatentPublisher(daemon.broker, stream="embed/one", latent_format="sd1", record="off") as publisher:
        publisher.publish(sd1_latents_of(PATCHES["red"]), step=0, total_steps=2)
        page = opened()
        page.goto(f"{daemon.web}/streams/embed/one/embed")
        await_colour(page, "canvas", PATCHES["red"])
        publisher.publish(sd1_latents_of(PATCHES["blue"]), step=1, total_steps=2)
        await_colour(page, "canvas", PATCHES["blue"])
        assert page.locator("button, a, input").count() == 0
        frame = f"<iframe src='{daemon.web}/streams/embed/one/embed'></iframe><iframe src='{daemon.web}/'></iframe>"
        (tmp_path / "notebook.html").write_text(frame)
        handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as notebook:
            threading.Thread(target=notebook.serve_forever).start()
            try:
                page.goto(f"http://localhost:{notebook.server_port}/notebook.html")
                await_colour(page.frame_locator("iframe >> nth=0"), "canvas", PATCHES["blue"])
                expect(page.frame_locator("iframe >> nth=1").locator(".top")).to_have_count(0)
            finally:
                notebook.shutdown()


# --- stop ---


def test_stop_is_in_time_for_the_next_step(daemon: Daemon, opened: Open) -> None:
    """A sampler of a step a second: from the daemon's answer to Stop it publishes one step more at most."""
    published = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal published
        while not (publisher.stopped or done.wait(1.0)):
            publisher.publish(sd1_latents_of(PATCHES["red"]), step=published, total_steps=10_000)
            published += 1

    with LatentPublisher(daemon.broker, stream="steps/in-time", latent_format="sd1", record="off") as publisher:
        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            page = opened("#/s/steps/in-time")
            await_picture(page, STAGE)
            stop = page.locator(".actions [data-act=stop]")
            expect(stop).to_have_attribute("title", CAN_STOP)
            with page.expect_response(lambda answer: answer.url.endswith("/stop")):
                page.keyboard.press("Shift+X")
            at_answer = published
            sampler.join(20)
            assert not sampler.is_alive()
        finally:
            done.set()
            sampler.join()
    assert published - at_answer <= 1


def test_stop_reaches_the_sampler_within_a_step(daemon: Daemon, opened: Open) -> None:
    """On the wall, one key stops the run in focus: `publisher.stopped` turns true between two of its steps."""
    with LatentPublisher(daemon.broker, stream="steps/stopped", latent_format="sd1", record="off") as publisher:
        assert not publisher.stopped  # it can be stopped, then
        publisher.publish(sd1_latents_of(PATCHES["red"]), step=0, total_steps=9)
        page = opened("#/")
        tile = page.locator("[data-name='steps/stopped']")
        tile.scroll_into_view_if_needed()  # one out of sight, below the streams of other tests, is not kept up to date
        expect(tile.locator("[data-act=stop]")).to_have_attribute("title", CAN_STOP)
        tile.locator(".name").focus()
        page.keyboard.press("Shift+X")
        wait_for(lambda: publisher.stopped, 5.0, of="the wish at the sampler")
    expect(tile.locator("article")).to_have_attribute("data-look", "stopped")
