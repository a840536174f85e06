"""What the streamer says to its broker through a line that is stuck, or gone: with real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from taesd_stream import wire
from taesd_stream.messages import Cursor, Forget, Keyframe, Record, StreamerHello, Watch
from taesd_stream.sockets import bind, dial
from taesd_stream_workers.streamer.broker_outbox import HELLO_S, BrokerOutbox
from tests.golden_messages import OTHER_RUN, RUN

HELLO = StreamerHello(endpoint="ipc://nowhere")
WATCH = Watch(stream="a", rendition="thumb", viewers=1)
WISH = Keyframe(stream="a", rendition="live")
FILLER = bytes(65_000)
GONE = Cursor(run=RUN, attempt=1, written=-1, synced=-1)


class Line:
    """An outbox and its broker. `now_s` is its clock."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.now_s = 100.0
        self.outbox = BrokerOutbox(lambda: [HELLO, WATCH], lambda: self.now_s)
        self._context, self._address = context, address
        self.dealer = dial(context, zmq.DEALER, address, hwm=8)

    def come(self) -> None:
        """The broker is there."""
        self._router = bind(self._context, zmq.ROUTER, self._address, hwm=8)
        assert self.dealer.poll(20_000, zmq.POLLOUT)

    def send(self) -> None:
        """One turn of the streamer's loop."""
        self.outbox.send(self.dealer)

    def fill(self) -> None:
        """Until nothing more is taken."""
        while self.dealer.poll(0, zmq.POLLOUT):
            self.dealer.send(FILLER, zmq.NOBLOCK)

    def read(self) -> list[bytes]:
        """What comes to the broker next."""
        assert self._router.poll(20_000), "nothing came in 20 s"
        return self._router.recv_multipart()[1:]

    def read_until_free(self) -> None:
        """The broker reads what was taken, until the line takes more."""
        while not self.dealer.poll(0, zmq.POLLOUT):
            self.read()

    def read_to(self, last: Any) -> list[Any]:
        """What comes to the broker up to a message, without what filled the line."""
        heard: list[Any] = []
        while not heard or heard[-1] != last:
            if (parts := self.read()) != [FILLER]:
                heard.append(wire.unpack(parts, wire.FROM_INSIDE))
        return heard


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    """A line without a broker."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield Line(context, f"ipc://{tmp_path}/b")
    context.destroy(linger=0)


def test_hello_is_the_first_that_a_stuck_line_takes(line: Line) -> None:
    """One that fell due while nothing was taken goes before the wishes that came meanwhile, and not a second later."""
    line.come()
    line.send()
    assert line.read_to(WATCH) == [HELLO, WATCH]
    line.fill()
    line.now_s += HELLO_S
    line.send()
    line.read_until_free()
    line.outbox.put(WISH)
    line.send()
    assert line.read_to(WISH) == [HELLO, WATCH, WISH]


def test_a_file_that_is_gone_is_told_though_the_line_was_stuck(line: Line) -> None:
    """The broker would wait for ever for what follows it. How far a file is, and a late viewer, are said again."""
    line.come()
    line.fill()
    for message in (WISH, GONE, Cursor(run=OTHER_RUN, attempt=1, written=5, synced=5)):
        line.outbox.put(message)
    line.send()
    line.read_until_free()
    line.outbox.put(Record(stream="mark", mode="all"))
    line.send()
    assert line.read_to(Record(stream="mark", mode="all"))[-2:] == [GONE, Record(stream="mark", mode="all")]


def test_of_a_run_that_was_gone_the_newest_counts(line: Line) -> None:
    """One that is written again by now is not said to be gone, one that is gone twice is said to be so once."""
    again = Cursor(run=OTHER_RUN, attempt=2, written=0, synced=-1)
    line.outbox.put(Record(stream="a", mode="all"))
    line.outbox.put(Forget(run=OTHER_RUN))
    for message in (GONE, Cursor(run=OTHER_RUN, attempt=1, written=-1, synced=-1), again, GONE):
        line.outbox.put(message)
    line.send()
    line.come()
    line.outbox.put(WISH)
    line.send()
    assert line.read_to(WISH) == [HELLO, WATCH, Record(stream="a", mode="all"), Forget(run=OTHER_RUN), GONE, WISH]
