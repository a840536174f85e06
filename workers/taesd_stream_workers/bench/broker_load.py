"""A load for a real broker, over real sockets: samplers, a worker that answers at once, a streamer that watches.

What it measures is a floor: the load runs beside the broker on the same machine.
"""

from __future__ import annotations

import os
import queue
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.config import Config, load_config
from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.messages import (
    Ack,
    DemandUpdate,
    Done,
    Job,
    PublisherHello,
    RunHello,
    State,
    StreamerHello,
    Watch,
    WorkerHello,
)
from taesd_stream.sockets import dial, receive_parts
from taesd_stream_workers.role.process import Reports, Role

SAMPLERS: Final = 64  # that are watched, and as many that nobody watches; each has one frame under way
CREDITS: Final = 4  # jobs of the worker, as of one on a GPU
HELLO_S: Final = 0.5
ANSWER_S: Final = 20  # for any answer, on a machine that has other work too
ANSWER_MS: Final = 1000 * ANSWER_S
WAITING_BYTES: Final = 16 << 20  # of one burst to samplers that nobody watches
BURST: Final = 12  # frames of each of them, then a HELLO, whose answer ends it; a connection holds 16
FORMAT: Final = "bench"  # of no table: the broker only asks that it has three axes


class BrokerSilentError(TaesdStreamError):
    """The broker that was to be measured does not answer."""


@contextmanager
def running_broker() -> Iterator[dict[str, Any]]:
    """A broker of its own, on free loopback ports, in a folder that goes afterwards. Yields: its addresses and `pid`.

    Raises: BrokerSilentError when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="taesd-stream-bench-") as folder:
        reports: Reports = queue.SimpleQueue()
        role = Role("broker", "broker", _config(Path(folder)))
        role.spawn(["--quiet"], reports)
        try:
            deadline_s = time.monotonic() + ANSWER_S
            while not role.is_ready:
                try:
                    _, pid, report = reports.get(timeout=max(0.01, deadline_s - time.monotonic()))
                except queue.Empty:
                    raise BrokerSilentError(f"the broker was not ready within {ANSWER_S} s") from None
                role.take(pid, report)
            assert role.process is not None
            yield role.facts | {"pid": role.process.pid}
        finally:
            role.ask_to_stop()
            role.wait_or_kill(time.monotonic() + 5.0)


def _config(folder: Path) -> Config:
    """A broker that keeps nothing and refuses no load."""
    limits = {"max_messages_s": 10_000_000, "max_client_messages_s": 10_000_000}
    local = {"bind": "tcp://127.0.0.1:0", "workers_bind": "tcp://127.0.0.1:0"}
    return load_config(
        values={"broker": {**limits, **local}, "recording": {"folder": str(folder / "recordings"), "film": "off"}}
    )


def frame_of(run: str, seq: int, payload: bytes) -> LatentFrame:
    """A frame of these bytes, a multiple of 32."""
    return LatentFrame(
        run=run,
        seq=seq,
        index=seq,
        step=seq,
        total_steps=None,
        sigma=None,
        dtype="uint8",
        shape=(4, 8, len(payload) // 32),
        kept=False,
        sent_ns=time.monotonic_ns(),
        payload=payload,
    )


class Sampler:
    """One publisher's connection and its run."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], front: str, stream: str) -> None:
        self.run = secrets.token_hex(8)
        self.stream = stream
        self.socket = dial(context, zmq.DEALER, front, hwm=1000)
        self._seq = -1

    def open(self) -> None:
        """OPEN the run, and wait for its DEMAND."""
        if not self.socket.poll(ANSWER_MS, zmq.POLLOUT):
            raise BrokerSilentError(f"the broker takes no connection within {ANSWER_S} s")
        info = StreamInfo(stream=self.stream, run=self.run, kind="steps", latent_format=FORMAT, record="off")
        self.socket.send_multipart(wire.pack(info))
        self.wait_for(DemandUpdate)

    def publish(self, payload: bytes) -> None:
        """Send the next frame."""
        self._seq += 1
        self.socket.send_multipart(wire.pack(frame_of(self.run, self._seq, payload)), copy=False)

    def hello(self) -> None:
        """HELLO, as each second; the broker answers with its time, an ACK and a DEMAND."""
        row = RunHello(next_seq=self._seq + 1)
        self.socket.send_multipart(wire.pack(PublisherHello(runs={self.run: row}, echo_ns=time.monotonic_ns())))

    def wait_for(self, kind: type) -> None:
        """Read up to the next answer of a kind."""
        while True:
            if not self.socket.poll(ANSWER_MS):
                raise BrokerSilentError(f"the broker said no {kind.__name__} within {ANSWER_S} s")
            if isinstance(wire.unpack(self.socket.recv_multipart(), wire.TO_PUBLISHER), kind):
                return

    def drain(self) -> None:
        """Drop what came."""
        while self.socket.poll(0):
            self.socket.recv_multipart()


