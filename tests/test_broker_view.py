"""What people see of a run at a real broker: its film asks for nothing, a run that stands still, notes that end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from taesd_stream.messages import Degraded, DemandUpdate, RunHello
from tests.broker_role import BrokerRole, frame, new_run
from tests.daemon import wait_for


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerRole]:
    """A broker that no test harms."""
    with BrokerRole(tmp_path_factory.mktemp("broker")) as one:
        yield one


def test_a_film_asks_for_no_frame(broker: BrokerRole) -> None:
    """Films are on: a watched run's frames go into one too, but once nobody watches nothing is asked for or decoded."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        run = new_run()
        streamer.watch("film")
        publisher.open(run, "film")
        publisher.say(frame(run, 0))
        (item,) = worker.do(1)
        assert item.renditions == ("live", "film")
        streamer.watch("film", viewers=0)
        assert publisher.next(DemandUpdate, lambda one: one.level == "idle").run == run
        for seq in range(1, 4):
            publisher.say(frame(run, seq))
        wait_for(lambda: broker.row("film")["seq"] == 3, of="the frames")
        worker.no_job(1.0)


def test_what_was_worse_in_one_step_is_not_said_of_the_next(broker: BrokerRole) -> None:
    """Short of memory, or too slow, a step is shown somehow: flag and text stand beside it, and go with the next."""
    with broker.publisher() as publisher, broker.streamer() as streamer, broker.worker() as worker:
        run = new_run()
        streamer.watch("worse")
        publisher.open(run, "worse")
        publisher.say(frame(run, 0))
        worse: tuple[Degraded, ...] = (
            Degraded(run=run, code="small_pieces", text="Short of memory: decoded in small pieces."),
            Degraded(run=run, code="nano", text="Too slow here: shown by the nano decoder."),
        )
        worker.done(worker.job(), degraded=worse)
        row = wait_for(lambda: (row := broker.row("worse"))["note"] and row, of="the note")
        assert (row["note"], row["flags"]) == (worse[1].text, ["degraded"])
        publisher.say(frame(run, 1))
        worker.do(1)
        wait_for(lambda: broker.row("worse")["note"] is None, of="its end")
        assert broker.row("worse")["flags"] == []
        counts = broker.stats().stats["counts"]
        assert (counts["degraded_small_pieces"], counts["degraded_nano"]) == (1, 1)
        streamer.watch("worse", viewers=0)
        publisher.end(run, 1)


def test_a_watch_that_is_said_again_makes_no_frame_older(tmp_path: Path) -> None:
    """The streamer says each second who is watched: the frame that came first is decoded first all the same."""
    with (
        BrokerRole(tmp_path) as broker,  # its own: workers of another test would be here for some seconds
        broker.publisher() as publisher,
        broker.streamer() as streamer,
        broker.worker(credits=1) as worker,
    ):
        slow, quick, other = runs = [new_run() for _ in range(3)]
        for run, name in zip(runs, ("slow", "quick", "other"), strict=True):
            publisher.open(run, f"again/{name}")
        for name in ("slow", "other"):
            streamer.watch(f"again/{name}")
        wait_for(lambda: all(broker.row(f"again/{name}")["viewers"] for name in ("slow", "other")), of="the watches")
        publisher.say(frame(slow, 0))
        worker.do(1)  # nothing of it waits now
        publisher.say(frame(other, 0))
        at_hand = worker.job()
        streamer.watch("again/slow")
        streamer.watch("again/quick")
        wait_for(lambda: broker.row("again/quick")["viewers"] == 1, of="both watches")
        publisher.say(frame(quick, 0))
        publisher.say(frame(slow, 1))
        wait_for(lambda: broker.row("again/slow")["seq"] == 1, of="both frames")
        worker.done(at_hand)
        assert [item.run for item in worker.do(2)] == [quick, slow]


@pytest.mark.slow
def test_a_run_that_stands_still_is_stalled_until_its_next_frame(broker: BrokerRole) -> None:
    """Its sampler lives, and no step comes for much longer than steps take: `stalled`, while the run stays `live`."""
    with broker.publisher() as publisher:
        run = new_run()
        publisher.open(run, "stands")
        for seq in range(3):
            publisher.say(frame(run, seq))

        def flags(seq: int) -> list[str]:
            publisher.publisher_hello(**{run: RunHello(next_seq=seq + 1)})
            row = broker.row("stands")
            assert (row["state"], row["seq"]) == ("live", seq)
            return list(row["flags"])

        wait_for(lambda: flags(2) == ["stalled"], of="the flag")
        publisher.say(frame(run, 3))
        wait_for(lambda: broker.row("stands")["seq"] == 3, of="the frame")
        assert flags(3) == []
