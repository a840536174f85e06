"""A socket that dials one address, says why it is not let in, and knocks again later."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Final

import zmq
from zmq.utils.monitor import recv_monitor_message

from taesd_stream.keys import Keys
from taesd_stream.sockets import close, dial
from taesd_stream.wire import DEFAULT_ADDRESS

FIRST_KNOCK_S: Final = 1.0  # then twice as long each time
MAX_KNOCK_S: Final = 30.0
BROKEN_OFF_S: Final = 2.0  # handshakes that are only broken off: a broker that starts or ends does so too
_WATCHED: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Line:
    """One thread's. `socket` may become another one in `look`; error: why nobody lets it in, None while somebody does.

    libzmq tells a program nothing of a handshake that failed, and after most failures never tries again.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        address: str,
        *,
        keys: Keys | None = None,
        hwm: int = 64,
        identity: bytes | None = None,
    ) -> None:
        """kind: zmq.DEALER, zmq.PUSH. Raises: zmq.ZMQError for an address that is none."""
        self.error: str | None = None
        self.address = address
        self._context = context
        self._kind = kind
        self._keys = keys
        self._hwm = hwm
        self._identity = identity
        self._wait_s = FIRST_KNOCK_S
        self._knock_s = math.inf  # when to dial again
        self._broken_off_s: float | None = None
        self._dial()

    def look(self) -> bool:
        """Learn what became of the handshakes; dial again when it is time. Returns whether `socket` is a new one."""
        monitor = self.socket.get_monitor_socket()
        while monitor.poll(0):
            self._take(recv_monitor_message(monitor)["event"])
        if time.monotonic() < self._knock_s:
            return False
        self.close()
        self._dial()
        return True

    def refused(self, text: str) -> None:
        """The peer itself has said so, on a connection that stands: close it at the next `look`, and knock again."""
        self.error = f"{self.address}: {text}"
        self._knock_later()

    @property
    def is_broken_off(self) -> bool:
        """Whether handshakes are only broken off: a key may be wrong, or what listens there is no daemon (any more)."""
        return self._broken_off_s is not None

    def move(self, address: str) -> None:
        """Dial another address: `socket` is a new one. Raises: zmq.ZMQError for an address that is none."""
        self.close()
        self.address = address
        self.error, self._broken_off_s, self._wait_s = None, None, FIRST_KNOCK_S
        self._dial()

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket and what watches it."""
        close(self.socket, linger_ms)

    def _dial(self) -> None:
        self._knock_s = math.inf
        self.socket = dial(
            self._context,
            self._kind,
            self.address,
            hwm=self._hwm,
            identity=self._identity,
            keys=self._keys,
            watched_events=_WATCHED,
        )

    def _take(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.error, self._broken_off_s, self._wait_s = None, None, FIRST_KNOCK_S
            return
        now = time.monotonic()
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:  # libzmq goes on trying
            self._broken_off_s = self._broken_off_s or now
            if now - self._broken_off_s > BROKEN_OFF_S:
                self.error = f"{self.address} breaks off every handshake: {self._doubt()}"
            return
        self._broken_off_s = None
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.error = f"{self.address} refuses this key: it was never allowed there, or was revoked"
        else:
            self.error = f"{self.address} and this side do not agree on encryption: {self._doubt()}"
        self._knock_later()

    def _knock_later(self) -> None:
        if self._knock_s == math.inf:
            self._knock_s = time.monotonic() + self._wait_s
            self._wait_s = min(MAX_KNOCK_S, 2 * self._wait_s)

    def _doubt(self) -> str:
        if self._keys is None:
            return (
                "it asks for a key, which `taesd-stream keys new NAME` makes there; or what listens there is no daemon"
            )
        return "is the key in server.pub another daemon's, or is that one without keys?"


def checked_line(
    context: zmq.Context[zmq.Socket[bytes]], address: str, others: Iterable[str], *, keys: Keys | None
) -> Line:
    """A DEALER's line to `address`; the others are only looked at, so that one that is none is said now, not when due.

    Raises: ValueError that names the address that is none.
    """
    at = address
    try:
        for at in others:
            if at != address:
                close(dial(context, zmq.DEALER, at))
        at = address
        return Line(context, zmq.DEALER, address, keys=keys)
    except zmq.ZMQError as error:
        raise ValueError(f"address: expected one such as {DEFAULT_ADDRESS}, got {at!r}: {error}") from error
