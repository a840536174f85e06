"""Whether publishing makes a sampler slower: its steps with and without, the sampler and the daemon on a core each.

    python -m tests.benchmarks.sampler_untouched            (about 15 minutes)

A sampler of seeded torch work, about 50 ms a step on one thread, bound to core 0; a real daemon (linear decoder) bound
to core 1: nobody watches, a viewer does, or every frame is kept. Pairs in the order ABBA (alone, publishing,
publishing, alone): `percent` is how much longer a step with publishing is, mean and 95 % interval (Student's t) over
the pairs. The SHA-256 of the final latents of every run must be the same. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from taesd_stream import LatentPublisher
from taesd_stream.frames import RecordMode
from tests.daemon import Daemon
from tests.processes import children_of

STEP_S: Final = 0.05
SHAPE: Final = (4, 128, 128)  # 128 KiB as float16
BAR_PERCENT: Final = 0.5
T_95: Final = ((5, 2.78), (10, 2.26), (20, 2.09), (40, 2.02))  # two-sided, by pairs at the least

# who watches: a process of its own, on the daemon's core
VIEWER: Final = """
import os, sys, time, urllib.request
os.sched_setaffinity(0, {1})
while True:
    try:
        with urllib.request.urlopen(sys.argv[1] + "/streams/untouched/watched/live.mjpeg", timeout=5) as pictures:
            while pictures.read1(1 << 16): pass
    except OSError:
        time.sleep(0.2)
"""


class Sampler:
    """Seeded steps of about STEP_S on one thread."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._matrix = torch.randn(512, 512)
        started_s = time.perf_counter()
        for _ in range(100):
            torch.mm(self._matrix, self._matrix)
        self._products = max(1, round(STEP_S * 100 / (time.perf_counter() - started_s)))

    def run(self, steps: int, publisher: LatentPublisher | None) -> tuple[float, str]:
        """Seconds a step, and the SHA-256 of the final latents."""
        torch.manual_seed(7)
        latents = torch.randn(SHAPE)
        started_s = time.perf_counter()
        for step in range(steps):
            for _ in range(self._products):
                torch.mm(self._matrix, self._matrix)
            latents.mul_(0.99).add_(torch.randn(SHAPE), alpha=0.1)
            if publisher is not None:
                publisher.publish(latents, step=step, total_steps=steps, sigma=1.0)
        step_s = (time.perf_counter() - started_s) / steps
        return step_s, hashlib.sha256(latents.numpy().tobytes()).hexdigest()


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error(f"--pairs {arguments.pairs}: an interval needs 2 at least")
    sampler = Sampler()
    results: dict[str, Any] = {"bar_percent": BAR_PERCENT, "pairs": arguments.pairs, "steps": arguments.steps}
    with tempfile.TemporaryDirectory() as name, Daemon(Path(name)) as daemon:
        bind(daemon)
        os.sched_setaffinity(0, {0})
        for use in ("idle", "watched", "kept"):
            results[use] = compare(daemon, sampler, use, arguments.pairs, arguments.steps)
            sys.stdout.write(f"{use:<8} {results[use]}\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps(results) + "\n")


def bind(daemon: Daemon) -> None:
    """The daemon and its roles, each with all its threads, to core 1."""
    for pid in [daemon.process.pid, *children_of(daemon.process.pid)]:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {1})


def compare(daemon: Daemon, sampler: Sampler, use: str, pairs: int, steps: int) -> dict[str, Any]:
    """ABBA pairs; each run with publishing is a run of its own."""
    differences, hashes, alone_ms = [], set(), []
    viewer = subprocess.Popen([sys.executable, "-c", VIEWER, daemon.web]) if use == "watched" else None
    try:
        for _ in range(pairs):
            seconds = []
            for is_published in (False, True, True, False):
                step_s, digest = one_run(daemon, sampler, use, steps) if is_published else sampler.run(steps, None)
                seconds.append(step_s)
                hashes.add(digest)
            alone_s = (seconds[0] + seconds[3]) / 2
            alone_ms.append(1000 * alone_s)
            differences.append(100 * ((seconds[1] + seconds[2]) / 2 - alone_s) / alone_s)
    finally:
        if viewer is not None:
            viewer.kill()
            viewer.wait()
    mean, half = float(np.mean(differences)), half_interval(differences)
    return {
        "percent": {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)},
        "step_ms_alone": round(float(np.median(alone_ms)), 2),
        "is_same_result": len(hashes) == 1,
    }


def one_run(daemon: Daemon, sampler: Sampler, use: str, steps: int) -> tuple[float, str]:
    """A run with a publisher."""
    record: RecordMode = "all" if use == "kept" else "off"
    with LatentPublisher(daemon.broker, stream=f"untouched/{use}", latent_format="sd1", record=record) as publisher:
        return sampler.run(steps, publisher)


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of their mean."""
    quantile = next((t for count, t in reversed(T_95) if len(values) >= count), 12.7)
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


if __name__ == "__main__":
    main()
