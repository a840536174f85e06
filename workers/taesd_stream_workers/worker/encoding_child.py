"""A process that encodes for a decode worker, away from its GIL: `… encoding_child SOCKET PLANES BYTES LIVE FILMS`.

SOCKET and PLANES are file descriptors, LIVE and FILMS how many threads it has for each. Both ways go MessagePack
arrays, one behind the other: what to encode, and what became of it. It ends when its worker does, for then the socket
ends; it loads neither torch nor ZeroMQ's sockets.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import msgpack

from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.log import set_up_logging
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream_workers.worker.chain_encoder import Order
from taesd_stream_workers.worker.encode_pool import Chain, EncodeTask
from taesd_stream_workers.worker.encode_threads import EncodeThreads
from taesd_stream_workers.worker.shared_planes import shared_bytes

logger = logging.getLogger(__name__)

READ_BYTES: Final = 1 << 20


class Wanted(NamedTuple):
    """One picture of a chain: (rows, width) planes from `first` on; order: an Order."""

    ticket: int
    chain: int
    run: str
    rendition: Rendition
    is_one_of_many: bool
    first: int
    rows: int
    width: int
    order: tuple[Any, ...]


class Ended(NamedTuple):
    """A chain's encoders are not needed any more: it is over, or its next picture begins anew."""

    ticket: int
    chain: int


class Made(NamedTuple):
    """What became of it: the picture, as EncodedPicture has it; empty where it failed, and of an Ended."""

    ticket: int
    payload: bytes = b""
    is_keyframe: bool = False
    width: int = 0
    height: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class _Chain(Chain):
    """number: what the worker calls it. waiting: how much is not answered yet; ended: tickets of Ended, in order."""

    number: int
    waiting: int = 0
    ended: deque[int] = field(default_factory=deque)


class Child:
    """The main thread reads what is wanted, those of the lanes answer."""

    def __init__(self, link: socket.socket, planes: Any, lanes: EncodeThreads) -> None:
        """planes: (n,) uint8, the shared memory."""
        self._link = link
        self._planes = planes
        self._lanes = lanes
        self._chains: dict[int, _Chain] = {}
        self._changed = threading.Condition()  # of chains; and one answer at a time

    def run(self) -> None:
        """Encode until the worker is gone, or wants nothing more."""
        self._lanes.start(self._answer)
        read = msgpack.Unpacker(use_list=False)
        while words := self._received():
            read.feed(words)
            for row in read:
                with self._changed:
                    if len(row) == len(Ended._fields):
                        self._end(Ended(*row))
                    else:
                        self._encode(Wanted(*row))
        with self._changed:
            self._changed.wait_for(lambda: not any(chain.waiting for chain in self._chains.values()))
        self._lanes.close()

    def _received(self) -> bytes:
        try:
            return self._link.recv(READ_BYTES)
        except ConnectionError:  # the worker was killed
            return b""

    def _encode(self, one: Wanted) -> None:
        planes = self._planes[one.first : one.first + one.rows * one.width].reshape(one.rows, one.width)
        if one.chain not in self._chains:
            self._chains[one.chain] = _Chain(
                run=one.run, rendition=one.rendition, is_one_of_many=one.is_one_of_many, number=one.chain
            )
        chain = self._chains[one.chain]
        chain.waiting += 1
        task = EncodeTask(
            run=one.run,
            rendition=one.rendition,
            order=Order(*one.order),
            planes=planes,
            copy=HostCopy(planes),
            on_done=functools.partial(self._say, one.ticket),
        )
        self._lanes.submit([(chain, task)])

    def _end(self, one: Ended) -> None:
        if one.chain not in self._chains:
            self._say(one.ticket, None)
            return
        chain = self._chains[one.chain]
        chain.waiting += 1
        chain.ended.append(one.ticket)
        self._lanes.end(chain)

    def _answer(self, chain: Chain, task: EncodeTask | None, encoded: EncodedPicture | None) -> None:
        assert isinstance(chain, _Chain)
        with self._changed:
            if task is not None:
                task.on_done(encoded)
            else:
                self._say(chain.ended.popleft(), None)
            chain.waiting -= 1
            if task is None and not chain.waiting:
                del self._chains[chain.number]
            self._changed.notify_all()

    def _say(self, ticket: int, encoded: EncodedPicture | None) -> None:
        made = Made(ticket)
        if encoded is not None:
            made = Made(ticket, encoded.payload, encoded.is_keyframe, encoded.width, encoded.height)
        try:
            self._link.sendall(msgpack.packb(made))
        except ConnectionError:  # the worker was killed: what waits here is for nobody
            os._exit(0)


def main() -> None:
    """Encode for the worker that started this process."""
    set_up_logging(f"encoder of worker {os.getppid()}", is_quiet=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # they mean the worker, which still needs its pictures
        signal.signal(number, signal.SIG_IGN)
    threading.excepthook = lambda failed: give_up(failed.exc_value)
    link, planes, nbytes, live, films = (int(word) for word in sys.argv[1:])
    try:
        Child(socket.socket(fileno=link), shared_bytes(planes, nbytes), EncodeThreads(live, films)).run()
    except Exception as error:  # noqa: BLE001 the outermost loop
        give_up(error)


def give_up(error: BaseException | None) -> None:
    """End at once, whatever the other threads do: the worker goes on with another process."""
    logger.critical("encoder_failed", exc_info=error)
    os._exit(1)


if __name__ == "__main__":
    main()
