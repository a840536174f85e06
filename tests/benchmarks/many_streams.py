"""200 kept streams at 10 frames/s of 32 KiB through one broker: how late an ack is, and where it breaks.

    python -m tests.benchmarks.many_streams            (about three minutes; --quick: 20 s)

A load of N connections in a process of its own, a real broker, and one process that is both worker (a 16x16 grey H.264
picture a frame, really encoded) and streamer (its cursors follow what came). Bound to two cores where there are more.
`late`: kept frames acked later than 1 s, or never; the knee is the most frames/s without one. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from taesd_stream import wire
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream.messages import Ack, Cursor, Done, Job, PublisherHello, RunHello, StreamerHello, WorkerHello
from taesd_stream.sockets import dial
from tests.benchmarks.broker import thread_ns
from tests.broker_role import BrokerRole

SHAPE: Final = (4, 64, 64)  # of float16: 32 KiB
LATE_S: Final = 1.0
HELLO_S: Final = 1.0
GREY: Final = np.full((24, 16), 128, np.uint8)
MODULE: Final = [sys.executable, "-m", "tests.benchmarks.many_streams"]


class Sampler:
    """One kept stream's connection: frames out at its pace, the age of each ack."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], front: str, number: int, payload: bytes) -> None:
        self.run = secrets.token_hex(8)
        self.socket = dial(context, zmq.DEALER, front, hwm=1000)
        self.sent_s: list[float] = []
        self.acked_s: list[float] = []
        self._stream = f"many/{number}"
        self._payload = payload
        self._hello_s = 0.0

    def open(self) -> None:
        """OPEN it."""
        self.socket.poll(10_000, zmq.POLLOUT)
        info = StreamInfo(stream=self._stream, run=self.run, kind="steps", latent_format="sd1", record="all")
        self.socket.send_multipart(wire.pack(info))

    def publish(self) -> None:
        """Send the next frame, and HELLO where it is due."""
        now_s, seq = time.monotonic(), len(self.sent_s)
        if now_s > self._hello_s:
            self._hello_s = now_s + HELLO_S
            rows = {self.run: RunHello(next_seq=seq, kept_from=len(self.acked_s))}
            self.socket.send_multipart(wire.pack(PublisherHello(runs=rows, echo_ns=time.monotonic_ns())))
        frame = LatentFrame(
            run=self.run,
            seq=seq,
            index=seq,
            step=seq,
            total_steps=None,
            sigma=None,
            dtype="float16",
            shape=SHAPE,
            kept=True,
            sent_ns=time.monotonic_ns(),
            payload=self._payload,
        )
        self.sent_s.append(now_s)
        self.socket.send_multipart(wire.pack(frame), copy=False)

    def hear(self) -> None:
        """Take what came."""
        while self.socket.poll(0):
            message = wire.unpack(self.socket.recv_multipart(), wire.TO_PUBLISHER)
            if isinstance(message, Ack):
                self.acked_s += [time.monotonic()] * (message.seq + 1 - len(self.acked_s))


def hear_until(poller: zmq.Poller, by_socket: dict[Any, Sampler], until_s: float) -> None:
    """Take what comes to any sampler, at the moment it comes."""
    while True:
        for socket, _ in poller.poll(max(0, math.ceil(1000 * (until_s - time.monotonic())))):
            by_socket[socket].hear()
        if time.monotonic() >= until_s:
            return


