"""Live packets between the streamer's two threads: bounded in bytes, no hole in a chain, nothing of a former worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Final

from taesd_stream.frames import Packet
from taesd_stream.messages import State
from taesd_stream_workers.role.broken_chains import BrokenChains
from taesd_stream_workers.streamer.newest_runs import NewestRuns

INBOX_BYTES: Final = 64 << 20


class Inbox:
    """`put` and `on_state` in the streamer's thread, `take_all` in the web's.

    ask_keyframe, count_dropped: called in the streamer's thread.
    """

    def __init__(self, ask_keyframe: Callable[[str], None], count_dropped: Callable[[Packet], None]) -> None:
        self._packets: deque[tuple[Packet, int]] = deque()
        self._held_bytes = 0
        self._lock = Lock()
        self._broken = BrokenChains(ask_keyframe)
        self._runs = NewestRuns()
        self._count_dropped = count_dropped

    def on_state(self, state: State) -> None:
        """The broker's newest STATE."""
        self._runs.on_state(state)

    def put(self, packet: Packet, streamed_ns: int) -> bool:
        """Queue it; over the bound the oldest goes, `live` up to its next keyframe. Returns whether it was empty."""
        if self._runs.is_replaced(packet):
            self._lose(packet)
            return False
        if self._runs.has_moved(packet) or not self._broken.takes(packet):
            self._count_dropped(packet)
            return False
        with self._lock:
            was_empty = not self._packets
            self._packets.append((packet, streamed_ns))
            self._held_bytes += len(packet.payload)
            if self._held_bytes > INBOX_BYTES:
                self._drop()
        return was_empty

    def take_all(self) -> list[tuple[Packet, int]]:
        """What came since, each with its time."""
        with self._lock:
            taken = list(self._packets)
            self._packets.clear()
            self._held_bytes = 0
        return taken

    def _drop(self) -> None:
        waiting, self._packets = self._packets, deque()
        for packet, streamed_ns in waiting:
            if self._held_bytes > INBOX_BYTES:
                self._lose(packet)
            elif self._broken.takes(packet):
                self._packets.append((packet, streamed_ns))
                continue
            else:
                self._count_dropped(packet)
            self._held_bytes -= len(packet.payload)

    def _lose(self, packet: Packet) -> None:
        self._broken.lose(packet)
        self._count_dropped(packet)
