"""Workers that come, go and drain: streams spread over them, and move without a picture lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.messages import Cursor, Drain, Echo, Forget, Gap, JobItem
from taesd_stream_workers.broker.dispatcher import STREAMER_GONE_S
from taesd_stream_workers.broker.kept_run import RECORD_STUCK_S
from tests.broker_role import BrokerRole, Peer, frame, new_run
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.page_socket import PageSocket
from tests.pictures import decode_file, decode_h264, sd1_latents_of
from tests.troubles import pid_of, stopped


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerRole]:
    """A broker of the test's own: workers of another test would be here for some seconds."""
    with BrokerRole(tmp_path) as one:
        yield one


def kept_run(publisher: Peer, stream: str, count: int) -> str:
    """A kept run of so many frames, which the log has. Returns: its id."""
    run = new_run()
    publisher.open(run, stream, record="all")
    for seq in range(count):
        publisher.say(frame(run, seq, kept=True))
    publisher.ack(run, count - 1)
    return run


def test_new_streams_spread_over_the_workers(broker: BrokerRole) -> None:
    """Of four watched streams that open together each of two workers gets two."""
    with (
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker("one") as one,
        broker.worker("two") as two,
    ):
        broker.wait_for_workers(2)
        for number in range(4):
            streamer.watch(f"spread/{number}")
            run = new_run()
            publisher.open(run, f"spread/{number}")
            publisher.say(frame(run, 0))
        seen: dict[str, int] = {}
        while sum(seen.values()) < 4:
            for name, worker in (("one", one), ("two", two)):
                with contextlib.suppress(AssertionError):
                    job = worker.job(0.1)
                    worker.done(job)
                    seen[name] = seen.get(name, 0) + len(job.items)
    assert seen == {"one": 2, "two": 2}


def test_frames_that_a_newer_one_replaced_are_counted(broker: BrokerRole) -> None:
    """Of five frames of a watched run three wait for a worker when the next one comes: /metrics can tell how many."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        streamer.watch("replaced")
        run = new_run()
        publisher.open(run, "replaced")
        publisher.say(frame(run, 0))
        worker.done(worker.job())
        worker.hello(credits=0)
        for seq in range(1, 5):
            publisher.say(frame(run, seq))
        wait_for(lambda: broker.row("replaced")["seq"] == 4, of="all five")
        counts = broker.stats().stats["counts"]
    assert (counts["live_frames"], counts["live_replaced"]) == (5, 3)


def test_a_drained_worker_gets_nothing_more_and_is_let_go(broker: BrokerRole) -> None:
    """HELLO with draining: what it holds it may finish, what comes goes to another, then DRAIN; nobody is blamed."""
    gone = broker.stats().stats["counts"].get("workers_gone", 0)
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as leaving:
        streamer.watch("drain/one")
        run = new_run()
        publisher.open(run, "drain/one")
        publisher.say(frame(run, 0))
        job = leaving.job()
        with broker.worker("staying") as staying:
            broker.wait_for_workers(2)
            leaving.hello(draining=True)
            wait_for(lambda: any(row["draining"] for row in broker.stats().workers), of="the wish")
            publisher.say(frame(run, 1))
            staying.no_job(0.3)  # the other one is still at work on the stream
            leaving.done(job)
            taken = staying.job()
            assert [item.seq for item in taken.items] == [1]
            assert taken.items[0].placed_ns > job.items[0].placed_ns  # what the one that leaves has made is late now
            staying.done(taken)
            leaving.hello(draining=True)
            leaving.drained()
            assert any(isinstance(message, Forget) for message in leaving.heard)
            assert [row["id"] for row in broker.stats().workers] == ["staying"]
    assert broker.stats().stats["counts"].get("workers_gone", 0) == gone


def test_a_kept_run_moves_behind_what_is_written(broker: BrokerRole) -> None:
    """A recording's worker drains: the next one begins, as a new attempt, with the frame behind those on their way."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as leaving:
        run = kept_run(publisher, "drain/kept", 4)
        sent = leaving.do(4)
        with broker.worker() as staying:
            broker.wait_for_workers(2)
            leaving.hello(draining=True)
            publisher.say(frame(run, 4, kept=True))
            publisher.ack(run, 4)
            staying.no_job(0.3)  # the file has not told yet what it holds
            assert not any(isinstance(message, Drain) for message in leaving.heard)
            streamer.written(run, sent[-1].attempt, 3)
            (item,) = staying.job().items
            assert (item.seq, item.attempt > sent[-1].attempt) == (4, True)
            publisher.end(run, 4)
            streamer.written(run, item.attempt, 4, finished=True)


