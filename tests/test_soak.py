"""A daemon and fifty streams that come and go: memory, descriptors and threads of every process stay as they were."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.daemon import Daemon, clean_environment
from tests.page_socket import PageSocket
from tests.processes import Usage, children_of, usage_of

STREAMS = 50
MINUTES = float(os.environ.get("SOAK_MINUTES", "20"))
SAMPLE_S = 10.0
WATCH_S = 30.0  # then the page turns to other streams
MORE_BYTES = 1.06  # of the last quarter over the second one: allocators breathe
MORE_MIB = 6.0
FLAT = ("rss_mib", "pss_mib", "descriptors", "threads")
SETS = (
    "recording.max_age_s=60",  # files come and go too
    "recording.film_max_bytes=1048576",
    "recording.lost_after_s=20",
)


def watch_some(page: PageSocket, daemon: Daemon, until_s: float) -> None:
    """Look at some of the streams for a while, as a page does."""
    names = [name for name, row in daemon.streams().items() if row["state"] == "live"][:6]
    page.watch({name: "thumb" if place else "live" for place, name in enumerate(names)})
    while (left_s := until_s - time.monotonic()) > 0:
        try:
            page.picture(timeout_s=min(left_s, 2.0))
        except TimeoutError:
            continue


def report(samples: dict[str, list[Usage]]) -> str:
    """A table: medians of each quarter, and the most of all."""
    lines = [f"{'process':<12}{'':>14}" + "".join(f"{f'quarter {n}':>12}" for n in (1, 2, 3, 4)) + f"{'most':>10}"]
    for name, rows in samples.items():
        for what in FLAT:
            values = [float(getattr(row, what)) for row in rows]
            shown = "".join(f"{median:>12.1f}" for median in quarters(values))
            lines.append(f"{name:<12}{what:>14}{shown}{max(values):>10.1f}")
    return "\n".join(lines)


def quarters(values: list[float]) -> list[float]:
    """The median of each quarter."""
    size = len(values) // 4
    return [statistics.median(values[place * size : (place + 1) * size]) for place in range(4)]


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 300)
def test_fifty_streams_that_come_and_go_leave_nothing_behind(tmp_path: Path) -> None:
    """PSS, RSS, file descriptors and threads of supervisor, broker, worker, streamer and sampler are flat."""
    with Daemon(tmp_path, *SETS) as daemon:
        samplers = subprocess.Popen(
            [sys.executable, "-m", "tests.soak_samplers", daemon.broker, str(STREAMS)],
            stdin=subprocess.PIPE,
            env=clean_environment(tmp_path),
        )
        roles = {row["role"]: row["pid"] for row in daemon.facts["roles"]}
        processes = {"supervisor": daemon.process.pid, **roles, "samplers": samplers.pid}
        samples: dict[str, list[Usage]] = {name: [] for name in processes}
        started_s = time.monotonic()
        try:
            while (now := time.monotonic()) < started_s + MINUTES * 60:
                with PageSocket(daemon) as page:  # pages come and go too
                    for number in range(1, round(WATCH_S / SAMPLE_S) + 1):
                        watch_some(page, daemon, now + number * SAMPLE_S)
                        for name, pid in processes.items():
                            samples[name].append(usage_of(pid))
        finally:
            assert samplers.stdin is not None
            samplers.stdin.close()
            samplers.wait(30)
        print("\n" + report(samples))  # noqa: T201 the table is the result
        for name, rows in samples.items():
            print(f"{name:<12}{rows[-1].cpu_s:>8.0f} s of processor")  # noqa: T201
        opened = daemon.log().count("stream_opened")
        print(f"{opened} runs in {MINUTES:.0f} minutes")  # noqa: T201
        assert set(children_of(daemon.process.pid)) == set(roles.values()), "a role was started again"
        assert opened > STREAMS * MINUTES / 2
    for name, rows in samples.items():
        for what in FLAT:
            _, before, _, after = quarters([float(getattr(row, what)) for row in rows])
            spare = MORE_MIB if what.endswith("mib") else 0.05 * before + 3
            factor = MORE_BYTES if what.endswith("mib") else 1.0
            assert after <= before * factor + spare, f"{name}: {what} grew from {before} to {after}"
