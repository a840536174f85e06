"""A process that encodes for a decode worker, away from its GIL: `python -m …encoding_child SOCKET PLANES BYTES`.

SOCKET and PLANES are file descriptors. Both ways go MessagePack arrays, one behind the other: what to encode, and what
became of it. It ends when its worker does, for then the socket ends; it loads neither torch nor ZeroMQ's sockets.
"""

from __future__ import annotations

import signal
import socket
import sys
import traceback
from collections import deque
from typing import Any, Final, NamedTuple

import msgpack

from taesd_stream.frames import Rendition
from taesd_stream_workers.worker.chain_encoder import ChainEncoder, Order
from taesd_stream_workers.worker.heap import Heap
from taesd_stream_workers.worker.shared_planes import shared_bytes

READ_BYTES: Final = 1 << 20


class Wanted(NamedTuple):
    """One picture of a chain: (rows, width) planes from `first` on; order: an Order."""

    ticket: int
    chain: int
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
    """What became of it: the picture, as EncodedPicture has it, or what went wrong; neither of an Ended."""

    ticket: int
    payload: bytes = b""
    is_keyframe: bool = False
    width: int = 0
    height: int = 0
    error: str = ""


class Child:
    """Chains take turns, so that a long one holds up no other."""

    def __init__(self, link: socket.socket, planes: Any) -> None:
        """planes: (n,) uint8, the shared memory."""
        self._link = link
        self._planes = planes
        self._read = msgpack.Unpacker(use_list=False)
        self._encoders: dict[int, ChainEncoder] = {}
        self._waiting: dict[int, deque[Wanted | Ended]] = {}  # by chain, whose turn is next first
        self._heap = Heap()

    def run(self) -> None:
        """Encode until the worker is gone."""
        while self._take() or self._waiting:
            if self._waiting:
                self._link.sendall(msgpack.packb(self._next()))

    def _take(self) -> bool:
        """Read what has come, and wait where there is nothing to do. Returns whether the worker is there."""
        try:
            words = self._link.recv(READ_BYTES, socket.MSG_DONTWAIT if self._waiting else 0)
        except BlockingIOError:
            return True
        self._read.feed(words)
        for row in self._read:
            one = Ended(*row) if len(row) == len(Ended._fields) else Wanted(*row)
            self._waiting.setdefault(one.chain, deque()).append(one)
        return bool(words)

    def _next(self) -> Made:
        chain = next(iter(self._waiting))
        waiting = self._waiting.pop(chain)
        one = waiting.popleft()
        if waiting:
            self._waiting[chain] = waiting  # behind the others
        if isinstance(one, Ended):
            encoder = self._encoders.pop(chain, None)
            if encoder is not None:
                encoder.close()
                self._heap.give_back()
            return Made(one.ticket)
        if chain not in self._encoders:
            self._encoders[chain] = ChainEncoder(one.rendition, is_one_of_many=one.is_one_of_many)
        planes = self._planes[one.first : one.first + one.rows * one.width].reshape(one.rows, one.width)
        try:
            made = self._encoders[chain].encode(planes, Order(*one.order))
        except Exception as error:  # noqa: BLE001 this picture is lost, the next may do
            traceback.print_exc()  # to the worker's log
            return Made(one.ticket, error=repr(error)[:500])
        return Made(one.ticket, made.payload, made.is_keyframe, made.width, made.height)


def main() -> None:
    """Encode for the worker that started this process."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they mean the worker, which still needs its pictures
        signal.signal(number, signal.SIG_IGN)
    link, planes, nbytes = (int(word) for word in sys.argv[1:])
    try:
        Child(socket.socket(fileno=link), shared_bytes(planes, nbytes)).run()
    except ConnectionError:
        return  # the worker was killed


if __name__ == "__main__":
    main()
