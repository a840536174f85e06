"""The latent log at a real broker: a full disk, damage, age, and what a restarted broker believes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taesd_stream.config import load_config
from taesd_stream.frames import StreamInfo
from taesd_stream.latent_log import RunLog, read_messages
from taesd_stream.messages import Ack, DemandUpdate, End, Forget, Gap, Job, JobItem, Record, Refused, RunHello
from taesd_stream_workers.broker import keeping
from taesd_stream_workers.broker.dispatcher import LOOK_S
from taesd_stream_workers.broker.keeping import Keeping
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.log_writer import LogWriter
from taesd_stream_workers.broker.registry import ENDED_RUNS, Registry
from taesd_stream_workers.broker.runs import Run
from tests.broker_role import BrokerRole, StreamerPeer, WorkerPeer, frame, new_run
from tests.daemon import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerRole]:
    """A broker that the test may harm."""
    with BrokerRole(tmp_path) as one:
        yield one


def test_a_full_disk_acks_nothing_and_goes_on_when_there_is_room(broker: BrokerRole) -> None:
    """What the disk does not take is not acked, and said; sent again when there is room it is, and nothing is lost."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "full", record="all")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
        (path,) = broker.log_folder.glob("*.latents")
        whole = path.stat().st_size
        broker.limit_files(whole + 100)
        seq = 1
        while "log_error" not in broker.alerts():
            publisher.say(frame(run, seq, kept=True))
            publisher.receive(0.05)
            seq = publisher.acked() + 1
        assert "cannot be written" in broker.alerts()["log_error"]
        last = publisher.acked()
        assert broker.stats().stats["counts"]["log_errors"] >= 1
        broker.limit_files(1 << 30)
        publisher.say(frame(run, last + 1, kept=True))
        publisher.ack(run, last + 1)
        wait_for(lambda: "log_error" not in broker.alerts(), of="the all-clear")
    broker.kill()
    broker.start()
    assert broker.stats().runs[run]["last_seq"] == last + 1


def test_an_end_is_acked_when_the_log_has_it(broker: BrokerRole) -> None:
    """Whoever dies after that ACK, the next start knows that the run has ended, and does not wait for its publisher."""
    with broker.publisher() as publisher:
        for number in range(50):
            run = new_run()
            publisher.open(run, f"ended/{number}", record="all")
            publisher.say(frame(run, 0, kept=True))
            publisher.ack(run, 0)
            publisher.end(run, 0)
            (path,) = broker.log_folder.glob(f"{run}*.latents")
            *_, last = read_messages(path)
            assert isinstance(last, End)


class HeldFile:
    """`with`: nobody else can open the file until it is let go, as on a disk that takes its time. A lease: fcntl(2)."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b")

    def __enter__(self) -> HeldFile:
        fcntl.fcntl(self._file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    @property
    def is_asked_for(self) -> bool:
        """Whether somebody waits in open()."""
        return fcntl.fcntl(self._file, fcntl.F_GETLEASE) != fcntl.F_WRLCK

    def let_go(self) -> None:
        """Whoever waits has it."""
        self._file.close()


@pytest.fixture
def no_sigio() -> Iterator[None]:
    """Who is asked for a lease is told by a signal, which would end the process."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGIO, before)


@pytest.mark.usefixtures("no_sigio")
def test_logs_that_are_slow_to_read_hold_up_no_ack(broker: BrokerRole) -> None:
    """Where logs come slowly off the disk, one is read a turn: between two of them other runs' frames are acked."""
    cold, other = [new_run(), new_run()], new_run()
    with broker.publisher() as publisher:
        for number, run in enumerate(cold):
            publisher.open(run, f"cold/{number}", record="all")
            publisher.say(frame(run, 0, kept=True))
            publisher.ack(run, 0)
    broker.kill()  # the next one has none of them to sync
    broker.start()
    paths = [path for run in cold for path in broker.log_folder.glob(f"{run}.*")]
    with contextlib.ExitStack() as stack, broker.publisher() as publisher, broker.streamer():
        publisher.open(other, "acked", record="all")
        held = [stack.enter_context(HeldFile(path)) for path in paths]
        worker = stack.enter_context(broker.worker(credits=1))
        (first,) = wait_for(lambda: [one for one in held if one.is_asked_for], of="the broker at one of the logs")
        publisher.say(frame(other, 0, kept=True))
        time.sleep(2 * LOOK_S)  # so slow is the disk
        first.let_go()
        publisher.ack(other, 0)
        job = worker.job()
        (second,) = (one for one in held if one is not first)
        assert not second.is_asked_for
        second.let_go()
        worker.done(job)
        items = [*job.items, *worker.do(2)]
        assert {item.run for item in items} == {*cold, other}


