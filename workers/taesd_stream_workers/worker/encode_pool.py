"""Encoding threads of a decode worker: any thread takes any picture, those of one chain one after the other."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from taesd_stream.decoding.host_copies import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, JpegEncoder, Planes, VideoEncoder, encoder_for
from taesd_stream_workers.worker.heap import Heap

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # pictures but films'; full, the decoder waits, and with it the worker's credits
MANY_LIVE: Final = 8  # chains of `live` from which on a new one is made quickly rather than small
FILM_S: Final = 1.0  # so often a film gets a picture however much there is to do, or busy runs would have none at all


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """One picture to encode. attempt, keyframe: where the chain begins anew; on_done gets None when encoding failed.

    copy: on whose way to the host the planes are. track, tracks: of a chain that has an encoder for each of its tracks.
    is_clip: it is one of a whole video's.
    """

    run: str
    rendition: Rendition
    attempt: int
    keyframe: bool
    pts: int
    planes: Planes
    size: tuple[int, int]
    copy: HostCopy
    on_done: Callable[[EncodedPicture | None], None]
    track: int = 0
    tracks: int = 1
    is_clip: bool = False


@dataclass(slots=True)
class _Track:
    encoder: VideoEncoder | JpegEncoder
    last_pts: int = -1


@dataclass(slots=True)
class _Chain:
    """Pictures of one run and rendition. due: where threads find it; is_busy: one has it, or is about to.

    tasks: None closes the encoders.
    """

    due: queue.SimpleQueue[_Chain | None]
    is_one_of_many: bool
    tasks: deque[EncodeTask | None] = field(default_factory=deque)
    is_busy: bool = False
    tracks: list[_Track] = field(default_factory=list)
    attempt: int = 0


class EncodePool:
    """`submit` from one thread; each task's `on_done` is called in a thread of the pool, in order within its chain.

    Films, which nobody waits for, have a few threads of their own, so that nothing else has to wait behind one.
    """

    def __init__(self, threads: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._chains: dict[tuple[str, Rendition], _Chain] = {}
        self._due: queue.SimpleQueue[_Chain | None] = queue.SimpleQueue()
        self._due_films: queue.SimpleQueue[_Chain | None] = queue.SimpleQueue()
        self._waiting = self._films_waiting = 0
        self._room = threading.Condition()  # of all fields
        self._live_threads, self._film_threads = threads, max(1, threads // 4)
        self._filmed_s: dict[str, float] = {}  # by run: when a frame of it was last let into its film
        self._heap = Heap()
        queues = [self._due] * threads + [self._due_films] * self._film_threads
        self._threads = [
            threading.Thread(target=self._run, args=(due,), name=f"encode {number}")
            for number, due in enumerate(queues)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, tasks: Sequence[EncodeTask]) -> None:
        """Queue pictures; waits while too many wait already."""
        with self._room:
            self._room.wait_for(lambda: self._waiting - self._films_waiting < MAX_WAITING)
            for task in tasks:
                self._queue(self._chain(task), task)

    def takes_film(self, run: str, *, granted: int = 0, is_busy: bool = False) -> bool:
        """Whether a frame of a run may go into its film too; from the thread that submits. If so it counts as taken.

        A film takes only time that nobody else wants: while live pictures wait for a thread, or is_busy says that the
        device is asked for, it gets one in FILM_S, and no two films at once. granted: how many frames were let in and
        are not submitted yet.
        """
        now_s = self._clock_s()
        with self._room:
            before = self._films_waiting + granted
            is_busy = is_busy or self._waiting - self._films_waiting > self._live_threads
            is_due = now_s - self._filmed_s.get(run, float("-inf")) >= FILM_S
            takes = is_due and not before if is_busy else before < 2 * self._film_threads
            if takes:
                self._filmed_s[run] = now_s
        return takes

    def forget(self, run: str) -> None:
        """Close the encoders of a run, behind what is queued of it."""
        with self._room:
            self._filmed_s.pop(run, None)
            for key in [key for key in self._chains if key[0] == run]:
                self._queue(self._chains.pop(key), None)

    def runs(self) -> list[str]:
        """Those that have encoders here, the oldest first. Any thread."""
        with self._room:
            return list(dict.fromkeys(run for run, _ in self._chains))

    def close(self) -> None:
        """Encode what is queued, then join the threads."""
        with self._room:
            self._room.wait_for(lambda: self._waiting == 0)
        for due in (self._due, self._due_films):
            for _ in self._threads:
                due.put(None)
        for thread in self._threads:
            thread.join()
        for chain in self._chains.values():
            _close(chain)

    def _chain(self, task: EncodeTask) -> _Chain:
        key = (task.run, task.rendition)
        if key not in self._chains:
            is_film = task.rendition == "film"
            live = sum(rendition == "live" for _, rendition in self._chains)
            self._chains[key] = _Chain(self._due_films if is_film else self._due, is_one_of_many=live >= MANY_LIVE)
        return self._chains[key]

    def _queue(self, chain: _Chain, task: EncodeTask | None) -> None:
        self._waiting += 1
        self._films_waiting += chain.due is self._due_films
        chain.tasks.append(task)
        if not chain.is_busy:
            chain.is_busy = True
            chain.due.put(chain)

    def _run(self, due: queue.SimpleQueue[_Chain | None]) -> None:
        while (chain := due.get()) is not None:
            task = chain.tasks.popleft()
            if task is None:
                _close(chain)
                self._heap.give_back()
            else:
                task.on_done(_encode(chain, task))
            with self._room:
                self._waiting -= 1
                self._films_waiting -= due is self._due_films
                self._room.notify_all()
                chain.is_busy = bool(chain.tasks)
                if chain.is_busy:
                    due.put(chain)  # behind the others: no chain keeps a thread to itself


def _close(chain: _Chain) -> None:
    for track in chain.tracks:
        track.encoder.close()
    chain.tracks = []


def _encode(chain: _Chain, task: EncodeTask) -> EncodedPicture | None:
    try:
        task.copy.wait()
        if len(chain.tracks) != task.tracks or chain.attempt != task.attempt:
            encoders = (
                encoder_for(task.rendition, is_one_of_many=chain.is_one_of_many, is_clip=task.is_clip)
                for _ in range(task.tracks)
            )
            chain.tracks, chain.attempt = [_Track(encoder) for encoder in encoders], task.attempt
        track = chain.tracks[task.track]
        if isinstance(track.encoder, JpegEncoder):
            return track.encoder.encode(task.planes, size=task.size)
        is_new = task.keyframe or task.pts <= track.last_pts
        track.last_pts = task.pts
        return track.encoder.encode(task.planes, task.pts, force_keyframe=is_new, size=task.size)
    except Exception:
        logger.exception("encode_failed run=%s rendition=%s", task.run, task.rendition)
        _close(chain)
        return None
