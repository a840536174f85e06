"""What the streamer's threads say to the broker: HELLO before all else, and what is kept while nobody takes it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.messages import Cursor, Forget, Record

logger = logging.getLogger(__name__)

HELLO_S: Final = 1.0
MAX_WAITING: Final = 1000  # wishes of people while the broker is away


class BrokerOutbox:
    """`put` in any thread, `send` in the socket's own.

    greeting: HELLO, and all that a broker must know that was restarted; asked for in the thread of `send`.
    """

    def __init__(self, greeting: Callable[[], Iterable[Any]], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._greeting = greeting
        self._clock_s = clock_s
        self._queued: deque[Any] = deque()
        self._next_hello_s = float("-inf")

    def put(self, message: Any) -> None:
        """Queue it for the next `send`."""
        self._queued.append(message)

    def send(self, socket: zmq.Socket[bytes]) -> None:
        """Send what is due, as far as it is taken. Once a turn of the loop.

        HELLO goes first: a broker that hears none for 3 s takes the streamer for gone, however many wishes it hears.
        """
        if not socket.poll(0, zmq.POLLOUT):
            self._drop_what_is_said_again()
            return
        if self._clock_s() >= self._next_hello_s:
            self._next_hello_s = self._clock_s() + HELLO_S
            for message in self._greeting():
                _send(socket, message)
        for _ in range(len(self._queued)):
            if not _send(socket, self._queued[0]):
                self._drop_what_is_said_again()
                return
            self._queued.popleft()

    def _drop_what_is_said_again(self) -> None:
        """The broker is away, or does not read. HELLO will tell it all that still holds, and the hub a STOP: it knows
        the run that was meant. What a person wants recorded or given up, and that a growing file is gone, is said once.
        """
        waiting = [self._queued.popleft() for _ in range(len(self._queued))]
        newest = {message.run: message for message in waiting if isinstance(message, Cursor)}
        gone = [cursor for cursor in newest.values() if cursor.written < 0 and not cursor.finished]
        wishes = [message for message in waiting if isinstance(message, Record | Forget)]
        if len(wishes) > MAX_WAITING:
            logger.warning("wishes_lost count=%d reason=broker_away", len(wishes) - MAX_WAITING)
        self._queued.extendleft(reversed([*wishes[-MAX_WAITING:], *gone]))


def _send(socket: zmq.Socket[bytes], message: Any) -> bool:
    try:
        socket.send_multipart(wire.pack(message), zmq.NOBLOCK)
    except zmq.Again:
        return False
    return True
