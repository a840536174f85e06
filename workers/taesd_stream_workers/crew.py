"""The decode workers that the broker knows: their credits, the jobs they hold, how fast they are."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from taesd_stream.capacity import Departures
from taesd_stream.messages import WorkerHello
from taesd_stream.scheduling import Candidate, Group, WorkerLimits, first_due, order_of_service
from taesd_stream_workers.live_latents import MAX_HISTORY

SILENT_S: Final = 3.0
MAX_GONE: Final = 64  # workers that are remembered for what they held


@dataclass(slots=True)
class JobHeld:
    """A job that a worker has not answered yet."""

    items: tuple[Candidate, ...]
    latent_format: str
    nbytes: int
    given_s: float
    deadline_s: float

    @property
    def is_clip(self) -> bool:
        """Whether it is of whole videos: decoded in slices, between which its worker takes up other jobs."""
        return self.items[0].is_clip

    @property
    def is_suspect(self) -> bool:
        """Whether it is to tell if its one frame is poison."""
        return self.items[0].is_suspect


@dataclass(slots=True)
class Worker:
    """One decode worker, as the broker sees it."""

    id: bytes
    hello: WorkerHello
    heard_s: float
    jobs: dict[int, JobHeld] = field(default_factory=dict)  # in the order they were given
    overdue: set[int] = field(default_factory=set)  # given to others since, but still in its hands
    seconds_per_byte: dict[str, float] = field(default_factory=dict)  # by latent format: how long jobs are under way
    departures: Departures = field(default_factory=Departures)  # by latent format, in bytes: how much it can do
    frames: int = 0

    @property
    def credits(self) -> int:
        """How many jobs it takes now."""
        return 0 if self.hello.draining else self.hello.credits - len(self.jobs) - len(self.overdue)

    def limits(self, group: Group, max_batch_size: int, max_job_s: float) -> WorkerLimits:
        """What the scheduler must know for a job of that group."""
        latent_format, _, _ = group
        return WorkerLimits(
            worker=self.id,
            max_batch_size=max_batch_size,
            max_job_s=max_job_s,
            seconds_per_byte=self.seconds_per_byte.get(latent_format),
        )

    def takes_beside(self, offered: Sequence[Candidate]) -> Sequence[Candidate]:
        """Those that may go to it beside what it holds, in order of service.

        Its last credit is never a clip's: other streams' jobs go between the slices. Where a frame is suspected, clips
        and others do not mix, for a death would not tell whose fault it was. While the oldest waits for that, nothing
        more of what it waits for is given; and what follows a frame that waits does not overtake it in its run.
        """
        clips = sum(job.is_clip for job in self.jobs.values())
        others = len(self.jobs) - clips
        is_suspect = any(job.is_suspect for job in self.jobs.values())
        if not clips and not is_suspect and not any(one.is_suspect for one in offered):
            return offered
        oldest = first_due(offered, self.id)
        waits = oldest if oldest is not None and oldest.is_suspect else None
        takes_clips = clips < max(1, self.hello.credits - 1) and not (others and is_suspect)
        takes_clips &= not (clips and waits is not None and not waits.is_clip)
        takes_others = not (clips and is_suspect) and not (others and waits is not None and waits.is_clip)
        found: list[Candidate] = []
        waiting: set[str] = set()  # runs
        for one in sorted(offered, key=order_of_service):
            may_go = takes_clips if one.is_clip else takes_others
            if one.run in waiting or not may_go or (one.is_suspect and (others if one.is_clip else clips)):
                waiting.add(one.run)
            else:
                found.append(one)
        return found

    def at_hand(self) -> list[JobHeld]:
        """What it may be working on: its oldest clip, its oldest other job. What waits behind does no harm."""
        return list({job.is_clip: job for job in reversed(self.jobs.values())}.values())

    def to_state(self) -> dict[str, Any]:
        """The worker's row of STATE."""
        return {
            "id": self.id.decode("ascii", "replace"),
            "device": self.hello.device,
            "engines": self.hello.engines,
            "draining": self.hello.draining,
            "jobs": len(self.jobs),
            "frames": self.frames,
        }


