"""Memory that a worker shares with the processes that encode for it: planes are read where they were written."""

from __future__ import annotations

import bisect
import mmap
import os
import threading
from typing import Final

import numpy as np
from numpy.typing import NDArray

ALIGNMENT: Final = 64  # bytes, what an encoder likes to read from


class SharedPlanes:
    """Handed out in pieces, the first that is free and large enough. `fd` is inherited by whoever is to see it.

    Linux: the file has no name, and is gone with the last process that holds it.
    """

    def __init__(self, nbytes: int) -> None:
        """nbytes: at most; what was never used takes no memory."""
        self.nbytes = nbytes
        self.fd = os.memfd_create("taesd-stream-planes")
        os.ftruncate(self.fd, nbytes)
        self._bytes = shared_bytes(self.fd, nbytes)
        self._free = [(0, nbytes)]  # (first, bytes), in order, no two side by side
        self._changed = threading.Condition()

    def put(self, words: NDArray[np.uint8]) -> int:
        """Copy bytes there, waiting for room. words: (n,). Returns: where they are. Raises: ValueError for too many."""
        if _padded(len(words)) > self.nbytes:
            raise ValueError(f"planes: {len(words)} bytes, over the {self.nbytes} that encoders can be given at once")
        with self._changed:
            while (first := self._taken(_padded(len(words)))) is None:
                self._changed.wait()
        self._bytes[first : first + len(words)] = words  # without the GIL
        return first

    def give_back(self, first: int, nbytes: int) -> None:
        """What `put` was given there is not needed any more. Any thread."""
        with self._changed:
            end = first + _padded(nbytes)
            place = bisect.bisect(self._free, (first, 0))
            if place < len(self._free) and self._free[place][0] == end:
                end += self._free.pop(place)[1]
            if place and sum(self._free[place - 1]) == first:
                place -= 1
                first = self._free.pop(place)[0]
            self._free.insert(place, (first, end - first))
            self._changed.notify_all()

    def close(self) -> None:
        """Let go of it here."""
        os.close(self.fd)
        self._bytes = np.empty(0, np.uint8)  # the map has a descriptor of its own, until nobody looks at it

    def _taken(self, nbytes: int) -> int | None:
        """Where a piece was taken from what is free; None: there is no such piece."""
        for place, (first, free) in enumerate(self._free):
            if free >= nbytes:
                self._free[place : place + 1] = [(first + nbytes, free - nbytes)] if free > nbytes else []
                return first
        return None


def shared_bytes(fd: int, nbytes: int) -> NDArray[np.uint8]:
    """The same memory, in any process that has `fd`."""
    return np.frombuffer(mmap.mmap(fd, nbytes), np.uint8)


def _padded(nbytes: int) -> int:
    return -(-max(1, nbytes) // ALIGNMENT) * ALIGNMENT
