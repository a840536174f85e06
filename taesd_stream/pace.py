"""How often a publisher sends frames that nobody keeps: what the broker's DEMAND asks for."""

from __future__ import annotations

import math
from typing import Final

from taesd_stream.messages import DemandUpdate

IDLE_INTERVAL_S: Final = 2.0  # of frames while nobody watches, where the broker does not say: a late viewer has one


class Pace:
    """The time of the next frame. Used by the side thread alone; times are monotonic seconds."""

    def __init__(self) -> None:
        self.next_s = -math.inf  # when a frame may go
        self._is_idle = False
        self._interval_s = 0.0
        self._sent_s = -math.inf

    def ask(self, demand: DemandUpdate) -> None:
        """Take the broker's word; it counts from the last frame sent."""
        asked_s = 1 / demand.max_fps if demand.max_fps else None
        self._is_idle = demand.level == "idle"
        if self._is_idle:
            self._interval_s = asked_s or IDLE_INTERVAL_S
        else:
            self._interval_s = 0.0 if demand.level == "every" else asked_s or 0.0
        self.next_s = self._sent_s + self._interval_s

    def sent(self, now: float) -> None:
        """A frame went."""
        self._sent_s = now
        self.next_s = now + self._interval_s

    def is_resting(self, now: float) -> bool:
        """Whether nobody watches and the late viewer's frame is not due: publishes need not even be copied."""
        return self._is_idle and now < self.next_s
