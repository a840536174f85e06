"""`live` runs at the broker: every latent in order, its history where a worker is new, cuts only under overload."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from taesd_stream.messages import Degraded, DemandUpdate, Job
from taesd_stream.wire import MAX_FRAME_BYTES
from taesd_stream_workers.broker.live_latents import MAX_HISTORY, history_before
from tests.broker_role import BrokerRole, Peer, WorkerPeer, frame, new_run, values
from tests.daemon import wait_for

HISTORY = 3
ENGINES = {"sd1": {"decoder": "test", "history": HISTORY}}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerRole]:
    """A broker that no test harms."""
    with BrokerRole(tmp_path_factory.mktemp("broker")) as one:
        yield one


def seqs(job: Job) -> list[int]:
    """Of its items."""
    return [item.seq for item in job.items]


def histories(job: Job) -> list[list[int]]:
    """The values of each item's history."""
    return [[] if history is None else values(history) for _, _, history in job.parts()]


def open_watched(publisher: Peer, run: str, stream: str) -> None:
    """Open a `live` run, and wait until the broker asks for all of it."""
    if publisher.open(run, stream, kind="live").level != "every":
        publisher.next(DemandUpdate, lambda one: one.level == "every")


def decode_all(worker: WorkerPeer, last: int) -> list[Job]:
    """Take jobs and answer DONE until `last` is decoded."""
    jobs: list[Job] = []
    while not jobs or seqs(jobs[-1])[-1] < last:
        jobs.append(worker.job())
        worker.done(jobs[-1])
    return jobs


def test_every_latent_of_a_watched_live_run_goes_once_in_order(broker: BrokerRole) -> None:
    """Ten latents at once are no reason to pass one over: all come, in order, without history."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/order")
        open_watched(publisher, run, "live/order")
        for seq in range(10):
            publisher.say(frame(run, seq))
        jobs = decode_all(worker, 9)
        streamer.watch("live/order", viewers=0)
    assert [seq for job in jobs for seq in seqs(job)] == list(range(10))
    assert all(history == [] for job in jobs for history in histories(job))
    first, *others = [item for job in jobs for item in job.items]
    assert not first.expects_memory
    assert all(item.expects_memory for item in others)


def begin(publisher: Peer, worker: WorkerPeer, stream: str, count: int) -> str:
    """A watched `live` run of which `count` latents are decoded."""
    run = new_run()
    open_watched(publisher, run, stream)
    for seq in range(count):
        publisher.say(frame(run, seq))
    decode_all(worker, count - 1)
    return run


def test_a_worker_that_is_new_to_a_live_run_gets_its_history(broker: BrokerRole) -> None:
    """When a run's worker dies, the next one gets the latents before it, and begins with a keyframe for the viewers."""
    with broker.publisher() as publisher, broker.streamer() as streamer:
        streamer.watch("live/moved")
        with broker.worker("first", engines=ENGINES) as first:
            run = begin(publisher, first, "live/moved", 6)
        with broker.worker("second", engines=ENGINES) as second:
            publisher.say(frame(run, 6))
            job = second.job()
            assert job.items[0].keyframe  # for a worker that was there before has an encoder that is behind
            while 6 not in seqs(job):  # the last picture once more, for the viewers of the new chain
                second.done(job)
                job = second.job()
            second.done(job)
        streamer.watch("live/moved", viewers=0)
    first_item = job.items[0]
    assert histories(job)[0] == list(range(first_item.seq - HISTORY, first_item.seq))
    assert (first_item.history, first_item.expects_memory) == (HISTORY, False)