def test_a_frame_that_ended_two_jobs_is_left_out(broker: BrokerRole) -> None:
    """Poison: tried again, alone; then no worker gets it any more, and a GAP lets the file pass it."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        run = kept_run(publisher, "poison", 3)
        job = worker.job()
        worker.failed(job, "internal", items=[0])
        while job.items[0].attempt == 1:  # what went before the failure was heard
            job = worker.job()
        assert [item.seq for item in job.items] == [0]
        worker.failed(job, "internal")
        gap = streamer.next(Gap)
        assert gap.seq == 0
        streamer.written(run, gap.attempt, 0)
        later: list[JobItem] = []
        while not later or later[-1].seq < 2:
            job = worker.job()
            worker.done(job)
            later += [item for item in job.items if item.attempt == gap.attempt]
        assert [item.seq for item in later] == [1, 2]
        assert broker.stats().stats["counts"]["gaps"] == 1
        assert "left out" in broker.row("poison")["note"]


def test_a_frame_that_was_not_encoded_is_tried_for_longer(broker: BrokerRole) -> None:
    """Its encoder may have been short of memory: two failures are no poison, and its neighbour goes on."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        run = kept_run(publisher, "memory", 2)
        job = worker.job()
        for attempt in (1, 2, 3):
            while job.items[0].attempt < attempt:  # what went before the failure was heard
                job = worker.job()
            assert job.items[0].seq == 0
            worker.failed(job, "not_encoded", items=[0])
        recorded: list[JobItem] = []
        while not recorded or recorded[-1].seq < 1:
            job = worker.job()
            worker.done(job)
            recorded += [item for item in job.items if item.attempt == 4]
        assert [item.seq for item in recorded] == [0, 1]
        streamer.written(run, 4, 1)
        counts = broker.stats().stats["counts"]
        assert (counts["failed_not_encoded"], counts.get("gaps", 0)) == (3, 0)


def test_the_last_credit_of_a_worker_is_no_clips(broker: BrokerRole) -> None:
    """While it is at work on a clip, a worker of two credits gets another stream's picture, not the next clip."""
    clip = (3, 4, 8, 8)
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        runs = {name: new_run() for name in ("clip/one", "clip/two", "beside")}
        for name, run in runs.items():
            streamer.watch(name)
            publisher.open(run, name, kind="steps" if name == "beside" else "clip")
        publisher.say(frame(runs["clip/one"], 0, shape=clip))
        first = worker.job()
        publisher.say(frame(runs["clip/two"], 0, shape=clip))
        worker.no_job(0.3)
        publisher.say(frame(runs["beside"], 0))
        beside = worker.job()
        assert [item.stream for item in beside.items] == ["beside"]
        worker.done(first)
        second = worker.job()
        assert [item.stream for item in second.items] == ["clip/two"]
        worker.done(second)
        worker.done(beside)


