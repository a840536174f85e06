"""A decode worker's packets on their way to the streamer: over real sockets, to a reader that is slow or dead."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from taesd_stream import wire
from taesd_stream.frames import Packet
from taesd_stream.sockets import prepare, receive_parts
from taesd_stream_workers.worker.outgoing import MAX_BYTES, Outgoing
from tests.daemon import wait_for
from tests.golden_messages import OTHER_RUN, PACKET, RUN

QUARTER = bytes(MAX_BYTES // 4)
RECORD = replace(PACKET, rendition="record", attempt=1)


class Way:
    """An Outgoing and the streamers at its other end, which exist once `reader` has made them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._readers: list[zmq.Socket[bytes]] = []
        self.asked: list[str] = []
        self.outgoing = Outgoing(self._context, self.asked.append)

    def address(self, name: str) -> str:
        """Of a streamer."""
        return f"ipc://{self._folder}/{name}"

    def reader(self, name: str) -> zmq.Socket[bytes]:
        """A streamer's socket, bound."""
        socket = self._context.socket(zmq.PULL)
        prepare(socket, hwm=256)
        socket.bind(self.address(name))
        self._readers.append(socket)
        return socket

    def read(self, reader: zmq.Socket[bytes]) -> list[Packet]:
        """All that is queued, as the reader gets it."""
        got: list[Packet] = []
        last = replace(PACKET, rendition="thumb", stream="behind/all")  # goes out when the others have
        marks = [last]

        def all_of_it() -> bool:
            if self.outgoing.send() and marks:
                self.outgoing.put(reader.getsockopt_string(zmq.LAST_ENDPOINT), marks.pop())
                self.outgoing.send()
            while reader.poll(50):
                got.append(wire.unpack(receive_parts(reader), wire.FROM_WORKER_TO_STREAMER))
            return bool(got) and got[-1].stream == last.stream

        wait_for(all_of_it, of="the packets")
        return got[:-1]

    def close(self) -> None:
        """End all of it."""
        self.outgoing.close()
        for reader in self._readers:
            reader.close()
        self._context.destroy(linger=0)


@pytest.fixture
def way(tmp_path: Path) -> Iterator[Way]:
    """A way to streamers that are not there yet."""
    one = Way(tmp_path)
    yield one
    one.close()


def live(seq: int, *, run: str = RUN, key: bool = False, payload: bytes = QUARTER) -> Packet:
    """A packet of a `live` chain."""
    return replace(PACKET, run=run, stream=f"s/{run[:4]}", seq=seq, is_keyframe=key, payload=payload)


def test_a_chain_that_lost_a_packet_goes_on_at_its_next_keyframe(way: Way) -> None:
    """Over the bound the oldest goes, and what follows it up to the keyframe: those deltas would show rubbish."""
    for seq in range(8):
        way.outgoing.put(way.address("a"), live(seq, key=seq in (0, 6)))
    assert [packet.seq for packet in way.read(way.reader("a"))] == [6, 7]
    assert way.asked == ["s/0011"]
    assert way.outgoing.dropped["live"] == 6


def test_a_delta_that_comes_behind_the_hole_is_dropped_too(way: Way) -> None:
    """Also with room again nothing of the broken chain is sent before its keyframe; other chains are whole."""
    for seq in range(5):
        way.outgoing.put(way.address("a"), live(seq, key=seq == 0))
    for packet in (live(5), live(0, run=OTHER_RUN, key=True), live(6, key=True), live(1, run=OTHER_RUN), live(7)):
        way.outgoing.put(way.address("a"), replace(packet, payload=b"small"))
    got = [(packet.run, packet.seq) for packet in way.read(way.reader("a"))]
    assert got == [(OTHER_RUN, 0), (RUN, 6), (OTHER_RUN, 1), (RUN, 7)]


def test_what_is_recorded_is_not_dropped(way: Way) -> None:
    """Over the bound `record` stays, every packet and in order, and says that it is full."""
    for seq in range(5):
        way.outgoing.put(way.address("a"), replace(RECORD, seq=seq, payload=QUARTER))
        way.outgoing.put(way.address("a"), live(seq, key=True))
    assert way.outgoing.is_full
    got = way.read(way.reader("a"))
    assert [packet.seq for packet in got if packet.rendition == "record"] == [0, 1, 2, 3, 4]
    assert way.outgoing.held_bytes == 0


def test_a_streamer_that_died_does_not_block_the_next(way: Way) -> None:
    """Packets for an endpoint where nobody is any more do not hold those for the new streamer."""
    way.outgoing.put(way.address("dead"), RECORD)
    assert not way.outgoing.send()
    way.outgoing.put(way.address("new"), replace(RECORD, attempt=2))
    assert [packet.attempt for packet in way.read(way.reader("new"))] == [2]


def test_a_late_packet_for_a_streamer_that_died_changes_nothing(way: Way) -> None:
    """A job that was given before may end later: what waits for the new streamer is sent all the same."""
    way.outgoing.put(way.address("dead"), RECORD)
    way.outgoing.put(way.address("new"), replace(RECORD, attempt=2, seq=0))
    way.outgoing.put(way.address("dead"), replace(RECORD, seq=8))
    way.outgoing.put(way.address("new"), replace(RECORD, attempt=2, seq=1))
    assert [(packet.attempt, packet.seq) for packet in way.read(way.reader("new"))] == [(2, 0), (2, 1)]


def test_what_was_dropped_is_said(way: Way, caplog: pytest.LogCaptureFixture) -> None:
    """Dropped packets are in the log, as one line with their count and not one line each."""
    for seq in range(20):
        way.outgoing.put(way.address("a"), live(seq, key=True))
    with caplog.at_level(logging.WARNING):
        way.outgoing.send()
        way.outgoing.send()
    assert [record.getMessage() for record in caplog.records] == ["streamer_too_slow dropped=16 all={'live': 16}"]
