"""A real broker process for tests, and its peers (publisher, worker, streamer) spoken by the test over real sockets."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import secrets
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import zmq

from taesd_stream import wire
from taesd_stream.frames import Kind, LatentFrame, RecordMode, Rendition, StreamInfo
from taesd_stream.keys import Keys
from taesd_stream.messages import (
    Ack,
    Cursor,
    DemandUpdate,
    Done,
    Drain,
    Echo,
    End,
    Failed,
    Job,
    JobItem,
    Keyframe,
    PublisherHello,
    Refused,
    RunHello,
    State,
    Stats,
    StreamerHello,
    Watch,
    WorkerHello,
)
from taesd_stream.sockets import dial
from tests.daemon import COMMAND, START_S, clean_environment, wait_for

M = TypeVar("M")

TIMEOUT_S = 8.0
HELLO_S = 0.5
SHAPE = (4, 8, 8)


class BrokerRole:
    """`with BrokerRole(folder) as broker:` runs one alone, on free local ports."""

    def __init__(self, folder: Path, *sets: str, config: Path | None = None) -> None:
        self.folder = folder
        self._config = ["--config", str(config)] if config is not None else []
        self.log_folder = folder / "recordings" / ".latents"
        self._sets = [f"recording.folder={folder / 'recordings'}", *sets]
        self.front = self.inside = "tcp://127.0.0.1:0"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.alive: list[HelloPeer] = []
        self.keys: Keys | None = None  # of its workers and its streamer, where it asks for some

    def __enter__(self) -> BrokerRole:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._context.destroy(linger=0)

    def start(self, *, prepare: Callable[[], None] | None = None) -> None:
        """Start it where it was before, and wait until it is ready. prepare: called in the child before it runs."""
        own = [f"broker.bind={self.front}", f"broker.workers_bind={self.inside}"]
        options = [word for one in (*self._sets, *own) for word in ("--set", one)]
        self._log = (self.folder / "broker.log").open("ab")
        started_s = time.monotonic()
        self.process = subprocess.Popen(
            [*COMMAND, "broker", *self._config, *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=clean_environment(self.folder),
            preexec_fn=prepare,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"the broker did not start:\n{self.log()[-3000:]}"
        self.ready_after_s = time.monotonic() - started_s
        facts = json.loads(line)
        self.front, self.inside = facts["bind"], facts["workers_bind"]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.wait(15)
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        """As a crash does."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.stop()

    def log(self) -> str:
        """All that it logged."""
        return (self.folder / "broker.log").read_text()

    def stats(self) -> State:
        """Its STATE, asked for."""
        self.beat()
        with self.peer(self.inside, wire.TO_STREAMER, keys=self.keys) as peer:
            return peer.ask(Stats(), State)

    def wait_for_workers(self, count: int) -> None:
        """Wait until it knows so many."""
        wait_for(lambda: len(self.stats().workers) == count, of=f"{count} workers")

    def row(self, stream: str) -> dict[str, Any]:
        """The stream's row of STATE."""
        return next(row for row in self.stats().streams if row["name"] == stream)

    def alerts(self) -> dict[str, str]:
        """What it warns of."""
        found: dict[str, str] = self.stats().stats["alerts"]
        return found

    def limit_files(self, limit_bytes: int) -> None:
        """No file of it may grow past so many bytes: its writes behind that fail, as on a full disk.

        What it logs shares the limit; that much it can say in any case.
        """
        limit_bytes = max(limit_bytes, (self.folder / "broker.log").stat().st_size + 4096)
        _, hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit_bytes, hard))

    @contextmanager
    def peer(
        self, address: str, allowed: Sequence[type], identity: str = "", keys: Keys | None = None
    ) -> Iterator[Peer]:
        """A socket that the test speaks for."""
        identity = identity or f"peer-{secrets.token_hex(4)}"
        socket = dial(self._context, zmq.DEALER, address, hwm=1000, identity=identity.encode(), keys=keys)
        try:
            yield Peer(socket, allowed, self)
        finally:
            socket.close(linger=0)

    def beat(self) -> None:
        """Say HELLO for every peer that must not be silent; called wherever one of them waits."""
        for peer in self.alive:
            peer.say_hello_if_due()

    @contextmanager
    def publisher(self, keys: Keys | None = None) -> Iterator[Peer]:
        """A publisher's connection."""
        with self.peer(self.front, wire.TO_PUBLISHER, keys=keys) as one:
            yield one

    @contextmanager
    def worker(self, identity: str = "", **hello: Any) -> Iterator[WorkerPeer]:
        """A worker that says HELLO; jobs are the test's to answer."""
        with self.peer(self.inside, wire.TO_WORKER, identity, self.keys) as one:
            worker = WorkerPeer(one.socket, one.allowed, self)
            worker.hello(**hello)
            with self._alive(worker):
                yield worker

    @contextmanager
    def streamer(self) -> Iterator[StreamerPeer]:
        """A streamer that says HELLO, and writes nothing by itself."""
        with self.peer(self.inside, wire.TO_STREAMER, keys=self.keys) as one:
            streamer = StreamerPeer(one.socket, one.allowed, self)
            streamer.hello()
            with self._alive(streamer):
                yield streamer

    @contextmanager
    def _alive(self, peer: HelloPeer) -> Iterator[None]:
        self.alive.append(peer)
        try:
            yield
        finally:
            self.alive.remove(peer)


