"""Signs of life of a publisher's broker: what it answered, what it owes, since when its socket takes nothing."""

from __future__ import annotations

import math
from typing import Final

FIRST_ANSWER_S: Final = 0.5  # a daemon that is there has been reached by then
SILENT_S: Final = 2.0  # a broker that leaves HELLO unanswered so long hangs, or is behind a hole: it gets no frames
MAX_UNHEARD_BYTES: Final = 64 << 20  # of frames sent since it was heard last, all of which may lie in our memory
GONE_S: Final = 5.0  # over what its supervisor needs to start it again (2 s), for a run in two files is a price too
NEVER_HEARD_S: Final = 2.5  # it has nothing of the run yet; over line.BROKEN_OFF_S, so that a missing key is said


class Pulse:
    """Of one broker, from the first dialling on. The side thread's alone; `now` is monotonic."""

    def __init__(self) -> None:
        self.is_heard = False  # it has answered
        self.blocked_since_s: float | None = None  # when the socket took nothing for the first time
        self._asked_s: float | None = None  # when the oldest HELLO went that is not answered
        self._unheard_bytes = 0

    def asked(self, now: float) -> None:
        """HELLO went out."""
        self._asked_s = self._asked_s or now

    def sent(self, nbytes: int) -> None:
        """A frame went that nobody acks."""
        self._unheard_bytes += nbytes

    def heard(self) -> None:
        """It said something."""
        self.is_heard = True
        self._asked_s, self._unheard_bytes = None, 0

    def blocked(self, now: float) -> None:
        """The socket took nothing."""
        self.blocked_since_s = self.blocked_since_s or now

    def unblocked(self) -> None:
        """The socket takes again: on another connection, on which nothing was asked yet."""
        self.blocked_since_s = self._asked_s = None

    def is_silent(self, now: float) -> bool:
        """Whether it does not read what it gets: what were sent would grow old in our memory."""
        is_late = self._asked_s is not None and now - self._asked_s > SILENT_S
        return is_late or self._unheard_bytes > MAX_UNHEARD_BYTES

    def is_absent(self, now: float) -> bool:
        """Whether nobody seems to be there."""
        is_unreached = self.blocked_since_s is not None and now - self.blocked_since_s >= FIRST_ANSWER_S
        return is_unreached or self.is_silent(now)

    def gone_s(self, *, is_ending: bool) -> float:
        """When it counts as gone, unless it gives a sign of life before. is_ending: the program waits for it."""
        since = min((at for at in (self.blocked_since_s, self._asked_s) if at is not None), default=math.inf)
        return since + (GONE_S if self.is_heard and not is_ending else NEVER_HEARD_S)
