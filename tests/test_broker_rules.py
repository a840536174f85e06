"""Rules of the protocol at a real broker: lost runs, what is remembered, whose word on keeping holds."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from taesd_stream.config import load_config
from taesd_stream.frames import Kind, LatentFrame, RecordMode, StreamInfo
from taesd_stream.messages import DemandUpdate, Done, End, JobItem, Record, RunHello
from taesd_stream_workers.broker.registry import (
    ENDED_BYTES,
    ENDED_RUNS,
    LIVE_BYTES,
    MAX_PENDING,
    PENDING_RECORD_S,
    Registry,
)
from taesd_stream_workers.broker.runs import Run
from tests.broker_role import BrokerRole, StreamerPeer, frame, new_run
from tests.daemon import wait_for

HALF_SEGMENT = (4, 2112, 2048)  # 33 MiB: two fill a segment of the log


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerRole]:
    """A broker of the test's own; half a segment of the log is a large picture."""
    with BrokerRole(tmp_path, "broker.max_picture_px=1000000000") as one:
        yield one


def recorded(broker: BrokerRole, streamer: StreamerPeer, run: str, last: int) -> int:
    """Decode and write a run up to `last`, and say that its file is finished. Returns the attempt."""
    items: list[JobItem] = []
    with broker.worker() as worker:
        while not items or items[-1].seq < last:
            items += worker.do(1)
    streamer.written(run, items[-1].attempt, last)
    wait_for(lambda: broker.stats().runs[run]["ended"], of="the end of keeping")
    streamer.written(run, items[-1].attempt, last, finished=True)
    wait_for(lambda: run not in broker.stats().runs, of="the end of the recording")
    return items[-1].attempt


def test_a_lost_run_that_comes_back_goes_on_in_another_file(tmp_path: Path) -> None:
    """Its publisher silent for recording.lost_after_s, the file is finished; what comes then is kept, as a new part."""
    run = new_run()
    with (
        BrokerRole(tmp_path, "recording.lost_after_s=0.3") as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
    ):
        publisher.open(run, "lost", record="all")
        for seq in range(2):
            publisher.say(frame(run, seq, kept=True))
        publisher.ack(run, 1)
        attempt = recorded(broker, streamer, run, 1)
        publisher.publisher_hello(**{run: RunHello(next_seq=3, kept_from=2)})
        publisher.say(frame(run, 2, kept=True))
        publisher.ack(run, 2)
        row = broker.stats().runs[run]
        assert (row["kept_from"], row["last_seq"]) == (2, 2)
        assert row["attempt"] > attempt


def test_of_a_lost_run_its_newest_frame_is_the_last_one(tmp_path: Path) -> None:
    """With record "last" and no word from its publisher, what the broker holds is kept, once."""
    first, second = new_run(), new_run()
    with (
        BrokerRole(tmp_path, "recording.lost_after_s=0.1") as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
    ):
        for run in (first, second):
            publisher.open(run, f"last/{run}", record="last")
            publisher.say(frame(run, 3))
            wait_for(lambda: broker.stats().runs, of="the recording")
            assert set(broker.stats().runs) == {run}
            recorded(broker, streamer, run, 3)


def test_a_word_about_a_former_recording_ends_no_other(broker: BrokerRole) -> None:
    """A run that is recorded twice: "finished", said again of the first, frees nothing that the second still needs."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer:
        publisher.open(run, "twice", record="all")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
        streamer.say(Record(stream="twice", mode="off"))
        publisher.next(DemandUpdate, lambda demand: demand.record == "off")
        publisher.publisher_hello(**{run: RunHello(next_seq=1)})
        first = recorded(broker, streamer, run, 0)
        streamer.say(Record(stream="twice", mode="all"))
        publisher.next(DemandUpdate, lambda demand: demand.record == "all")
        publisher.say(frame(run, 1, kept=True))
        publisher.ack(run, 1)
        publisher.end(run, 1)
        streamer.written(run, first, -1, finished=True)
        assert recorded(broker, streamer, run, 1) > first


def test_poison_is_counted_where_nobody_records_it(broker: BrokerRole) -> None:
    """A frame that ended two jobs is left out of the views: counted, and said on the page."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        streamer.watch("poison")
        publisher.open(run, "poison")
        publisher.say(frame(run, 0))
        worker.failed(worker.job(), "internal")
        streamer.keyframe("poison")  # a viewer comes, and it is tried again
        worker.failed(worker.job(), "internal")
        wait_for(lambda: broker.stats().stats["counts"].get("frames_poisoned") == 1, of="the count")
        assert "left out" in broker.row("poison")["note"]


def test_a_broker_takes_as_many_connections_as_the_system_allows(tmp_path: Path) -> None:
    """Where a shell lets it open 128 files, and the system more, it takes what the system allows."""
    with BrokerRole(tmp_path) as broker:
        broker.kill()
        broker.start(prepare=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 4096)))
        assert resource.prlimit(broker.process.pid, resource.RLIMIT_NOFILE) == (4096, 4096)


