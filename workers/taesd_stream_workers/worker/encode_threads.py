"""Lanes of an EncodePool that are threads: any of them takes any picture whose turn it is."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from taesd_stream.media.encoder import EncodedPicture
from taesd_stream_workers.worker.chain_encoder import ChainEncoder
from taesd_stream_workers.worker.encode_pool import Chain, Done, EncodeTask
from taesd_stream_workers.worker.heap import Heap

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Queue:
    """A chain's. tasks: None closes the encoders; is_busy: a thread has it, or is about to."""

    encoder: ChainEncoder
    tasks: deque[EncodeTask | None] = field(default_factory=deque)
    is_busy: bool = False


class EncodeThreads:
    """See Lanes. Films have threads of their own."""

    def __init__(self, live: int, films: int) -> None:
        self.live, self.films = live, films
        self._due: queue.SimpleQueue[Chain | None] = queue.SimpleQueue()
        self._due_films: queue.SimpleQueue[Chain | None] = queue.SimpleQueue()
        self._changes = threading.Lock()  # of chains' queues
        self._heap = Heap()
        self._threads: list[threading.Thread] = []
        self.error: Exception | None = None  # see Lanes

    def start(self, done: Done) -> None:
        """See Lanes."""
        queues = [self._due] * self.live + [self._due_films] * self.films
        self._threads = [
            threading.Thread(target=self._guarded, args=(due, done), name=f"encode {number}")
            for number, due in enumerate(queues)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, tasks: Sequence[tuple[Chain, EncodeTask]]) -> None:
        """See Lanes."""
        for chain, task in tasks:
            self._put(chain, task)

    def end(self, chain: Chain) -> None:
        """See Lanes."""
        self._put(chain, None)

    def close(self) -> None:
        """See Lanes."""
        for due in (self._due, self._due_films):
            for _ in self._threads:
                due.put(None)
        for thread in self._threads:
            thread.join()

    def _put(self, chain: Chain, task: EncodeTask | None) -> None:
        if chain.place is None:
            chain.place = _Queue(ChainEncoder(chain.rendition, is_one_of_many=chain.is_one_of_many))
        with self._changes:
            chain.place.tasks.append(task)
            is_busy, chain.place.is_busy = chain.place.is_busy, True
        if not is_busy:
            (self._due_films if chain.is_film else self._due).put(chain)

    def _guarded(self, due: queue.SimpleQueue[Chain | None], done: Done) -> None:
        try:
            self._run(due, done)
        except Exception as error:  # the thread's outermost loop: its chain would stand still without a word
            self.error = error
            logger.exception("encoders_failed")

    def _run(self, due: queue.SimpleQueue[Chain | None], done: Done) -> None:
        while (chain := due.get()) is not None:
            queued: _Queue = chain.place
            task = queued.tasks.popleft()
            encoded = None
            if task is None:
                queued.encoder.close()
                self._heap.give_back()
            else:
                encoded = _encoded(queued.encoder, task)
            done(chain, task, encoded)
            with self._changes:
                queued.is_busy = bool(queued.tasks)
                if queued.is_busy:
                    due.put(chain)  # behind the others: no chain keeps a thread to itself


def _encoded(encoder: ChainEncoder, task: EncodeTask) -> EncodedPicture | None:
    try:
        task.copy.wait()
        return encoder.encode(task.planes, task.order)
    except Exception:
        logger.exception("encode_failed run=%s rendition=%s", task.run, task.rendition)
        encoder.close()  # also where the device failed: the next picture begins anew
        return None
