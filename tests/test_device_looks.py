"""When a device is asked whether a copy is done: never in vain where the last step tells, never much too late."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from taesd_stream.device_looks import EARLY, FIRST_S, MAX_PAUSE_S, MAX_TRUST_S, DeviceLooks


class Clock:
    """A time of the test's own: what counts here is time, and nothing may wait for it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Held:
    """A snapshot's side of the looks, done at a moment of the clock; counts how often it is asked in vain."""

    def __init__(self, clock: Clock, done_s: float, *, is_on_device: bool = True) -> None:
        self.is_on_device = is_on_device
        self.in_vain = 0
        self._clock, self._done_s = clock, done_s

    def is_ready(self, _taken: None) -> bool:
        is_done = self._clock.now_s >= self._done_s
        self.in_vain += not is_done
        return is_done


@dataclasses.dataclass
class Frame:
    """One that waits."""

    sent_ns: int
    snapshot: Any
    taken: None = None
    missed_s: float = 0.0


@pytest.fixture
def clock() -> Clock:
    """The looks' clock."""
    return Clock()


def found_after(looks: DeviceLooks, clock: Clock, takes_s: float) -> tuple[float, int]:
    """Publish one, look whenever it is time: how long after it was done it is found, and how often it was not."""
    sent_s = clock.now_s
    held = Held(clock, sent_s + takes_s)
    frame = Frame(round(sent_s * 1e9), held)
    while not looks.ready([frame]):
        assert looks.next_s > clock.now_s
        clock.now_s = looks.next_s
    assert looks.next_s == math.inf
    return clock.now_s - (sent_s + takes_s), held.in_vain


def test_a_device_is_left_alone_while_its_next_step_is_launched(clock: Clock) -> None:
    """A copy that is done at once is found at the first look, which comes when the next step is on its way."""
    for _ in range(50):
        begun_s = clock.now_s
        _, in_vain = found_after(DeviceLooks(clock), clock, 0.0)
        assert in_vain == 0
        assert FIRST_S - 1e-6 <= clock.now_s - begun_s <= 2 * FIRST_S + 1e-6


def test_what_lies_in_the_host_is_there_at_once(clock: Clock) -> None:
    """No look is put off for a frame that no device has."""
    frame = Frame(round(clock.now_s * 1e9), Held(clock, clock.now_s, is_on_device=False))
    assert DeviceLooks(clock).ready([frame]) == [frame]


@pytest.mark.parametrize("takes_s", [0.005, 0.03, 0.09])
def test_steps_of_one_length_are_looked_at_when_they_are_done(clock: Clock, takes_s: float) -> None:
    """After some steps a frame costs few looks, and is found soon."""
    looks = DeviceLooks(clock)
    found = [found_after(looks, clock, takes_s) for _ in range(100)][20:]
    assert max(late_s for late_s, _ in found) <= 0.2 * takes_s + 2 * FIRST_S
    assert sum(in_vain for _, in_vain in found) <= 1.5 * len(found)


def test_a_short_step_behind_long_ones_does_not_wait_for_long(clock: Clock) -> None:
    """However long the last one took, the next is looked at within MAX_TRUST_S; a long one every MAX_PAUSE_S."""
    looks = DeviceLooks(clock)
    late_s, _ = found_after(looks, clock, 60.0)
    assert late_s <= MAX_PAUSE_S
    late_s, _ = found_after(looks, clock, 0.02)
    assert late_s <= MAX_TRUST_S
    for _ in range(100):
        late_s, _ = found_after(looks, clock, 0.0)
    assert late_s <= 2 * FIRST_S


def test_those_behind_one_that_is_not_done_wait_too(clock: Clock) -> None:
    """Frames are found in their order."""
    old_ns = round((clock.now_s - 1) * 1e9)
    done = [Frame(old_ns, Held(clock, 0.0)) for _ in range(3)]
    late = Frame(old_ns, Held(clock, math.inf))
    assert DeviceLooks(clock).ready([*done[:2], late, done[2]]) == done[:2]


def test_a_frame_that_waited_for_its_turn_tells_nothing_of_how_long_it_took(clock: Clock) -> None:
    """Being done by then is no news, and what was learnt before stays; but to be done sooner than that is."""
    looks = DeviceLooks(clock)
    found_after(looks, clock, 0.02)
    patience_s = looks.patience_s
    assert 0.01 < patience_s <= 0.02

    def look_at_age(age_s: float) -> None:
        frame = Frame(round(clock.now_s * 1e9), Held(clock, clock.now_s))
        clock.now_s += age_s
        assert looks.ready([frame]) == [frame]

    look_at_age(2 * patience_s)
    assert looks.patience_s == patience_s
    look_at_age(0.9 * patience_s)
    assert looks.patience_s == EARLY * patience_s


def test_a_planned_look_that_comes_late_is_planned_sooner_next_time(clock: Clock) -> None:
    """One slow step must not hold back those after it, however late the system lets each look be."""
    looks = DeviceLooks(clock)
    found_after(looks, clock, 0.09)
    for _ in range(40):
        frame = Frame(round(clock.now_s * 1e9), Held(clock, clock.now_s + FIRST_S / 2))
        assert not looks.ready([frame])
        clock.now_s = looks.next_s + 0.01
        assert looks.ready([frame])
    assert looks.patience_s < 0.01