def take(worker: WorkerPeer, streamer: StreamerPeer, run: str, items: list[JobItem], last: int) -> None:
    """Do jobs of a run until the file has `last`; the streamer tells each."""
    while not items or items[-1].seq < last:
        job = worker.job()
        worker.done(job)
        items += job.items
        streamer.written(run, items[-1].attempt, items[-1].seq)


def test_a_damaged_record_costs_itself_alone(broker: BrokerRole) -> None:
    """Of a log with one wrong byte in the middle the streamer is told one GAP; all other frames are decoded."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "damaged", record="all")
        for seq in range(6):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 5)
        publisher.end(run, 5)
    broker.kill()
    (path,) = broker.log_folder.glob("*.latents")
    data = bytearray(path.read_bytes())
    data[-3 * (len(data) // 7)] ^= 0xFF
    path.write_bytes(data)
    broker.start()
    with broker.streamer() as streamer, broker.worker() as worker:
        items: list[JobItem] = []
        job = worker.job()
        worker.done(job)
        items += job.items
        streamer.written(run, items[-1].attempt, items[-1].seq)
        gap = streamer.next(Gap)
        assert gap.seq == items[-1].seq + 1
        streamer.written(run, gap.attempt, gap.seq)
        take(worker, streamer, run, items, 5)
    assert sorted({item.seq for item in items} | {gap.seq}) == list(range(6))
    assert broker.stats().stats["counts"]["gaps"] == 1
    assert "log_damaged" in broker.log() or "frame_not_recorded" in broker.log()


def test_a_log_whose_format_has_changed_since_is_known_again(broker: BrokerRole) -> None:
    """Frames of a waiting log that their format does not allow end no broker: their run has no size to tell."""
    run = new_run()
    log = RunLog(broker.log_folder, StreamInfo(stream="other", run=run, kind="steps", latent_format="sd1"))
    log.append(frame(run, 0, kept=True, shape=(16, 8, 8)))
    log.sync()
    broker.stop()
    broker.start()
    assert (broker.row("other")["width"], broker.row("other")["step"]) == (None, 0)


def test_of_many_runs_that_wait_the_newest_are_shown(broker: BrokerRole) -> None:
    """STATE has a row for the recording of each, for it must not outgrow its limit a stream's for the newest alone."""
    infos = [
        StreamInfo(stream=f"waits/{n}", run=new_run(), kind="steps", latent_format="unheard of") for n in range(70)
    ]
    for info in infos:
        log = RunLog(broker.log_folder, info)
        log.append(frame(info.run, 0, kept=True))
        log.end(End(run=info.run, last_seq=0, reason="done"))
        log.sync()
    broker.stop()
    broker.start()
    wait_for(lambda: len(broker.stats().streams) == ENDED_RUNS, of="the newest alone")
    assert set(broker.stats().runs) == {info.run for info in infos}


def test_of_too_many_runs_that_wait_no_other_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that begins nor a lost one's last frame; people are told, and it goes on where there is room."""
    monkeypatch.setattr(keeping, "MAX_KEPT", 1)
    config = load_config(sets=[f"recording.folder={tmp_path}", "broker.log_max_bytes=1000000"])
    links = Links()
    registry = Registry(config)
    runs = [
        Run(StreamInfo(stream=str(n), run=new_run(), kind="steps", latent_format="sd1"), peer=None, record="all")
        for n in range(3)
    ]
    first, second, lost = runs
    for run in runs:
        registry.add(run)
    keeper = Keeping(config, registry, LogWriter(lambda: None), links)
    first.heard_s = second.heard_s = time.monotonic()
    keeper.keep(first, frame(first.info.run, 0, kept=True))
    keeper.keep(second, frame(second.info.run, 0, kept=True))
    assert (first.kept is None, second.kept is None, list(links.alerts)) == (False, True, ["too_many_runs"])
    lost.record, lost.newest = "last", frame(lost.info.run, 0)
    keeper.tick()
    assert (lost.kept, lost.owed_frame) == (None, None)
    first.finish_keeping()
    keeper.tick()
    assert not links.alerts
    keeper.keep(second, frame(second.info.run, 0, kept=True))
    assert second.kept is not None


