"""Many samplers, daemons and workers as an event simulation: what waits, what is replaced, how busy everybody is.

Each sampler steps at a pace of its own, belongs to one daemon (`daemons.ranked`) and there to one worker, and is idle,
watched or kept. A broker takes what has come, then gives jobs to workers with credit, of what is watched the newest; a
worker does one job after the other, its pictures go to the first encoder that is free, then to the streamer. Waits,
batches and replaced frames come of that; service times are those of `Times`, each time the same. The seed is fixed.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from taesd_stream.capacity import LOAD_FACTOR, Departures, JobCost, bottleneck, sent_per_s, servers_needed, utilisation
from taesd_stream.daemons import ranked
from taesd_stream.frames import Demand
from taesd_stream.scheduling import RECORD_PATIENCE_NS
from taesd_stream_workers.broker.runs import MAX_LIVE_IN_FLIGHT

SEED: Final = 9
STEP_S: Final = (0.2, 3.0)  # of the samplers, log-uniform between
JITTER: Final = 0.1  # of each step
WARM_UP_S: Final = 2.0
SECONDS: Final = 6.0
PATIENCE_S: Final = RECORD_PATIENCE_NS / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Measured service times in seconds, and how much goes on at once.

    take_s: broker, a frame from a sampler into memory. give_s: from there to a worker, and the worker's answer.
    hello_s: broker, a sampler's HELLO, one a second. job_s, frame_s: worker, a job and each frame of it.
    encode_s, record_s: one picture in one of `encoders` threads, live or for a file. serve_s: streamer, to one viewer.
    hop_s: each way between two processes.
    """

    take_s: float
    give_s: float
    hello_s: float
    job_s: float
    frame_s: float
    encode_s: float
    record_s: float
    serve_s: float
    hop_s: float
    encoders: int
    credits: int
    max_batch_size: int = 16


@dataclass(slots=True)
class Stream:
    """One sampler: who it is, how it steps, and where its frames are."""

    name: str
    interval_s: float  # between the frames that it sends
    use: Demand
    in_flight: int = 0
    waits_since_s: float = -1.0  # the newest frame's publish, of a watched one that waits for its worker; -1: none


@dataclass(slots=True)
class Worker:
    """One decode worker: what waits for it, what it holds, when its encoders are free."""

    daemon: Daemon
    credits: int
    live: dict[str, Stream] = field(default_factory=dict)  # what waits, oldest first
    kept: deque[tuple[float, Stream]] = field(default_factory=deque)  # publishes
    jobs: deque[Job] = field(default_factory=deque)
    encoders: list[float] = field(default_factory=list)
    is_busy: bool = False
    departures: Departures = field(default_factory=Departures)  # by which the broker learns what it can do
    frames: int = 0
    encode_s: float = 0.0


@dataclass(slots=True)
class Job:
    """Frames that a broker gave to a worker together, each with when it was published."""

    worker: Worker
    frames: list[tuple[float, Stream]]
    given_s: float


@dataclass(slots=True)
class Daemon:
    """One broker and one streamer, and their workers."""

    hello_share: float = 0.0  # of the broker's time
    inbox: list[tuple[float, Stream, Worker]] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    is_busy: bool = False
    busy_s: float = 0.0
    streamer_free_s: float = 0.0
    streamer_s: float = 0.0


