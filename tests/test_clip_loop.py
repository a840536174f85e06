"""A clip for players: round after round in its own time, from the packets that came once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from taesd_stream.frames import CLOCK_HZ, Packet
from taesd_stream_workers.streamer.web.clip_loop import LATE_NS, ClipLoop
from tests.test_recording import chain, clip

S = 1_000_000_000
PICTURE_NS = 3750 * S // CLOCK_HZ


def shown(loop: ClipLoop, now_ns: int) -> list[tuple[int, int, int]]:
    """seq, index and time of what is due."""
    return [(packet.seq, packet.index, at_ns) for packet, at_ns in loop.due(now_ns)]


def a_clip(seq: int, count: int) -> list[Packet]:
    """Its packets, as the view has them."""
    return [replace(packet, kind="clip", rendition="live") for packet in clip(seq, count)]


def loop_of(packets: list[Packet]) -> ClipLoop:
    """One that has them all."""
    loop = ClipLoop()
    for packet in packets:
        loop.add(packet)
    return loop


def test_each_picture_is_due_in_its_time_and_the_first_behind_the_last() -> None:
    """Three pictures that came at once: one at once, the others a picture's time later, then from the first again."""
    loop = loop_of(a_clip(0, 3))
    assert shown(loop, S) == [(0, 0, S)]
    assert shown(loop, S + PICTURE_NS - 1) == []
    assert loop.wait_s(S + PICTURE_NS // 2, 1.0) == pytest.approx(PICTURE_NS / 2 / S)
    rest = shown(loop, S + 4 * PICTURE_NS + 9)
    assert [index for _, index, _ in rest] == [1, 2, 0, 1]
    assert [round((at_ns - S) / PICTURE_NS) for _, _, at_ns in rest] == [1, 2, 3, 4]


def test_a_clip_made_again_for_another_viewer_changes_nothing() -> None:
    """The same frame's packets once more leave the round as it is; a newer frame's take its place at once."""
    loop = loop_of(a_clip(0, 3))
    shown(loop, S)
    for packet in a_clip(0, 3):
        loop.add(packet)
    assert [place[:2] for place in shown(loop, S + PICTURE_NS)] == [(0, 1)]
    loop.add(a_clip(1, 3)[0])
    assert shown(loop, S + PICTURE_NS + 1) == [(1, 0, S + PICTURE_NS + 1)]
    assert loop.wait_s(S + 2 * PICTURE_NS, 1.0) == 1.0  # the others are not here yet


def test_who_was_held_up_sees_the_next_round_from_now_on() -> None:
    """A player that took nothing for long gets the rest of the round, then a new one; it does not run to catch up."""
    loop = loop_of(a_clip(0, 3))
    shown(loop, S)
    late_ns = S + 3 * PICTURE_NS + 2 * LATE_NS
    assert [place[1] for place in shown(loop, late_ns)] == [1, 2, 0]
    assert shown(loop, late_ns + PICTURE_NS)[0][1:] == (1, late_ns + PICTURE_NS)


def test_pictures_of_other_kinds_are_due_as_they_come() -> None:
    """Steps are shown at once, each once, and end a clip that went round."""
    loop = loop_of(a_clip(0, 3))
    shown(loop, S)
    loop.add(replace(chain(5, 5)[0], rendition="live"))
    assert shown(loop, S + 10 * PICTURE_NS) == [(5, 0, S + 10 * PICTURE_NS)]
    assert shown(loop, 2 * S) == []