def test_the_newest_ended_runs_are_remembered(broker: BrokerRole) -> None:
    """64 of them with their last frame; older ones go."""
    names = [f"ended/{number}" for number in range(ENDED_RUNS + 3)]
    with broker.publisher() as publisher:
        for name in names:
            run = new_run()
            publisher.open(run, name)
            publisher.say(frame(run, 0))
            publisher.end(run, 0)
    wait_for(lambda: len(broker.stats().streams) == ENDED_RUNS, of="the oldest to go")
    rows = broker.stats().streams
    assert [row["name"] for row in rows] == names[3:]
    assert {row["seq"] for row in rows} == {0}


def test_what_is_remembered_is_bounded_in_bytes(tmp_path: Path) -> None:
    """Of ended runs whose last frames are over 256 MiB together the oldest go."""
    registry = Registry(load_config(sets=[f"recording.folder={tmp_path}"]))
    large = frame(new_run(), 0, shape=HALF_SEGMENT)
    count = ENDED_BYTES // large.nbytes
    for number in range(count + 2):
        info = StreamInfo(stream=f"s/{number}", run=new_run(), kind="steps", latent_format="sd1")
        run = Run(info, peer=None, record="off")
        run.newest, run.heard_s = large, float(number - 100)
        registry.add(run)
    assert [run.info.stream for run in registry.forget_old()] == ["s/0", "s/1"]
    assert len(registry.by_run) == count


def test_what_a_lost_run_owes_outlives_the_bounds(tmp_path: Path) -> None:
    """record="last", no word from its publisher: with its name taken, or over the bounds, its newest frame stays; what
    was kept, is empty, or is of a run that keeps nothing goes."""
    registry = Registry(load_config(sets=[f"recording.folder={tmp_path}"]))

    def lost(stream: str, *, record: RecordMode = "last", newest: LatentFrame | None = None, recorded: int = -1) -> Run:
        run = Run(StreamInfo(stream=stream, run=new_run(), kind="steps", latent_format="sd1"), peer=None, record=record)
        run.newest, run.recorded_until = newest, recorded
        registry.add(run)
        return run

    last = frame(new_run(), 3)
    replaced, over = lost("replaced", newest=last), lost("over", newest=last)
    gone = [lost("off", record="off", newest=last), lost("empty"), lost("is kept", newest=last, recorded=3)]
    for number in range(ENDED_RUNS):
        lost(f"s/{number}" if number else "replaced").heard_s = 0.0  # later than the others, and so before them
    assert registry.forget_old() == gone
    assert registry.by_run[replaced.info.run].newest is last
    assert registry.by_name["over"] is over


def test_what_may_wait_is_shared_by_the_live_runs_that_live(tmp_path: Path) -> None:
    """Each `live` run that comes makes the others' share smaller at once; one that ended gives its share back."""
    registry = Registry(load_config(sets=[f"recording.folder={tmp_path}"]))
    for number in range(4):
        info = StreamInfo(stream=f"v/{number}", run=new_run(), kind="live", latent_format="taehv", fps=16.0)
        registry.add(Run(info, peer=b"publisher", record="off"))
        assert registry.live_share_bytes == LIVE_BYTES // (number + 1)
    registry.by_name["v/0"].end = End(run=registry.by_name["v/0"].info.run, last_seq=0, reason="done")
    registry.give_turns()
    assert registry.live_share_bytes == LIVE_BYTES // 3


@pytest.mark.slow
def test_a_lost_run_whose_name_was_taken_leaves_its_newest_frame(tmp_path: Path) -> None:
    """record="last": its sampler died and was started again at once; after `lost_after_s` the first one's is kept."""
    first, second = new_run(), new_run()
    with BrokerRole(tmp_path, "recording.lost_after_s=11.5") as broker:
        with broker.publisher() as publisher:
            publisher.open(first, "again", record="last")
            publisher.say(frame(first, 3))
            wait_for(lambda: broker.row("again")["seq"] == 3, of="the frame")
        with broker.publisher() as publisher:
            publisher.open(second, "again", record="last")
            wait_for(lambda: first in broker.stats().runs, of="the recording", timeout_s=20)
            wait_for(lambda: broker.stats().runs[first]["last_seq"] == 3, of="the frame in the log")


def test_a_persons_word_waits_for_an_hour(tmp_path: Path) -> None:
    """A name's next run is recorded if it comes within the hour; a later one has no such wish any more."""
    now_s = 100.0
    registry = Registry(load_config(sets=[f"recording.folder={tmp_path}"]), lambda: now_s)
    opened = StreamInfo(stream="later", run=new_run(), kind="steps", latent_format="sd1")
    registry.ask_record("later", "all")
    now_s += PENDING_RECORD_S - 1
    registry.forget_old()
    assert registry.record_mode(opened) == "all"
    registry.ask_record("later", "all")
    now_s += PENDING_RECORD_S
    assert registry.record_mode(opened) == "off"


