"""The broker's side of a publisher's socket, spoken by the test itself over a real ROUTER."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import zmq

from taesd_stream import wire
from taesd_stream.frames import Demand, LatentFrame, RecordMode, StreamInfo
from taesd_stream.messages import Ack, DemandUpdate, Echo, End, PublisherHello, Refused
from taesd_stream.sockets import bind

M = TypeVar("M")

TIMEOUT_S = 20.0


class BrokerPeer:
    """`with BrokerPeer() as peer:` listens; the test takes what came, in order, and says what the broker would.

    HELLO is answered by its echo alone, everything else is the test's to answer.
    """

    def __init__(self, address: str = "tcp://127.0.0.1:0") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = bind(self._context, zmq.ROUTER, address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self.heard: list[Any] = []  # every message so far
        self.sender = b""  # who said the last one

    def __enter__(self) -> BrokerPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Be gone, as a killed broker is."""
        self._socket.close(linger=0)
        self._context.term()

    def receive(self, timeout_s: float = TIMEOUT_S) -> Any:
        """The next message."""
        assert self._socket.poll(round(timeout_s * 1000)), f"nothing came in {timeout_s} s, only {self.heard[-5:]}"
        self.sender, *parts = self._socket.recv_multipart()
        message = wire.unpack(parts, wire.FROM_PUBLISHER)
        self.heard.append(message)
        if isinstance(message, PublisherHello):
            self.send(Echo(echo_ns=message.echo_ns, now_ns=time.monotonic_ns()))
        return message

    def hear(self) -> None:
        """All that has come by now, which may be nothing."""
        while self._socket.poll(0):
            self.receive()

    def next(self, cls: type[M], where: Callable[[M], bool] = lambda _: True) -> M:
        """The next message of a kind; what comes before it is only heard."""
        deadline_s = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline_s:
            message = self.receive(max(0.001, deadline_s - time.monotonic()))
            if isinstance(message, cls) and where(message):
                return message
        raise AssertionError(f"no such {cls.__name__}, only {self.heard[-5:]}")

    def frame(self, seq: int, *, kept: bool | None = None) -> LatentFrame:
        """The next FRAME of that seq."""
        return self.next(LatentFrame, lambda frame: frame.seq == seq and kept in (None, frame.kept))

    def seqs(self) -> list[int]:
        """Of all frames so far, in the order in which they came."""
        return [message.seq for message in self.heard if isinstance(message, LatentFrame)]

    def send(self, message: Any) -> None:
        """Say something to whoever spoke last."""
        self._socket.send_multipart([self.sender, *wire.pack(message)])

    def opened(self) -> StreamInfo:
        """The next OPEN."""
        return self.next(StreamInfo)

    def demand(self, run: str, level: Demand = "watched", record: RecordMode = "off", max_fps: float = 0.0) -> None:
        """Say who wants the run."""
        self.send(DemandUpdate(run=run, level=level, max_fps=max_fps, record=record))

    def ack(self, run: str, seq: int, *, ended: bool = False) -> None:
        """Say what the log has."""
        self.send(Ack(run=run, seq=seq, ended=ended))

    def refuse(self, run: str, code: str, text: str = "no", use: str | None = None) -> None:
        """Say no."""
        self.send(Refused(stream="unknown", run=run, code=code, text=text, use=use))

    def finish(self) -> End:
        """Take everything up to END, acking what is kept as a broker with a log does."""
        while True:
            message = self.receive()
            if isinstance(message, LatentFrame) and message.kept:
                self.ack(message.run, message.seq)
            elif isinstance(message, End):
                self.ack(message.run, message.last_seq, ended=True)
                return message
