"""Packets on their way from a decode worker to the streamer: bounded in bytes, the sockets of one thread."""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

import zmq

from taesd_stream import wire
from taesd_stream.frames import Packet
from taesd_stream.keys import Keys
from taesd_stream_workers.role.broken_chains import BrokenChains
from taesd_stream_workers.role.line import RoleLine

logger = logging.getLogger(__name__)

MAX_BYTES: Final = 64 << 20
LATE_S: Final = 30.0  # so long packets for a former streamer may come from jobs that were given before
SAY_S: Final = 1.0


class Outgoing:
    """A queue and its PUSH socket. Over the bound all but `record` lose their oldest.

    ask_keyframe: called with a stream whose `live` chain has lost a packet.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        ask_keyframe: Callable[[str], None],
        keys: Keys | None = None,
    ) -> None:
        self._context = context
        self._keys = keys
        self._queue: deque[Packet] = deque()
        self._endpoint = ""
        self._line: RoleLine | None = None
        self._left: dict[str, float] = {}  # endpoints of former streamers -> until when their packets are late ones
        self._broken = BrokenChains(ask_keyframe)
        self.held_bytes = 0
        self.dropped: Counter[str] = Counter()
        self._said = 0
        self._next_say_s = 0.0

    @property
    def is_full(self) -> bool:
        """Whether recordings fill it: then no credit is given back."""
        return self.held_bytes > MAX_BYTES

    def put(self, endpoint: str, packet: Packet) -> None:
        """Queue a packet, dropping the oldest that may be dropped if it is over the bound."""
        if endpoint != self._endpoint:
            if time.monotonic() < self._left.get(endpoint, 0.0):
                return  # nobody is there any more: of a recording the next attempt sends it again
            self._turn_to(endpoint)
        if not self._broken.takes(packet):
            self.dropped[packet.rendition] += 1
            return
        self._queue.append(packet)
        self.held_bytes += len(packet.payload)
        if self.is_full:
            self._drop()

    def send(self) -> bool:
        """Send what goes now. Returns whether all of it went."""
        self._say_dropped()
        while self._queue:
            packet = self._queue[0]
            try:
                self._connected().send_multipart(wire.pack(packet), zmq.NOBLOCK, copy=False)
            except zmq.Again:
                if self._line is not None:
                    self._line.attend()
                return False
            self._queue.popleft()
            self.held_bytes -= len(packet.payload)
        return True

    def close(self) -> None:
        """Close the socket; what was sent has two seconds to leave."""
        if self._line is not None:
            self._line.close(linger_ms=2000)

    def _turn_to(self, endpoint: str) -> None:
        """A daemon has one streamer: another endpoint is a new one, and what waits for the old one would block it."""
        now_s = time.monotonic()
        self._left = {left: until_s for left, until_s in self._left.items() if until_s > now_s and left != endpoint}
        if self._endpoint:
            self._left[self._endpoint] = now_s + LATE_S
        for packet in self._queue:
            self._broken.lose(packet)
        self._queue.clear()
        self.held_bytes = 0
        if self._line is not None:
            self._line.close()
            self._line = None
        self._endpoint = endpoint

    def _connected(self) -> zmq.Socket[bytes]:
        if self._line is None:
            self._line = RoleLine(self._context, zmq.PUSH, self._endpoint, keys=self._keys)
        return self._line.socket

    def _drop(self) -> None:
        kept: deque[Packet] = deque()
        for packet in self._queue:
            if packet.rendition != "record" and self.is_full:
                self._broken.lose(packet)
            elif self._broken.takes(packet):
                kept.append(packet)
                continue
            self.held_bytes -= len(packet.payload)
            self.dropped[packet.rendition] += 1
        self._queue = kept

    def _say_dropped(self) -> None:
        total, now_s = self.dropped.total(), time.monotonic()
        if total > self._said and now_s >= self._next_say_s:
            logger.warning("streamer_too_slow dropped=%d all=%s", total - self._said, dict(self.dropped))
            self._said, self._next_say_s = total, now_s + SAY_S
