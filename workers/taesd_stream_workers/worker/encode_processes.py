"""Lanes of an EncodePool that are processes: where a GPU decodes, encoders in threads would keep the GIL from all else.

Each call of an encoder's thread lets go of the GIL and waits to get it back; the worker's own Python waits behind them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import selectors
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from taesd_stream.media.encoder import EncodedPicture, Planes
from taesd_stream.sockets import WakePipe
from taesd_stream_workers.worker import encoding_child
from taesd_stream_workers.worker.encode_pool import Chain, Done, EncodeTask
from taesd_stream_workers.worker.encoding_child import READ_BYTES, Made, Wanted
from taesd_stream_workers.worker.shared_planes import SharedPlanes

logger = logging.getLogger(__name__)

PLANES_BYTES: Final = 512 << 20  # at most; of 16384x16384, more than H.264 knows, there is room for one
PIECE_BYTES: Final = 16 << 20  # of pictures that go there in one copy


@dataclass(slots=True, eq=False)
class _Piece:
    """Planes in shared memory, until all its pictures are made."""

    first: int
    nbytes: int
    pictures: int


@dataclass(slots=True)
class _Waiting:
    """What a child was given. task: None ends the chain."""

    chain: Chain
    task: EncodeTask | None = None
    piece: _Piece | None = None


@dataclass(slots=True, eq=False)
class _Child:
    """A process and what it has to do. chains: how many are its own; is_lost: it is gone, and takes nothing more."""

    process: subprocess.Popen[bytes]
    link: socket.socket
    is_for_films: bool
    read: Any = field(default_factory=lambda: msgpack.Unpacker(use_list=False))
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    chains: int = 0
    is_lost: bool = False


@dataclass(slots=True)
class _Lane:
    number: int
    child: _Child


class EncodeProcesses:
    """See Lanes. A chain stays with the process that it began in; of one that dies the next picture begins anew.

    One thread waits for planes and hands them over, another takes what comes back: both see many pictures at a time.
    """

    def __init__(self, processes: int) -> None:
        self.live, self.films = processes, max(1, processes // 4)
        self._planes = SharedPlanes(PLANES_BYTES)
        self._orders: queue.SimpleQueue[Sequence[tuple[Chain, EncodeTask]] | Chain | None] = queue.SimpleQueue()
        self._children: list[_Child] = []
        self._changes = threading.Lock()  # of children and lanes
        self._numbers, self._tickets = itertools.count(), itertools.count()
        self._selector = selectors.DefaultSelector()
        self._wakes = WakePipe()
        self._selector.register(self._wakes.fileno(), selectors.EVENT_READ)
        self._is_closing = False
        self._threads = [
            threading.Thread(target=self._ship, name="to encoders"),
            threading.Thread(target=self._collect, name="from encoders"),
        ]

    @staticmethod
    def are_possible() -> bool:
        """Whether this system can share memory that has no name."""
        return hasattr(os, "memfd_create")

    def start(self, done: Done) -> None:
        """See Lanes."""
        self._done = done
        self._children = [self._new_child(is_for_films=number >= self.live) for number in range(self.live + self.films)]
        for thread in self._threads:
            thread.start()

    def submit(self, tasks: Sequence[tuple[Chain, EncodeTask]]) -> None:
        """See Lanes."""
        self._orders.put(tasks)

    def end(self, chain: Chain) -> None:
        """See Lanes."""
        self._orders.put(chain)

    def close(self) -> None:
        """See Lanes."""
        self._orders.put(None)
        for thread in self._threads:
            thread.join()
        self._selector.close()
        self._wakes.close()
        self._planes.close()

    # --- there ---

    def _ship(self) -> None:
        while (order := self._orders.get()) is not None:
            rows: defaultdict[_Child, list[Wanted]] = defaultdict(list)
            if isinstance(order, Chain):
                self._ship_end(order, rows)
            else:
                for part in pieces(order):
                    self._ship_piece(part, rows)
            for child, wanted in rows.items():
                _send(child, b"".join(msgpack.packb(one) for one in wanted))
        self._is_closing = True
        with self._changes:
            for child in self._children:
                with contextlib.suppress(OSError):  # it has died meanwhile
                    child.link.shutdown(socket.SHUT_WR)
        self._wakes.wake()

    def _ship_end(self, chain: Chain, rows: defaultdict[_Child, list[Wanted]]) -> None:
        with self._changes:
            lane: _Lane | None = chain.lane
            is_there = lane is not None and not lane.child.is_lost
            if lane is not None and is_there:
                lane.child.chains -= 1
                rows[lane.child].append(Wanted(self._ticket(lane.child, _Waiting(chain)), lane.number))
        if not is_there:
            self._done(chain, None, None)

    def _ship_piece(self, part: Sequence[tuple[Chain, EncodeTask]], rows: defaultdict[_Child, list[Wanted]]) -> None:
        """Copy the planes of some tasks, all of one copy, to where the processes see them."""
        copy = part[0][1].copy
        spans = [_span(task) for _, task in part]
        first, last = min(span.start for span in spans), max(span.stop for span in spans)
        try:
            copy.wait()
            if first < 0 or last > copy.array.nbytes or not copy.array.flags.c_contiguous:
                raise ValueError("planes: they do not lie within their copy")
            piece = _Piece(self._planes.put(copy.array.reshape(-1)[first:last]), last - first, len(part))
        except Exception as error:  # noqa: BLE001 the device failed, or there is no room for so large ones
            for chain, task in part:
                _say_failed(task, repr(error))
                self._done(chain, task, None)
            return
        for (chain, task), span in zip(part, spans, strict=True):
            waiting = _Waiting(chain, task, piece)
            height, width = task.planes.shape
            where = piece.first + span.start - first
            what = (chain.rendition, chain.is_one_of_many, where, height, width, tuple(task.order))
            try:
                with self._changes:
                    lane = self._lane(chain)
                    rows[lane.child].append(Wanted(self._ticket(lane.child, waiting), lane.number, *what))
            except OSError as error:  # no process could be started in place of one that died
                _say_failed(task, repr(error))
                self._over(waiting, None)

    def _ticket(self, child: _Child, waiting: _Waiting) -> int:
        """Note what a child is given; with `_changes` held."""
        ticket = next(self._tickets)
        child.waiting[ticket] = waiting
        return ticket

    def _lane(self, chain: Chain) -> _Lane:
        """Of a chain: it goes on where it is, or begins where there are fewest; with `_changes` held."""
        lane: _Lane | None = chain.lane
        if lane is None or lane.child.is_lost:
            lost = [child for child in self._children if child.is_lost]
            for one in lost:
                self._children[self._children.index(one)] = self._new_child(is_for_films=one.is_for_films)
            mine = (child for child in self._children if child.is_for_films == chain.is_film)
            lane = chain.lane = _Lane(next(self._numbers), min(mine, key=lambda child: child.chains))
            lane.child.chains += 1
        return lane

    def _new_child(self, *, is_for_films: bool) -> _Child:
        ours, theirs = socket.socketpair()
        words = (str(theirs.fileno()), str(self._planes.fd), str(self._planes.nbytes))
        process = subprocess.Popen(  # noqa: S603 a module of ours
            [sys.executable, "-m", encoding_child.__name__, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # ours is the report to a supervisor
            process_group=0,  # Ctrl-C is the worker's
            pass_fds=(theirs.fileno(), self._planes.fd),
        )
        theirs.close()
        child = _Child(process, ours, is_for_films)
        self._selector.register(ours, selectors.EVENT_READ, child)
        return child

    # --- and back ---

    def _collect(self) -> None:
        while not self._is_closing or len(self._selector.get_map()) > 1:
            for key, _ in self._selector.select():
                child: _Child | None = key.data
                if child is None:
                    self._wakes.drain()
                    continue
                words = _received(child.link)
                child.read.feed(words)
                for row in child.read:
                    self._made(child, Made(*row))
                if not words:
                    self._lose(child)

    def _made(self, child: _Child, made: Made) -> None:
        with self._changes:
            waiting = child.waiting.pop(made.ticket)
        if made.error and waiting.task is not None:
            _say_failed(waiting.task, made.error)
        size = {"width": made.width, "height": made.height}
        is_made = waiting.task is not None and not made.error
        picture = EncodedPicture(payload=made.payload, is_keyframe=made.is_keyframe, **size) if is_made else None
        self._over(waiting, picture)

    def _over(self, waiting: _Waiting, picture: EncodedPicture | None) -> None:
        piece = waiting.piece
        if piece is not None:
            with self._changes:
                piece.pictures -= 1
                is_free = not piece.pictures
            if is_free:
                self._planes.give_back(piece.first, piece.nbytes)
        self._done(waiting.chain, waiting.task, picture)

    def _lose(self, child: _Child) -> None:
        """It ended: because it was told to, or it died, and what it had is lost with it."""
        self._selector.unregister(child.link)
        with self._changes:
            child.is_lost = True
            lost, child.waiting = list(child.waiting.values()), {}
        child.link.close()
        code = child.process.wait()
        if code or lost:
            logger.error("encoder_died exit_code=%d pictures=%d", code, sum(one.task is not None for one in lost))
        for one in lost:
            self._over(one, None)


def pieces(tasks: Sequence[tuple[Chain, EncodeTask]]) -> Iterator[list[tuple[Chain, EncodeTask]]]:
    """Cut into runs of tasks of one copy whose planes lie within PIECE_BYTES, the order kept."""
    part: list[tuple[Chain, EncodeTask]] = []
    first = last = 0
    for chain, task in tasks:
        span = _span(task)
        first, last = min(first, span.start), max(last, span.stop)
        if part and (part[0][1].copy is not task.copy or last - first > PIECE_BYTES):
            yield part
            part = []
        if not part:
            first, last = span.start, span.stop
        part.append((chain, task))
    if part:
        yield part


def _span(task: EncodeTask) -> slice:
    """Where the planes of a task lie within the bytes of its copy."""
    first = _address(task.planes) - _address(task.copy.array)
    return slice(first, first + task.planes.nbytes)


def _address(array: Planes) -> int:
    return int(array.__array_interface__["data"][0])


def _say_failed(task: EncodeTask, error: str) -> None:
    logger.error("encode_failed run=%s rendition=%s error=%s", task.run, task.rendition, error)


def _send(child: _Child, words: bytes) -> None:
    """A child that is gone takes nothing: whoever reads from it learns that, and what is lost."""
    try:
        child.link.sendall(words)
    except OSError as error:
        logger.debug("encoder_gone error=%s", error)


def _received(link: socket.socket) -> bytes:
    """What has come; nothing: it is gone."""
    try:
        return link.recv(READ_BYTES)
    except ConnectionError:
        return b""
