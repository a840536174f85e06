"""The page for everybody: axe finds no serious fault on any view, and Firefox shows what Chromium shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.daemon import Daemon, wait_for
from tests.firefox import Firefox
from tests.page_fixture import PIXEL, PageHost, recording, serving, stream
from tests.pictures import PATCHES
from tests.test_films import steps, watched_run
from tests.test_page_render import BLUE, GREEN, RED, RUN, film_of

pytestmark = pytest.mark.browser

VIEWS = ["#/", "#/s/b", "#/recordings", "#/compare/0123456789abcdef/fedcba9876543210"]


@pytest.fixture
def host() -> Iterator[PageHost]:
    with serving(PageHost()) as started:
        started.streams = [stream("a"), stream("b", meta={"prompt": "x", "seed": 4}), stream("c", flags=["degraded"])]
        started.recordings = [recording("a")]
        film_of(started, [RED, GREEN, BLUE])
        yield started


def axe() -> str:
    """axe-core's script, from `npm install axe-core` here or in $TAESD_STREAM_AXE; the test skips without."""
    folders = [os.environ.get("TAESD_STREAM_AXE", ""), "."]
    found = [Path(folder) / "node_modules/axe-core/axe.min.js" for folder in folders if folder]
    path = next((one for one in found if one.is_file()), None)
    if path is None:
        pytest.skip("no axe-core: `npm install axe-core`, or its folder in TAESD_STREAM_AXE")
    return path.read_text()


def faults(page: Page) -> list[str]:
    """What axe calls serious or critical, one line each."""
    found: dict[str, Any] = page.evaluate("axe.run({resultTypes: ['violations']})")
    return [
        f"{one['id']} ({one['impact']}): {node['html'][:120]}: {node['failureSummary']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_no_serious_fault(host: PageHost, browser: Browser, scheme: Any, width: int) -> None:
    """No view, dark or light, wide or narrow, has a fault that axe calls serious or critical."""
    script = axe()
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True, reduced_motion="reduce"
    )
    page = context.new_page()
    found: dict[str, list[str]] = {}
    for view in VIEWS:
        page.goto(host.url + view)
        page.reload()
        expect(page.locator("#tab-live .count")).not_to_be_empty()
        page.evaluate(script)
        found[view] = faults(page)
    page.keyboard.press("?")
    found["help"] = faults(page)
    page.goto(f"{host.url}#/s/{RUN}/1")
    page.reload()
    expect(page.get_by_role("slider", name="Step")).to_be_visible()
    expect(page.locator("#stage-canvas[data-seq='1']")).to_be_visible()
    host.alerts = [{"code": "disk_full", "text": "Recording stopped: the disk is full."}]
    host.push()
    expect(page.locator(".banner")).to_be_visible()
    page.keyboard.press("y")
    expect(page.locator("#toast")).to_be_visible()
    page.evaluate(script)
    found["scrubber, banner, toast"] = faults(page)
    context.close()
    assert not any(found.values()), found


def test_firefox_shows_pictures_and_steps(daemon: Daemon, tmp_path: Path) -> None:
    """In Firefox a tile and an opened stream get their pictures, and a link to a step shows it."""
    run = watched_run(daemon, "firefox/one", [PATCHES[name] for name in ("red", "green", "blue")])
    wait_for(lambda: len(steps(daemon, run)) == 3, of="the film")
    with Firefox(tmp_path) as firefox:
        firefox.go(f"{daemon.web}/#/")
        tile = "document.querySelector(`#wall canvas[data-stream='firefox/one']`)"
        firefox.wait_until(tile)
        firefox.run(f"{tile}.scrollIntoView()")  # below other tests' streams nothing is drawn
        firefox.wait_until(f"{tile}.dataset.pictures > 0")
        firefox.run("location.hash = '#/s/firefox/one'")
        stage = "document.querySelector('#stage-canvas')"
        firefox.wait_until(f"{stage}.dataset.pictures > 0 && {stage}.dataset.seq === '2'")
        firefox.wait_until("!document.querySelector('.scrubber').hidden")
        firefox.run(f"location.hash = '#/s/{run}/1'")
        firefox.wait_until(f"{stage}.dataset.rendition === 'film' && {stage}.dataset.seq === '1'")
        # what a worker draws is seen a moment after it says so
        pixel = f"return ({PIXEL})({stage})"
        wait_for(lambda: firefox.run(pixel) == pytest.approx(PATCHES["green"], abs=12), of="the step's colour")