class Peer:
    """One end of a connection to the broker."""

    def __init__(self, socket: zmq.Socket[bytes], allowed: Sequence[type], broker: BrokerRole) -> None:
        self.socket = socket
        self.allowed = allowed
        self.heard: list[Any] = []
        self._aside: deque[Any] = deque()  # came while it waited for something else: still to be received
        self._broker = broker

    def say(self, message: Any) -> None:
        """Send it; the connection may still be coming."""
        assert self.socket.poll(round(TIMEOUT_S * 1000), zmq.POLLOUT), "no broker to say it to"
        self.socket.send_multipart(wire.pack(message))

    def receive(self, timeout_s: float) -> Any | None:
        """The next message, None where none came in time."""
        message = self._aside.popleft() if self._aside else self._read(timeout_s)
        if message is not None:
            self.heard.append(message)
        return message

    def _read(self, timeout_s: float) -> Any | None:
        deadline_s = time.monotonic() + timeout_s
        while not self.socket.poll(max(0, min(200, round((deadline_s - time.monotonic()) * 1000)))):
            self._broker.beat()
            if time.monotonic() >= deadline_s:
                return None
        return wire.unpack(self.socket.recv_multipart(), self.allowed)

    def next(self, cls: type[M], where: Callable[[M], bool] = lambda _: True, timeout_s: float = TIMEOUT_S) -> M:
        """The next message of a kind; what comes before it is only heard."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            message = self.receive(deadline_s - time.monotonic())
            if message is None:
                raise AssertionError(f"no such {cls.__name__} in {timeout_s} s, only {self.heard[-4:]}")
            if isinstance(message, cls) and where(message):
                return message

    def ask(self, message: Any, answer: type[M]) -> M:
        """Say it, and wait for the answer."""
        self.say(message)
        return self.next(answer)

    def drain(self) -> None:
        """Hear what is there."""
        while self.receive(0) is not None:
            pass

    def open(
        self, run: str, stream: str, *, kind: Kind = "steps", record: RecordMode = "off", latent_format: str = "sd1"
    ) -> DemandUpdate:
        """OPEN a run, and wait for its DEMAND."""
        fps = 16.0 if kind == "live" else None
        self.say(StreamInfo(stream=stream, run=run, kind=kind, latent_format=latent_format, record=record, fps=fps))
        return self.next(DemandUpdate, lambda demand: demand.run == run)

    def publisher_hello(self, **runs: RunHello) -> None:
        """HELLO of these runs."""
        self.say(PublisherHello(runs=runs, echo_ns=time.monotonic_ns()))

    def ack(self, run: str, seq: int, timeout_s: float = TIMEOUT_S) -> Ack:
        """The ACK of that seq or a later one."""
        return self.next(Ack, lambda ack: ack.run == run and ack.seq >= seq, timeout_s)

    def acked(self) -> int:
        """The last seq that was acked, of whatever run; -1 for none."""
        self.drain()
        return max((message.seq for message in self.heard if isinstance(message, Ack)), default=-1)

    def end(self, run: str, last_seq: int) -> None:
        """END of a run, and wait until the broker has it."""
        self.say(End(run=run, last_seq=last_seq, reason="done"))
        self.next(Ack, lambda ack: ack.run == run and ack.ended)

    def refused(self) -> Refused:
        """The next REFUSED."""
        return self.next(Refused)


class HelloPeer(Peer):
    """A peer that is gone for the broker when it is silent."""

    said: Any = None
    _said_s = 0.0

    def settle(self) -> None:
        """Wait until the broker has all that this peer said: what another one says then comes after it."""
        self.said = dataclasses.replace(self.said, echo_ns=time.monotonic_ns())
        self.say_hello()
        while True:
            message = self._read(TIMEOUT_S)
            assert message is not None, f"the broker did not hear {self.said}"
            if isinstance(message, Echo) and message.echo_ns == self.said.echo_ns:
                return
            self._aside.append(message)

    def say_hello(self) -> None:
        """HELLO, now."""
        self._said_s = time.monotonic()
        self.say(self.said)

    def say_hello_if_due(self) -> None:
        """HELLO, where the last one is some time ago."""
        if time.monotonic() - self._said_s > HELLO_S:
            self.say_hello()


class WorkerPeer(HelloPeer):
    """A worker's connection."""

    said = WorkerHello(device="cpu (test)", credits=2)

    def hello(self, **fields: Any) -> None:
        """HELLO with these fields new, and wait until the broker knows.

        `live` runs that it answered are in its memory until it says otherwise.
        """
        self.said = dataclasses.replace(self.said, **fields)
        self.settle()

    def job(self, timeout_s: float = TIMEOUT_S) -> Job:
        """The next JOB."""
        return self.next(Job, timeout_s=timeout_s)

    def no_job(self, for_s: float) -> None:
        """Assert that none comes for a while."""
        deadline_s = time.monotonic() + for_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            message = self.receive(left_s)
            assert not isinstance(message, Job), message

    def done(self, job: Job, **fields: Any) -> None:
        """DONE."""
        live = [item for item in job.items if item.kind == "live"]
        self.said = dataclasses.replace(
            self.said, memories={**self.said.memories, **{item.run: item.index + 1 for item in live}}
        )
        self.say(Done(job=job.job, ms=5.0, **fields))

    def do(self, count: int) -> list[JobItem]:
        """Do jobs until that many items are done. Returns: the items, in their order."""
        items: list[JobItem] = []
        while len(items) < count:
            job = self.job()
            self.done(job)
            items += job.items
        return items

    def failed(self, job: Job, code: str, *, items: Sequence[int] = (), retry: bool = True) -> None:
        """FAILED."""
        self.say(Failed(job=job.job, items=list(items), code=code, text=f"{code} (test)", retry=retry))

    def drained(self) -> Drain:
        """The next DRAIN."""
        return self.next(Drain)


