"""Which frames form the next job, for which worker. Pure: no thread, no socket, no clock inside.

Rules: a stream stays on the worker that has its encoder and its temporal memory; another one gets the history along.
Frames of one latent format, shape and dtype go together, of every run one before any has two; what waited longest goes
first, live pictures a little before recordings; no job is longer than `max_job_s`, but of clips and of dozens of
latents at once, which workers cut.
"""

from __future__ import annotations

from collections import Counter
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
    attempt: of its recording, or of a `live` run's order: an answer about another one is late.
    is_sliced: a whole video or dozens of latents, which a worker decodes in slices: nothing else waits in its job.
    memory: the worker that holds the memory of the `live` run up to this frame. history_bytes: what goes along to a
    worker that does not; 0 where nothing is needed. is_repeat: shown already, once more for a late viewer.
    """

    run: str
    seq: int
    group: Group
    renditions: tuple[Rendition, ...]
    nbytes: int
    since_ns: int
    worker: bytes | None = None
    is_suspect: bool = False
    is_sliced: bool = False
    attempt: int = 0
    memory: bytes | None = None
    history_bytes: int = 0
    is_repeat: bool = False

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
    """What one worker can take of one group.

    seconds_per_byte: measured; None: not known yet.
    """

    worker: bytes
    max_batch_size: int
    max_job_s: float
    seconds_per_byte: float | None = None

    def takes(self, frames: int, nbytes: int) -> bool:
        """Whether a job of so many frames and bytes is within every bound."""
        seconds = nbytes * (self.seconds_per_byte or 0.0)
        return frames <= self.max_batch_size and nbytes <= MAX_JOB_BYTES and seconds <= self.max_job_s


def order_of_service(one: Candidate) -> tuple[int, int]:
    """What candidates are sorted by."""
    return one.due_ns, one.seq


def first_due(candidates: Iterable[Candidate], worker: bytes) -> Candidate | None:
    """The one that this worker's next job begins with, and whose group all of it shares."""
    mine = (one for one in candidates if one.worker is None or one.worker == worker)
    return min(mine, key=order_of_service, default=None)


def next_job(candidates: Iterable[Candidate], limits: WorkerLimits) -> tuple[Candidate, ...]:
    """The candidates that form this worker's next job, in order of service; empty when none may go to it.

    All share the first one's group. At least one is taken, however large; a suspect one is taken alone. Where not all
    fit, every run has its first before any run its second.
    """
    mine = sorted((one for one in candidates if one.worker in (None, limits.worker)), key=order_of_service)
    if not mine:
        return ()
    if mine[0].is_suspect:
        return (mine[0],)
    group, is_sliced = mine[0].group, mine[0].is_sliced
    passed_over: set[str] = set()  # runs whose later frames must not overtake
    turns: Counter[str] = Counter()
    in_turn: list[tuple[int, int]] = []
    for place, one in enumerate(mine):
        if one.group != group or one.is_sliced != is_sliced or one.is_suspect or one.run in passed_over:
            passed_over.add(one.run)
            continue
        in_turn.append((turns[one.run], place))
        turns[one.run] += 1
    taken: list[int] = []
    nbytes = 0
    for turn, place in sorted(in_turn):
        one = mine[place]
        nbytes += one.nbytes + (one.history_bytes if turn == 0 and one.memory != limits.worker else 0)
        if taken and not limits.takes(len(taken) + 1, nbytes):
            break
        taken.append(place)
    return tuple(mine[place] for place in sorted(taken))


def history_due(job: Sequence[Candidate], worker: bytes) -> tuple[bool, ...]:
    """Of each item of a job whether its history goes along: the first of a run whose memory is not on this worker."""
    runs: set[str] = set()
    due: list[bool] = []
    for one in job:
        due.append(one.history_bytes > 0 and one.memory != worker and one.run not in runs)
        runs.add(one.run)
    return tuple(due)
