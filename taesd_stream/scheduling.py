"""Which frames form the next job, for which worker. Pure: no thread, no socket, no clock inside.

Rules: a stream stays on the worker that has its encoder; frames of one latent format, shape and dtype go together; what
waited longest goes first, live pictures a little before recordings; no job is longer than `max_job_s`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from taesd_stream.frames import Rendition, WireDtype

Group: TypeAlias = tuple[str, tuple[int, ...], WireDtype]  # latent format, shape, dtype: what can share a batch

# A recording may wait this long behind live pictures, then it goes first: neither starves the other.
RECORD_PATIENCE_NS: Final = 300_000_000
MAX_JOB_BYTES: Final = 48 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One frame that could be decoded now.

    since_ns: when it began to wait. worker: the only one that may take it (it holds the encoder), None: any.
    is_suspect: a job with it has failed: it goes alone, so that a second failure tells whose fault it is.
    """

    run: str
    seq: int
    group: Group
    renditions: tuple[Rendition, ...]
    nbytes: int
    since_ns: int
    worker: bytes | None = None
    is_suspect: bool = False

    @property
    def is_record(self) -> bool:
        """Whether a recording waits for it."""
        return "record" in self.renditions

    @property
    def due_ns(self) -> int:
        """When it ought to go: the order of service."""
        only_record = self.renditions == ("record",)
        return self.since_ns + (RECORD_PATIENCE_NS if only_record else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """What one worker can take. seconds_per_byte: measured, of latents of a group's format; None: not known yet."""

    worker: bytes
    max_batch_size: int
    max_job_s: float
    seconds_per_byte: float | None = None


def next_job(candidates: Iterable[Candidate], limits: WorkerLimits) -> tuple[Candidate, ...]:
    """The candidates that form this worker's next job, in order of service; empty when none may go to it.

    All share the first one's group. At least one is taken, however large; a suspect one is taken alone.
    """
    mine = sorted(
        (one for one in candidates if one.worker in (None, limits.worker)), key=lambda one: (one.due_ns, one.seq)
    )
    if not mine:
        return ()
    if mine[0].is_suspect:
        return (mine[0],)
    group = mine[0].group
    job: list[Candidate] = []
    nbytes = 0
    passed_over: set[str] = set()  # runs whose later frames must not overtake
    for one in mine:
        if one.group != group or one.is_suspect or one.run in passed_over:
            passed_over.add(one.run)
            continue
        if job and (len(job) == limits.max_batch_size or not _fits(nbytes + one.nbytes, limits)):
            break
        job.append(one)
        nbytes += one.nbytes
    return tuple(job)


def _fits(nbytes: int, limits: WorkerLimits) -> bool:
    seconds = nbytes * (limits.seconds_per_byte or 0.0)
    return nbytes <= MAX_JOB_BYTES and seconds <= limits.max_job_s


def desired_workers(loads_s: Sequence[float], headroom: float = 1.3) -> int:
    """How many workers the offered load needs.

    loads_s: for each stream, frames a second that it offers times seconds a frame takes: its share of one worker.
    """
    return max(1, math.ceil(headroom * sum(loads_s)))