def test_names_that_wait_for_a_run_are_bounded(tmp_path: Path) -> None:
    """Of more RECORDs for names that nobody has than MAX_PENDING the oldest are forgotten."""
    registry = Registry(load_config(sets=[f"recording.folder={tmp_path}"]))
    for number in range(MAX_PENDING + 1):
        registry.ask_record(f"s/{number}", "all")
    modes = [
        registry.record_mode(StreamInfo(stream=f"s/{number}", run=new_run(), kind="steps", latent_format="sd1"))
        for number in range(2)
    ]
    assert modes == ["off", "all"]


def test_a_persons_word_waits_for_the_run_and_beats_all_others(tmp_path: Path) -> None:
    """RECORD of a name that nobody has holds for its next run, whatever that says itself, and whatever a rule says."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rules]]\nstream = "later/*"\nrecord = "off"\n')
    with (
        BrokerRole(tmp_path, config=rules) as broker,
        broker.publisher() as publisher,
        broker.streamer() as streamer,
    ):
        streamer.say(Record(stream="later/one", mode="all"))
        streamer.say_hello()
        streamer.drain()
        assert publisher.open(new_run(), "later/one", record="off").record == "all"
        assert publisher.open(new_run(), "later/two", record="all").record == "off"  # the rule's word


@pytest.mark.parametrize(("shown", "kept_from"), [(4, 4), (3, 5)])
def test_the_step_that_is_shown_is_recorded_too(broker: BrokerRole, shown: int, kept_from: int) -> None:
    """The newest frame is put in front of a recording that begins with the one behind it; never across a hole."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer:
        publisher.open(run, "front")
        publisher.say(frame(run, shown))
        wait_for(lambda: broker.row("front")["seq"] == shown, of="the frame that is shown")
        streamer.say(Record(stream="front", mode="all"))
        publisher.next(DemandUpdate, lambda demand: demand.record == "all")
        publisher.say(frame(run, 5, kept=True))
        publisher.ack(run, 5)
        assert broker.stats().runs[run]["kept_from"] == kept_from


def test_a_stream_that_does_not_say_follows_the_default(tmp_path: Path) -> None:
    """OPEN without `record`: recording.default is what is kept; one that says so beats it."""
    with BrokerRole(tmp_path, "recording.default=all") as broker, broker.publisher() as publisher:
        run = new_run()
        publisher.say(StreamInfo(stream="default", run=run, kind="steps", latent_format="sd1"))
        assert publisher.next(DemandUpdate).record == "all"
        assert publisher.open(new_run(), "says", record="off").record == "off"


@pytest.mark.parametrize(("kind", "stays"), [("steps", 1), ("live", 2)])
def test_the_log_is_freed_behind_what_is_safe_in_the_file(broker: BrokerRole, kind: Kind, stays: int) -> None:
    """Whole segments go behind `synced`, not behind `written`; of `live` those stay that the next latents need."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer:
        publisher.open(run, "freed", kind=kind, record="all")
        for seq in range(3):
            publisher.say(frame(run, seq, kept=True, shape=HALF_SEGMENT))
        publisher.ack(run, 2)
        attempt = broker.stats().runs[run]["attempt"]

        def segments(written: int, synced: int) -> int:
            streamer.written(run, attempt, written, synced=synced)
            wait_for(lambda: broker.row("freed")["behind"] == 2 - written, of="the cursor")
            return len([*broker.log_folder.glob("*.latents")])

        assert segments(written=1, synced=0) == 2
        assert segments(written=2, synced=2) == stays


def test_frames_of_a_format_that_no_worker_has_wait_for_one_that_has(broker: BrokerRole) -> None:
    """They stay in the log, the page says why, each worker is asked once; the next that comes may have the decoder."""
    run = new_run()
    with (
        broker.publisher() as publisher,
        broker.streamer(),
        broker.worker("one") as one,
        broker.worker("two") as two,
    ):
        broker.wait_for_workers(2)
        publisher.open(run, "unknown", record="all", latent_format="my-own")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
        for worker in (one, two):
            worker.failed(worker.job(), "no_decoder", retry=False)
        row = wait_for(lambda: (row := broker.row("unknown"))["note"] and row, of="the note")
        assert "no_decoder" in row["note"]
        one.no_job(0.1)
        two.no_job(0.1)
        assert broker.stats().runs[run]["last_seq"] == 0
        with broker.worker("able") as able:
            assert [item.seq for item in able.do(1)] == [0]


def test_the_number_of_workers_that_are_needed_follows_the_load(broker: BrokerRole) -> None:
    """Frames that each take a worker longer than the next one takes to come ask for more than one."""
    run = new_run()
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        assert broker.stats().desired_workers == 1
        streamer.watch("load")
        publisher.open(run, "load")
        for seq in range(5):
            publisher.say(frame(run, seq))
            worker.say(Done(job=worker.job().job, ms=5000.0))
        assert wait_for(lambda: (found := broker.stats().desired_workers) > 1 and found, of="more workers")
