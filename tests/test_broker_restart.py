"""A broker that is killed and comes back: what names mean then, and whose word on keeping holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from taesd_stream.messages import DemandUpdate, Record, RunHello
from tests.broker_role import BrokerRole, frame, new_run
from tests.daemon import wait_for


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerRole]:
    """A broker that the test may harm."""
    with BrokerRole(tmp_path) as one:
        yield one


@pytest.mark.parametrize(("old", "new"), [("f" * 16, "0" * 16), ("0" * 16, "f" * 16)])
def test_a_name_means_its_newest_run_also_after_a_restart(broker: BrokerRole, old: str, new: str) -> None:
    """An ended run whose recording waits is not what its name means, whatever the ids: viewers see the living one."""
    with broker.publisher() as publisher:
        for run in (old, new):
            publisher.open(run, "again", record="all")
            publisher.say(frame(run, 0, kept=True))
            publisher.ack(run, 0)
            if run == old:
                publisher.end(run, 0)
    broker.kill()
    broker.start()
    assert broker.row("again")["run"] == new
    with broker.publisher() as publisher, broker.streamer() as streamer:
        publisher.open(new, "again", record="off")
        streamer.watch("again")
        assert publisher.next(DemandUpdate, lambda one: one.level == "watched").run == new
    assert set(broker.stats().runs) == {old, new}


def test_a_press_on_record_beats_what_comes_back(broker: BrokerRole) -> None:
    """Record off, said to a broker that has just come back, is a later word than that of the run that opens again."""
    run = new_run()
    with broker.publisher() as publisher:
        publisher.open(run, "pressed", record="all")
        publisher.say(frame(run, 0, kept=True))
        publisher.ack(run, 0)
    broker.kill()
    broker.start()
    with broker.publisher() as publisher, broker.streamer() as streamer:
        streamer.say(Record(stream="pressed", mode="off"))
        wait_for(lambda: broker.row("pressed")["record"] == "off", of="the press")
        publisher.publisher_hello(**{run: RunHello(next_seq=1)})
        assert publisher.open(run, "pressed", record="all").record == "off"
        publisher.publisher_hello(**{run: RunHello(next_seq=1)})
        wait_for(lambda: broker.stats().runs[run]["ended"], of="the end of keeping")