def test_a_restarted_broker_asks_for_the_last_word_on_keeping(broker: BrokerRole) -> None:
    """A run that it knows from its log is asked to open again, and its word then, not the log's, is what is kept."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "word", record="all")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
    broker.kill()
    broker.start()
    assert broker.row("word")["record"] == "all"
    with broker.publisher() as publisher:
        publisher.publisher_hello(**{run: RunHello(next_seq=5)})
        assert publisher.next(Refused).code == "unknown_run"
        assert publisher.open(run, "word", record="off").record == "off"
        publisher.publisher_hello(**{run: RunHello(next_seq=5)})
        assert publisher.ack(run, 0).seq == 0
        assert publisher.next(DemandUpdate).record == "off"
        wait_for(lambda: broker.stats().runs[run]["ended"], of="the end of keeping")


def test_a_log_that_is_full_acks_nothing_until_there_is_room(tmp_path: Path) -> None:
    """Over broker.log_max_bytes a kept frame gets no ACK, and everybody is told; when a recording is done it does."""
    with (
        BrokerRole(tmp_path, "broker.log_max_bytes=1500") as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker() as worker,
    ):
        runs = [new_run(), new_run()]
        publisher.open(runs[0], "full/first", record="all")
        seq = 0
        while "log_full" not in broker.alerts():
            publisher.say(frame(runs[0], seq, kept=True))
            publisher.receive(0.05)
            seq = publisher.acked() + 1
        last = publisher.acked()
        publisher.open(runs[1], "full/second", record="all")
        publisher.say(frame(runs[1], 0, kept=True))
        publisher.publisher_hello(**{runs[1]: RunHello(next_seq=1, kept_from=0)})
        assert publisher.next(Ack, lambda ack: ack.run == runs[1]).seq == -1
        publisher.end(runs[0], last)
        items: list[JobItem] = []
        take(worker, streamer, runs[0], items, last)
        streamer.written(runs[0], items[-1].attempt, last, finished=True)
        wait_for(lambda: "log_full" not in broker.alerts(), of="room in the log")
        publisher.say(frame(runs[1], 0, kept=True))
        publisher.ack(runs[1], 0)


def test_no_more_is_sent_ahead_of_the_files_than_the_window(tmp_path: Path) -> None:
    """Of eight frames that are due those go that recording.window_bytes holds; a cursor lets as many more go."""
    shape = (4, 192, 192)  # 288 KiB: three fit
    with (
        BrokerRole(tmp_path, f"recording.window_bytes={1 << 20}") as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
    ):
        run = new_run()
        publisher.open(run, "window", record="all")
        for seq in range(8):
            publisher.say(frame(run, seq, kept=True, shape=shape))
        publisher.ack(run, 7)
        with broker.worker(credits=8) as worker:
            items: list[JobItem] = []
            for behind, written in ((2, 1), (4, 4), (7, 7)):
                while not items or items[-1].seq < behind:
                    job = worker.job()
                    worker.done(job)
                    items += job.items
                worker.no_job(0.2)
                assert items[-1].seq == behind
                streamer.written(run, items[-1].attempt, written)
    assert [item.seq for item in items] == list(range(8))


def test_what_is_given_up_or_finished_leaves_the_window(tmp_path: Path) -> None:
    """Three frames fill recording.window_bytes: as many go again after a failure, and of the next run."""
    shape = (4, 192, 192)  # 288 KiB
    with (
        BrokerRole(tmp_path, f"recording.window_bytes={1 << 20}") as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker(credits=8) as worker,
    ):

        def given() -> list[Job]:
            jobs = [worker.job()]
            while sum(len(job.items) for job in jobs) < 3:
                jobs.append(worker.job())
            return jobs

        for number in range(2):
            run = new_run()
            publisher.open(run, f"window/{number}", record="all")
            for seq in range(3):
                publisher.say(frame(run, seq, kept=True, shape=shape))
            publisher.end(run, 2)
            for job in given():
                worker.failed(job, "no_memory")
            again = given()
            for job in again:
                worker.done(job)
            streamer.written(run, again[-1].items[-1].attempt, 2, finished=True)
            wait_for(lambda: not broker.stats().runs, of="the end of the recording")


def test_what_comes_again_behind_its_recording_makes_no_second_one(broker: BrokerRole) -> None:
    """A publisher that never heard its ACKs sends again what is in a finished file: it is acked, and not kept twice."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        publisher.open(run, "again", record="all")
        for seq in range(3):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 2)
        items: list[JobItem] = []
        take(worker, streamer, run, items, 2)
        streamer.say(Record(stream="again", mode="off"))
        publisher.next(DemandUpdate, lambda demand: demand.record == "off")
        publisher.publisher_hello(**{run: RunHello(next_seq=3)})
        publisher.ack(run, 2)
        streamer.written(run, items[-1].attempt, 2, finished=True)
        wait_for(lambda: run not in broker.stats().runs, of="the end of the recording")
        publisher.publisher_hello(**{run: RunHello(next_seq=3, kept_from=1)})
        assert publisher.next(Ack).seq == 2
        publisher.say(frame(run, 1, kept=True))
        publisher.say(frame(run, 2, kept=True))
        publisher.publisher_hello(**{run: RunHello(next_seq=3, kept_from=1)})
        assert publisher.next(Ack).seq == 2
        assert run not in broker.stats().runs


