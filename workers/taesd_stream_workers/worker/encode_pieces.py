"""Pictures that lie side by side in one copy from the device, to be handed on together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, TypeAlias

import numpy as np

from taesd_stream.media.encoder import Planes
from taesd_stream_workers.worker.encode_pool import Chain, EncodeTask

PIECE_BYTES: Final = 16 << 20  # at most, but of one picture that is larger

Batch: TypeAlias = list[tuple[Chain, EncodeTask]]
Part: TypeAlias = list[tuple[Chain, EncodeTask, slice]]  # with the bytes of their copy that are their planes


def pieces(batch: Batch) -> Iterator[Part]:
    """Cut into runs of tasks of one copy whose planes lie within PIECE_BYTES, the order kept; bad ones are alone."""
    part: Part = []
    first = last = 0
    for chain, task in batch:
        span = _span(task)
        reach = min(first, span.start), max(last, span.stop)
        are_good = first < last and span.start < span.stop
        if part and part[0][1].copy is task.copy and are_good and reach[1] - reach[0] <= PIECE_BYTES:
            first, last = reach
        else:
            if part:
                yield part
            part, first, last = [], span.start, span.stop
        part.append((chain, task, span))
    if part:
        yield part


def _span(task: EncodeTask) -> slice:
    """Where the planes of a task lie within the bytes of its copy; empty: they are none, or lie elsewhere."""
    planes, whole = task.planes, task.copy.array
    first = _address(planes) - _address(whole)
    are_planes = planes.ndim == 2 and planes.dtype == np.uint8 and planes.flags.c_contiguous
    are_there = first >= 0 and first + planes.nbytes <= whole.nbytes and whole.flags.c_contiguous
    return slice(first, first + planes.nbytes) if are_planes and are_there else slice(0, 0)


def _address(array: Planes) -> int:
    return int(array.__array_interface__["data"][0])
