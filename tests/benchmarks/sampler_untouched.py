"""Whether publishing makes a sampler slower: its steps with and without, the sampler and the daemon on a core each.

    python -m tests.benchmarks.sampler_untouched            (about 80 minutes)
    python -m tests.benchmarks.sampler_untouched --uses watched,beside --bound process
    python -m tests.benchmarks.sampler_untouched --uses watched,kept --bound nothing --pairs 40

A sampler of seeded torch work, about 50 ms a step on one thread, bound to core 0; a real daemon (linear decoder) bound
to core 1 from its start: nobody watches, a viewer does, or every frame is kept. The publisher's own threads run on core
1, for a system puts them where something is idle; with `--bound process` on core 0, where they take from the sampler
all that they need: that is a process which has one core for everything. With `--bound nothing` the sampler computes on
all cores, as one does that has no GPU, and daemon and viewer take from it what they are given. Pairs in the order ABBA
(alone, publishing, publishing, alone), short ones, for a machine's own speed drifts: four of 50 steps tell half as much
as twenty of 10, in the same time. Where memory lies is another matter of each process, and more than the interval of
one: start it several times. `percent` is how much longer a step with publishing is, mean and 95 % interval (Student's
t) over the pairs. `side_ms` is the processor time that the publisher's own threads take for each step, and the
sampler's other ones where it has some. All pairs are one run: one that is alone has an open publisher, which says HELLO
once a second, and publishing begins anew in each pair, without the rhythm that spares a sampler at work the wake
(`publish_rhythm`) for its first five steps of twenty. What is published looks as x0 predictions do, one field with the
spectrum of photographs melting into another: noise is four times the work for an encoder. The viewer is what a page is,
a WebSocket that takes `live`.

Uses `beside` and `beside_kept` tell what the machine itself loses when its other core works: the sampler publishes
nothing, but in every second and third run of four a process on the daemon's core does, with a viewer, or kept. What
`watched` and `kept` lose more than that, publishing costs; `--against beside` measures just this, pair by pair: the
runs of every four that publish nothing have that process beside them. The SHA-256 of every run's final latents must be
the same. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from taesd_stream import LatentPublisher
from taesd_stream.frames import RecordMode
from tests.daemon import Daemon

STEP_S: Final = 0.05
SHAPE: Final = (4, 128, 128)  # 128 KiB as float16
REST_S: Final = 0.2  # until what was published is through
BAR_PERCENT: Final = 0.5
T_95: Final = ((5, 2.78), (10, 2.26), (20, 2.09), (40, 2.02))  # two-sided, by pairs at the least

BOUND: Final = ("thread", "process", "nothing")
USES: Final = ("idle", "watched", "kept", "beside", "beside_kept")

# who watches as a page does: a process of its own, on the daemon's core
VIEWER: Final = """
import os, sys
os.sched_setaffinity(0, {1})
from types import SimpleNamespace
from tests.page_socket import PageSocket
with PageSocket(SimpleNamespace(web=sys.argv[1])) as page:
    page.watch({f"untouched/{sys.argv[2]}": "live"})
    print(flush=True)  # it watches
    while True:
        page.picture(600)
"""


# who publishes beside the sampler: on the daemon's core, at its pace, from a line on stdin until the next one
NEIGHBOUR: Final = """
import os, select, sys
os.sched_setaffinity(0, {1})
import torch
from taesd_stream import LatentPublisher
from tests.benchmarks.sampler_untouched import natural
torch.set_num_threads(1)
first, last, step = natural(7), natural(8), 0
name, record, steps = sys.argv[2], sys.argv[3], int(sys.argv[4])
with LatentPublisher(sys.argv[1], stream=f"untouched/{name}", latent_format="sd1", record=record) as publisher:
    print(flush=True)
    while sys.stdin.readline():
        while not select.select([sys.stdin], [], [], STEP_S)[0]:
            publisher.publish(first.lerp(last, 1 - 0.8 ** (step % steps + 1)), step=step, sigma=1.0)
            step += 1
        sys.stdin.readline()
