"""The broker beside `zmq.proxy` in C: messages a second, added latency, and what its thread costs a message.

    python -m tests.benchmarks.broker            (about six minutes; --quick: half a minute)

Two samplers -> broker or proxy -> one worker, each a process, over tcp loopback, at most WINDOW frames under way. The
proxy hands bytes on; the broker unpacks and checks every frame, queues it, schedules it, and packs it into a job. The
runs are `live` ones, so that none may be passed over. Medians of interleaved rounds. `thread_us`: processor time of the
broker's own thread a message, scheduling included (Linux). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import secrets
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.frames import StreamInfo
from taesd_stream.messages import (
    DemandUpdate,
    Done,
    Job,
    Part,
    PublisherHello,
    RunHello,
    StreamerHello,
    Watch,
    WorkerHello,
)
from taesd_stream.sockets import dial
from taesd_stream_workers.bench.broker_load import frame_of
from tests.broker_role import BrokerRole

SIZES: Final = {"32 KiB": 32 << 10, "128 KiB": 128 << 10, "512 KiB": 512 << 10, "2 MiB": 2 << 20}
SAMPLERS: Final = 2
WINDOW: Final = 64  # frames under way, in all
PACE_HZ: Final = 150.0
HELLO_S: Final = 0.5
MODULE: Final = [sys.executable, "-m", "tests.benchmarks.broker"]


class Counters:
    """Numbers that the processes of one round share: frames sent by each sampler, frames that came."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(4096))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 4096)

    def get(self, place: int) -> int:
        """One number."""
        return int(struct.unpack_from("q", self._map, 8 * place)[0])

    def set(self, place: int, value: int) -> None:
        """Each place has one writer."""
        struct.pack_into("q", self._map, 8 * place, value)


def sampler(front: str, counters: Counters, number: int, nbytes: int, count: int, pace_hz: float) -> None:
    """Send `count` frames, as fast as the window allows or at a pace; `front` of a proxy is only sent frames."""
    run, payload = secrets.token_hex(8), os.urandom(nbytes)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = dial(context, zmq.DEALER, front, hwm=1000)
    info = StreamInfo(stream=f"bench/{number}", run=run, kind="live", latent_format="bench", record="off", fps=16.0)
    socket.poll(5000, zmq.POLLOUT)
    if os.environ.get("BENCH_BROKER"):
        socket.send_multipart(wire.pack(info))
        while True:
            demand = wire.unpack(socket.recv_multipart(), wire.TO_PUBLISHER)
            if isinstance(demand, DemandUpdate) and demand.level == "every":
                break
    hello_s = 0.0
    started_s = time.monotonic()
    for seq in range(count):
        while sum(counters.get(n) for n in range(SAMPLERS)) - counters.get(8) >= WINDOW:
            time.sleep(0.0001)
        if pace_hz:
            time.sleep(max(0.0, started_s + seq / pace_hz - time.monotonic()))
        if os.environ.get("BENCH_BROKER") and time.monotonic() > hello_s:
            hello_s = time.monotonic() + HELLO_S
            rows = {run: RunHello(next_seq=seq)}
            socket.send_multipart(wire.pack(PublisherHello(runs=rows, echo_ns=time.monotonic_ns())))
            while socket.poll(0):
                socket.recv_multipart()
        socket.send_multipart(wire.pack(frame_of(run, seq, payload)), copy=False)
        counters.set(number, seq + 1)
    while counters.get(8) < sum(counters.get(n) for n in range(SAMPLERS)):
        time.sleep(0.01)
    context.destroy(linger=0)


def worker(inside: str, counters: Counters, count: int) -> None:
    """Take `count` frames, and print the seconds from the first to the last, and each one's age in us."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = dial(context, zmq.DEALER, inside, hwm=1000, identity=b"bench-worker")
    is_broker = bool(os.environ.get("BENCH_BROKER"))
    hello = WorkerHello(device="bench", credits=8, engines={"bench": {"decoder": "none", "history": 0}})
    ages_us: list[float] = []
    hello_s = first_s = 0.0
    while len(ages_us) < count:
        if is_broker and time.monotonic() > hello_s:
            hello_s = time.monotonic() + HELLO_S
            socket.send_multipart(wire.pack(hello))
        if not socket.poll(100):
            continue
        head, *payloads = socket.recv_multipart(copy=False)
        now_ns = time.monotonic_ns()
        if is_broker:
            message = wire.unpack([bytes(head.buffer), *(payload.buffer for payload in payloads)], wire.TO_WORKER)
            if not isinstance(message, Job):
                continue
            socket.send_multipart(wire.pack(Done(job=message.job, ms=0.1)))
            sent = [item.sent_ns for item in message.items]
        else:
            handed_on: list[Part] = [bytes(payloads[0].buffer), payloads[1].buffer]
            sent = [wire.unpack(handed_on, wire.FROM_PUBLISHER).sent_ns]
        first_s = first_s or time.monotonic()
        ages_us += [(now_ns - sent_ns) / 1000 for sent_ns in sent]
        counters.set(8, len(ages_us))
    seconds = time.monotonic() - first_s
    sys.stdout.write(json.dumps({"seconds": seconds, "ages_us": sorted(ages_us)}) + "\n")
    context.destroy(linger=0)


def proxy() -> None:
    """`zmq.proxy` in C: prints its two addresses, and runs until it is killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for one in (front, back):
        one.bind("tcp://127.0.0.1:*")
    sys.stdout.write(json.dumps([one.getsockopt_string(zmq.LAST_ENDPOINT) for one in (front, back)]) + "\n")
    sys.stdout.flush()
    zmq.proxy(front, back)


