"""A disk that takes nothing, at a real broker: nothing is acked that it has not, all of it is told, and it heals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from taesd_stream.latent_log import read_messages
from taesd_stream.messages import Ack, DemandUpdate, End, Record, RunHello
from tests.broker_role import BrokerRole, frame, new_run
from tests.daemon import wait_for

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
        publisher.open(run, "gives-up", record="last")
        broker.limit_files(0)
        publisher.say(frame(run, 7, kept=True, shape=LARGE))
        wait_for(lambda: "log_error" in broker.alerts(), of="the error")
        assert run in broker.stats().runs
        wait_for(lambda: run not in broker.stats().runs, of="its end")
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
