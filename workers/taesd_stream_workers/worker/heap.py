"""Memory that was freed goes back to the system, where the C library would keep it for the thread that had it."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from typing import Final

EVERY_S: Final = 20.0


class Heap:
    """glibc keeps an arena for each thread, and in each what its largest moment needed: an H.264 encoder of a small
    picture alone is 17 MiB. A worker whose streams come and go grew by 45 MiB a minute that way (measured).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next_s = 0.0
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._trim = getattr(libc, "malloc_trim", None)  # musl has none, and needs none

    def give_back(self) -> None:
        """Some large thing was freed: give it back, at most every 20 s, for it takes some ms. Any thread."""
        now = time.monotonic()
        with self._lock:
            if self._trim is None or now < self._next_s:
                return
            self._next_s = now + EVERY_S
        self._trim(0)
