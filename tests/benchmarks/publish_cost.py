"""What publish() takes from a sampler's thread, beside the least that a hand-over can cost, in one run on the CPU.

    python -m tests.benchmarks.publish_cost            (about ten minutes)

Microseconds of the sampler's thread at a sampler's pace, so with cold caches: between two publishes numpy works on
8 MiB, on one thread, most of it without the GIL. The ways take turns, round by round; each figure is the median of the
rounds' percentiles.
`bare`: the copy of the latents in the wire's dtype, a deque, and an eventfd that wakes a thread in zmq.Poller, which
does nothing; `send`: a plain `socket.send(copy=True)` to the same broker; `in process`: diffusers' AutoencoderTiny, PIL
and JPEG. `idle` is publish() while nobody watches, beside a method that does nothing; `hot` the same in a tight loop.
The broker is a process that only listens. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import numpy as np
import zmq

from taesd_stream import LatentPublisher
from taesd_stream.errors import WireError
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.messages import End
from tests.broker_peer import BrokerPeer
from tests.daemon import wait_for

SHAPE: Final = (4, 128, 128)  # 128 KiB as float16
PACES_MS: Final = (20, 50)
BAR: Final = 1.3  # publish() / bare
IDLE_BAR_US: Final = 10.0
Way = Callable[[Any, int], object]


class Listener:
    """A broker in a process of its own that wants everything, or, of a stream `idle`, nothing; for a `with`."""

    def __enter__(self) -> Listener:
        command = [sys.executable, "-m", "tests.benchmarks.publish_cost", "--listen"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def listen() -> None:
    """The process of a Listener: answers what a broker would, until it is killed."""
    with BrokerPeer() as peer:
        sys.stdout.write(peer.address + "\n")
        sys.stdout.flush()
        while True:
            try:
                message = peer.receive(3600.0)
            except WireError:  # of the plain send
                continue
            peer.heard.clear()
            if isinstance(message, StreamInfo) and message.record != "all":
                is_idle = message.stream == "idle"
                peer.demand(message.run, "idle" if is_idle else "watched", max_fps=0.001 if is_idle else 0.0)
            elif isinstance(message, LatentFrame) and message.kept:
                peer.ack(message.run, message.seq)
            elif isinstance(message, End):
                peer.ack(message.run, message.last_seq, ended=True)


class Bare:
    """Snapshot and wake, and nothing else."""

    def __init__(self, snapshot: Callable[[Any], bytes]) -> None:
        self._snapshot = snapshot
        self._slot: deque[tuple[int, bytes]] = deque(maxlen=1)
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        threading.Thread(target=self._run, daemon=True).start()

    def publish(self, latents: Any, step: int) -> None:
        """Hand one over."""
        self._slot.append((step, self._snapshot(latents)))
        os.eventfd_write(self._event, 1)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._event, zmq.POLLIN)
        while True:
            poller.poll()
            os.eventfd_read(self._event)
            self._slot.clear()


class Empty:
    """A method that does nothing."""

    def publish(
        self, latents: Any, *, step: int, total_steps: int | None = None, sigma: float | None = None
    ) -> None: ...


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--listen", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--publishes", type=int, default=100, help="of each way in a round")
    arguments = parser.parse_args()
    if arguments.listen:
        listen()
        return
    with Listener() as listener:
        results = measure(listener, arguments.rounds, arguments.publishes)
    for pace, ways in results["us"].items():
        for name, figures in ways.items():
            sys.stdout.write(f"{pace:<8} {name:<28} {figures}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def measure(listener: Listener, rounds: int, publishes: int) -> dict[str, Any]:
    """Every figure: pace -> way -> percentiles, and the ratios that have a bar."""
    ways = all_ways(listener)
    us: dict[str, dict[str, dict[str, float]]] = {}
    for pace_ms in PACES_MS:
        times: dict[str, list[list[float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, (latents, way) in ways.items():
                count = 1 if name == "in process" else publishes  # it takes seconds
                times[name].append(run(way, latents, count, pace_ms))
        us[f"{pace_ms} ms"] = {name: median_of_rounds(rows) for name, rows in times.items()}
    ratios = {
        f"{pace} {kind}": round(figures[f"publish {kind}"]["p50"] / figures[f"bare {kind}"]["p50"], 2)
        for pace, figures in us.items()
        for kind in inputs()
    }
    hot = {name: hot_us(*ways[name]) for name in ("empty", "idle")}
    bars = {"publish_to_bare": BAR, "idle_us": IDLE_BAR_US}
    return {"bytes": 2 * int(np.prod(SHAPE)), "us": us, "publish_to_bare": ratios, "hot_us": hot, "bars": bars}


def inputs() -> dict[str, tuple[Any, Callable[[Any], bytes]]]:
    """Latents of each kind, and the plain way to their bytes in float16."""
    import torch

    torch.set_num_threads(1)
    numpy_latents = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    tensor = torch.from_numpy(numpy_latents.copy())
    return {
        "numpy float16": (numpy_latents.astype(np.float16), lambda one: bytes(one.tobytes())),
        "numpy float32": (numpy_latents, lambda one: bytes(one.astype(np.float16).tobytes())),
        "torch float16": (tensor.half(), lambda one: bytes(one.numpy().tobytes())),
        "torch float32": (tensor, lambda one: bytes(one.half().numpy().tobytes())),
    }


def all_ways(listener: Listener) -> dict[str, tuple[Any, Way]]:
    """Name -> (latents, call)."""
    watched = LatentPublisher(listener.address, stream="watched", latent_format="sd1", record="off")
    idle = LatentPublisher(listener.address, stream="idle", latent_format="sd1", record="off")
    ways: dict[str, tuple[Any, Way]] = {}
    for name, (latents, to_bytes) in inputs().items():
        ways[f"bare {name}"] = (latents, Bare(to_bytes).publish)
        ways[f"publish {name}"] = (latents, published_by(watched))
    latents = inputs()["numpy float16"][0]
    idle.publish(latents, step=0)
    wait_for(lambda: not idle._outbox.wanted, of="the idle publisher's rest")
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(listener.address)
    ways["send numpy float16"] = (latents, lambda one, _: socket.send(one.tobytes(), copy=True))
    ways["empty"] = (latents, published_by(Empty()))
    ways["idle"] = (latents, published_by(idle))
    ways["in process"] = (inputs()["torch float32"][0], in_process())
    return ways


def published_by(publisher: LatentPublisher | Empty) -> Way:
    """publish() as a sampler calls it."""
    return lambda latents, step: publisher.publish(latents, step=step, total_steps=1 << 30, sigma=1.0)


def in_process() -> Way:
    """The preview of diffusers' documentation."""
    from tests.benchmarks.in_process import in_process_preview  # the listener pays for no torch

    preview = in_process_preview()
    return lambda latents, _step: preview(latents.unsqueeze(0))


def run(way: Way, latents: Any, publishes: int, pace_ms: float) -> list[float]:
    """Microseconds of each call, with work of `pace_ms` before it."""
    work = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    result = np.empty_like(work)
    times_us = []
    warm_up = min(3, publishes - 1)
    for step in range(publishes + warm_up):
        until_s = time.perf_counter() + pace_ms / 1000
        while time.perf_counter() < until_s:
            np.multiply(work, work, out=result)
        started_ns = time.perf_counter_ns()
        way(latents, step)
        times_us.append((time.perf_counter_ns() - started_ns) / 1000)
    return times_us[warm_up:]


def hot_us(latents: Any, way: Way, count: int = 100_000) -> float:
    """Microseconds a call in a tight loop."""
    started_ns = time.perf_counter_ns()
    for step in range(count):
        way(latents, step)
    return round((time.perf_counter_ns() - started_ns) / count / 1000, 3)


def median_of_rounds(rounds: list[list[float]]) -> dict[str, float]:
    """p50, p95 and p99 of each round, and of each the median of the rounds."""
    return {
        f"p{one}": round(float(np.median([np.percentile(times, one) for times in rounds])), 1) for one in (50, 95, 99)
    }


if __name__ == "__main__":
    main()
