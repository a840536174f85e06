"""Which worker a stream belongs to: the least loaded one, and another later only where that makes a clear difference.

Pure: no thread, no socket, no clock inside. A load is a share of one worker: frames a second times seconds a frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

BASE_LOAD: Final = 0.02  # of a stream that costs next to nothing: many of them spread too
MARGIN: Final = 0.1  # a move costs a keyframe and history: it must make the busiest worker's load so much smaller


@dataclass(frozen=True, slots=True)
class StreamLoad:
    """One stream on its worker. may_move: it has not been moved just now."""

    run: str
    worker: bytes
    load: float
    may_move: bool = True


def loads_of(streams: Iterable[StreamLoad], workers: Sequence[bytes]) -> dict[bytes, float]:
    """What every worker has to do."""
    loads = dict.fromkeys(workers, 0.0)
    for one in streams:
        if one.worker in loads:
            loads[one.worker] += one.load
    return loads


def least_loaded(loads: Mapping[bytes, float]) -> bytes | None:
    """Where a new stream goes; None without workers."""
    return min(loads, key=lambda worker: (loads[worker], worker), default=None)


def next_move(streams: Sequence[StreamLoad], workers: Sequence[bytes]) -> tuple[str, bytes] | None:
    """The one stream that should move now, and where to; None where no move helps clearly.

    The busiest worker gives to the least busy one the stream that makes the two most alike. Each move makes the sum of
    the squared loads smaller, so moves come to an end, and none is taken back while the loads stay what they are.
    """
    loads = loads_of(streams, workers)
    least = least_loaded(loads)
    most = max(loads, key=lambda worker: (loads[worker], worker), default=None)
    if least is None or most is None or most == least:
        return None
    gap = loads[most] - loads[least]
    movable = [one for one in streams if one.worker == most and one.may_move and 0 < one.load <= gap - MARGIN]
    best = min(movable, key=lambda one: (abs(gap - 2 * one.load), one.run), default=None)
    return (best.run, least) if best is not None else None