def test_a_worker_is_told_what_moved_away_while_it_was_silent(broker: BrokerRole) -> None:
    """HELLO with encoders of runs that another worker shows: FORGET of each, of its own runs and unknown ones none."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker("one") as one:
        runs = {name: new_run() for name in ("moved", "stays")}
        for name, run in runs.items():
            streamer.watch(name)
            publisher.open(run, name)
        publisher.say(frame(runs["moved"], 0))
        one.done(one.job())
        one.hello(credits=0, draining=True)
        with broker.worker("two") as two:
            publisher.say(frame(runs["moved"], 1))
            two.done(two.job())
            one.drained()
            one.drain()
            one.heard.clear()
            two.hello(credits=0)
            one.hello(credits=2, draining=False)
            publisher.say(frame(runs["stays"], 0))
            one.done(one.job())
            one.hello(encoders=(runs["moved"], runs["stays"], new_run()))
            one.next(Forget)
            one.ask(one.said, Echo)
            told = {message.run for message in one.heard if isinstance(message, Forget)}
    assert told == {runs["moved"]}


def test_live_and_record_are_one_item_where_the_recording_is_at_the_newest(broker: BrokerRole) -> None:
    """Further behind, the newest frame is decoded apart for viewers, and the file's frames in their order for it."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker(credits=0) as worker:
        run = new_run()
        streamer.watch("both")
        publisher.open(run, "both", record="all")
        for seq in range(3):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 2)
        worker.hello(credits=2)
        behind = worker.do(4)
        assert sorted((item.seq, item.renditions) for item in behind) == [
            (0, ("record",)),
            (1, ("record",)),
            (2, ("live",)),
            (2, ("record",)),
        ]
        streamer.written(run, behind[-1].attempt, 2)
        publisher.say(frame(run, 3, kept=True))
        publisher.ack(run, 3)
        (item,) = worker.job().items
        assert (item.seq, item.renditions) == (3, ("live", "record"))


@pytest.mark.slow
def test_without_a_streamer_nothing_is_decoded(broker: BrokerRole) -> None:
    """No HELLO of it for 3 s: no jobs, what is kept is acked and waits; the next one's cursor begins a new attempt."""
    with broker.publisher() as publisher, broker.worker() as worker:
        run = new_run()
        publisher.open(run, "waits", record="all")
        with broker.streamer():
            for seq in range(2):
                publisher.say(frame(run, seq, kept=True))
            publisher.ack(run, 1)
            sent = worker.do(2)
        worker.no_job(STREAMER_GONE_S)
        publisher.say(frame(run, 2, kept=True))
        publisher.ack(run, 2)
        worker.no_job(1.0)
        with broker.streamer() as streamer:
            streamer.hello(Cursor(run=run, attempt=sent[-1].attempt, written=0, synced=0))
            again: list[JobItem] = []
            while not again or again[-1].seq < 2:
                job = worker.job()
                worker.done(job)
                again += [item for item in job.items if item.attempt > sent[-1].attempt]
            assert {item.seq for item in again} >= {1, 2}


@pytest.mark.slow
def test_a_move_does_not_wait_for_a_disk_that_stands_still(broker: BrokerRole) -> None:
    """What was decoded of a recording never reaches its file: the next worker does it again, after some seconds."""
    with broker.publisher() as publisher, broker.streamer(), broker.worker() as leaving:
        run = new_run()
        publisher.open(run, "stuck", record="all")
        for seq in range(2):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 1)
        sent = leaving.do(2)
        with broker.worker() as staying:
            broker.wait_for_workers(2)
            leaving.hello(draining=True)
            job = staying.job(RECORD_STUCK_S / 2)
            assert [(item.seq, item.attempt > sent[-1].attempt) for item in job.items] == [(0, True), (1, True)]


