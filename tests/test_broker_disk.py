"""A disk that takes nothing, at a real broker: nothing is acked that it has not, all of it is told, and it heals."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from taesd_stream.frames import StreamInfo
from taesd_stream.latent_log import read_messages
from taesd_stream.messages import Ack, DemandUpdate, End, Record, RunHello
from taesd_stream_workers.broker.registry import ENDED_AT_ONCE, ENDED_RUNS, MAX_META_BYTES
from tests.broker_role import SHAPE, BrokerRole, Peer, frame, new_run
from tests.daemon import wait_for

pytestmark = pytest.mark.faults

LARGE = (4, 64, 64)  # 32 KiB: more than the broker's own log, which shares the limit of its files
ROOM = 1 << 30


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerRole]:
    """A broker that the test may harm."""
    with BrokerRole(tmp_path) as one:
        yield one


def test_a_recording_that_begins_on_a_full_disk_waits_for_room(broker: BrokerRole) -> None:
    """Record pressed then: the step that was shown, which only the broker has, and the next are kept later."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        publisher.open(run, "begins")
        for seq in range(3):
            publisher.say(frame(run, seq, shape=LARGE))
        wait_for(lambda: broker.row("begins")["seq"] == 2, of="the frames that nobody keeps")
        streamer.say(Record(stream="begins", mode="all"))
        publisher.next(DemandUpdate, lambda demand: demand.record == "all")
        broker.limit_files(0)
        publisher.say(frame(run, 3, kept=True, shape=LARGE))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        publisher.publisher_hello(**{run: RunHello(next_seq=4, kept_from=3)})
        assert publisher.next(Ack).seq == 1
        broker.limit_files(ROOM)
        publisher.say(frame(run, 3, kept=True, shape=LARGE))
        publisher.ack(run, 3)
        assert broker.stats().runs[run]["kept_from"] == 2
        publisher.end(run, 3)
        items = worker.do(2)
        assert [item.seq for item in items] == [2, 3]
        streamer.written(run, items[-1].attempt, 3, finished=True)
        wait_for(lambda: run not in broker.stats().runs, of="the end of the recording")
        wait_for(lambda: "log_error" not in broker.alerts(), of="the all-clear")


def test_a_recording_that_never_got_a_frame_is_forgotten(tmp_path: Path) -> None:
    """A sampler that gave up on a full disk leaves no recording that waits for ever, and no warning of that disk."""
    run = new_run()
    with BrokerRole(tmp_path, "recording.lost_after_s=0.5") as broker, broker.publisher() as publisher:
        publisher.open(run, "gives-up", record="all")
        broker.limit_files(0)
        publisher.say(frame(run, 7, kept=True, shape=LARGE))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        assert run in broker.stats().runs
        wait_for(lambda: run not in broker.stats().runs, of="its end")
        wait_for(lambda: "log_error" not in broker.alerts(), of="the all-clear")


def test_the_last_frame_of_a_lost_run_waits_for_room(tmp_path: Path) -> None:
    """record="last", lost on a full disk: the warning stays, the frame is tried again, and with room it is recorded."""
    run = new_run()
    sets = ("recording.lost_after_s=0.1", "broker.log_max_age_s=3600")
    with BrokerRole(tmp_path, *sets) as broker, broker.publisher() as publisher:
        publisher.open(run, "lost", record="last")
        broker.limit_files(0)
        publisher.say(frame(run, 7, shape=LARGE))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        tries = broker.stats().stats["counts"]["log_errors"]
        while (told := broker.stats()).stats["counts"]["log_errors"] < tries + 2:
            assert "log_error" in told.stats["alerts"]
            assert run in told.runs
        assert broker.log().count("ERROR") == 1
        broker.limit_files(ROOM)
        wait_for(lambda: broker.stats().runs[run]["last_seq"] == 7, of="the frame")
        wait_for(lambda: "log_error" not in broker.alerts(), of="the all-clear")


