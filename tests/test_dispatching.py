"""Placement, credits and scheduling together: the broker's dispatcher with many workers over real sockets, by property.

The test is the broker's loop and its workers; what comes, goes, answers and is watched is hypothesis' choice.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taesd_stream import wire
from taesd_stream.config import load_config
from taesd_stream.frames import StreamInfo
from taesd_stream.messages import Done, End, Failed, Forget, Job, WorkerHello
from taesd_stream_workers.broker.dispatcher import Dispatcher, StreamerLink
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.registry import Registry
from taesd_stream_workers.broker.runs import Run
from taesd_stream_workers.role.gate import Gate
from tests.broker_role import frame, new_run

WORKERS = [b"one", b"two", b"three"]
RUNS = 6
LARGE = (4, 256, 256)  # 512 KiB

steps = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), st.integers(0, RUNS - 1)),
        st.tuples(st.just("answer"), st.integers(0, len(WORKERS) - 1)),
        st.tuples(st.just("hello"), st.integers(0, len(WORKERS) - 1)),
        st.tuples(st.just("drain"), st.integers(0, len(WORKERS) - 1)),
        st.tuples(st.just("tick"), st.just(0)),
    ),
    max_size=40,
)


class Farm:
    """A dispatcher, its workers, and what each of them has in hand."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], credits_: list[int], sets: list[str]) -> None:
        config = load_config(sets=sets)
        self._links = Links()
        self._links.bind(Gate(config), context, "inproc://front", "inproc://inside")
        self.registry = Registry(config)
        streamer = StreamerLink()
        streamer.peer, streamer.packets_to, streamer.heard_s = b"streamer", "inproc://packets", float("inf")
        self.dispatcher = Dispatcher(config, self.registry, streamer, self._links)
        self._hellos = [WorkerHello(device="cpu", credits=count) for count in credits_]
        self._sockets = [context.socket(zmq.DEALER) for _ in WORKERS]
        for name, socket in zip(WORKERS, self._sockets, strict=True):
            socket.setsockopt(zmq.IDENTITY, name)
            socket.connect("inproc://inside")
        self.jobs: list[list[Job]] = [[] for _ in WORKERS]
        self.runs: list[Run] = []
        for number in range(RUNS):
            info = StreamInfo(stream=f"s/{number}", run=new_run(), kind="steps", latent_format="sd1")
            self.runs.append(Run(info, peer=b"publisher", record="off"))
            self.registry.add(self.runs[-1])
            self.registry.watch(info.stream, "live", 1)
        self.published = [-1] * RUNS
        self.shown: defaultdict[str, list[int]] = defaultdict(list)
        self.is_draining = [False] * len(WORKERS)

    def take(self, word: str, number: int) -> None:
        """One step, and the jobs that come of it."""
        if word == "frame":
            self.publish(number)
        elif word == "answer" and self.jobs[number]:
            self.dispatcher.on_done(WORKERS[number], Done(job=self.jobs[number].pop(0).job, ms=1.0))
        elif word in ("hello", "drain"):
            self.is_draining[number] = word == "drain"
            hello = WorkerHello(device="cpu", credits=self._hellos[number].credits, draining=word == "drain")
            self.dispatcher.on_hello(WORKERS[number], hello)
        elif word == "tick":
            self.dispatcher.tick()
        self.dispatcher.give_jobs()
        for place, socket in enumerate(self._sockets):
            self._receive(place, socket)
        self._check()

    def refuse(self, number: int) -> None:
        """A worker has no decoder for its oldest job."""
        job = self.jobs[number].pop(0)
        refused = Failed(job=job.job, items=[], code="no_decoder", text="no decoder (test)", retry=False)
        self.dispatcher.on_failed(WORKERS[number], refused)
        self.dispatcher.give_jobs()

    def publish(self, number: int) -> None:
        """The next frame of a run comes in."""
        self.published[number] += 1
        run = self.runs[number]
        run.take(frame(run.info.run, self.published[number]), 1, is_watched=True, share_bytes=0)
        self.registry.touch(run)

    def wait_for_recording(self) -> None:
        """One more run that has ended, and whose one frame is in its log."""
        run_id = new_run()
        info = StreamInfo(stream=f"waits/{run_id}", run=run_id, kind="steps", latent_format="sd1")
        run = Run(info, peer=None, record="all")
        run.end = End(run=run_id, last_seq=0, reason="done")
        kept = self.registry.keep_log(run, 0)
        kept.log.append(frame(run_id, 0, kept=True, shape=LARGE))
        kept.queued = kept.logged = 0
        kept.is_over = True
        self.registry.add(run)

    def _receive(self, place: int, socket: zmq.Socket[bytes]) -> None:
        while socket.poll(0):
            message = wire.unpack(socket.recv_multipart(), wire.TO_WORKER)
            if isinstance(message, Forget):
                assert not any(item.run == message.run for job in self.jobs[place] for item in job.items)
            if not isinstance(message, Job):
                continue
            assert not self.is_draining[place]
            self.jobs[place].append(message)
            for item in message.items:
                self.shown[item.run].append(item.seq)

    def _check(self) -> None:
        for place, jobs in enumerate(self.jobs):
            assert len(jobs) <= self._hellos[place].credits
        for run in self.runs:
            holders = {place for place, jobs in enumerate(self.jobs) if any(_has(job, run) for job in jobs)}
            assert len(holders) <= 1, "two workers encode one chain"
            seqs = self.shown[run.info.run]
            assert seqs == sorted(seqs), "a run goes back"  # its newest frame may come again, at another worker


