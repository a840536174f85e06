"""When the next publish is due: a side thread that looks by itself then need not be woken by the sampler.

Of publish() the wake is the dearest part, most of it the system's: it interrupts another core.
"""

from __future__ import annotations

from collections import deque
from typing import Final

NEVER_NS: Final = 1 << 63  # later than any time
INTERVALS: Final = 4
MAX_SPREAD_NS: Final = 4_000_000  # of intervals that are a rhythm
LATE_NS: Final = 1_000_000  # a look before the publish is in vain
SOON_NS: Final = 6_000_000  # a look within so long of a publish spares the wake: more than late and spread together


class PublishRhythm:
    """The last publishes of a stream; all times are monotonic nanoseconds."""

    def __init__(self) -> None:
        self._last_ns: int | None = None
        self._intervals: deque[int] = deque(maxlen=INTERVALS)

    def add(self, sent_ns: int) -> None:
        """A publish, in order."""
        if self._last_ns is not None:
            self._intervals.append(sent_ns - self._last_ns)
        self._last_ns = sent_ns

    def look_ns(self, now_ns: int) -> int:
        """When to look for the next publish; NEVER_NS where it was due already, or nobody can tell."""
        if self._last_ns is None or len(self._intervals) < INTERVALS:
            return NEVER_NS
        longest = max(self._intervals)
        look_ns = self._last_ns + longest + LATE_NS
        is_steady = longest - min(self._intervals) <= MAX_SPREAD_NS
        return look_ns if is_steady and look_ns > now_ns else NEVER_NS