def test_an_end_that_the_disk_did_not_take_is_not_acked(broker: BrokerRole) -> None:
    """It is said and counted, tried again until it is in the log, and acked then."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "ends", record="all")
        publisher.say(frame(run, 0, kept=True, shape=LARGE))
        publisher.ack(run, 0)
        (path,) = broker.log_folder.glob("*.latents")
        broker.limit_files(path.stat().st_size)
        publisher.say(End(run=run, last_seq=0, reason="done"))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        publisher.drain()
        assert not any(isinstance(one, Ack) and one.ended for one in publisher.heard)
        assert broker.stats().stats["counts"]["log_errors"] >= 1
        broker.limit_files(ROOM)
        publisher.next(Ack, lambda ack: ack.ended)
    assert isinstance([*read_messages(path)][-1], End)


def test_the_warning_stays_while_one_run_waits(broker: BrokerRole) -> None:
    """Frames that fit into what is left of a disk do not say that it has room for all."""
    large, small = new_run(), new_run()
    with broker.publisher() as publisher:
        publisher.open(large, "large", record="all")
        publisher.open(small, "small", record="all")
        broker.limit_files(0)
        publisher.say(frame(large, 0, kept=True, shape=LARGE))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        for seq in range(3):
            publisher.say(frame(small, seq, kept=True))
            publisher.ack(small, seq)
            assert "log_error" in broker.alerts()
        broker.limit_files(ROOM)
        publisher.say(frame(large, 0, kept=True, shape=LARGE))
        publisher.ack(large, 0)
        wait_for(lambda: "log_error" not in broker.alerts(), of="the all-clear")


@contextmanager
def no_log_folder(broker: BrokerRole) -> Iterator[None]:
    """A file stands where the log's folder was, for a while."""
    away = broker.log_folder.rename(broker.folder / "away")
    broker.log_folder.write_text("no folder")
    yield
    broker.log_folder.unlink()
    away.rename(broker.log_folder)


def test_a_log_folder_that_is_none_ends_no_broker(broker: BrokerRole) -> None:
    """Nothing is acked then, and it is said; what is finished is forgotten; with the folder it goes on."""
    done, old, new = (new_run() for _ in range(3))
    with broker.publisher() as publisher, broker.streamer() as streamer:
        for run in (done, old):
            publisher.open(run, f"s/{run}", record="all")
            publisher.say(frame(run, 0, kept=True))
            publisher.ack(run, 0)
        publisher.end(done, 0)
        publisher.open(new, f"s/{new}", record="all")
        with no_log_folder(broker):
            publisher.say(frame(old, 1, kept=True))
            publisher.say(frame(new, 0, kept=True))
            wait_for(lambda: broker.stats().stats["counts"].get("log_errors", 0) >= 2, of="both errors")
            assert "cannot be written" in broker.alerts()["log_error"]
            streamer.written(done, 99, 0, finished=True)
            wait_for(lambda: done not in broker.stats().runs, of="the end of the one that is done")
            wait_for(lambda: "log_segment_stays" in broker.log(), of="the word of its file")
            publisher.drain()
            acks = {(one.run, one.seq) for one in publisher.heard if isinstance(one, Ack)}
            assert not acks & {(old, 1), (new, 0)}
        for run, seq in ((old, 1), (new, 0)):
            publisher.say(frame(run, seq, kept=True))
            publisher.ack(run, seq)
        wait_for(lambda: "log_error" not in broker.alerts(), of="the all-clear")


def test_a_log_that_cannot_be_read_is_waited_for(broker: BrokerRole) -> None:
    """Its frames are not left out: it is said, and with the folder back they are decoded."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer(), broker.worker(credits=0) as worker:
        publisher.open(run, "unread", record="all")
        for seq in range(2):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 1)
        with no_log_folder(broker):
            worker.hello(credits=2)
            wait_for(lambda: "log_unreadable" in broker.alerts(), of="the warning")
        assert [item.seq for item in worker.do(2)] == [0, 1]
        wait_for(lambda: "log_unreadable" not in broker.alerts(), of="the all-clear")
        assert "gaps" not in broker.stats().stats["counts"]


def test_a_log_folder_that_somebody_removed_is_made_again(broker: BrokerRole) -> None:
    """What comes then is kept, by runs that were kept before too."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "made-again", record="all")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
        broker.log_folder.rename(broker.folder / "away")
        publisher.say(frame(run, 1, kept=True))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        publisher.say(frame(run, 1, kept=True))
        publisher.ack(run, 1)
        assert [path.name for path in broker.log_folder.iterdir()] == [f"{run}.0001.latents"]