class Farm:
    """Everything at work; `run` plays it through."""

    def __init__(self, times: Times, streams: Sequence[Stream], daemons: int, workers: int) -> None:
        """workers: of each daemon."""
        self._times = times
        self._daemons = [Daemon() for _ in range(daemons)]
        for daemon in self._daemons:
            daemon.workers = [Worker(daemon, times.credits, encoders=[0.0] * times.encoders) for _ in range(workers)]
        self._rng = np.random.default_rng(SEED)
        self._queue: list[tuple[float, int, str, Any]] = []
        self._number = itertools.count()
        self._from_s, self._until_s = WARM_UP_S, WARM_UP_S + SECONDS
        self.live_s: list[float] = []
        self.kept_s: list[float] = []
        self.offered = self.replaced = self.shown = 0
        self._home = self._place(streams)
        self._streams = streams

    def _place(self, streams: Sequence[Stream]) -> dict[str, Worker]:
        """Each stream's daemon by rendezvous hash; there, as the broker does, the worker with the least to do."""
        by_address = {f"tcp://host-{number}:5760": daemon for number, daemon in enumerate(self._daemons)}
        home: dict[str, Worker] = {}
        loads = {id(worker): 0.0 for daemon in self._daemons for worker in daemon.workers}
        for stream in streams:
            daemon = by_address[ranked(list(by_address), stream.name)[0]]
            worker = min(daemon.workers, key=lambda one: loads[id(one)])
            loads[id(worker)] += 0.0 if stream.use == "idle" else 1 / stream.interval_s
            home[stream.name] = worker
            daemon.hello_share += self._times.hello_s
        return home

    def run(self) -> Farm:
        """Play it through."""
        for stream in self._streams:
            self._at(float(self._rng.random()) * stream.interval_s, "arrive", stream)
        handlers: dict[str, Callable[[float, Any], None]] = {
            "arrive": self._arrive,
            "broker": self._broker,
            "job": self._job,
            "decoded": self._decoded,
            "done": self._done,
            "packet": self._packet,
        }
        while self._queue and self._queue[0][0] < self._until_s:
            now_s, _, kind, what = heapq.heappop(self._queue)
            handlers[kind](now_s, what)
        return self

    def _at(self, when_s: float, kind: str, what: Any) -> None:
        heapq.heappush(self._queue, (when_s, next(self._number), kind, what))

    def _counts(self, when_s: float) -> bool:
        """Whether the warm-up was over by then."""
        return when_s >= self._from_s

    def _arrive(self, now_s: float, stream: Stream) -> None:
        """A frame is at its broker, and the sampler goes on."""
        jitter = 1 + JITTER * (2 * float(self._rng.random()) - 1)
        self._at(now_s + stream.interval_s * jitter, "arrive", stream)
        worker = self._home[stream.name]
        worker.daemon.inbox.append((now_s - self._times.hop_s, stream, worker))
        self._wake(now_s, worker.daemon)

    # --- broker: take what has come, then give jobs ---

    def _wake(self, now_s: float, daemon: Daemon) -> None:
        if not daemon.is_busy:
            daemon.is_busy = True
            self._at(now_s, "broker", daemon)

    def _broker(self, now_s: float, daemon: Daemon) -> None:
        """One turn of its loop; another one follows, until one has nothing to do."""
        times = self._times
        slower = 1 / max(0.01, 1 - daemon.hello_share)  # what HELLOs leave of its time
        came, daemon.inbox = daemon.inbox, []
        for sent_s, stream, worker in came:
            self._take(sent_s, stream, worker)
        end_s = now_s + len(came) * times.take_s * slower
        free = [worker for worker in daemon.workers if worker.credits]
        while free:
            given = [(worker, job) for worker in free if (job := self._next_job(worker))]
            for worker, job in given:
                worker.credits -= 1
                end_s += len(job) * times.give_s * slower
                self._at(end_s + times.hop_s, "job", Job(worker, job, given_s=end_s))
            free = [worker for worker, _ in given if worker.credits]
        daemon.busy_s += self._within(now_s, end_s) / slower
        daemon.is_busy = end_s > now_s
        if daemon.is_busy:
            self._at(end_s, "broker", daemon)

    def _take(self, sent_s: float, stream: Stream, worker: Worker) -> None:
        if stream.use == "every":
            worker.kept.append((sent_s, stream))
        elif stream.use == "watched":
            self.offered += self._counts(sent_s)
            if stream.waits_since_s >= 0:
                self.replaced += self._counts(stream.waits_since_s)
            stream.waits_since_s = sent_s
            worker.live.setdefault(stream.name, stream)

    def _next_job(self, worker: Worker) -> list[tuple[float, Stream]]:
        """What waited longest first, live pictures a little before recordings: scheduling.next_job in short."""
        most = self._times.max_batch_size
        may_go = (one for one in worker.live.values() if one.in_flight < MAX_LIVE_IN_FLIGHT)
        ready = deque(itertools.islice(may_go, most))
        job: list[tuple[float, Stream]] = []
        while len(job) < most and (ready or worker.kept):
            due_s = ready[0].waits_since_s if ready else np.inf
            if worker.kept and worker.kept[0][0] + PATIENCE_S <= due_s:
                job.append(worker.kept.popleft())
                continue
            stream = ready.popleft()
            del worker.live[stream.name]
            job.append((stream.waits_since_s, stream))
            stream.waits_since_s = -1.0
            stream.in_flight += 1
        return job

    # --- worker ---

    def _job(self, now_s: float, job: Job) -> None:
        job.worker.jobs.append(job)
        if not job.worker.is_busy:
            self._begin(now_s, job.worker)

    def _begin(self, now_s: float, worker: Worker) -> None:
        worker.is_busy = bool(worker.jobs)
        if worker.jobs:
            end_s = now_s + self._times.job_s + len(worker.jobs[0].frames) * self._times.frame_s
            self._at(end_s, "decoded", worker)

    def _decoded(self, now_s: float, worker: Worker) -> None:
        times = self._times
        job = worker.jobs.popleft()
        worker.frames += len(job.frames) if now_s >= self._from_s else 0
        last_s = now_s
        for sent_s, stream in job.frames:
            begin_s = max(now_s, heapq.heappop(worker.encoders))
            end_s = begin_s + (times.record_s if stream.use == "every" else times.encode_s)
            heapq.heappush(worker.encoders, end_s)
            worker.encode_s += self._within(begin_s, end_s)
            last_s = max(last_s, end_s)
            self._at(end_s + times.hop_s, "packet", (worker.daemon, sent_s, stream))
        self._at(last_s + times.hop_s, "done", job)
        self._begin(now_s, worker)

    def _done(self, now_s: float, job: Job) -> None:
        job.worker.credits += 1
        job.worker.departures.done("frames", len(job.frames), given_s=job.given_s, now_s=now_s)
        for _, stream in job.frames:
            stream.in_flight -= stream.use == "watched"
        self._wake(now_s, job.worker.daemon)

    # --- streamer ---

    def _packet(self, now_s: float, what: tuple[Daemon, float, Stream]) -> None:
        daemon, sent_s, stream = what
        begin_s = max(now_s, daemon.streamer_free_s)
        daemon.streamer_free_s = begin_s + self._times.serve_s
        daemon.streamer_s += self._within(begin_s, daemon.streamer_free_s)
        self.shown += self._counts(now_s)
        if self._counts(sent_s):
            (self.kept_s if stream.use == "every" else self.live_s).append(daemon.streamer_free_s - sent_s)

    # --- figures ---

    def _told_load(self, worker: Worker) -> float:
        """A worker's load as its broker sees it: frames/s times what departures say of a frame."""
        cost = worker.departures.costs.get("frames", JobCost())
        return worker.frames / SECONDS * cost.full_s(self._times.max_batch_size)

    def _within(self, begin_s: float, end_s: float) -> float:
        return max(0.0, min(end_s, self._until_s) - max(begin_s, self._from_s))

    def figures(self) -> dict[str, Any]:
        """Latency, what was replaced, and how busy the busiest of each part was."""
        workers = [worker for daemon in self._daemons for worker in daemon.workers]
        times = self._times
        frame_s = times.job_s / times.max_batch_size + times.frame_s  # in full batches: they fill as they are needed
        loads = {
            "broker": max(one.busy_s / SECONDS + one.hello_share for one in self._daemons),
            "worker": max(max(utilisation(one.frames, frame_s), one.encode_s / times.encoders) for one in workers)
            / SECONDS,
            "streamer": max(one.streamer_s for one in self._daemons) / SECONDS,
        }
        return {
            "frames_s": round(self.shown / SECONDS),
            "p50_ms": _ms(self.live_s, 50),
            "p99_ms": _ms(self.live_s, 99),
            "replaced": round(self.replaced / max(1, self.offered), 4),
            "kept_p99_ms": _ms(self.kept_s, 99),
            "loads": {name: round(load, 3) for name, load in loads.items()},
            "desired_workers": sum(
                servers_needed(sum(self._told_load(one) for one in daemon.workers)) for daemon in self._daemons
            ),
            "add": what_to_add(loads),
        }


