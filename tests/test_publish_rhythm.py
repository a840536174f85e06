"""When the side thread looks by itself: shortly after a steady publish was due, and never where nobody can tell."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.publish_rhythm import INTERVALS, LATE_NS, MAX_SPREAD_NS, NEVER_NS, SOON_NS, PublishRhythm

MS = 1_000_000
BEGIN_NS = 5_000 * MS


def rhythm_of(*intervals_ms: float) -> tuple[PublishRhythm, int]:
    """One of publishes so far apart, and when the last was."""
    rhythm, at_ns = PublishRhythm(), BEGIN_NS
    rhythm.add(0, at_ns)
    for seq, interval_ms in enumerate(intervals_ms, 1):
        at_ns += round(interval_ms * MS)
        rhythm.add(seq, at_ns)
    return rhythm, at_ns


def test_a_steady_sampler_is_looked_for_when_it_is_due() -> None:
    """Not before the longest of the last intervals is over."""
    rhythm, last_ns = rhythm_of(50, 51, 50, 52)
    assert rhythm.look_ns(last_ns) == last_ns + 52 * MS + LATE_NS


@pytest.mark.parametrize("count", range(INTERVALS))
def test_a_few_publishes_are_no_rhythm(count: int) -> None:
    """Who published less than five times is not looked for."""
    rhythm, last_ns = rhythm_of(*[50] * count)
    assert rhythm.look_ns(last_ns) == NEVER_NS


def test_a_sampler_that_varies_is_not_looked_for_until_it_is_steady_again() -> None:
    """A pause, for a decode or a new prompt, is forgotten after as many steps as count."""
    rhythm, last_ns = rhythm_of(50, 50, 50, 50, 900, 50, 50, 50)
    assert rhythm.look_ns(last_ns) == NEVER_NS
    rhythm.add(9, last_ns + 50 * MS)
    assert rhythm.look_ns(last_ns + 50 * MS) == last_ns + 100 * MS + LATE_NS


def test_publishes_that_were_only_counted_are_part_of_the_rhythm() -> None:
    """Of three steps of 10 ms whose middle one was let go the interval is 10 ms, not 20."""
    rhythm = PublishRhythm()
    for seq in (0, 1, 3, 4, 6):
        rhythm.add(seq, BEGIN_NS + seq * 10 * MS)
    assert rhythm.interval_ns() == 10 * MS
    rhythm.add(8, BEGIN_NS + 120 * MS)
    assert rhythm.interval_ns() == NEVER_NS


def test_it_is_looked_for_once() -> None:
    """Where nothing came by then, the next publish wakes."""
    rhythm, last_ns = rhythm_of(50, 50, 50, 50)
    look_ns = rhythm.look_ns(last_ns)
    assert rhythm.look_ns(look_ns) == NEVER_NS


@given(
    st.integers(0, 100 * MS),
    st.lists(st.integers(0, MAX_SPREAD_NS + MS), min_size=INTERVALS, max_size=INTERVALS),
    st.integers(0, 8),
)
def test_a_publish_in_the_rhythm_never_wakes(shortest_ns: int, more_ns: list[int], eighths: int) -> None:
    """One that comes within the spread of the last intervals finds a look that is soon; no spread over 4 ms is one."""
    rhythm, last_ns = rhythm_of(90, 9, *[(shortest_ns + more) / MS for more in more_ns])
    look_ns = rhythm.look_ns(last_ns)
    spread_ns = max(more_ns) - min(more_ns)
    assert (look_ns != NEVER_NS) == (spread_ns <= MAX_SPREAD_NS)
    if look_ns != NEVER_NS:
        next_ns = last_ns + shortest_ns + min(more_ns) + spread_ns * eighths // 8
        assert LATE_NS <= look_ns - next_ns <= LATE_NS + MAX_SPREAD_NS < SOON_NS
