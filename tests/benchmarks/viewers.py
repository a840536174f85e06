"""How many viewers a core of the streamer serves: its CPU seconds over the pictures sent, at rising numbers of pages.

    python -m tests.benchmarks.viewers            (about two minutes)

A real daemon, one stream at 10 pictures a second, N pages that take `live` by WebSocket, in a process of their own.
`cores`: CPU of the streamer's process in the turn; `viewers_per_core`: by the slope between the first and the last
turn; `seen_per_s`: pictures of the slowest page; `packets_per_picture`: encodes that all viewers cost, from /metrics.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, wait_for

HZ: Final = 10.0
VIEW: Final = """
import json, struct, sys, threading, time
from websockets.sync.client import connect
url, count, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
seen = [0] * count
def view(number):
    with connect(url, max_size=None) as socket:
        socket.send(json.dumps({"type": "watch", "streams": {"viewed": "live"}}))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if isinstance(socket.recv(timeout=20), bytes):
                seen[number] += 1
threads = [threading.Thread(target=view, args=(n,)) for n in range(count)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(min(seen, default=0))
"""


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far (Linux)."""
    fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def packets(daemon: Daemon) -> float:
    """Packets of `live` so far."""
    text = daemon.get("/metrics")[1].decode()
    return float(text.partition('\ntaesd_stream_packets_total{rendition="live"} ')[2].partition("\n")[0] or 0)


def turn(daemon: Daemon, viewers: int, turn_s: float, published: list[int]) -> dict[str, Any]:
    """One number of viewers."""
    url, pid = daemon.web.replace("http", "ws") + "/ws", daemon.pid_of("streamer")
    load = subprocess.Popen(
        [sys.executable, "-c", VIEW, url, str(viewers), str(turn_s + 4)], stdout=subprocess.PIPE, text=True
    )
    time.sleep(3.0)  # all are connected
    began = cpu_s(pid), time.monotonic(), packets(daemon), published[0]
    time.sleep(turn_s)
    cores = (cpu_s(pid) - began[0]) / (time.monotonic() - began[1])
    per_picture = (packets(daemon) - began[2]) / max(1, published[0] - began[3])
    output, _ = load.communicate()
    return {
        "viewers": viewers,
        "cores": round(cores, 3),
        "packets_per_picture": round(per_picture, 2),
        "seen_per_s": round(int(output) / (turn_s + 4), 1),
    }


def measure(numbers: list[int], turn_s: float, folder: Path) -> dict[str, Any]:
    """All turns over one daemon."""
    over, published = threading.Event(), [0]

    def publish() -> None:
        latents = [np.random.default_rng(seed).standard_normal((4, 32, 32)).astype(np.float16) for seed in range(8)]
        with LatentPublisher(daemon.broker, stream="viewed", latent_format="sd1") as publisher:
            while not over.wait(1 / HZ):
                publisher.publish(latents[published[0] % 8], step=published[0])
                published[0] += 1

    with Daemon(folder, f"web.max_viewers={2 * max(numbers) + 10}") as daemon:
        thread = threading.Thread(target=publish)
        thread.start()
        try:
            wait_for(lambda: daemon.streams(), of="the stream")
            turns = [turn(daemon, number, turn_s, published) for number in numbers]
        finally:
            over.set()
            thread.join()
    slope = (turns[-1]["cores"] - turns[0]["cores"]) / max(1, numbers[-1] - numbers[0])
    return {"turns": turns, "hz": HZ, "viewers_per_core": round(1 / slope) if slope > 0 else None}


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--viewers", type=int, nargs="+", default=[1, 10, 50, 100])
    parser.add_argument("--turn-s", type=float, default=10.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = measure(arguments.viewers, arguments.turn_s, Path(name))
    for row in results["turns"]:
        sys.stdout.write(f"{row}\n")
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