def test_a_worker_that_lost_its_memory_is_sent_the_history(broker: BrokerRole) -> None:
    """FAILED no_memory of a latent brings the same latent again, and what was behind it, with the history."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/lost")
        run = begin(publisher, worker, "live/lost", 5)
        publisher.say(frame(run, 5))
        lost = worker.job()
        worker.failed(lost, "no_memory", items=[0])
        again = worker.job()
        worker.done(again)
        streamer.watch("live/lost", viewers=0)
    assert (seqs(again)[0], histories(again)[0]) == (5, [2, 3, 4])


def test_latents_behind_one_without_a_picture_go_again(broker: BrokerRole) -> None:
    """FAILED bad_frame of a latent: it comes no more, what followed it does, and the history has it."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/bad")
        run = begin(publisher, worker, "live/bad", 3)
        worker.hello(credits=0)
        for seq in range(3, 6):
            publisher.say(frame(run, seq))
        wait_for(lambda: broker.row("live/bad")["seq"] == 5, of="all three")
        worker.hello(credits=2)
        job = worker.job()
        assert seqs(job) == [3, 4, 5]
        worker.failed(job, "bad_frame", items=[0], retry=False)
        again = worker.job()
        worker.done(again)
        streamer.watch("live/bad", viewers=0)
    assert (seqs(again), histories(again)[0]) == ([4, 5], [1, 2, 3])


def test_what_a_worker_says_it_remembers_is_believed(broker: BrokerRole) -> None:
    """HELLO that no longer lists the run: the next latent brings its history; one that lists it: none."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/told")
        run = begin(publisher, worker, "live/told", 5)
        worker.hello(memories={run: 5})
        publisher.say(frame(run, 5))
        job = worker.job()
        assert (seqs(job), histories(job)) == ([5], [[]])
        worker.done(job)
        worker.hello(memories={})
        publisher.say(frame(run, 6))
        job = worker.job()
        assert (seqs(job), histories(job)) == ([6], [[3, 4, 5]])
        worker.done(job)
        streamer.watch("live/told", viewers=0)


def test_latents_that_come_faster_than_they_are_decoded_go_as_one_cut(broker: BrokerRole) -> None:
    """Without a free worker for over a second what waits goes, counted and said; what follows keeps its time."""
    before = broker.stats().stats["counts"].get("latents_cut", 0)
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/cut")
        run = new_run()
        open_watched(publisher, run, "live/cut")
        publisher.say(frame(run, 0))
        held = worker.job()  # not answered: the worker is slow
        worker.hello(credits=0)
        for seq in range(1, 21):
            publisher.say(frame(run, seq))

        def is_cut() -> bool:
            nonlocal seq
            streamer.drain()
            seq += 1
            publisher.say(frame(run, seq))
            worker.hello(credits=0)
            return bool(broker.stats().stats["counts"].get("latents_cut", 0) > before)

        wait_for(is_cut, of="the cut")
        row = broker.row("live/cut")
        cut = broker.stats().stats["counts"]["latents_cut"] - before
        assert "degraded" in row["flags"]
        assert row["note"].startswith("Too slow")
        worker.done(held)
        worker.hello(credits=2)
        job = worker.job()
        worker.done(job)
        streamer.watch("live/cut", viewers=0)
    first = job.items[0]
    assert first.seq == 1 + cut
    assert (first.index, first.fps) == (first.seq, 16.0)
    assert histories(job)[0] == [first.seq - 3, first.seq - 2, first.seq - 1]


def test_a_late_viewer_of_a_live_run_gets_the_last_frame_once_more(broker: BrokerRole) -> None:
    """KEYFRAME while nothing waits: the newest latent as a repeat, which expects the worker to be past it."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/late")
        begin(publisher, worker, "live/late", 5)
        streamer.keyframe("live/late")
        job = worker.job()
        assert [(item.seq, item.is_repeat, item.keyframe, item.history) for item in job.items] == [(4, True, True, 0)]
        worker.failed(job, "no_memory", items=[0])
        job = worker.job()
        assert [(item.seq, item.is_repeat, item.keyframe) for item in job.items] == [(4, True, True)]
        assert histories(job) == [[1, 2, 3]]
        worker.done(job)
        streamer.watch("live/late", viewers=0)


