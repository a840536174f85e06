"""A press on Record is said to each broker that comes, till its run ends, and to none twice."""

from __future__ import annotations

import pytest

from taesd_stream.messages import Record, State
from taesd_stream_workers.streamer.record_wishes import KEPT_S, SETTLED_S, RecordWishes


class Streamer:
    """Wishes, what they said, and a clock of ours."""

    def __init__(self) -> None:
        self.said: list[Record] = []
        self.now_s = 100.0
        self.wishes = RecordWishes(self.said.append, lambda: self.now_s)

    def hears(self, pid: int, *names: str, after_s: float = 0.2, change: dict[str, str] | None = None) -> None:
        """STATE of the broker of that process."""
        self.now_s += after_s
        self.wishes.on_state(state(pid, *names, **(change or {})))


def state(pid: int, *names: str, **facts: str) -> State:
    """A broker's STATE with these streams, alive but for what is said of them."""
    rows = [{"name": name, "run": "0" * 16, "state": "live", "flags": []} | facts for name in names]
    return State(streams=rows, runs={}, workers=[], stats={"pid": pid}, desired_workers=1, now_ns=0)


def test_a_new_broker_is_told_what_the_old_one_was() -> None:
    """Killed right after the press: the next broker hears the same RECORD once."""
    streamer = Streamer()
    streamer.wishes.add("a", "all", state(1, "a"))
    streamer.hears(1, "a")
    streamer.hears(2)
    streamer.hears(2, "a")
    assert streamer.said == [Record(stream="a", mode="all")] * 2


def test_a_broker_that_lives_on_is_told_once() -> None:
    """It has heard it; the next one has not, however late it comes: a rule would have its way with a run put off."""
    streamer = Streamer()
    streamer.wishes.add("a", "off", state(1, "a"))
    for after_s in (SETTLED_S + 0.1, 1.0, 2 * KEPT_S):
        streamer.hears(1, "a", after_s=after_s)
    assert len(streamer.said) == 1
    streamer.hears(2)  # the sampler has not come back yet
    streamer.hears(2, "a", after_s=2 * KEPT_S)
    assert streamer.said == [Record(stream="a", mode="off")] * 2


@pytest.mark.parametrize("change", [{"state": "done"}, {"run": "f" * 16}], ids=["ended", "next"])
def test_a_wish_ends_with_its_run(change: dict[str, str]) -> None:
    """What a person said of a run that is over is no word on the next one."""
    streamer = Streamer()
    streamer.wishes.add("a", "all", state(1, "a"))
    streamer.hears(1, "a", after_s=SETTLED_S + 0.1)
    streamer.hears(1, "a", change=change)
    streamer.hears(2)
    assert len(streamer.said) == 1


def test_a_wish_for_a_stream_to_come_outlives_brokers_for_an_hour() -> None:
    """Without a run of that name each new broker is told; after an hour none is."""
    streamer = Streamer()
    streamer.wishes.add("later", "all", None)
    streamer.hears(1, after_s=10)
    streamer.hears(2, after_s=10)
    assert len(streamer.said) == 3
    streamer.hears(2, after_s=KEPT_S)
    streamer.hears(3)
    assert len(streamer.said) == 3


def test_the_last_press_counts() -> None:
    """Record, then off: a new broker hears off alone."""
    streamer = Streamer()
    streamer.wishes.add("a", "all", state(1, "a"))
    streamer.wishes.add("a", "off", state(1, "a"))
    streamer.hears(2)
    assert [record.mode for record in streamer.said] == ["all", "off", "off"]
