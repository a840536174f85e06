"""The page in a real Chromium over three real daemons: what a person sees of several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.page_fixture import await_colour, opening
from tests.three_daemons import COLOURS, ThreeDaemons

ARTIFACTS = Path(__file__).parent.parent / "artifacts" / "page"


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeDaemons]:
    """Three daemons."""
    with ThreeDaemons(tmp_path_factory.mktemp("farm")) as started:
        yield started


@pytest.mark.browser
def test_the_page_of_several_daemons(farm: ThreeDaemons, browser: Browser) -> None:
    """In Chromium: tiles of all daemons in their colours, a filter by daemon, a stage that says whose stream it is."""
    with ExitStack() as stack:
        farm.publish(stack, "seen", total_steps=8)
        open_page = stack.enter_context(opening(browser, farm.first.web))
        page = open_page()
        for name in COLOURS:
            tile = f"#wall canvas[data-stream='{name}/seen']"
            page.locator(f"[data-name='{name}/seen']").scroll_into_view_if_needed()
            expect(page.locator(f"{tile}:not([data-pictures='0'])")).to_be_attached(timeout=30_000)
            await_colour(page, tile, COLOURS[name])
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=ARTIFACTS / "peers-wall.png", animations="disabled")
        third = farm.third.web.removeprefix("http://")
        page.keyboard.press("/")
        page.locator("#filter").fill(f"seen {third}")
        expect(page.locator("#wall li:visible")).to_have_count(1)
        page.locator("[data-name='three/seen'] .name").click()
        expect(page.locator("dt:text-is('Daemon') + dd")).to_have_text(third)
        await_colour(page, "#view-stage canvas[data-stream='three/seen']", COLOURS["three"])
        page.screenshot(path=ARTIFACTS / "peers-stage.png", animations="disabled")