class StreamerPeer(HelloPeer):
    """The streamer's connection."""

    def hello(self, *cursors: Cursor) -> None:
        """HELLO, and wait until the broker knows."""
        self.said = StreamerHello(endpoint="tcp://127.0.0.1:9", cursors=cursors)
        self.settle()

    def watch(self, stream: str, rendition: Rendition = "live", viewers: int = 1) -> None:
        """Viewers come or go, and wait until the broker knows."""
        self.say(Watch(stream=stream, rendition=rendition, viewers=viewers))
        self.settle()

    def keyframe(self, stream: str, rendition: Rendition = "live") -> None:
        """A late viewer."""
        self.say(Keyframe(stream=stream, rendition=rendition))

    def written(self, run: str, attempt: int, seq: int, *, synced: int = -1, finished: bool = False) -> None:
        """CURSOR."""
        self.say(Cursor(run=run, attempt=attempt, written=seq, synced=synced, finished=finished))


def frame(
    run: str, seq: int, *, index: int | None = None, kept: bool = False, shape: tuple[int, ...] = SHAPE
) -> LatentFrame:
    """A frame whose every value is its seq."""
    return LatentFrame(
        run=run,
        seq=seq,
        index=seq if index is None else index,
        step=seq,
        total_steps=None,
        sigma=None,
        dtype="float16",
        shape=shape,
        kept=kept,
        sent_ns=time.monotonic_ns(),
        payload=np.full(shape, seq, np.float16).tobytes(),
    )


def values(payload: Any) -> list[int]:
    """Of each latent (of SHAPE) in a payload its value."""
    latents = np.frombuffer(payload, np.float16).reshape(-1, *SHAPE)
    assert (latents == latents[:, :1, :1, :1]).all()
    return [int(one) for one in latents[:, 0, 0, 0]]


def new_run() -> str:
    """A run of its own."""
    return secrets.token_hex(8)