def _has(job: Job, run: Run) -> bool:
    return any(item.run == run.info.run for item in job.items)


@contextmanager
def farm(credits_: list[int], sets: list[str] | None = None) -> Iterator[Farm]:
    """One, and its sockets closed behind it."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield Farm(context, credits_, sets or [])
    finally:
        context.destroy(linger=0)


@given(st.lists(st.integers(1, 4), min_size=len(WORKERS), max_size=len(WORKERS)), steps)
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_every_newest_frame_is_shown_by_one_worker_at_a_time(credits_: list[int], taken: list[tuple[str, int]]) -> None:
    """Workers come and drain, frames and answers come in any order: credits hold, no run is at two workers at once or
    goes back; and once all is answered every run's newest frame was given to a worker."""
    with farm(credits_) as one:
        for word, number in taken:
            one.take(word, number)
        for number in range(len(WORKERS)):
            one.take("hello", number)
        for _ in range(4 * RUNS):
            for number in range(len(WORKERS)):
                one.take("answer", number)
            one.take("tick", 0)
        assert [one.shown[run.info.run][-1:] for run in one.runs] == [
            [seq] if seq >= 0 else [] for seq in one.published
        ]


def test_the_balancer_moves_nothing_to_a_worker_that_refused_it() -> None:
    """Two busy streams stay at the one worker that decodes them, until the idle one comes anew: it may do so then."""
    with farm([1, 1, 1]) as one:
        first, second = one.runs[:2]
        one.take("hello", 0)
        for number in (0, 1, 0, 1):
            one.take("frame", number)
            one.refuse(0)
            if number and one.published[1] == 0:
                one.take("hello", 1)
        assert (first.worker, second.worker) == (WORKERS[1], WORKERS[1])
        one.take("frame", 0)
        one.take("answer", 1)  # in 1 ms
        for run in (first, second):
            run.interval_s, run.moved_s = 0.002, float("-inf")  # as if it had been there for long
        one.take("tick", 0)
        assert (first.worker, second.worker) == (WORKERS[1], WORKERS[1])
        one.take("drain", 0)
        one.take("hello", 0)
        one.take("tick", 0)
        assert {first.worker, second.worker} == {WORKERS[0], WORKERS[1]}


def test_a_stream_leaves_a_worker_for_one_that_has_not_refused_it() -> None:
    """Its worker drains: it goes to the one that nobody asked yet, though one without its decoder is as free."""
    with farm([1, 1, 1]) as one:
        for number in range(len(WORKERS)):
            one.take("hello", number)
        (run, *_) = one.runs
        one.take("frame", 0)
        one.refuse(0)
        assert run.worker == b"three"
        one.take("tick", 0)
        one.take("drain", WORKERS.index(b"three"))
        one.take("frame", 0)
        assert run.worker == b"two"


def bytecodes_of(call: Callable[[], object]) -> int:
    """How many instructions of Python a call takes: what a clock cannot tell exactly."""
    count = 0

    def trace(at: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        at.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_recordings_that_wait_cost_nothing_where_a_frame_comes(tmp_path: Path) -> None:
    """A streamer that is behind leaves hundreds of ended runs: what the loop does for another's frame does not grow."""

    def cost(waiting: int) -> int:
        sets = [f"recording.folder={tmp_path / str(waiting)}", "recording.window_bytes=1048576"]
        with farm([8, 8, 8], sets) as one:
            one.registry.log_folder.mkdir(parents=True)
            for _ in range(waiting):
                one.wait_for_recording()
            one.registry.give_turns()
            for number in range(len(WORKERS)):
                one.take("hello", number)
            one.publish(0)
            spent = bytecodes_of(one.dispatcher.give_jobs)
            assert one.runs[0].items_out == 1
            return spent

    few, many = 50, 450
    assert cost(many) - cost(few) < many - few, "it looks at each of them"  # the collector's hooks may add a few