def what_to_add(loads: dict[str, float]) -> str:
    """The part whose lack is felt first: the busiest, if it is over the load factor."""
    busiest = bottleneck({name: -load for name, load in loads.items()})
    return (
        {"worker": "a worker", "broker": "a daemon", "streamer": "a daemon"}[busiest]
        if (loads[busiest] > LOAD_FACTOR)
        else "nothing"
    )


def samplers(
    count: int, *, watched: float, kept: float, step_s: tuple[float, float] = STEP_S, max_fps: float = 30.0
) -> list[Stream]:
    """So many samplers, the same ones each time. watched, kept: shares of them; the rest is idle."""
    rng = np.random.default_rng(SEED)
    shortest, longest = np.log(step_s)
    paces = np.exp(rng.uniform(shortest, longest, count))
    kinds: tuple[Demand, ...] = ("watched", "every", "idle")
    uses = [kinds[one] for one in rng.choice(3, count, p=[watched, kept, 1 - watched - kept])]
    return [
        Stream(f"sampler/{number}", 1 / sent_per_s(float(pace), use, max_fps=max_fps), use)
        for number, (pace, use) in enumerate(zip(paces, uses, strict=True))
    ]


def _ms(times_s: Sequence[float], percentile: float) -> float | None:
    return round(1000 * float(np.percentile(times_s, percentile)), 1) if times_s else None