def test_a_kept_live_run_is_decoded_once_for_file_and_viewers(broker: BrokerRole) -> None:
    """Each kept latent goes once, in order, with both renditions; a new attempt brings history out of the log."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/kept")
        publisher.open(run, "live/kept", kind="live", record="all")
        for seq in range(12):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 11)
        jobs = decode_all(worker, 11)
        items = [item for job in jobs for item in job.items]
        assert [(item.seq, item.renditions) for item in items] == [(seq, ("live", "record")) for seq in range(12)]
        streamer.written(run, items[0].attempt, 7)
        assert wait_for(lambda: broker.row("live/kept")["behind"] == 4, of="the cursor")
        worker.hello(memories={})
        publisher.say(frame(run, 12, kept=True))
        again = worker.job()
        assert [(item.seq, item.renditions) for item in again.items] == [(12, ("live", "record"))]
        worker.failed(again, "no_memory", items=[0])
        again = worker.job()
        worker.done(again)
        streamer.watch("live/kept", viewers=0)
        publisher.end(run, 12)
        streamer.written(run, again.items[0].attempt, 12, finished=True)
        wait_for(lambda: run not in broker.stats().runs, of="the end of the recording")
    item = again.items[0]
    assert item.attempt > items[0].attempt
    assert histories(again)[0] == list(range(item.seq - HISTORY, item.seq))


def test_after_a_restart_the_worker_that_lists_a_run_goes_on(tmp_path: Path) -> None:
    """A new broker gives the next latent, without history, to the worker that remembers the run, and to no other."""
    with BrokerRole(tmp_path) as broker:
        run = new_run()
        with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
            streamer.watch("live/restart")
            publisher.open(run, "live/restart", kind="live")
            publisher.say(frame(run, 0))
            worker.done(worker.job())
        broker.kill()
        broker.start()
        with (
            broker.publisher() as publisher,
            broker.streamer() as streamer,
            broker.worker("other", engines=ENGINES) as other,
            broker.worker("worker", engines=ENGINES, memories={run: 1}) as worker,
        ):
            streamer.watch("live/restart")
            open_watched(publisher, run, "live/restart")
            broker.wait_for_workers(2)
            publisher.say(frame(run, 1))
            job = worker.job()
            assert [(item.seq, item.expects_memory, item.history) for item in job.items] == [(1, True, 0)]
            worker.done(job)
            other.no_job(0.3)


def test_a_cold_start_is_said(broker: BrokerRole) -> None:
    """What a worker says it had to do worse is counted, and the page's flag and text until it is over."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(engines=ENGINES) as worker:
        streamer.watch("live/cold")
        run = new_run()
        open_watched(publisher, run, "live/cold")
        publisher.say(frame(run, 0, index=7))
        job = worker.job()
        assert [(item.index, item.history, item.expects_memory) for item in job.items] == [(7, 0, False)]
        worker.done(job, degraded=(Degraded(run=run, code="approximate", text="Colours approximate."),))
        row = wait_for(lambda: (row := broker.row("live/cold"))["note"] and row, of="the note")
        assert (row["note"], "degraded" in row["flags"]) == ("Colours approximate.", True)
        assert broker.stats().stats["counts"]["degraded_approximate"] >= 1
        seqs_left = iter(range(1, 1000))

        def is_clear() -> bool:
            seq = next(seqs_left)
            publisher.say(frame(run, seq, index=7 + seq))
            worker.done(worker.job())
            return broker.row("live/cold")["note"] is None

        wait_for(is_clear, of="clear pictures")
        streamer.watch("live/cold", viewers=0)


def test_a_history_is_no_more_than_one_part_carries() -> None:
    """Of latents of 8 MiB the newest eight: with a ninth the worker's socket would break off the connection."""
    shape = (16, 512, 512)
    payload = bytes(8 << 20)
    frames = [replace(frame(new_run(), seq), shape=shape, payload=payload) for seq in range(11)]
    history = history_before(frames[10], frames.__getitem__, MAX_HISTORY)
    assert (history.count, len(history.payload)) == (8, MAX_FRAME_BYTES)
