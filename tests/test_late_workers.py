"""Workers that hang, are slow, are stopped or die: where their streams go, and which frames are to blame."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taesd_stream.messages import Gap, Job, Progress
from taesd_stream_workers.broker.crew import SILENT_S
from tests.broker_role import BrokerRole, Peer, StreamerPeer, WorkerPeer, frame, new_run
from tests.daemon import wait_for

pytestmark = pytest.mark.faults

DEADLINE_S = 0.5


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerRole]:
    """A broker that does not wait for long for a word about a job."""
    with BrokerRole(tmp_path, f"decoder.job_deadline_s={DEADLINE_S}") as one:
        yield one


def show(publisher: Peer, streamer: StreamerPeer, stream: str) -> str:
    """A watched run with a frame."""
    run = new_run()
    streamer.watch(stream)
    publisher.open(run, stream)
    publisher.say(frame(run, 0))
    return run


def gone(broker: BrokerRole) -> int:
    """How many times a worker was given up."""
    return int(broker.stats().stats["counts"].get("workers_gone", 0))


def jobs(worker: WorkerPeer) -> list[Job]:
    """All that it was given."""
    worker.drain()
    return [message for message in worker.heard if isinstance(message, Job)]


def test_streams_go_past_a_worker_that_hangs(broker: BrokerRole) -> None:
    """It says HELLO and answers no job: it gets no stream while another is there, and the one it had leaves it."""
    with (
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker("hangs", credits=1) as hung,
        broker.worker("works") as good,
    ):
        broker.wait_for_workers(2)
        first = show(publisher, streamer, "first")
        hung.job()
        assert good.do(1)[0].run == first  # the other's deadline is over
        broker.wait_for_workers(2)
        runs = [show(publisher, streamer, f"new/{number}") for number in range(5)]
        assert sorted(item.run for item in good.do(len(runs))) == sorted(runs)
        assert len(jobs(hung)) == 1


def test_a_worker_that_answers_late_gets_streams_again(broker: BrokerRole) -> None:
    """Once it owes nothing any more it is as good as the other, which has a stream already."""
    with (
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker("late") as late,
        broker.worker("works") as good,
    ):
        broker.wait_for_workers(2)
        show(publisher, streamer, "first")
        held = late.job()
        good.do(1)  # its deadline is over
        broker.wait_for_workers(2)
        late.done(held)

        def gets_one() -> bool:
            show(publisher, streamer, f"new/{new_run()}")
            return len(jobs(late)) > 1

        wait_for(gets_one, of="a stream for it")


def test_a_word_about_a_job_keeps_its_worker(tmp_path: Path) -> None:
    """PROGRESS more often than the deadline: the worker is not given up, though its job takes longer."""
    with (
        BrokerRole(tmp_path, "decoder.job_deadline_s=2") as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker() as worker,
    ):
        show(publisher, streamer, "long")
        job = worker.job()
        for _ in range(8):
            worker.no_job(0.4)
            worker.say(Progress(job=job.job))
        assert gone(broker) == 0
        wait_for(lambda: gone(broker) == 1, of="the deadline, without a word")


def work_for(worker: WorkerPeer, seconds: float) -> list[Job]:
    """What a worker is given while it works."""
    given: list[Job] = []
    until_s = time.monotonic() + seconds
    while (left_s := until_s - time.monotonic()) > 0:
        if isinstance(message := worker.receive(left_s), Job):
            given.append(message)
    return given


def keep(publisher: Peer, stream: str, frames: int) -> str:
    """A run whose frames are to be recorded."""
    run = new_run()
    publisher.open(run, stream, record="all")
    for seq in range(frames):
        publisher.say(frame(run, seq, kept=True))
    return run


def test_a_slow_worker_leaves_no_frame_out(broker: BrokerRole) -> None:
    """Frames that take longer than the deadline are recorded all the same: late is not poison, nor for ever."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        run = keep(publisher, "slow", 2)
        publisher.ack(run, 1)
        held = [worker.job()]
        while broker.row("slow")["behind"]:
            held += work_for(worker, 2.4 * DEADLINE_S)
            if not held:
                continue  # the cursor is still on its way
            job = held.pop(0)
            worker.done(job)
            for item in job.items:
                streamer.written(run, item.attempt, item.seq)
        assert gone(broker) > 0
        streamer.drain()
        assert not any(isinstance(message, Gap) for message in streamer.heard)


