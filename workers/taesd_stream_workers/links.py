"""What the parts of the broker share: its two sockets, its counters, and what people must be told."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import zmq

from taesd_stream import wire
from taesd_stream.errors import ConfigError
from taesd_stream.sockets import bind_router

logger = logging.getLogger(__name__)

Context = zmq.Context[zmq.Socket[bytes]]


class Links:
    """Used in the broker's loop alone. is_changed: STATE has something new to tell."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.alerts: dict[str, str] = {}
        self.is_changed = True

    def bind(self, context: Context, publishers: str, inside: str) -> None:
        """Bind both sockets. Raises: ConfigError for an address that is in use, or none."""
        self.front = _bind(context, "broker.bind", publishers)
        self.inner = _bind(context, "broker.workers_bind", inside)

    def to_publisher(self, peer: bytes, message: Any) -> bool:
        """Send to a publisher; False when it is gone or takes no more."""
        return _send(self.front, peer, message)

    def to_inside(self, peer: bytes, message: Any) -> bool:
        """Send to a worker or the streamer; False when it is gone or takes no more."""
        return _send(self.inner, peer, message)

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
        socket.send_multipart([peer, *wire.pack(message)], zmq.NOBLOCK, copy=False)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            return False
        raise
    return True


def _bind(context: Context, key: str, address: str) -> zmq.Socket[bytes]:
    try:
        return bind_router(context, address)
    except zmq.ZMQError as error:
        in_use = error.errno == zmq.EADDRINUSE
        way_out = "another daemon may be running; choose another with --set" if in_use else "check"
        raise ConfigError(f"{key} = {address}: {error.strerror}; {way_out} {key}=…") from error