def test_what_nobody_recorded_goes_only_where_an_age_is_set(tmp_path: Path) -> None:
    """Latents of an ended run stay; with broker.log_max_age_s they go once they are older, counted and logged."""
    run = new_run()
    with BrokerRole(tmp_path) as broker:
        with broker.publisher() as publisher:
            publisher.open(run, "old", record="all")
            publisher.say(frame(run, 0, kept=True))
            publisher.ack(run, 0)
            publisher.end(run, 0)
        broker.stop()
        (path,) = broker.log_folder.glob("*.latents")
        os.utime(path, (1, 1))
        broker.start()
        assert run in broker.stats().runs
    with BrokerRole(tmp_path, "broker.log_max_age_s=3600") as broker:
        wait_for(lambda: run not in broker.stats().runs, of="its end")
        wait_for(lambda: not path.exists(), of="the file's end")
        assert broker.stats().stats["counts"]["logs_expired"] == 1
        assert "log_given_up stream=old" in broker.log()


def test_what_waits_of_an_ended_run_is_given_up_by_a_persons_wish(broker: BrokerRole) -> None:
    """FORGET from inside drops the log of a run that is over, not of one that goes on; `blocked` says why it waits."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        publisher.open(run, "blocked", record="all", latent_format="unheard of")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
        worker.failed(worker.job(), "no_decoder", retry=False)
        wait_for(lambda: broker.stats().runs[run]["blocked"] == "no_decoder (test)", of="the word of it")
        streamer.say(Forget(run=run))
        streamer.settle()
        assert run in broker.stats().runs
        publisher.end(run, 0)
        streamer.say(Forget(run=run))
        wait_for(lambda: not broker.stats().runs and not [*broker.log_folder.glob("*.latents")], of="the log's end")
    assert "log_given_up stream=blocked" in broker.log()


def test_latents_of_a_format_that_nobody_knows_are_checked_as_far_as_can_be(broker: BrokerRole) -> None:
    """Of a user's own format the broker knows no channels, but a picture with five axes is none."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "own", latent_format="my-own")
        publisher.say(frame(run, 0, shape=(1, 2, 4, 8, 8)))
        assert "3 or 4 axes" in publisher.refused().text
        publisher.say(frame(run, 1, shape=(7, 8, 8)))
        wait_for(lambda: broker.row("own")["seq"] == 1, of="the right one")
