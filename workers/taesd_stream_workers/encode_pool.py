"""Encoding threads of a decode worker: a stream always on the same one, for its encoder is a chain."""

from __future__ import annotations

import logging
import queue
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, JpegEncoder, Planes, VideoEncoder, encoder_for

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 64  # pictures a lane; full, the decoder waits, and with it the worker's credits
BUSY_WAITING: Final = 8  # pictures a lane from which on nothing is encoded that nobody waits for


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeTask:
    """One picture to encode. attempt, keyframe: where the chain begins anew; on_done gets None when encoding failed."""

    run: str
    rendition: Rendition
    attempt: int
    keyframe: bool
    pts: int
    planes: Planes
    size: tuple[int, int]
    on_done: Callable[[EncodedPicture | None], None]


@dataclass(slots=True)
class _Chain:
    encoder: VideoEncoder | JpegEncoder
    attempt: int
    last_pts: int = -1


@dataclass(slots=True)
class _Lane:
    tasks: queue.Queue[EncodeTask | str | None] = field(default_factory=lambda: queue.Queue(MAX_WAITING))
    chains: dict[tuple[str, Rendition], _Chain] = field(default_factory=dict)


class EncodePool:
    """`submit` from one thread; each task's `on_done` is called in its lane's thread, in order of submission."""

    def __init__(self, threads: int) -> None:
        self._lanes = [_Lane() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(lane,), name=f"encode {number}")
            for number, lane in enumerate(self._lanes)
        ]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def submit(self, task: EncodeTask) -> None:
        """Queue one picture; waits while its lane is full."""
        self._lane(task.run).tasks.put(task)

    def is_busy(self, run: str) -> bool:
        """Whether pictures of this run would have to wait."""
        return self._lane(run).tasks.qsize() >= BUSY_WAITING

    def forget(self, run: str) -> None:
        """Close the encoders of a run, behind what is queued of it."""
        self._lane(run).tasks.put(run)

    def close(self) -> None:
        """Encode what is queued, then join the threads."""
        for lane in self._lanes:
            lane.tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _lane(self, run: str) -> _Lane:
        return self._lanes[zlib.crc32(run.encode()) % len(self._lanes)]

    def _run(self, lane: _Lane) -> None:
        while (task := lane.tasks.get()) is not None:
            if isinstance(task, str):
                for key in [key for key in lane.chains if key[0] == task]:
                    lane.chains.pop(key).encoder.close()
            else:
                task.on_done(_encode(lane, task))
        for chain in lane.chains.values():
            chain.encoder.close()


def _encode(lane: _Lane, task: EncodeTask) -> EncodedPicture | None:
    key = (task.run, task.rendition)
    chain = lane.chains.get(key)
    if chain is None or chain.attempt != task.attempt:
        chain = lane.chains[key] = _Chain(encoder_for(task.rendition), task.attempt)
    try:
        if isinstance(chain.encoder, JpegEncoder):
            return chain.encoder.encode(task.planes, size=task.size)
        is_new = task.keyframe or task.pts <= chain.last_pts
        chain.last_pts = task.pts
        return chain.encoder.encode(task.planes, task.pts, force_keyframe=is_new, size=task.size)
    except Exception:
        logger.exception("encode_failed run=%s rendition=%s", task.run, task.rendition)
        del lane.chains[key]
        return None
