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
from taesd_stream_workers.broker.live_latents import MAX_HISTORY

SILENT_S: Final = 3.0
LATE_S: Final = 60.0  # a worker that hangs has ended itself by then (lifecycle.HUNG_S): one that lives is slow
MAX_GONE: Final = 64  # workers that are remembered for what they held


@dataclass(slots=True)
class JobHeld:
    """A job that a worker has not answered yet."""

    items: tuple[Candidate, ...]
    latent_format: str
    nbytes: int
    given_s: float
    patience_s: float  # how long it may take without a word
    deadline_s: float

    @property
    def is_sliced(self) -> bool:
        """Whether it is decoded in slices, between which its worker takes up other jobs."""
        return self.items[0].is_sliced

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
    patience_s: float  # how long its jobs may take without a word; a slow one is given more
    jobs: dict[int, JobHeld] = field(default_factory=dict)  # in the order they were given
    overdue: dict[int, JobHeld] = field(default_factory=dict)  # given to others since, but still in its hands
    died_of: tuple[Candidate, ...] | None = None  # what it had at hand when it fell silent
    seconds_per_byte: dict[str, float] = field(default_factory=dict)  # by latent format: how long jobs are under way
    departures: Departures = field(default_factory=Departures)  # by latent format, in bytes: how much it can do
    frames: int = 0

    @property
    def is_silent(self) -> bool:
        """Whether it has died, as far as can be told."""
        return time.monotonic() - self.heard_s > SILENT_S

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

        Its last credit is never a sliced job's: other streams' jobs go between the slices. Where a frame is suspected,
        the two do not mix, for a death would not tell whose fault it was. While the oldest waits for that, nothing
        more of what it waits for is given; and what follows a frame that waits does not overtake it in its run.
        """
        sliced = sum(job.is_sliced for job in self.jobs.values())
        others = len(self.jobs) - sliced
        is_suspect = any(job.is_suspect for job in self.jobs.values())
        if not sliced and not is_suspect and not any(one.is_suspect for one in offered):
            return offered
        oldest = first_due(offered, self.id)
        waits = oldest if oldest is not None and oldest.is_suspect else None
        takes_sliced = sliced < max(1, self.hello.credits - 1) and not (others and is_suspect)
        takes_sliced &= not (sliced and waits is not None and not waits.is_sliced)
        takes_others = not (sliced and is_suspect) and not (others and waits is not None and waits.is_sliced)
        found: list[Candidate] = []
        waiting: set[str] = set()  # runs
        for one in sorted(offered, key=order_of_service):
            may_go = takes_sliced if one.is_sliced else takes_others
            if one.run in waiting or not may_go or (one.is_suspect and (others if one.is_sliced else sliced)):
                waiting.add(one.run)
            else:
                found.append(one)
        return found

    def at_hand(self) -> list[JobHeld]:
        """What it may be working on: its oldest sliced job, its oldest other one. What waits behind does no harm."""
        held = [*self.overdue.values(), *self.jobs.values()]
        return list({job.is_sliced: job for job in reversed(held)}.values())

    def renew(self) -> None:
        """It works: what waits behind the job at hand has all its time before it, and is not late before that one."""
        deadline_s = 0.0
        for held in self.jobs.values():
            held.deadline_s = deadline_s = max(deadline_s, time.monotonic() + held.patience_s)

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
        self._gone: dict[bytes, Worker] = {}

    def hello(self, peer: bytes, hello: WorkerHello) -> bool:
        """Note that a worker is there. Returns whether it is new."""
        worker = self.workers.get(peer)
        is_new = worker is None
        if worker is None:
            known = self._gone.pop(peer) if peer in self._gone else None
            worker = self.workers[peer] = known or Worker(peer, hello, time.monotonic(), self._deadline_s)
        worker.hello, worker.heard_s = hello, time.monotonic()
        return is_new

    def assign(self, worker: Worker, items: tuple[Candidate, ...]) -> int:
        """Give a worker a job. Returns the job's number."""
        job = self._next_job
        self._next_job += 1
        latent_format: str = items[0].group[0]
        nbytes = sum(item.nbytes for item in items)
        now_s = time.monotonic()
        # one that was late already is given the time to show whether it is slow, or ends its worker
        patience_s = max(worker.patience_s, LATE_S) if items[0].is_suspect else worker.patience_s
        deadline_s = max([now_s + patience_s, *(held.deadline_s for held in worker.jobs.values())])
        worker.jobs[job] = JobHeld(items, latent_format, nbytes, now_s, patience_s, deadline_s)
        return job

    def progress(self, peer: bytes, job: int) -> None:
        """One slice more is done: the deadline counts from here."""
        worker = self.workers.get(peer)
        held = (worker.jobs.get(job) or worker.overdue.get(job)) if worker is not None else None
        if worker is not None and held is not None:
            held.deadline_s = time.monotonic() + held.patience_s
            worker.renew()

    def finish(self, peer: bytes, job: int, ms: float | None = None) -> JobHeld | None:
        """The worker answered. Returns the job; None for one that was given to another since: its answer is late."""
        worker = self.workers.get(peer) or self._gone.get(peer)
        if worker is None:
            return None
        now_s = time.monotonic()
        late, held = worker.overdue.pop(job, None), worker.jobs.pop(job, None)
        answered = late or held
        if answered is not None:
            worker.patience_s = max(worker.patience_s, min(LATE_S, 2 * (now_s - answered.given_s)))
            worker.renew()
        if held is None:
            worker.departures.passed(now_s)
            return None
        worker.frames += len(held.items)
        took_turns = held.is_sliced or any(job.is_sliced for job in worker.jobs.values())
        if ms is not None and not took_turns:
            worker.departures.done(held.latent_format, max(1, held.nbytes), given_s=held.given_s, now_s=now_s)
        else:  # the time of a failed one is not the next one's
            worker.departures.passed(now_s)
        if ms is not None:
            measured = ms / 1000 / max(1, held.nbytes)
            before = worker.seconds_per_byte.get(held.latent_format, measured)
            worker.seconds_per_byte[held.latent_format] = 0.7 * before + 0.3 * measured
        return held

    def remove(self, peer: bytes) -> Worker | None:
        """Forget a worker that is gone; should it come back, what it still holds counts against its credits."""
        worker = self.workers.pop(peer, None)
        if worker is not None:
            worker.overdue |= worker.jobs
            worker.jobs = {}
            self._gone[peer] = worker
            while len(self._gone) > MAX_GONE:
                del self._gone[next(iter(self._gone))]
        return worker

    def let_go(self, peer: bytes) -> bool:
        """Forget a worker that ends because it was told to: no frame is to blame. Returns whether it was here."""
        is_here = self.remove(peer) is not None
        self._gone.pop(peer, None)
        return is_here

    def was_away(self, away_s: float) -> None:
        """The broker itself stood still for so long: no worker was silent, no job is late for that."""
        for worker in self.workers.values():
            worker.heard_s += away_s
            for held in worker.jobs.values():
                held.deadline_s += away_s

    def gone(self) -> list[bytes]:
        """Workers that are silent, or whose job is over its deadline."""
        now_s = time.monotonic()
        for worker in self.workers.values():  # an answer may be lost on its way: it is not waited for in all eternity
            worker.overdue = {job: held for job, held in worker.overdue.items() if now_s < held.deadline_s + LATE_S}
        return [
            worker.id
            for worker in self.workers.values()
            if worker.is_silent or any(job.deadline_s < now_s for job in worker.jobs.values())
        ]

    def dead(self) -> list[Worker]:
        """Workers that are gone, and silent since: each is told once, unless it comes back."""
        found = [worker for worker in self._gone.values() if worker.is_silent and worker.died_of is None]
        for worker in found:
            worker.died_of = tuple(item for job in worker.at_hand() for item in job.items)
        return found

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
