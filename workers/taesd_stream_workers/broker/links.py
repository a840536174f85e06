"""What the parts of the broker share: its two sockets, its counters, and what people must be told."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.errors import ConfigError
from taesd_stream.messages import Part
from taesd_stream_workers.role.gate import Door, Gate

logger = logging.getLogger(__name__)

FRONT_HWM: Final = 16  # messages of one connection that wait, each up to 64 MiB; past them its TCP stands still
INNER_HWM: Final = 1000

Context = zmq.Context[zmq.Socket[bytes]]


class Links:
    """Used in the broker's loop alone. front: to the samplers; inner: to workers and the streamer.

    is_changed: STATE has something new to tell.
    """

    front: Door
    inner: Door

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.alerts: dict[str, str] = {}
        self.is_changed = True

    def bind(self, gate: Gate, context: Context, publishers: str, inside: str) -> None:
        """Bind both sockets. Raises: ConfigError for an address that is in use, or none."""
        gate.open(context)
        with _named("broker.bind", publishers):
            self.front = gate.bind(context, zmq.ROUTER, publishers, "samplers", hwm=FRONT_HWM, send_hwm=INNER_HWM)
        with _named("broker.workers_bind", inside):
            self.inner = gate.bind(context, zmq.ROUTER, inside, "workers", hwm=INNER_HWM)

    def to_publisher(self, peer: bytes, message: Any) -> bool:
        """Send to a publisher; False when it is gone or takes no more."""
        return _send(self.front.socket, peer, message)

    def to_inside(self, peer: bytes, message: Any) -> bool:
        """Send to a worker or the streamer; False when it is gone or takes no more."""
        return _send(self.inner.socket, peer, message)

    def alert(self, code: str, text: str) -> None:
        """Something that a person must mend: on every page until `resolve`, logged once."""
        if code not in self.alerts:
            logger.error("%s %s", code, text)
            self.is_changed = True
        self.alerts[code] = text

    def resolve(self, code: str) -> None:
        """It is mended."""
        if self.alerts.pop(code, None):
            self.is_changed = True


def _send(socket: zmq.Socket[bytes], peer: bytes, message: Any) -> bool:
    try:
        socket.send_multipart([peer, *map(_as_it_came, wire.pack(message))], zmq.NOBLOCK, copy=False)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            return False
        raise
    return True


def _as_it_came(part: Part) -> Part | zmq.Frame:
    """A payload that ZeroMQ brought goes on as its own: for other memory pyzmq wakes a thread once it is sent."""
    frame = part.obj if isinstance(part, memoryview) else None
    return frame if isinstance(frame, zmq.Frame) and len(frame) == len(part) else part


@contextlib.contextmanager
def _named(key: str, address: str) -> Iterator[None]:
    try:
        yield
    except zmq.ZMQError as error:
        in_use = error.errno == zmq.EADDRINUSE
        way_out = "another daemon may be running; choose another with --set" if in_use else "check"
        raise ConfigError(f"{key} = {address}: {error.strerror}; {way_out} {key}=…") from error
