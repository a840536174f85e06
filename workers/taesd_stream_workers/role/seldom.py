"""Failures that may come again and again, each said seldom: they must not fill the disk by our log."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Final

SAY_AGAIN_S: Final = 60.0
MAX_SAID: Final = 10  # in that time, of what is ever new: each may bring its traceback


class Seldom:
    """One thread's."""

    def __init__(self, max_said: int = MAX_SAID, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._max_said = max_said
        self._clock_s = clock_s
        self._said_s: dict[Hashable, float] = {}

    def may_say(self, what: Hashable) -> bool:
        """Whether to log it now: at once, and again when a minute has passed. Whoever asks must then say it."""
        now_s = self._clock_s()
        if now_s - self._said_s.get(what, float("-inf")) < SAY_AGAIN_S:
            return False
        if len(self._said_s) >= self._max_said:
            self._said_s = {one: said_s for one, said_s in self._said_s.items() if now_s - said_s < SAY_AGAIN_S}
        if len(self._said_s) >= self._max_said:
            return False
        self._said_s[what] = now_s
        return True