@dataclass(frozen=True, slots=True)
class Rate:
    """How many a second, and what each cost the broker's thread, milliseconds; None where the system does not say."""

    per_s: float
    thread_ms: float | None


@dataclass(frozen=True, slots=True)
class BrokerRates:
    """What a broker did with frames of one size.

    frames: from samplers to a worker. waiting: of samplers that nobody watches, into its memory.
    ages_ms: of single frames while nothing else was under way, from publish to the worker.
    """

    frames: Rate
    waiting: Rate
    ages_ms: list[float]


def thread_s(pid: int) -> float | None:
    """Processor time of a process's first thread so far, seconds (Linux); None where the system does not say."""
    try:
        return int((Path("/proc") / str(pid) / "task" / str(pid) / "schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return None


class BrokerLoad:
    """`with BrokerLoad(facts) as load:` connects everybody; used by one thread."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.linger = 0
        self._context.set(zmq.MAX_SOCKETS, 4 * SAMPLERS + 64)
        self._hello_s = 0.0

    def __enter__(self) -> BrokerLoad:
        try:
            self._connect(self._facts["bind"], self._facts["workers_bind"])
        except BaseException:  # Ctrl-C too: sockets that stay would hold up the end of the process
            self._context.destroy(linger=0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def _connect(self, front: str, inside: str) -> None:
        self._worker = dial(self._context, zmq.DEALER, inside, hwm=1000, identity=b"bench-worker")
        self._streamer = dial(self._context, zmq.DEALER, inside, hwm=1000, identity=b"bench-streamer")
        self._watched = [Sampler(self._context, front, f"watched/{number}") for number in range(SAMPLERS)]
        self._unwatched = [Sampler(self._context, front, f"unwatched/{number}") for number in range(SAMPLERS)]
        self._by_run = {one.run: one for one in self._watched}
        for one in (self._worker, self._streamer):
            if not one.poll(ANSWER_MS, zmq.POLLOUT):
                raise BrokerSilentError(f"the broker takes no connection within {ANSWER_S} s")
        self._stay()
        for sampler in self._watched:
            self._streamer.send_multipart(wire.pack(Watch(stream=sampler.stream, rendition="live", viewers=1)))
        self._wait_for_state()
        for sampler in (*self._watched, *self._unwatched):
            sampler.open()

    def measure(self, nbytes: int, seconds: float) -> BrokerRates:
        """All of it for frames of so many bytes (a multiple of 32); takes about `seconds`."""
        payload = os.urandom(nbytes)
        self._settle()
        self._through(self._watched, payload, seconds / 8)  # warm
        self._settle()
        began = self._clocks()
        frames = self._rate(began, len(self._through(self._watched, payload, seconds / 2)))
        waiting = self._waiting(payload, seconds / 4)
        self._settle()
        return BrokerRates(frames, waiting, self._through(self._watched[:1], payload, seconds / 8))

    def hellos(self, seconds: float) -> Rate:
        """HELLOs of samplers and their answers, when nothing else is to do."""
        return self._rounds(seconds, len(self._unwatched), 1, lambda _: None)

    def _clocks(self) -> tuple[float, float | None]:
        """Now, and the processor time of the broker's thread so far, seconds."""
        return time.monotonic(), thread_s(self._facts["pid"])

    def _rate(self, began: tuple[float, float | None], count: int) -> Rate:
        now_s, worked_s = self._clocks()
        is_known = worked_s is not None and began[1] is not None
        return Rate(
            per_s=count / (now_s - began[0]),
            thread_ms=1000 * (worked_s - began[1]) / count if is_known else None,  # type: ignore[operator]
        )

    def _waiting(self, payload: bytes, seconds: float) -> Rate:
        count = max(1, min(SAMPLERS, WAITING_BYTES // (BURST * len(payload))))

        def burst(sampler: Sampler) -> None:
            for _ in range(BURST):
                sampler.publish(payload)

        return self._rounds(seconds, count, BURST, burst)

    def _rounds(self, seconds: float, count: int, each: int, publish: Callable[[Sampler], None]) -> Rate:
        """`publish` of so many samplers, `each` messages; a HELLO behind them is answered when they were taken."""
        began, rounds = self._clocks(), 0
        while rounds == 0 or time.monotonic() - began[0] < seconds:
            for sampler in self._unwatched[:count]:
                publish(sampler)
                sampler.hello()
            for sampler in self._unwatched[:count]:
                sampler.wait_for(Ack)
                sampler.drain()
            self._stay()
            rounds += 1
        return self._rate(began, rounds * count * each)

    def _through(self, samplers: Sequence[Sampler], payload: bytes, seconds: float) -> list[float]:
        """One frame of each sampler under way, for so long. Returns: the age of each at the worker, milliseconds."""
        chosen = {one.run for one in samplers}
        for sampler in samplers:
            sampler.publish(payload)
        until_s, under_way, ages_ms = time.monotonic() + seconds, len(samplers), []
        while under_way > 0:
            for item in (one for one in self._take_job() if one.run in chosen):
                ages_ms.append((time.monotonic_ns() - item.sent_ns) / 1e6)
                if time.monotonic() < until_s:
                    self._by_run[item.run].publish(payload)
                else:
                    under_way -= 1
            self._stay()
        return ages_ms

    def _take_job(self) -> Sequence[Any]:
        """The items of the next job, which is done at once."""
        if not self._worker.poll(ANSWER_MS):
            raise BrokerSilentError(f"the broker gave no job within {ANSWER_S} s")
        message = wire.unpack(receive_parts(self._worker), wire.TO_WORKER)
        if not isinstance(message, Job):
            return ()
        self._worker.send_multipart(wire.pack(Done(job=message.job, ms=0.1)))
        return message.items

    def _settle(self) -> None:
        """Drop the jobs that are still to come, as after a KEYFRAME: what is measured begins with none under way."""
        while self._worker.poll(50):
            message = wire.unpack(receive_parts(self._worker), wire.TO_WORKER)
            if isinstance(message, Job):
                self._worker.send_multipart(wire.pack(Done(job=message.job, ms=0.1)))
        for sampler in (*self._watched, *self._unwatched):
            sampler.hello()
        for sampler in (*self._watched, *self._unwatched):
            sampler.wait_for(Ack)
            sampler.drain()

    def _stay(self) -> None:
        """Worker and streamer say HELLO where it is due, and drop what the broker tells."""
        if time.monotonic() >= self._hello_s:
            self._hello_s = time.monotonic() + HELLO_S
            engines = {FORMAT: {"decoder": "none", "history": 0}}
            self._worker.send_multipart(wire.pack(WorkerHello(device="bench", credits=CREDITS, engines=engines)))
            self._streamer.send_multipart(wire.pack(StreamerHello(endpoint="tcp://127.0.0.1:9")))
        while self._streamer.poll(0):
            self._streamer.recv_multipart()

    def _wait_for_state(self) -> None:
        """The broker has heard the streamer, and so what it watches."""
        deadline_s = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline_s:
            if self._streamer.poll(100) and isinstance(
                wire.unpack(self._streamer.recv_multipart(), wire.TO_STREAMER), State
            ):
                return
        raise BrokerSilentError(f"the broker told no STATE within {ANSWER_S} s")