@pytest.mark.slow
def test_a_recording_that_stands_still_is_not_decoded_for_ever(broker: BrokerRole) -> None:
    """Nothing reaches its file: after a while one frame tries, and no other; once that is written, all follow."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        run = new_run()
        publisher.open(run, "stands", record="all")
        for seq in range(30):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 29)
        assert [item.seq for item in worker.do(30)] == list(range(30))
        job = worker.job(2 * RECORD_STUCK_S)
        worker.done(job)
        (tried,) = job.items
        assert tried.seq == 0
        worker.no_job(RECORD_STUCK_S + 2)
        streamer.written(run, tried.attempt, 0)
        assert [item.seq for item in worker.do(29)] == list(range(1, 30))


@contextlib.contextmanager
def extra_worker(daemon: Daemon, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One worker more beside a daemon's own."""
    sets = [f"broker.workers_bind={daemon.facts['workers']}", "decoder.threads=1"]
    options = [word for one in sets for word in ("--set", one)]
    with (folder / "worker.log").open("ab") as log:
        process = subprocess.Popen([*COMMAND, "worker", *options], stderr=log, env=clean_environment(folder))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_streams_go_over_three_real_workers_and_back(tmp_path: Path) -> None:
    """Workers come, and are drained by SIGTERM, under eight kept streams: each file has every frame once, in order."""
    names = [f"move/{number}" for number in range(8)]
    count = 0
    with Daemon(tmp_path) as daemon, contextlib.ExitStack() as stack:
        publishers = [
            stack.enter_context(LatentPublisher(daemon.broker, stream=name, latent_format="sd1", record="all"))
            for name in names
        ]

        def publish() -> None:
            nonlocal count
            for publisher in publishers:
                grey = 40 + 3 * (count % 60)
                publisher.publish(sd1_latents_of((grey, grey, grey)), step=count)
            count += 1

        def workers() -> list[dict[str, object]]:
            publish()
            rows: list[dict[str, object]] = daemon.json("/api/v1/workers")["workers"]
            return rows

        def all_busy(number: int) -> bool:
            rows = workers()
            return len(rows) == number and all(int(str(row["frames"])) > 0 for row in rows)

        wait_for(lambda: all_busy(1), of="the daemon's own worker")
        with extra_worker(daemon, tmp_path) as first, extra_worker(daemon, tmp_path) as second:
            wait_for(lambda: all_busy(3), 90, of="work on all three")
            for process in (first, second):
                os.kill(process.pid, signal.SIGTERM)
            wait_for(lambda: len(workers()) == 1, 60, of="one worker left")
            assert (first.wait(30), second.wait(30)) == (0, 0)
        for _ in range(5):
            publish()
        for publisher in publishers:
            assert publisher.wait_until_acked(60), publisher.error
            publisher.close()
        expected = [40 + 3 * (step % 60) for step in range(count)]
        for publisher in publishers:
            recording = daemon.recording(publisher.run)
            assert (recording["frames"], recording["gaps"]) == (count, [])
            greys = [float(np.mean(picture)) for picture in decode_file(daemon.file(recording["id"]))]
            assert greys == pytest.approx(expected, abs=1.5)
        assert "worker_gone" not in daemon.log()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_worker_that_wakes_disturbs_no_picture(tmp_path: Path) -> None:
    """Each of two real workers is stopped with jobs in hand until the other shows its stream, and wakes: every picture
    that a page gets is the one that was published, and none comes behind a later one."""
    over = threading.Event()
    seen: list[tuple[dict[str, Any], bytes]] = []
    with Daemon(tmp_path) as daemon, extra_worker(daemon, tmp_path) as extra, PageSocket(daemon) as page:
        wait_for(lambda: len(daemon.json("/api/v1/workers")["workers"]) == 2, 60, of="both workers")

        def paint() -> None:
            with LatentPublisher(daemon.broker, stream="woken", latent_format="sd1") as publisher:
                seq = 0
                while not over.wait(0.02):
                    publisher.publish(sd1_latents_of((grey_of(seq),) * 3), step=seq)
                    seq += 1

        def see(pictures: int) -> None:
            seen.extend(page.picture(60.0) for _ in range(pictures))

        painter = threading.Thread(target=paint)
        painter.start()
        try:
            page.watch({"woken": "live"})
            see(20)
            for pid in (pid_of(daemon, "worker"), extra.pid) * 2:
                with stopped(pid):
                    see(30)  # while it is the one that shows the stream they are the other's, after some seconds
                see(30)
        finally:
            over.set()
            painter.join()
    seqs = [header["seq"] for header, _ in seen]
    assert seqs == sorted(seqs)
    greys = [float(np.mean(picture)) for picture in decode_h264([payload for _, payload in seen])]
    assert greys == pytest.approx([grey_of(seq) for seq in seqs], abs=2)


def grey_of(seq: int) -> int:
    """The shade that a frame is painted in: unlike those around it."""
    return 40 + 3 * (seq % 60)