def test_a_recording_goes_to_a_worker_that_was_late(broker: BrokerRole) -> None:
    """Another one has no decoder while the able one still owes an answer: once that is there, it is asked again."""
    with (
        broker.publisher() as publisher,
        broker.streamer(),
        broker.worker("able") as able,
        broker.worker("unable") as unable,
    ):
        broker.wait_for_workers(2)
        keep(publisher, "waits", 1)
        late = able.job()
        taken = unable.job()  # the other's deadline is over
        broker.wait_for_workers(2)
        unable.failed(taken, "no_decoder", retry=False)
        wait_for(lambda: broker.row("waits")["note"], of="the refusal")
        able.done(late)
        again = able.job()
        assert [(item.seq, item.attempt > late.items[0].attempt) for item in again.items] == [(0, True)]
        assert len(jobs(unable)) == 1


@pytest.mark.slow
def test_a_worker_that_drains_while_it_is_late_blames_no_frame(broker: BrokerRole) -> None:
    """It is let go with a frame in its hands, and silent since: one failed job more does not make that frame poison."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker("stays", credits=0) as stays:
        keep(publisher, "late", 1)
        publisher.ack(next(iter(broker.stats().runs)), 0)
        with broker.worker("leaves") as leaves:
            leaves.job()
            stays.hello(credits=1)
            taken = stays.job()  # the other's deadline is over
            leaves.hello(draining=True)
            leaves.drained()
        stays.no_job(SILENT_S + 2)
        stays.failed(taken, "internal")
        assert [item.seq for item in stays.job().items] == [0]
        streamer.drain()
        assert not any(isinstance(message, Gap) for message in streamer.heard)


@pytest.mark.slow
def test_a_stopped_worker_blames_no_frame(broker: BrokerRole) -> None:
    """Two workers after each other are silent for a while with the same frame, and come back: it is recorded."""
    with (
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker("one") as one,
        broker.worker("two") as two,
    ):
        broker.wait_for_workers(2)
        run = keep(publisher, "stopped", 1)
        job = one.job()
        for stopped, other in ((one, two), (two, one)):
            broker.alive.remove(stopped)
            taken = other.job()
            assert [(item.run, item.seq) for item in taken.items] == [(run, 0)]
            broker.alive.append(stopped)
            stopped.done(job)
            stopped.say_hello()
            broker.wait_for_workers(2)
            job = taken
        one.done(job)
        streamer.written(run, job.items[0].attempt, 0)
        wait_for(lambda: broker.row("stopped")["behind"] == 0, of="the cursor")
        assert not any(isinstance(message, Gap) for message in streamer.heard)


@pytest.mark.slow
def test_a_frame_that_kills_two_workers_is_left_out(broker: BrokerRole) -> None:
    """A worker dies with it, then another with it alone: the file passes it, and goes on behind it."""
    with broker.publisher() as publisher, broker.streamer() as streamer:
        run = keep(publisher, "poison", 3)
        publisher.ack(run, 2)
        for name in ("first", "second"):
            with broker.worker(name) as worker:
                assert worker.job().items[0].seq == 0
            wait_for(lambda: not broker.stats().workers, of="its end")
        gap = streamer.next(Gap)
        assert gap.seq == 0
        streamer.written(run, gap.attempt, 0)
        with broker.worker("third") as worker:
            assert [item.seq for item in worker.do(2)] == [1, 2]


@pytest.mark.slow
def test_a_frame_that_hangs_two_workers_is_left_out(broker: BrokerRole) -> None:
    """Past its deadline a worker lives on for a while, then it ends itself: what it still owed is to blame."""
    with broker.publisher() as publisher, broker.streamer() as streamer:
        run = keep(publisher, "hangs", 1)
        publisher.ack(run, 0)
        with broker.worker("second", credits=0) as second:
            with broker.worker("first", credits=1) as first:
                first.job()
                second.hello(credits=1)
                second.job()  # the first one's deadline is over
            wait_for(lambda: len(broker.stats().workers) == 1, of="the first one's end")
        gap = streamer.next(Gap)
        assert (gap.run, gap.seq) == (run, 0)
