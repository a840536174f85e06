"""What it costs to see a stream through another daemon's page: later by how much, and processor time a picture.

    python -m tests.benchmarks.passing_on            (about a minute)

Two real daemons, the second a peer of the first; a stream at the second, N pages that take `live`, in a process of
their own, first at the second daemon itself (`direct`), then at the first (`passed on`). `p50_ms`, `p99_ms`: from the
moment when the second's streamer had the packet to its arrival at the page. `kib`: the mean picture. `least_per_s`:
pictures of the slowest page. `cores`: CPU of the first's streamer.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import numpy as np

from taesd_stream import LatentPublisher
from tests.benchmarks.viewers import cpu_s
from tests.daemon import Daemon, wait_for

HZ: Final = 20.0
VIEW: Final = """
import json, struct, sys, threading, time
from websockets.sync.client import connect
url, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
views = [[] for _ in range(count)]
def view(seen):
    with connect(url, max_size=None) as socket:
        socket.send(json.dumps({"type": "watch", "streams": {"passed": "live"}}))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = socket.recv(timeout=20)
            now_us = time.monotonic_ns() // 1000
            if isinstance(message, bytes):
                header = json.loads(message[4 : 4 + struct.unpack_from(">I", message)[0]])
                seen.append((now_us - header["stamps"]["streamed_us"], len(message)))
threads = [threading.Thread(target=view, args=(seen,)) for seen in views]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(views))
"""


def publish(publisher: LatentPublisher, stop: threading.Event) -> None:
    """Noise of 512x512 at HZ until told to stop."""
    latents = np.random.default_rng(0).standard_normal((8, 4, 64, 64)).astype(np.float16)
    step = 0
    while not stop.wait(1 / HZ):
        publisher.publish(latents[step % 8], step=step)
        step += 1


def measure(at: Daemon, first: Daemon, pages: int, seconds: float) -> dict[str, Any]:
    """One turn."""
    url = at.web.replace("http", "ws") + "/ws"
    before_s = cpu_s(first.pid_of("streamer"))
    done = subprocess.run(
        [sys.executable, "-c", VIEW, url, str(pages), str(seconds)], check=True, capture_output=True, text=True
    )
    cores = (cpu_s(first.pid_of("streamer")) - before_s) / seconds
    views: list[list[list[int]]] = json.loads(done.stdout)
    ages_us, sizes = np.array([picture for seen in views for picture in seen]).T
    p50_ms, p99_ms = np.percentile(ages_us, [50, 99]) / 1000
    least_per_s = min(map(len, views)) / seconds
    figures = {
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
        "kib": sizes.mean() / 1024,
        "least_per_s": least_per_s,
        "cores": cores,
    }
    return {name: round(float(value), 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--seconds", type=float, default=10)
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("second", "first")]
        for one in folders:
            one.mkdir()
        with Daemon(folders[0], "recording.film=off") as second:
            peers = {"TAESD_STREAM_PEERS": json.dumps([{"url": second.web}])}
            with (
                Daemon(folders[1], environment=peers) as first,
                LatentPublisher(second.broker, stream="passed", latent_format="sd1") as publisher,
            ):
                stop = threading.Event()
                sampler = threading.Thread(target=publish, args=(publisher, stop))
                sampler.start()
                try:
                    wait_for(lambda: "passed" in first.streams(), of="the stream")
                    for pages in asked.pages:
                        for way, at in (("direct", second), ("passed on", first)):
                            row = {"way": way, "pages": pages, **measure(at, first, pages, asked.seconds)}
                            rows.append(row)
                            print(row, flush=True)
                finally:
                    stop.set()
                    sampler.join()
    print(json.dumps({"benchmark": "passing_on", "hz": HZ, "rows": rows}))


if __name__ == "__main__":
    main()
