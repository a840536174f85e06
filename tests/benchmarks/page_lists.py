"""The page with much to show beside the page with little: its longest task in Chromium, turn by turn, in one run.

    python -m tests.benchmarks.page_lists            (about a minute; --quick: a smoke run)

`recordings`: 3,000 of them beside 100, their list opened, states told, and fifty more rows asked for. `films`: two
runs of 3,000 steps each beside 100, compared by sigma. Figures are medians of milliseconds, and `ratio` is how much
longer much takes: what is made for each entry that nobody sees shows there. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any, Final

from playwright.sync_api import Browser, Page, expect

from tests.benchmarks.figures import cpu_name
from tests.page_fixture import LONG_TASKS, PageHost, chromium, opening, recording, serving, stream

MUCH: Final = 3000
LITTLE: Final = 100
TURNS: Final = 7
A, B = "a" * 16, "b" * 16


def recordings(host: PageHost, page: Page, number: int) -> None:
    """The list is opened, told of again, and lengthened."""
    host.recordings = [recording(f"r{index:04}", started=10_000.0 - index) for index in range(number)]
    host.push()
    page.evaluate("location.hash = '#/recordings'")
    rows = page.locator("#recordings b")
    expect(rows).to_have_count(50)
    for told in range(4):
        host.recordings.insert(0, recording(f"newest {told}", started=20_000.0 + told))
        host.push()
        expect(rows.nth(0)).to_have_text(f"newest {told}")
    page.get_by_role("button", name="Show 50 of").press("Enter")
    expect(rows).to_have_count(100)


def films(host: PageHost, page: Page, number: int) -> None:
    """Two runs are laid side by side."""
    for run, total in ((A, number), (B, number + 1)):
        host.steps[run] = [[seq, seq, total, float(number - seq), 100 * seq] for seq in range(number)]
    page.evaluate(f"location.hash = '#/compare/{A}/{B}'")
    expect(page.locator("#view-compare .state")).to_contain_text(f"Matched by sigma: {number} and {number + 1} steps")
    page.keyboard.press("Home")
    page.evaluate("() => new Promise(requestAnimationFrame)")


def longest_ms(browser: Browser, work: Callable[[PageHost, Page, int], None], number: int) -> float:
    """The longest task of a new page that does the work; Chromium tells of none below 50 ms."""
    host = PageHost(streams=[stream("a"), stream("b")])
    with serving(host), opening(browser, host.url) as open_page:
        page = open_page(script=LONG_TASKS)
        expect(page.locator("body[data-link=on]")).to_be_attached()
        work(host, page, number)
        return float(max(page.evaluate("self.long_tasks"), default=50))


def measure(browser: Browser, work: Callable[[PageHost, Page, int], None], turns: int) -> dict[str, float]:
    """Medians of each, and their ratio."""
    taken: dict[int, list[float]] = {MUCH: [], LITTLE: []}
    for _ in range(turns):
        for number, times in taken.items():
            times.append(longest_ms(browser, work, number))
    much_ms, little_ms = (statistics.median(times) for times in taken.values())
    return {"much_ms": much_ms, "little_ms": little_ms, "ratio": round(much_ms / little_ms, 2)}


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one turn each: does it run at all")
    turns = 1 if parser.parse_args().quick else TURNS
    results: dict[str, Any] = {"machine": cpu_name()}
    with chromium() as browser:
        for work in (recordings, films):
            results[work.__name__] = measure(browser, work, turns)
            sys.stdout.write(f"{work.__name__:<10} {results[work.__name__]}\n")
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