def load(front: str, streams: int, fps: float, seconds: float) -> None:
    """Publish on all streams, evenly spread in time; print the ages of the acks."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, 4096)
    payload = os.urandom(32 << 10)
    samplers = [Sampler(context, front, number, payload) for number in range(streams)]
    by_socket = {one.socket: one for one in samplers}
    poller = zmq.Poller()
    for one in samplers:
        one.open()
        poller.register(one.socket, zmq.POLLIN)
    count = int(streams * fps * seconds)
    started_s = time.monotonic()
    for turn in range(count):
        due_s = started_s + turn / (streams * fps)
        hear_until(poller, by_socket, due_s)
        samplers[turn % streams].publish()
    offered_s = time.monotonic() - started_s
    until_s = time.monotonic() + 5.0
    while time.monotonic() < until_s and any(len(one.acked_s) < len(one.sent_s) for one in samplers):
        hear_until(poller, by_socket, time.monotonic() + 0.05)
    ages = sorted(acked - sent for one in samplers for sent, acked in zip(one.sent_s, one.acked_s, strict=False))
    missing = count - len(ages)
    result = {
        "offered_per_s": round(count / offered_s),
        "ack_p50_ms": round(1000 * ages[len(ages) // 2], 1) if ages else None,
        "ack_p99_ms": round(1000 * ages[len(ages) * 99 // 100], 1) if ages else None,
        "ack_max_ms": round(1000 * ages[-1], 1) if ages else None,
        "late": missing + sum(age > LATE_S for age in ages),
    }
    sys.stdout.write(json.dumps(result) + "\n")
    context.destroy(linger=0)


def worker_and_streamer(inside: str) -> None:
    """Encode a grey picture for each frame, and say that the file has it; until killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    worker = dial(context, zmq.DEALER, inside, hwm=1000, identity=b"grey-worker")
    streamer = dial(context, zmq.DEALER, inside, hwm=1000, identity=b"grey-streamer")
    encoders: dict[str, VideoEncoder] = {}
    pictures: dict[str, int] = {}
    hello_s = 0.0
    while True:
        if time.monotonic() > hello_s:
            hello_s = time.monotonic() + 0.5
            worker.send_multipart(wire.pack(WorkerHello(device="grey", credits=2)))
            streamer.send_multipart(wire.pack(StreamerHello(endpoint="tcp://127.0.0.1:9")))
        while streamer.poll(0):
            streamer.recv_multipart()
        if not worker.poll(50):
            continue
        head, *payloads = worker.recv_multipart(copy=False)
        message = wire.unpack([head.bytes, *(payload.buffer for payload in payloads)], wire.TO_WORKER)
        if not isinstance(message, Job):
            continue
        started_s = time.monotonic()
        cursors: dict[str, Cursor] = {}
        for item in message.items:
            pictures[item.run] = pictures.get(item.run, 0) + 1
            encoder = encoders.setdefault(item.run, VideoEncoder("record"))
            encoder.encode(GREY, 3000 * pictures[item.run])
            cursors[item.run] = Cursor(run=item.run, attempt=item.attempt, written=item.seq, synced=item.seq)
        worker.send_multipart(wire.pack(Done(job=message.job, ms=1000 * (time.monotonic() - started_s))))
        for cursor in cursors.values():
            streamer.send_multipart(wire.pack(cursor))


def measure(folder: Path, streams: int, fps: float, seconds: float) -> dict[str, Any]:
    """One load: acks, and the broker thread's share of a core."""
    folder.mkdir(parents=True)
    with BrokerRole(folder) as broker:
        grey = subprocess.Popen([*MODULE, "--role", "grey", "--inside", broker.inside])
        try:
            before_ns, started_s = thread_ns(broker.process.pid), time.monotonic()
            sent = subprocess.run(
                [
                    *(*MODULE, "--role", "load", "--front", broker.front, "--streams", str(streams)),
                    *("--fps", str(fps), "--seconds", str(seconds)),
                ],
                stdout=subprocess.PIPE,
                check=True,
                timeout=seconds + 60,
            )
            spent = (thread_ns(broker.process.pid) - before_ns) / 1e9 / (time.monotonic() - started_s)
        finally:
            grey.kill()
            grey.wait()
    result: dict[str, Any] = json.loads(sent.stdout)
    return {"streams": streams, "fps": fps, **result, "broker_thread": round(spent, 2)}


def main() -> None:
    """Measure at the claim's load, then at higher ones until a frame is late."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    for word, kind in (("role", str), ("front", str), ("inside", str), ("streams", int), ("fps", float)):
        parser.add_argument(f"--{word}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=20.0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role == "load":
        load(given.front, given.streams, given.fps, given.seconds)
        return
    if given.role == "grey":
        worker_and_streamer(given.inside)
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for fps in (2.0,) if given.quick else (10.0, 12.0, 15.0, 20.0, 25.0, 30.0):
            rows.append(measure(Path(name) / f"{fps}", 200, fps, 5.0 if given.quick else given.seconds))
            sys.stdout.write(f"{rows[-1]}\n")
            sys.stdout.flush()
            if rows[-1]["late"]:
                break
    knee = max((row["offered_per_s"] for row in rows if not row["late"]), default=0)
    sys.stdout.write(json.dumps({"many_streams": rows, "knee_frames_per_s": knee}) + "\n")


if __name__ == "__main__":
    main()
