"""Whether recording slows the live view: the same streams, watched, with and without Record, turn by turn.

    python -m tests.benchmarks.recording_cost            (about three minutes)

A real daemon, a publisher process, a page's WebSocket that takes `live` of each stream. `packet_ms`: publish() to the
packet at the streamer, of the pictures that were shown in a turn; `shown_fps`: pictures a second that reached the page.
Pairs of turns, record off and all, without films, in changing order; the difference is the median of the pairs'. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.preview_cost import SHAPE
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

PUBLISH: Final = """
import sys, time
import numpy as np
from taesd_stream import LatentPublisher
address, count, hz, shape = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), eval(sys.argv[4])
publishers = [LatentPublisher(address, stream=f"cost/{n}", latent_format="sd1") for n in range(count)]
rng = np.random.default_rng(0)
latents = [rng.standard_normal(shape).astype(np.float16) for _ in range(16)]
step, next_s = 0, time.monotonic()
while True:
    for publisher in publishers:
        publisher.publish(latents[step % 16], step=step)
    step += 1
    next_s += 1 / hz
    time.sleep(max(0.0, next_s - time.monotonic()))
"""


def turn(daemon: Daemon, page: PageSocket, names: list[str], mode: str, turn_s: float) -> dict[str, float]:
    """One turn with recording off, or on."""
    for name in names:
        daemon.json(f"/api/v1/streams/{name}/record", method="POST", body={"mode": mode})
    settle_s = time.monotonic() + 1.5
    while time.monotonic() < settle_s:
        page.picture(20)
    late_ms, began_s = [], time.monotonic()
    while time.monotonic() < began_s + turn_s:
        header, _ = page.picture(20)
        late_ms.append((header["stamps"]["streamed_us"] - header["stamps"]["sent_us"]) / 1000)
    took_s = time.monotonic() - began_s
    late_ms.sort()
    return {
        "shown_fps": len(late_ms) / took_s,
        "p50_ms": late_ms[len(late_ms) // 2],
        "p95_ms": late_ms[int(len(late_ms) * 0.95)],
    }


def measure(streams: int, hz: float, pairs: int, turn_s: float, folder: Path) -> dict[str, Any]:
    """Pairs of turns over one daemon."""
    names = [f"cost/{number}" for number in range(streams)]
    turns: dict[str, list[dict[str, float]]] = {"off": [], "all": []}
    with Daemon(folder, "recording.film=off") as daemon:  # a film is encoded as a recording is
        command = [sys.executable, "-c", PUBLISH, daemon.broker, str(streams), str(hz), str(SHAPE)]
        load = subprocess.Popen(command)
        try:
            wait_for(lambda: len(daemon.streams()) == streams, of="the streams")
            with PageSocket(daemon) as page:
                page.watch(dict.fromkeys(names, "live"))
                turn(daemon, page, names, "off", 2.0)  # warm
                for pair in range(pairs):
                    for mode in ("off", "all") if pair % 2 else ("all", "off"):
                        turns[mode].append(turn(daemon, page, names, mode, turn_s))
        finally:
            load.kill()
            load.wait()
    return {
        mode: {key: round(statistics.median(one[key] for one in rows), 2) for key in rows[0]}
        for mode, rows in turns.items()
    } | {
        f"added_{key}": round(
            statistics.median(b[key] - a[key] for a, b in zip(turns["off"], turns["all"], strict=True)), 2
        )
        for key in ("p50_ms", "p95_ms", "shown_fps")
    }


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--hz", type=float, default=10.0)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--turn-s", type=float, default=10.0)
    one = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = measure(one.streams, one.hz, one.pairs, one.turn_s, Path(name))
    for key, value in results.items():
        sys.stdout.write(f"{key:<20} {value}\n")
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
