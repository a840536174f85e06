"""Packets that wait for a disk: in order, of one attempt, and bounded."""

from __future__ import annotations

from dataclasses import replace

from taesd_stream_workers.streamer.unwritten import MAX_BYTES, Unwritten
from tests.golden_messages import OTHER_RUN, PACKET

FIRST = replace(PACKET, rendition="record", attempt=1, seq=0)


def test_what_follows_waits_behind_it() -> None:
    """Of the attempt that waits each next packet, of an older one none; other runs do not wait."""
    unwritten = Unwritten()
    assert not unwritten.takes(FIRST)
    unwritten.put(FIRST)
    later = [replace(FIRST, seq=seq) for seq in (1, 2)]
    assert all(unwritten.takes(packet) for packet in (*later, replace(FIRST, seq=1, attempt=0)))
    assert not unwritten.takes(replace(FIRST, run=OTHER_RUN))
    assert unwritten.take_all() == [FIRST, *later]
    assert not unwritten.takes(FIRST)


def test_a_newer_attempt_replaces_what_waits() -> None:
    """It is tried at once, and what waited of the older one is gone."""
    unwritten = Unwritten()
    unwritten.put(FIRST)
    assert not unwritten.takes(replace(FIRST, attempt=2))
    assert unwritten.take_all() == []


def test_what_waits_is_bounded_in_bytes() -> None:
    """Over the bound packets are lost; with room again they wait as before."""
    unwritten = Unwritten()
    half = [replace(FIRST, seq=seq, payload=bytes(MAX_BYTES // 2)) for seq in range(3)]
    for packet in half:
        unwritten.put(packet)
    assert unwritten.take_all() == half[:2]
    unwritten.put(half[2])
    assert unwritten.take_all() == half[2:]
