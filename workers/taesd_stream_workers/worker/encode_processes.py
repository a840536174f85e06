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
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream.sockets import WakePipe
from taesd_stream_workers.worker import encoding_child
from taesd_stream_workers.worker.encode_pieces import Batch, Part, pieces
from taesd_stream_workers.worker.encode_pool import LOOK_S, Chain, Done, EncodeTask
from taesd_stream_workers.worker.encoding_child import READ_BYTES, Ended, Made, Wanted
from taesd_stream_workers.worker.shared_planes import SharedPlanes

logger = logging.getLogger(__name__)

PLANES_BYTES: Final = 512 << 20  # at most; of 16384x16384, the largest that H.264 knows, there is room for one
# Of a process. A chain stays in one, so the more in each, the fewer pictures wait while another has nothing to do; but
# as many are lost with it, and all its chains begin anew.
THREADS: Final = 4
MAX_DEATHS: Final = 20  # one after the other, and no picture between: they cannot live here


class EncodeProcesses:
    """See Lanes. Films have processes and memory of their own."""

    def __init__(self, live: int, films: int, planes_bytes: int = PLANES_BYTES, threads: int = THREADS) -> None:
        """planes_bytes: of memory for planes, at most, and as much for films'. threads: of a process."""
        self.live, self.films = live, films
        self._live = ProcessGroup([(share, 0) for share in shares(live, threads)], planes_bytes)
        self._films = ProcessGroup([(0, share) for share in shares(films, threads)], planes_bytes)

    @staticmethod
    def are_possible() -> bool:
        """Whether this system can share memory that has no name."""
        return hasattr(os, "memfd_create")

    @property
    def error(self) -> Exception | None:
        """See Lanes."""
        return self._live.error or self._films.error

    def start(self, done: Done) -> None:
        """See Lanes."""
        self._live.start(done)
        self._films.start(done)

    def submit(self, tasks: Sequence[tuple[Chain, EncodeTask]]) -> None:
        """See Lanes."""
        for group, is_film in ((self._live, False), (self._films, True)):
            batch = [(chain, task) for chain, task in tasks if chain.is_film == is_film]
            if batch:
                group.submit(batch)

    def end(self, chain: Chain) -> None:
        """See Lanes."""
        (self._films if chain.is_film else self._live).end(chain)

    def close(self) -> None:
        """See Lanes."""
        self._live.close()
        self._films.close()


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
    threads: int
    read: Any = field(default_factory=lambda: msgpack.Unpacker(use_list=False, max_buffer_size=0))
    waiting: dict[int, _Waiting] = field(default_factory=dict)
    chains: Counter[Rendition] = field(default_factory=Counter)
    is_lost: bool = False

    def load(self, rendition: Rendition) -> tuple[float, float]:
        """Chains for each thread: of a rendition, then of all."""
        return self.chains[rendition] / self.threads, self.chains.total() / self.threads


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a chain is encoded, and what it is called there."""

    child: _Child
    number: int


class ProcessGroup:
    """Processes and the memory that they read from. `submit`, `end` from one thread at a time.

    One thread waits for planes and hands them over, another takes what comes back: both see many pictures at a time. A
    chain stays with the process that it began in; where that dies the next picture begins it anew in another.
    error: why it has stopped for good.
    """

    def __init__(self, processes: list[tuple[int, int]], planes_bytes: int) -> None:
        """processes: the threads of each, for live pictures and for films."""
        self.error: Exception | None = None
        self._processes, self._planes_bytes = processes, planes_bytes
        self._batches: queue.SimpleQueue[Batch | Chain | None] = queue.SimpleQueue()
        self._children: list[_Child] = []
        self._changes = threading.Lock()  # of children, places and pieces
        self._numbers, self._tickets = itertools.count(), itertools.count()
        self._deaths = 0  # since a picture was made
        self._is_closing = False

    def start(self, done: Done) -> None:
        """See Lanes."""
        self._done = done
        self._planes = SharedPlanes(self._planes_bytes)
        self._selector = selectors.DefaultSelector()
        self._wakes = WakePipe()
        self._selector.register(self._wakes.fileno(), selectors.EVENT_READ)
        self._children = [self._new_child(threads) for threads in self._processes]
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for work, name in ((self._ship, "to encoders"), (self._collect, "from encoders"))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, batch: Batch) -> None:
        """Queue pictures."""
        self._batches.put(batch)

    def end(self, chain: Chain) -> None:
        """Close a chain's encoders, behind what is queued of it."""
        self._batches.put(chain)

    def close(self) -> None:
        """End the processes, behind what is queued; at once where something failed."""
        self._batches.put(None)
        for thread in self._threads:
            while thread.is_alive() and self.error is None:
                thread.join(LOOK_S)
        with self._changes:
            for child in self._children:
                child.process.kill()  # it has ended, but where something failed
                child.process.wait()
                child.link.close()
        if self.error is None:
            self._selector.close()
            self._wakes.close()
            self._planes.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the thread's outermost loop: without it no picture is made any more
            self.error = error  # nobody waits for this thread any more
            logger.exception("encoders_failed")

    # --- there ---

    def _ship(self) -> None:
        while (batch := self._batches.get()) is not None and self.error is None:
            if isinstance(batch, Chain):
                self._ship_end(batch)
            else:
                for part in pieces(batch):
                    self._ship_piece(part)
        self._is_closing = True
        with self._changes:
            for child in self._children:
                with contextlib.suppress(OSError):  # it has died meanwhile
                    child.link.shutdown(socket.SHUT_WR)
        self._wakes.wake()

    def _ship_end(self, chain: Chain) -> None:
        place: _Place | None = chain.place
        with self._changes:
            if place is not None and not place.child.is_lost:
                place.child.chains[chain.rendition] -= 1
                row = Ended(self._ticket(place.child, _Waiting(chain)), place.number)
            else:
                place = None
        if place is None:
            self._done(chain, None, None)
        else:
            _send(place.child, msgpack.packb(row))

    def _ship_piece(self, part: Part) -> None:
        """Hand over pictures of one copy: first their planes, where the processes see them."""
        copy = part[0][1].copy
        first, last = min(span.start for *_, span in part), max(span.stop for *_, span in part)
        piece: _Piece | None = None
        try:
            copy.wait()
            if first == last:
                raise ValueError("planes: expected (H*3//2, W) uint8 within their copy")
            piece = _Piece(self._planes.put(copy.array.reshape(-1)[first:last]), last - first, len(part))
        except Exception:  # the device failed, or there will never be room for as much
            for _, task, _ in part:
                logger.exception("encode_failed run=%s rendition=%s", task.run, task.rendition)
        rows: defaultdict[_Child, list[bytes]] = defaultdict(list)
        with self._changes:
            for chain, task, span in part:
                place = self._place(chain)
                ticket = self._ticket(place.child, _Waiting(chain, task, piece))
                row: Wanted | Ended = Ended(ticket, place.number)  # answered in its turn, and the next begins anew
                if piece is not None:
                    where, (height, width) = piece.first + span.start - first, task.planes.shape
                    what = (chain.run, chain.rendition, chain.is_one_of_many, where, height, width, task.order)
                    row = Wanted(ticket, place.number, *what)
                rows[place.child].append(msgpack.packb(row))
        for child, words in rows.items():
            _send(child, b"".join(words))

    def _ticket(self, child: _Child, waiting: _Waiting) -> int:
        """Note what a child is given; with `_changes` held."""
        ticket = next(self._tickets)
        child.waiting[ticket] = waiting
        return ticket

    def _place(self, chain: Chain) -> _Place:
        """Of a chain: it goes on where it is, or begins where fewest of its kind are; with `_changes` held.

        Raises: RuntimeError where no process is left.
        """
        place: _Place | None = chain.place
        if place is None or place.child.is_lost:
            for number, child in enumerate(self._children):
                if child.is_lost:
                    self._replace(number)
            living = [child for child in self._children if not child.is_lost]
            if not living:
                raise RuntimeError("no encoding process can be started: see the log")
            least = min(living, key=lambda child: child.load(chain.rendition))
            place = chain.place = _Place(least, next(self._numbers))
            least.chains[chain.rendition] += 1
        return place

    def _replace(self, number: int) -> None:
        self._children[number].link.close()
        try:
            self._children[number] = self._new_child(self._processes[number])
        except OSError:  # the others go on without it
            logger.exception("encoder_not_started")

    def _new_child(self, threads: tuple[int, int]) -> _Child:
        ours, theirs = socket.socketpair()
        words = map(str, (theirs.fileno(), self._planes.fd, self._planes.nbytes, *threads))
        try:
            process = subprocess.Popen(  # noqa: S603 a module of ours
                [sys.executable, "-P", "-m", encoding_child.__name__, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # ours is the report to a supervisor
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # numpy would start one for each processor
                process_group=0,  # Ctrl-C is the worker's
                pass_fds=(theirs.fileno(), self._planes.fd),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        child = _Child(process, ours, sum(threads))
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
        picture = None
        if made.payload:
            self._deaths = 0
            size = {"width": made.width, "height": made.height}
            picture = EncodedPicture(payload=made.payload, is_keyframe=made.is_keyframe, **size)
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
        """It ended: because it was told to, or it died, and what it had is lost with it.

        Raises: RuntimeError when one after the other dies.
        """
        self._selector.unregister(child.link)  # not closed: the other thread may be sending
        code = child.process.wait()
        with self._changes:
            child.is_lost = True
            lost, child.waiting = list(child.waiting.values()), {}
        if code or lost:
            self._deaths += 1
            logger.error("encoder_died exit_code=%d pictures=%d", code, sum(one.task is not None for one in lost))
        for one in lost:
            self._over(one, None)
        if self._deaths >= MAX_DEATHS:
            raise RuntimeError(f"{self._deaths} encoding processes have died one after the other: see the log")


def shares(lanes: int, most: int) -> list[int]:
    """So many lanes as evenly as may be, in shares of at most `most`."""
    count = -(-lanes // most)
    return [lanes * (place + 1) // count - lanes * place // count for place in range(count)]


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
