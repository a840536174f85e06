"""Every picture has one time, and a chain of them never goes back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.media.clock import PROVISIONAL_TICKS, ForwardPts, SteadyPts

SECOND_NS = 1_000_000_000


def test_steps_keep_the_samplers_own_pace() -> None:
    """A step's time is when it was published, from the run's first frame on."""
    clock = SteadyPts("steps")
    sent = [7 * SECOND_NS, 7 * SECOND_NS + 500_000_000, 10 * SECOND_NS]
    assert [clock.stamp(seq=i, sent_ns=ns) for i, ns in enumerate(sent)] == [[0], [45_000], [270_000]]


def test_steps_within_one_tick_are_put_apart() -> None:
    """Publishes closer than 11 microseconds still have times that grow."""
    clock = SteadyPts("steps")
    assert [clock.stamp(seq=i, sent_ns=i * 1000)[0] for i in range(5)] == [0, 1, 2, 3, 4]


@given(st.lists(st.integers(0, 3 * SECOND_NS), min_size=1, max_size=50))
def test_steps_always_grow_and_follow_the_source(gaps: list[int]) -> None:
    """Whatever the gaps, times grow strictly and are never ahead of the source by more than the frames' number."""
    sent = list(itertools.accumulate(gaps, initial=123))
    clock = SteadyPts("steps")
    times = [clock.stamp(seq=i, sent_ns=ns)[0] for i, ns in enumerate(sent)]
    assert all(before < after for before, after in itertools.pairwise(times))
    for i, (pts, ns) in enumerate(zip(times, sent, strict=True)):
        assert 0 <= pts - (ns - 123) * 9 // 100_000 <= i


def test_a_frame_sent_again_keeps_its_time() -> None:
    """The newest frame as a job again, or an old one, has the time it had."""
    clock = SteadyPts("steps")
    times = [clock.stamp(seq=i, sent_ns=i * 1000) for i in range(3)]
    assert clock.stamp(seq=2, sent_ns=2000) == times[2]
    assert clock.stamp(seq=0, sent_ns=0) == times[0]
    assert clock.stamp(seq=3, sent_ns=3000) == [3]


def test_another_worker_goes_on_with_the_runs_epoch() -> None:
    """Told the run's first time, a worker that takes a run over stamps as the first one would."""
    assert SteadyPts("steps", epoch_ns=SECOND_NS).stamp(seq=9, sent_ns=3 * SECOND_NS) == [180_000]


def test_live_is_stamped_by_place_and_rate() -> None:
    """A live picture's time is its place in the run over fps, without drift."""
    clock = SteadyPts("live", 16)
    assert clock.stamp(seq=0, sent_ns=5, index=0, count=4) == [0, 5625, 11250, 16875]
    assert clock.stamp(seq=1, sent_ns=9, index=4, count=1) == [22500]
    assert SteadyPts("live", 23.976).stamp(seq=1, sent_ns=0, index=86_314) == [round(86_314 / 23.976 * 90_000)]


def test_a_clip_starts_at_0() -> None:
    """Every clip of a run is stamped from 0."""
    clock = SteadyPts("clip", 8)
    assert [clock.stamp(seq=seq, sent_ns=seq, count=3) for seq in range(2)] == [[0, 11250, 22500]] * 2


@pytest.mark.parametrize("fps", [0, -1, float("nan")])
def test_a_rate_must_be_above_0(fps: float) -> None:
    """fps of 0, below, or no number is refused."""
    with pytest.raises(ValueError, match="fps"):
        SteadyPts("live", fps)


def test_clips_follow_each_other_on_one_timeline() -> None:
    """A clip begins where the one before ended; its pictures keep their distances."""
    forward = ForwardPts()
    times = [forward.stamp(i * 3750, index=i) for _ in range(2) for i in range(3)]
    assert times == [0, 3750, 7500, 11250, 15000, 18750]


def test_a_repeat_moves_on_and_the_next_picture_is_back_in_time() -> None:
    """A picture sent again comes a little later; the one after it has its own time."""
    forward = ForwardPts()
    assert [forward.stamp(pts, index=0) for pts in (0, 90_000, 90_000, 180_000)] == [
        0,
        90_000,
        90_000 + PROVISIONAL_TICKS,
        180_000,
    ]


@given(st.lists(st.tuples(st.integers(0, 10**7), st.integers(0, 3)), max_size=60))
def test_a_forward_timeline_grows_whatever_comes(pictures: list[tuple[int, int]]) -> None:
    """Any times and places give a timeline that grows strictly."""
    forward = ForwardPts(500, 600)
    times = [500, *(forward.stamp(pts, index=index) for pts, index in pictures)]
    assert all(before < after for before, after in itertools.pairwise(times))
