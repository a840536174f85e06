"""Encoding threads of a decode worker: any thread takes any picture, those of one chain one after the other."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from taesd_stream.decoding.host_copies import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, JpegEncoder, Planes, VideoEncoder, encoder_for

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 256  # pictures in all; full, the decoder waits, and with it the worker's credits
BUSY_WAITING: Final = 3  # pictures a thread from which on nothing is encoded that nobody waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """One picture to encode. attempt, keyframe: where the chain begins anew; on_done gets None when encoding failed.

    copy: on whose way to the host the planes are.
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


@dataclass(slots=True)
class _Chain:
    """Pictures of one run and rendition. is_busy: a thread has it, or is about to; None in tasks closes the encoder."""

    tasks: deque[EncodeTask | None] = field(default_factory=deque)
    is_busy: bool = False
    encoder: VideoEncoder | JpegEncoder | None = None
    attempt: int = 0
    last_pts: int = -1


class EncodePool:
    """`submit` from one thread; each task's `on_done` is called in a thread of the pool, in order within its chain."""

    def __init__(self, threads: int) -> None:
        self._chains: dict[tuple[str, Rendition], _Chain] = {}
        self._due: queue.SimpleQueue[_Chain | None] = queue.SimpleQueue()
        self._waiting = 0
        self._room = threading.Condition()  # of all fields
        self._threads = [threading.Thread(target=self._run, name=f"encode {number}") for number in range(threads)]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, tasks: Sequence[EncodeTask]) -> None:
        """Queue pictures; waits while too many wait already."""
        with self._room:
            self._room.wait_for(lambda: self._waiting < MAX_WAITING)
            self._waiting += len(tasks)
            for task in tasks:
                self._queue(self._chains.setdefault((task.run, task.rendition), _Chain()), task)

    @property
    def is_busy(self) -> bool:
        """Whether more pictures would make others wait for long."""
        return self._waiting >= BUSY_WAITING * len(self._threads)

    def forget(self, run: str) -> None:
        """Close the encoders of a run, behind what is queued of it."""
        with self._room:
            for key in [key for key in self._chains if key[0] == run]:
                self._waiting += 1
                self._queue(self._chains.pop(key), None)

    def close(self) -> None:
        """Encode what is queued, then join the threads."""
        with self._room:
            self._room.wait_for(lambda: self._waiting == 0)
        for _ in self._threads:
            self._due.put(None)
        for thread in self._threads:
            thread.join()
        for chain in self._chains.values():
            _close(chain)

    def _queue(self, chain: _Chain, task: EncodeTask | None) -> None:
        chain.tasks.append(task)
        if not chain.is_busy:
            chain.is_busy = True
            self._due.put(chain)

    def _run(self) -> None:
        while (chain := self._due.get()) is not None:
            task = chain.tasks.popleft()
            if task is None:
                _close(chain)
            else:
                task.on_done(_encode(chain, task))
            with self._room:
                self._waiting -= 1
                self._room.notify_all()
                chain.is_busy = bool(chain.tasks)
                if chain.is_busy:
                    self._due.put(chain)  # behind the others: no chain keeps a thread to itself


def _close(chain: _Chain) -> None:
    if chain.encoder is not None:
        chain.encoder.close()
        chain.encoder = None


def _encode(chain: _Chain, task: EncodeTask) -> EncodedPicture | None:
    try:
        task.copy.wait()
        if chain.encoder is None or chain.attempt != task.attempt:
            chain.encoder, chain.attempt, chain.last_pts = encoder_for(task.rendition), task.attempt, -1
        if isinstance(chain.encoder, JpegEncoder):
            return chain.encoder.encode(task.planes, size=task.size)
        is_new = task.keyframe or task.pts <= chain.last_pts
        chain.last_pts = task.pts
        return chain.encoder.encode(task.planes, task.pts, force_keyframe=is_new, size=task.size)
    except Exception:
        logger.exception("encode_failed run=%s rendition=%s", task.run, task.rendition)
        _close(chain)
        return None
