"""Packets on their way from a decode worker to the streamer: bounded in bytes, the sockets of one thread."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

import zmq

from taesd_stream import wire
from taesd_stream.frames import Packet
from taesd_stream.sockets import prepare

MAX_BYTES: Final = 64 << 20


class Outgoing:
    """A queue and its PUSH socket. Over the bound `live`, `thumb` and `jpeg` lose their oldest, `record` none."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
        self._queue: deque[tuple[str, Packet]] = deque()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self.held_bytes = 0
        self.dropped: Counter[str] = Counter()

    @property
    def is_full(self) -> bool:
        """Whether recordings fill it: then no credit is given back."""
        return self.held_bytes > MAX_BYTES

    def put(self, endpoint: str, packet: Packet) -> None:
        """Queue a packet, dropping the oldest that may be dropped if it is over the bound."""
        self._queue.append((endpoint, packet))
        self.held_bytes += len(packet.payload)
        if self.is_full:
            self._drop()

    def send(self) -> bool:
        """Send what goes now. Returns whether all of it went."""
        while self._queue:
            endpoint, packet = self._queue[0]
            try:
                self._socket(endpoint).send_multipart(wire.pack(packet), zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return False
            self._queue.popleft()
            self.held_bytes -= len(packet.payload)
        return True

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The sockets to wait on while packets are queued."""
        return list(self._sockets.values())

    def close(self) -> None:
        """Close the sockets; what was sent has two seconds to leave."""
        for socket in self._sockets.values():
            socket.close(linger=2000)

    def _socket(self, endpoint: str) -> zmq.Socket[bytes]:
        if endpoint not in self._sockets:
            for old in self._sockets.values():
                old.close(linger=0)  # a daemon has one streamer: another endpoint is a new one
            socket = self._context.socket(zmq.PUSH)
            prepare(socket, hwm=64)
            socket.setsockopt(zmq.IMMEDIATE, 1)
            socket.connect(endpoint)
            self._sockets = {endpoint: socket}
        return self._sockets[endpoint]

    def _drop(self) -> None:
        kept: deque[tuple[str, Packet]] = deque()
        while self._queue:
            endpoint, packet = self._queue.popleft()
            if packet.rendition == "record" or self.held_bytes <= MAX_BYTES:
                kept.append((endpoint, packet))
            else:
                self.held_bytes -= len(packet.payload)
                self.dropped[packet.rendition] += 1
        self._queue = kept
