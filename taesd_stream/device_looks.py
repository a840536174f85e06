"""When a publisher asks a device whether a copy is done: each look takes the GIL, which its sampler needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Any, Final, Protocol, TypeVar

from taesd_stream.latent_snapshot import Snapshot

# A step that is waited for is published before the next one is launched: until it is, the device has nothing to do.
FIRST_S: Final = 0.001
EARLY: Final = 0.9  # of the last one's time, where that was perhaps too long
MAX_TRUST_S: Final = 0.1  # who is done sooner than last time waits no longer
MAX_PAUSE_S: Final = 0.01


class Copied(Protocol):
    """A frame whose copy was asked for at sent_ns (monotonic). missed_s: its age at the last look in vain, else 0."""

    missed_s: float

    @property
    def sent_ns(self) -> int: ...
    @property
    def snapshot(self) -> Snapshot: ...
    @property
    def taken(self) -> Any: ...


C = TypeVar("C", bound=Copied)


class DeviceLooks:
    """The side thread's alone. next_s: when to look again, infinite where nothing waits. patience_s: about how old a
    frame gets until it is done.

    Besides, all that waits is looked at soon after something is published: then a step's latents are mostly done. Not
    before a frame is due, though, see Outbox.collect().
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self.next_s = math.inf
        self.patience_s = 0.0

    def ready(self, waiting: list[C]) -> list[C]:
        """Those that can be fetched without waiting, up to the first that cannot."""
        now_s = self._clock_s()
        found = [*takewhile(lambda one: _is_ready(one, _age_s(one, now_s)), waiting)]
        is_planned = self.next_s < math.inf  # else it may have been done for long
        if found and found[-1].missed_s:  # it took a little longer than that
            self.patience_s = found[-1].missed_s
        elif found and (is_planned or _age_s(found[-1], now_s) < self.patience_s):  # perhaps much less
            self.patience_s *= EARLY
        self.next_s = self._look_s(waiting[len(found)], now_s) if len(found) < len(waiting) else math.inf
        return found

    def _look_s(self, late: Copied, now_s: float) -> float:
        age_s = _age_s(late, now_s)
        if age_s >= FIRST_S:
            late.missed_s = age_s
        pause_s = min(max(0.1 * age_s, FIRST_S), MAX_PAUSE_S)
        return now_s + max(pause_s, min(self.patience_s, MAX_TRUST_S) - age_s)


def _is_ready(one: Copied, age_s: float) -> bool:
    if one.snapshot.is_on_device and age_s < FIRST_S:
        return False
    return one.snapshot.is_ready(one.taken)


def _age_s(one: Copied, now_s: float) -> float:
    return now_s - one.sent_ns / 1e9
