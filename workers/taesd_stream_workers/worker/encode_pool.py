"""Pictures that a decode worker encodes: those of one chain in order, not too many, films when there is time.

What encodes them are lanes: threads (encode_threads.py) or processes (encode_processes.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, Planes
from taesd_stream_workers.worker.chain_encoder import Order

MAX_WAITING: Final = 256  # pictures but films'; full, the decoder waits, and with it the worker's credits
MANY_LIVE: Final = 8  # chains of `live` from which on a new one is made quickly rather than small
LOOK_S: Final = 1.0  # how often those that wait for lanes look whether these have failed
FILM_S: Final = 1.0  # so often a film gets a picture however much there is to do, or busy runs would have none at all


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """One picture to encode. on_done gets None when encoding failed; copy: on whose way to the host the planes are."""

    run: str
    rendition: Rendition
    order: Order
    planes: Planes
    copy: HostCopy
    on_done: Callable[[EncodedPicture | None], None]


@dataclass(slots=True, eq=False, kw_only=True)
class Chain:
    """Pictures of one run and rendition. place: where it is encoded, as the lanes note it."""

    run: str
    rendition: Rendition
    is_one_of_many: bool
    place: Any = None

    @property
    def is_film(self) -> bool:
        """Whether nobody waits for it."""
        return self.rendition == "film"


Done: TypeAlias = Callable[[Chain, EncodeTask | None, EncodedPicture | None], None]


class Lanes(Protocol):
    """Where pictures are encoded, those of one chain one after the other. live, films: how many of each at once.

    Films, which nobody waits for, have lanes of their own, so that nothing else has to wait behind one.
    """

    live: int
    films: int

    @property
    def error(self) -> Exception | None:
        """Why nothing is encoded any more."""

    def start(self, done: Done) -> None:
        """Begin. done: called once for each task and `end`, in their order within a chain; no more after an error."""

    def submit(self, tasks: Sequence[tuple[Chain, EncodeTask]]) -> None:
        """Queue pictures. One thread at a time, as `end`."""

    def end(self, chain: Chain) -> None:
        """Close a chain's encoders, behind what is queued of it."""

    def close(self) -> None:
        """End, behind what is queued; at once where there is an error."""


class EncodePool:
    """`submit` from one thread; each task's `on_done` is called in a thread of the lanes, in order within its chain."""

    def __init__(self, lanes: Lanes, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._lanes = lanes
        self._clock_s = clock_s
        self._chains: dict[tuple[str, Rendition], Chain] = {}
        self._waiting = self._films_waiting = 0
        self._room = threading.Condition()  # of all fields
        self._filmed_s: dict[str, float] = {}  # by run: when a frame of it was last let into its film

    @property
    def error(self) -> Exception | None:
        """Why nothing is encoded any more. Any thread."""
        return self._lanes.error

    def start(self) -> None:
        """Start the lanes."""
        self._lanes.start(self._done)

    def submit(self, tasks: Sequence[EncodeTask]) -> None:
        """Queue pictures; waits while too many wait already."""
        with self._room:
            while self._waiting - self._films_waiting >= MAX_WAITING and self._lanes.error is None:
                self._room.wait(LOOK_S)
            of_chains = [(self._chain(task), task) for task in tasks]
            self._waiting += len(tasks)
            self._films_waiting += sum(chain.is_film for chain, _ in of_chains)
            self._lanes.submit(of_chains)

    def takes_live(self, run: str, *, granted: Collection[str] = ()) -> bool:
        """Whether `live` pictures of a run that a device could code are encoded here: as before, or few runs are.

        granted: runs that were let in and are not submitted yet.
        """
        with self._room:
            runs = self._live_runs() | set(granted)
        return run in runs or len(runs) < MANY_LIVE

    def takes_film(self, run: str, *, granted: int = 0, is_busy: bool = False) -> bool:
        """Whether a frame of a run may go into its film too; from the thread that submits. If so it counts as taken.

        A film takes only time that nobody else wants: while live pictures wait for a lane, or is_busy says that the
        device is asked for, it gets one in FILM_S, and no two films at once. granted: how many frames were let in and
        are not submitted yet.
        """
        now_s = self._clock_s()
        with self._room:
            before = self._films_waiting + granted
            is_busy = is_busy or self._waiting - self._films_waiting > self._lanes.live
            is_due = now_s - self._filmed_s.get(run, float("-inf")) >= FILM_S
            takes = is_due and not before if is_busy else before < 2 * self._lanes.films
            if takes:
                self._filmed_s[run] = now_s
        return takes

    def forget(self, run: str) -> None:
        """Close the encoders of a run, behind what is queued of it."""
        with self._room:
            self._filmed_s.pop(run, None)
            for key in [key for key in self._chains if key[0] == run]:
                self._end(self._chains.pop(key))

    def runs(self) -> list[str]:
        """Those that have encoders here, the oldest first. Any thread."""
        with self._room:
            return list(dict.fromkeys(run for run, _ in self._chains))

    def close(self) -> None:
        """Encode what is queued, then close the lanes."""
        with self._room:
            for chain in self._chains.values():
                self._end(chain)
            self._chains.clear()
            while self._waiting and self._lanes.error is None:
                self._room.wait(LOOK_S)
        self._lanes.close()

    def _chain(self, task: EncodeTask) -> Chain:
        key = (task.run, task.rendition)
        if key not in self._chains:
            is_one_of_many = len(self._live_runs()) >= MANY_LIVE
            self._chains[key] = Chain(run=task.run, rendition=task.rendition, is_one_of_many=is_one_of_many)
        return self._chains[key]

    def _live_runs(self) -> set[str]:
        return {run for run, rendition in self._chains if rendition == "live"}

    def _end(self, chain: Chain) -> None:
        self._waiting += 1
        self._films_waiting += chain.is_film
        self._lanes.end(chain)

    def _done(self, chain: Chain, task: EncodeTask | None, encoded: EncodedPicture | None) -> None:
        try:
            if task is not None:
                task.on_done(encoded)
        finally:
            with self._room:
                self._waiting -= 1
                self._films_waiting -= chain.is_film
                self._room.notify_all()
