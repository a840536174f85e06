"""How many decode workers the daemon should have: up at once, up by one where frames wait, down only after a while."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from taesd_stream.capacity import servers_needed

WAIT_S: Final = 0.5  # frames that wait longer...
WAIT_FOR_S: Final = 5.0  # ...for so long ask for one more
LOW_SHARE: Final = 0.6  # of what the present number could do...
LOW_FOR_S: Final = 120.0  # ...for so long, and it goes down


class Scaling:
    """Pure but for its memory: times come from the caller."""

    def __init__(self) -> None:
        self.desired = 1
        self._waits_since_s: float | None = None
        self._low_since_s: float | None = None

    def update(self, now_s: float, loads: Sequence[float], oldest_wait_s: float, workers: int) -> int:
        """The number for now.

        loads: each stream's share of one worker. oldest_wait_s: of what waits for one. workers: how many there are.
        """
        needed = servers_needed(sum(loads))
        self._waits_since_s = _since(self._waits_since_s, now_s, holds=workers > 0 and oldest_wait_s > WAIT_S)
        if self._waits_since_s is not None and now_s - self._waits_since_s >= WAIT_FOR_S:
            needed = max(needed, workers + 1)  # the measured times are too good to be true
        if needed >= self.desired:
            self.desired, self._low_since_s = needed, None
            return self.desired
        self._low_since_s = _since(self._low_since_s, now_s, holds=sum(loads) < LOW_SHARE * self.desired)
        if self._low_since_s is not None and now_s - self._low_since_s >= LOW_FOR_S:
            self.desired, self._low_since_s = needed, None
        return self.desired


def _since(before_s: float | None, now_s: float, *, holds: bool) -> float | None:
    """Since when a thing holds, without a break."""
    if not holds:
        return None
    return now_s if before_s is None else before_s
