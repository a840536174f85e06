"""Memories of live streams, kept from one step to the next within a budget of bytes: least recently used goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from taesd_stream.models.tiny_video import Memory


@dataclass(frozen=True, slots=True)
class StreamMemory:
    """What one stream leaves behind. next_index: place in the run of its next latent.

    exact_from: place from which on its frames are those of a stream that never lost its memory.
    size: (h, w) of its latents.
    """

    memory: Memory
    next_index: int
    exact_from: int
    size: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.memory)


class StreamMemories:
    """By run. Any thread: a run may be forgotten while another is decoded."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes: expected 0 or more, got {budget_bytes}")
        self._budget_bytes = budget_bytes
        self._streams: OrderedDict[str, StreamMemory] = OrderedDict()  # least recently used first
        self._nbytes = 0
        self._lock = threading.Lock()
        self.dropped = 0  # for want of room, since the start

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return self._nbytes

    def get(self, run: str) -> StreamMemory | None:
        """The memory of a run, if it is still here."""
        with self._lock:
            if run in self._streams:
                self._streams.move_to_end(run)
            return self._streams.get(run)

    def put(self, run: str, stream: StreamMemory) -> None:
        """Keep a memory in place of the run's last one; others go to make room, unless it is too large even alone."""
        with self._lock:
            self._remove(run)
            if stream.nbytes > self._budget_bytes:
                self.dropped += 1
                return
            self._streams[run] = stream
            self._nbytes += stream.nbytes
            while self._nbytes > self._budget_bytes:
                self._remove(next(iter(self._streams)))
                self.dropped += 1

    def forget(self, run: str) -> None:
        """Drop a run's memory; one that is not here is no error."""
        with self._lock:
            self._remove(run)

    def shed(self) -> None:
        """Memory is short: half of the runs lose theirs, those that were not stepped for longest."""
        with self._lock:
            for run in list(self._streams)[: len(self._streams) // 2]:
                self._remove(run)
                self.dropped += 1

    def next_indices(self) -> dict[str, int]:
        """Where each run would go on, as the worker says it in HELLO."""
        with self._lock:
            return {run: stream.next_index for run, stream in self._streams.items()}

    def _remove(self, run: str) -> None:
        gone = self._streams.pop(run, None)
        self._nbytes -= 0 if gone is None else gone.nbytes
