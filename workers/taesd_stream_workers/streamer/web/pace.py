"""How fast one page may change what the broker is told: what is over waits unread, and only that page with it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

WISHES_PER_S: Final = 1000
AT_ONCE: Final = 2000  # a wall of a thousand streams leaves all of them for a thousand others


class Pace:
    """One page's. A wish is one message to the broker."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._owed = 0.0  # wishes, as of `_at_s`
        self._at_s = clock_s()

    def wait_s(self, wishes: int) -> float:
        """Count wishes that were passed on. Returns: how long to wait before the next ones, 0 for not at all."""
        now_s = self._clock_s()
        self._owed = max(0.0, self._owed - (now_s - self._at_s) * WISHES_PER_S) + wishes
        self._at_s = now_s
        return max(0.0, (self._owed - AT_ONCE) / WISHES_PER_S)