class Crew:
    """All workers, and all jobs on their way."""

    def __init__(self, job_deadline_s: float, max_batch_size: int) -> None:
        self.workers: dict[bytes, Worker] = {}
        self._deadline_s = job_deadline_s
        self._max_batch_size = max_batch_size
        self._next_job = 1 + secrets.randbits(32)  # an answer to a former broker must not pass for one to us
        self._overdue: dict[bytes, set[int]] = {}

    def hello(self, peer: bytes, hello: WorkerHello) -> bool:
        """Note that a worker is there. Returns whether it is new."""
        worker = self.workers.get(peer)
        if worker is None:
            self.workers[peer] = Worker(peer, hello, time.monotonic(), overdue=self._overdue.pop(peer, set()))
            return True
        worker.hello, worker.heard_s = hello, time.monotonic()
        return False

    def assign(self, worker: Worker, items: tuple[Candidate, ...]) -> int:
        """Give a worker a job. Returns the job's number."""
        job = self._next_job
        self._next_job += 1
        latent_format: str = items[0].group[0]
        nbytes = sum(item.nbytes for item in items)
        now_s = time.monotonic()
        worker.jobs[job] = JobHeld(items, latent_format, nbytes, now_s, now_s + self._deadline_s)
        return job

    def progress(self, peer: bytes, job: int) -> None:
        """One slice more is done: the deadline counts from here."""
        if peer in self.workers and job in self.workers[peer].jobs:
            self._renew(peer)

    def finish(self, peer: bytes, job: int, ms: float | None = None) -> JobHeld | None:
        """The worker answered. Returns the job; None for one that was given to another since: its answer is late."""
        worker = self.workers.get(peer)
        (worker.overdue if worker else self._overdue.get(peer, set())).discard(job)
        held = worker.jobs.pop(job, None) if worker else None
        if worker is None or held is None:
            return None
        self._renew(peer)
        worker.frames += len(held.items)
        now_s = time.monotonic()
        is_alone = not held.is_clip and not any(job.is_clip for job in worker.jobs.values())  # else slices took turns
        if ms is not None and is_alone:
            worker.departures.done(held.latent_format, max(1, held.nbytes), given_s=held.given_s, now_s=now_s)
        else:  # the time of a failed one is not the next one's
            worker.departures.passed(now_s)
        if ms is not None:
            measured = ms / 1000 / max(1, held.nbytes)
            before = worker.seconds_per_byte.get(held.latent_format, measured)
            worker.seconds_per_byte[held.latent_format] = 0.7 * before + 0.3 * measured
        return held

    def _renew(self, peer: bytes) -> None:
        """It works: the jobs that wait behind the one at hand have all their time before them."""
        for held in self.workers[peer].jobs.values():
            held.deadline_s = time.monotonic() + self._deadline_s

    def remove(self, peer: bytes) -> Worker | None:
        """Forget a worker that is gone; should it come back, what it still holds counts against its credits."""
        worker = self.workers.pop(peer, None)
        if worker is not None:
            self._overdue[peer] = worker.overdue | set(worker.jobs)
            while len(self._overdue) > MAX_GONE:
                del self._overdue[next(iter(self._overdue))]
        return worker

    def gone(self) -> list[bytes]:
        """Workers that are silent, or whose job is over its deadline."""
        now = time.monotonic()
        return [
            worker.id
            for worker in self.workers.values()
            if now - worker.heard_s > SILENT_S or any(job.deadline_s < now for job in worker.jobs.values())
        ]

    def history(self, latent_format: str) -> int:
        """Latents that a `live` frame of the format needs before it on whatever worker; while unknown, the most."""
        told = [worker.hello.engines.get(latent_format, {}).get("history") for worker in self.workers.values()]
        return max((need for need in told if isinstance(need, int) and 0 <= need <= MAX_HISTORY), default=MAX_HISTORY)

    def slowest_s_per_frame(self, latent_format: str, nbytes: int) -> float:
        """Seconds of a worker's time that a frame takes in full batches, from what was measured; 0 when nothing was.

        Of a worker that never had two jobs on end it is how long one was under way, which is more.
        """
        most_bytes = self._max_batch_size * nbytes
        rates = [
            worker.departures.costs[latent_format].full_s(most_bytes)
            if latent_format in worker.departures.costs
            else worker.seconds_per_byte.get(latent_format, 0.0)
            for worker in self.workers.values()
        ]
        return max(rates, default=0.0) * nbytes
