"""Packets that the disk did not take: they wait in order until it does; after 15 s the broker sends them again."""

from __future__ import annotations

from collections import deque
from typing import Final

from taesd_stream.frames import Packet

MAX_BYTES: Final = 64 << 20  # of all recordings; what comes then is lost until the broker sends it again


class Unwritten:
    """Used in the writing thread alone."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Packet]] = {}  # by run: all of one attempt
        self._held_bytes = 0

    def put(self, packet: Packet) -> None:
        """It waits, if there is room."""
        if self._held_bytes + len(packet.payload) <= MAX_BYTES:
            self._waiting.setdefault(packet.run, deque()).append(packet)
            self._held_bytes += len(packet.payload)

    def takes(self, packet: Packet) -> bool:
        """Whether it has to wait behind others of its attempt, and does. What waits of an older attempt goes."""
        waiting = self._waiting.get(packet.run)
        if waiting is None:
            return False
        if packet.attempt > waiting[0].attempt:
            self._held_bytes -= sum(len(one.payload) for one in self._waiting.pop(packet.run))
            return False
        if packet.attempt == waiting[0].attempt:
            self.put(packet)
        return True

    def take_all(self) -> list[Packet]:
        """What waits, each run's in its order, to be tried again; it waits no longer."""
        taken = [packet for waiting in self._waiting.values() for packet in waiting]
        self._waiting.clear()
        self._held_bytes = 0
        return taken