""".replace("STEP_S", str(STEP_S))


class Run(NamedTuple):
    """Seconds a step, of which other threads of this process took `side_s`; the SHA-256 of the final latents."""

    step_s: float
    side_s: float
    digest: str


class Plan(NamedTuple):
    """A use, and what it is compared with; `cores`: the sampler's, `others`: the publisher's threads'."""

    use: str
    is_against_beside: bool
    pairs: int
    steps: int
    cores: set[int]
    others: set[int]


class Sampler:
    """Seeded steps of about STEP_S, on a thread a core."""

    def __init__(self, cores: int) -> None:
        torch.set_num_threads(cores)
        self._matrix = torch.randn(512, 512)
        started_s = time.perf_counter()
        for _ in range(100):
            torch.mm(self._matrix, self._matrix)
        self._products = max(1, round(STEP_S * 100 / (time.perf_counter() - started_s)))
        self._first, self._last = natural(7), natural(8)

    def run(self, steps: int, publisher: LatentPublisher | None = None) -> Run:
        """So many steps, with a publish each or none."""
        latents = self._first.clone()
        started_s, side_s = time.perf_counter(), time.process_time() - time.thread_time()
        for step in range(steps):
            for _ in range(self._products):
                torch.mm(self._matrix, self._matrix)
            latents.lerp_(self._last, 0.2)
            if publisher is not None:
                publisher.publish(latents, step=step, sigma=1.0)
        step_s = (time.perf_counter() - started_s) / steps
        side_s = (time.process_time() - time.thread_time() - side_s) / steps
        return Run(step_s, side_s, hashlib.sha256(latents.numpy().tobytes()).hexdigest())


def natural(seed: int) -> torch.Tensor:
    """Latents, SHAPE, with the spectrum of photographs: amplitudes as 1 / frequency (Field 1987)."""
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    radius = torch.hypot(torch.fft.fftfreq(SHAPE[1])[:, None], torch.fft.fftfreq(SHAPE[2])[None, :])
    field: torch.Tensor = torch.fft.ifft2(torch.fft.fft2(noise) / radius.clamp_min(1 / SHAPE[1])).real
    return field / field.std()


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=400, help="of ABBA")
    parser.add_argument("--steps", type=int, default=10, help="of each of the four")
    parser.add_argument("--uses", default=",".join(USES), help="some of them, between commas")
    parser.add_argument("--against", choices=("alone", "beside"), default="alone", help="what uses are compared with")
    parser.add_argument("--bound", choices=BOUND, default="thread", help="what is bound to core 0")
    arguments = parser.parse_args()
    unknown = [use for use in arguments.uses.split(",") if use not in USES]
    if unknown:
        parser.error(f"--uses: expected some of {', '.join(USES)}, got {', '.join(unknown)}")
    if arguments.against == "beside" and not {"watched", "kept"}.issuperset(arguments.uses.split(",")):
        parser.error("--against beside: it is the load of --uses watched or kept without their publisher")
    if arguments.pairs < 2:
        parser.error(f"--pairs {arguments.pairs}: an interval needs 2 at least")
    everywhere = os.sched_getaffinity(0)
    cores = everywhere if arguments.bound == "nothing" else {0}
    others = {"thread": {1}, "process": {0}, "nothing": everywhere}[arguments.bound]
    sampler = Sampler(len(cores))
    results: dict[str, Any] = {"bar_percent": BAR_PERCENT, "bound": arguments.bound}
    results |= {"pairs": arguments.pairs, "steps": arguments.steps, "against": arguments.against}
    os.sched_setaffinity(
        0, everywhere if arguments.bound == "nothing" else {1}
    )  # before the daemon begins, as taskset does: it counts the cores that it may use
    with tempfile.TemporaryDirectory() as name, Daemon(Path(name)) as daemon:
        os.sched_setaffinity(0, cores)
        for use in arguments.uses.split(","):
            plan = Plan(use, arguments.against == "beside", arguments.pairs, arguments.steps, cores, others)
            results[use] = compare(daemon, sampler, plan)
            sys.stdout.write(f"{use:<8} {results[use]}\n")
            sys.stdout.flush()
    sys.stdout.write(json.dumps(results) + "\n")


