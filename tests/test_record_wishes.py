"""A press on Record is said again to a broker that was killed before it could act, and to no other."""

from __future__ import annotations

from taesd_stream.messages import Record, State
from taesd_stream_workers.streamer.record_wishes import KEPT_S, SETTLED_S, RecordWishes


class Streamer:
    """Wishes, what they said, and a clock of ours."""

    def __init__(self) -> None:
        self.said: list[Record] = []
        self.now_s = 100.0
        self.wishes = RecordWishes(self.said.append, lambda: self.now_s)

    def hears(self, pid: int, *names: str, after_s: float = 0.2) -> None:
        """STATE of the broker of that process."""
        self.now_s += after_s
        self.wishes.on_state(state(pid, *names))


def state(pid: int, *names: str) -> State:
    """A broker's STATE with these streams, all alive."""
    rows = [{"name": name, "run": "0" * 16, "state": "live", "flags": []} for name in names]
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
    """It has heard it; should it be killed later, the publisher itself knows what is kept."""
    streamer = Streamer()
    streamer.wishes.add("a", "all", state(1, "a"))
    streamer.hears(1, "a", after_s=SETTLED_S + 0.1)
    streamer.hears(2, "a")
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