FEW_FILES = (64, 64)


def waiting_runs(
    publisher: Peer, number: int, *, count: int = 1, shape: tuple[int, ...] = SHAPE, **meta: str
) -> list[str]:
    """Runs of `count` frames that have ended, and whose recordings wait."""
    runs = [new_run() for _ in range(number)]
    for run in runs:
        info = StreamInfo(stream=f"waits/{run}", run=run, kind="steps", latent_format="sd1", record="all", meta=meta)
        frames = (frame(run, seq, kept=True, shape=shape) for seq in range(count))
        for message in (info, *frames, End(run=run, last_seq=count - 1, reason="done")):
            publisher.say(message)
    publisher.next(Ack, lambda ack: ack.run == runs[-1] and ack.ended)
    return runs


def test_runs_that_wait_hold_neither_files_nor_memory(tmp_path: Path) -> None:
    """Of 150 ended runs without a streamer, in a broker that may open 64 files, the newest 64 have a frame in memory:
    new streams are taken, and a next broker knows all of them, as cheaply."""
    with BrokerRole(tmp_path) as broker:
        resource.prlimit(broker.process.pid, resource.RLIMIT_NOFILE, FEW_FILES)
        with broker.publisher() as publisher:
            runs = waiting_runs(publisher, 150)
        wait_for(lambda: in_memory(broker) == ENDED_RUNS, of="the others to be let go")
        broker.kill()
        broker.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, FEW_FILES))
        with broker.publisher() as publisher:
            publisher.open(new_run(), "new")
        assert (set(broker.stats().runs), in_memory(broker)) == (set(runs), ENDED_RUNS)


def in_memory(broker: BrokerRole) -> int:
    """Of how many ended streams a frame is held."""
    return sum(row["seq"] is not None for row in broker.stats().streams if row["state"] == "done")


def test_what_waiting_runs_say_of_themselves_refuses_nobody(tmp_path: Path) -> None:
    """Where it is more than STATE may tell it is told of those that are being recorded, and new streams are taken."""
    text = "x" * 16_000
    count = MAX_META_BYTES // len(text) + 2
    with BrokerRole(tmp_path, "broker.max_client_streams=1000") as broker, broker.publisher() as publisher:
        runs = waiting_runs(publisher, count, prompt=text)
        info = StreamInfo(stream="new", run=new_run(), kind="steps", latent_format="sd1", meta={"prompt": text})
        publisher.say(info)
        publisher.next(DemandUpdate, lambda one: one.run == info.run)
        told = broker.stats()
        assert broker.row("new")["meta"] == {"prompt": text}
        assert [told.runs[run]["meta"] for run in runs] == [None] * count
        with broker.streamer(), broker.worker(credits=1) as worker:
            (first, *_) = worker.job().items
            assert broker.stats().runs[first.run]["meta"] == {"prompt": text}


def test_not_all_that_waits_is_read_at_once(tmp_path: Path) -> None:
    """Of twenty ended runs, of which two frames each are over recording.window_bytes, eight are begun, and all done."""
    shape = (4, 192, 192)  # 288 KiB
    sets = (f"recording.window_bytes={1 << 20}", "decoder.max_batch_size=64")
    with BrokerRole(tmp_path, *sets) as broker, broker.publisher() as publisher, broker.streamer() as streamer:
        runs = waiting_runs(publisher, 20, count=2, shape=shape)
        with broker.worker(credits=1) as worker:
            seen: list[str] = []
            while len(seen) < 40:
                job = worker.job()
                assert len({item.run for item in job.items}) <= ENDED_AT_ONCE + 3  # that the window holds
                worker.done(job)
                for item in job.items:
                    seen.append(item.run)
                    streamer.written(item.run, item.attempt, item.seq, finished=item.seq == 1)
    assert sorted(seen) == sorted([*runs, *runs])