def compare(daemon: Daemon, sampler: Sampler, plan: Plan) -> dict[str, Any]:
    """ABBA pairs; the publisher is open throughout."""
    differences, hashes, without_ms, side_ms = [], set(), [], []
    with contextlib.ExitStack() as stack:
        is_watched = plan.use in ("watched", "beside")
        beside, record = ("beside", "off") if is_watched else ("beside_kept", "all")
        streams = {plan.use, beside} if plan.is_against_beside else {plan.use}
        for stream in streams if is_watched else ():
            await_line(stack.enter_context(process(VIEWER, daemon.web, stream)))
        neighbour: subprocess.Popen[bytes] | None = None
        if beside in streams:
            neighbour = stack.enter_context(process(NEIGHBOUR, daemon.broker, beside, record, str(plan.steps)))
            await_line(neighbour)
        publisher = None if plan.use.startswith("beside") else stack.enter_context(open_publisher(daemon, plan))
        with_it, without = (neighbour, None) if publisher is None else (None, neighbour)
        for _ in range(plan.pairs):
            time.sleep(REST_S)
            with working(without):
                runs = [sampler.run(plan.steps)]
            with working(with_it):
                runs += [sampler.run(plan.steps, publisher) for _ in range(2)]
            time.sleep(REST_S)
            with working(without):
                runs.append(sampler.run(plan.steps))
            hashes |= {run.digest for run in runs}
            without_s = (runs[0].step_s + runs[3].step_s) / 2
            without_ms.append(1000 * without_s)
            side_ms += [1000 * run.side_s for run in runs[1:3]]
            differences.append(100 * ((runs[1].step_s + runs[2].step_s) / 2 - without_s) / without_s)
    mean, half = float(np.mean(differences)), half_interval(differences)
    return {
        "percent": {"mean": round(mean, 3), "low": round(mean - half, 3), "high": round(mean + half, 3)},
        "step_ms_without": round(float(np.median(without_ms)), 2),
        "side_ms": round(float(np.median(side_ms)), 3),
        "is_same_result": len(hashes) == 1,
    }


def open_publisher(daemon: Daemon, plan: Plan) -> LatentPublisher:
    """The sampler's own, its threads on the plan's cores."""
    record: RecordMode = "all" if plan.use == "kept" else "off"
    os.sched_setaffinity(0, plan.others)  # a thread begins on the cores of the one that starts it
    publisher = LatentPublisher(daemon.broker, stream=f"untouched/{plan.use}", latent_format="sd1", record=record)
    os.sched_setaffinity(0, plan.cores)
    return publisher


@contextlib.contextmanager
def working(neighbour: subprocess.Popen[bytes] | None) -> Iterator[None]:
    """The neighbour, where there is one, publishes meanwhile."""
    if neighbour is not None:
        toggle(neighbour)
    yield
    if neighbour is not None:
        toggle(neighbour)


@contextlib.contextmanager
def process(code: str, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Python code in a process of its own, which is killed at the end."""
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        try:
            yield started
        finally:
            started.kill()


def await_line(started: subprocess.Popen[bytes]) -> None:
    """Until a process has begun."""
    assert started.stdout is not None
    started.stdout.readline()


def toggle(neighbour: subprocess.Popen[bytes]) -> None:
    """Make the neighbour publish, or stop."""
    assert neighbour.stdin is not None
    neighbour.stdin.write(b"\n")
    neighbour.stdin.flush()


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of their mean."""
    quantile = next((t for count, t in reversed(T_95) if len(values) >= count), 12.7)
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


if __name__ == "__main__":
    main()
