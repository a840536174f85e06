"""desired_workers over time: up at once, one more where frames wait, down only after two quiet minutes."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.scaling import LOW_FOR_S, WAIT_FOR_S, Scaling


def test_load_raises_it_at_once() -> None:
    """ceil(1.3 x the sum of frames a second times seconds a frame), from one moment to the next."""
    scaling = Scaling()
    assert scaling.update(0.0, [], 0.0, 1) == 1
    assert scaling.update(0.5, [0.9, 0.9, 0.9], 0.0, 1) == 4


def test_frames_that_wait_for_long_ask_for_one_more() -> None:
    """Waits of over half a second, for five seconds without a break, ask for one more than there are."""
    scaling = Scaling()
    for tick in range(int(2 * WAIT_FOR_S)):
        assert scaling.update(tick / 2, [0.1], 0.6, 1) == 1
    assert scaling.update(WAIT_FOR_S, [0.1], 0.6, 1) == 2


def test_a_short_wait_asks_for_nothing() -> None:
    """A break in the waiting begins the five seconds anew."""
    scaling = Scaling()
    for tick in range(100):
        assert scaling.update(tick / 2, [0.1], 0.0 if tick % 8 == 7 else 2.0, 1) == 1


def test_it_goes_down_only_after_a_quiet_while() -> None:
    """Below 60 % for two minutes it goes down, at once to what is needed; a burst in between begins anew."""
    scaling = Scaling()
    assert scaling.update(0.0, [1.0, 1.0], 0.0, 3) == 3
    assert scaling.update(1.0, [0.2], 0.0, 3) == 3
    assert scaling.update(LOW_FOR_S, [1.9], 0.0, 3) == 3
    assert scaling.update(LOW_FOR_S + 1, [0.2], 0.0, 3) == 3
    assert scaling.update(2 * LOW_FOR_S, [0.2], 0.0, 3) == 3
    assert scaling.update(2 * LOW_FOR_S + 1, [0.2], 0.0, 3) == 1


@given(st.lists(st.tuples(st.floats(0.1, 30), st.floats(0, 8), st.floats(0, 2)), max_size=60))
def test_it_is_never_less_than_the_load_needs(ticks: list[tuple[float, float, float]]) -> None:
    """Whatever happened before, the number is enough for the load now, and at least one."""
    scaling, now_s = Scaling(), 0.0
    for after_s, load, wait_s in ticks:
        now_s += after_s
        assert scaling.update(now_s, [load], wait_s, 1) >= max(1, math.ceil(1.3 * load))
