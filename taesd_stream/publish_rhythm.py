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
        self._last: tuple[int, int] | None = None  # its seq and time
        self._intervals: deque[int] = deque(maxlen=INTERVALS)

    def add(self, seq: int, sent_ns: int) -> None:
        """A publish, in order; of those that were only counted no time is known."""
        if self._last is not None:
            last_seq, last_ns = self._last
            self._intervals.append((sent_ns - last_ns) // (seq - last_seq))
        self._last = seq, sent_ns

    def look_ns(self, now_ns: int) -> int:
        """When to look for the next publish; NEVER_NS where it was due already, or nobody can tell."""
        interval_ns = self.interval_ns()
        if self._last is None or interval_ns == NEVER_NS:
            return NEVER_NS
        look_ns = self._last[1] + interval_ns + LATE_NS
        return look_ns if look_ns > now_ns else NEVER_NS

    def interval_ns(self) -> int:
        """From one publish to the next, the longest of late; NEVER_NS where nobody can tell."""
        if len(self._intervals) < INTERVALS:
            return NEVER_NS
        longest = max(self._intervals)
        return longest if longest - min(self._intervals) <= MAX_SPREAD_NS else NEVER_NS
