"""Every picture has one time, and a chain of them never goes back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.frames import Stamps
from taesd_stream.media.clock import PROVISIONAL_TICKS, ForwardPts, PlayerClock, picture_pts, steps_pts
from taesd_stream.outbox import NS_PER_TICK
from tests.test_recording import packet

SECOND_NS = 1_000_000_000
OPENED_NS = 5 * SECOND_NS


def test_steps_keep_the_samplers_own_pace() -> None:
    """A step's time is when it was published, from the run's opening on; one from before it begins at 0."""
    assert [steps_pts(ns, OPENED_NS) for ns in (5 * SECOND_NS, 5_500_000_000, 8 * SECOND_NS, 0)] == [
        0,
        45_000,
        270_000,
        0,
    ]


@given(st.integers(0, 1 << 50), st.integers(1, 3 * SECOND_NS))
def test_steps_a_tick_apart_have_times_that_grow(sent_ns: int, gap_ns: int) -> None:
    """Publishes at least as far apart as the publisher puts them never share a time."""
    before, after = (steps_pts(OPENED_NS + ns, OPENED_NS) for ns in (sent_ns, sent_ns + NS_PER_TICK + gap_ns))
    assert before < after


@given(st.integers(0, 1 << 32), st.floats(0.1, 1000))
def test_a_picture_of_video_has_its_place_by_the_rate(index: int, fps: float) -> None:
    """To the next tick, however long the video is: an hour of 59.94 fps was a second late. And times grow."""
    assert abs(picture_pts(index, fps) - index * 90000 / Fraction(fps)) < 1
    assert picture_pts(index, fps) < picture_pts(index + 1, fps)
    assert [picture_pts(3600 * 60, one) for one in (60, 24)] == [3600 * 90000, 3600 * 60 * 3750]


def shown(packets: list[tuple[str, int, int, float]]) -> list[int]:
    """The player's times of (run, pts, index, second when it came)."""
    clock = PlayerClock()
    plain = packet(0, b"-", is_keyframe=True, pts=0)
    return [
        clock.stamp(replace(plain, run=run, pts=pts, index=index), round(second * SECOND_NS))
        for run, pts, index, second in packets
    ]


def test_a_player_keeps_the_samplers_pace() -> None:
    """From the first picture on a player's times are the run's own, whenever they come."""
    assert shown([("a", 900, 0, 1), ("a", 9900, 0, 1.5), ("a", 90_900, 0, 1.6)]) == [0, 9000, 90_000]


def test_a_players_clock_goes_on_through_repeats_and_then_fits_again() -> None:
    """A picture shown again comes when it really does; the next new one has its own time."""
    assert shown([("a", 0, 0, 1), ("a", 0, 0, 2), ("a", 0, 0, 3), ("a", 225_000, 0, 3.5)]) == [
        0,
        90_000,
        180_000,
        225_000,
    ]


def test_a_late_players_next_step_comes_when_it_does() -> None:
    """The first picture waited 20 s for its player: the step published 30 s after it is 10 s later for that player."""
    clock = PlayerClock()
    waited = Stamps(received_ns=SECOND_NS, started_ns=21 * SECOND_NS)
    first = replace(packet(0, b"-", is_keyframe=True, pts=0), stamps=waited)
    told = [clock.stamp(first, second * SECOND_NS) for second in (40, 41)]
    told.append(clock.stamp(replace(first, pts=30 * 90_000, stamps=Stamps()), 50 * SECOND_NS))
    assert told == [0, 90_000, 900_000]


def test_a_players_clock_goes_on_in_the_next_run() -> None:
    """A new run, whose times begin anew, follows the old one by the real pause, at its own pace."""
    assert shown([("a", 0, 0, 1), ("b", 40, 0, 3), ("b", 9040, 0, 3.2)]) == [0, 180_000, 189_000]


def test_a_clip_that_comes_again_follows_itself() -> None:
    """Each picture of a looped clip keeps its distance to the clip's first."""
    times = shown([("a", 0, 0, 1), ("a", 3000, 1, 1), ("a", 0, 0, 2), ("a", 3000, 1, 2)])
    assert times == [0, 3000, 93_000, 96_000]


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