@contextmanager
def running_proxy() -> Iterator[tuple[str, str, int, dict[str, str]]]:
    """Addresses, process, environment of its peers."""
    process = subprocess.Popen([*MODULE, "--role", "proxy"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    front, back = json.loads(process.stdout.readline())
    try:
        yield front, back, process.pid, {}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def running_broker(folder: Path) -> Iterator[tuple[str, str, int, dict[str, str]]]:
    """The same of a real broker, with a streamer's connection that watches both streams."""
    with BrokerRole(folder) as broker, broker.streamer() as streamer:
        for number in range(SAMPLERS):
            streamer.watch(f"bench/{number}")
        pid = broker.process.pid
        watcher = subprocess.Popen([*MODULE, "--role", "streamer", "--inside", broker.inside])
        try:
            time.sleep(1.0)
            yield broker.front, broker.inside, pid, {"BENCH_BROKER": "1"}
        finally:
            watcher.kill()
            watcher.wait()


def streamer_role(inside: str) -> None:
    """Watch the streams and say HELLO, until it is killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = dial(context, zmq.DEALER, inside, hwm=1000, identity=b"bench-streamer")
    socket.poll(5000, zmq.POLLOUT)
    while True:
        socket.send_multipart(wire.pack(StreamerHello(endpoint="tcp://127.0.0.1:9")))
        for number in range(SAMPLERS):
            socket.send_multipart(wire.pack(Watch(stream=f"bench/{number}", rendition="live", viewers=1)))
        until_s = time.monotonic() + HELLO_S
        while socket.poll(max(0, round((until_s - time.monotonic()) * 1000))):
            socket.recv_multipart()


def thread_ns(pid: int) -> int:
    """Processor time of a process's first thread."""
    return int((Path("/proc") / str(pid) / "task" / str(pid) / "schedstat").read_text().split()[0])


def measure(way: str, folder: Path, nbytes: int, count: int, pace_hz: float) -> dict[str, float]:
    """One round: messages a second and ages, or, of the broker, also its thread's time a message."""
    folder.mkdir(parents=True)
    running = running_broker(folder) if way == "broker" else running_proxy()
    samplers = 1 if pace_hz else SAMPLERS
    with running as (front, inside, pid, extra):
        environment = {**os.environ, **extra}
        shared = ["--counters", str(folder / "counters")]
        Counters(folder / "counters")
        taking = subprocess.Popen(
            [*MODULE, "--role", "worker", "--inside", inside, "--count", str(count * samplers), *shared],
            stdout=subprocess.PIPE,
            env=environment,
        )
        time.sleep(1.0)
        before_ns = thread_ns(pid)
        sending = [
            subprocess.Popen(
                [
                    *(*MODULE, "--role", "sampler", "--front", front, "--number", str(number)),
                    *("--nbytes", str(nbytes), "--count", str(count), "--pace", str(pace_hz), *shared),
                ],
                env=environment,
            )
            for number in range(samplers)
        ]
        output, _ = taking.communicate(timeout=300)
        spent_ns = thread_ns(pid) - before_ns
        for one in sending:
            one.wait(30)
    result: dict[str, Any] = json.loads(output)
    ages = result["ages_us"]
    return {
        "per_s": (count * samplers - 1) / result["seconds"],
        "p50_us": ages[len(ages) // 2],
        "p99_us": ages[len(ages) * 99 // 100],
        "thread_us": spent_ns / 1000 / (count * samplers),
    }


def measure_all(folder: Path, rounds: int, quick: bool) -> dict[str, dict[str, float]]:
    """The table: rounds of both ways, one after the other."""
    table: dict[str, dict[str, float]] = {}
    for name, nbytes in SIZES.items():
        count = max(100, min(6000, (400 << 20) // nbytes)) // (8 if quick else 1)
        found: dict[str, list[float]] = {}
        for turn in range(rounds):
            for way in ("broker", "proxy"):
                for pace_hz in (0.0, PACE_HZ):
                    place = folder / f"{nbytes}-{turn}-{way}-{pace_hz:.0f}"
                    one = measure(way, place, nbytes, count if not pace_hz else (60 if quick else 450), pace_hz)
                    keys = ("p50_us", "p99_us") if pace_hz else ("per_s", "thread_us")
                    for key in keys:
                        found.setdefault(f"{way}_{key}", []).append(one[key])
        row = {key: round(statistics.median(values), 1) for key, values in found.items()}
        row["ratio"] = round(row["broker_per_s"] / row["proxy_per_s"], 2)
        row["added_p50_us"] = round(row["broker_p50_us"] - row["proxy_p50_us"], 1)
        table[name] = row
        sys.stdout.write(f"{name:>8}  {row}\n")
        sys.stdout.flush()
    return table


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    for hidden, kind in (("role", str), ("front", str), ("inside", str), ("counters", Path)):
        parser.add_argument(f"--{hidden}", type=kind, help=argparse.SUPPRESS)
    for number in ("number", "nbytes", "count"):
        parser.add_argument(f"--{number}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--pace", type=float, default=0.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "proxy":
        proxy()
    elif given.role == "streamer":
        streamer_role(given.inside)
    elif given.role == "worker":
        worker(given.inside, Counters(given.counters), given.count)
    elif given.role == "sampler":
        sampler(given.front, Counters(given.counters), given.number, given.nbytes, given.count, given.pace)
    else:
        with tempfile.TemporaryDirectory() as name:
            table = measure_all(Path(name), 1 if given.quick else given.rounds, given.quick)
        sys.stdout.write(json.dumps({"broker": table}) + "\n")


if __name__ == "__main__":
    main()
