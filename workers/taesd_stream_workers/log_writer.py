"""The broker's writing thread: kept frames go to their logs here, so that a slow disk never holds the broker's loop."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from taesd_stream.frames import LatentFrame
from taesd_stream.latent_log import LogError, RunLog
from taesd_stream.messages import End
from taesd_stream.queues import ByteBoundedQueue

QUEUE_BYTES: Final = 128 << 20
SYNC_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Written:
    """One append that was tried. error: None when the file has it."""

    log: RunLog
    message: LatentFrame | End
    error: str | None


class LogWriter:
    """Appends in order; the owner collects the results in its own thread. error: why the thread ended too early."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._queue: ByteBoundedQueue[tuple[RunLog, LatentFrame | End | None]] = ByteBoundedQueue(QUEUE_BYTES, _size)
        self.error: Exception | None = None
        self._results: deque[Written] = deque()
        self._wake = wake
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="log writer")
        self._touched: set[RunLog] = set()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, log: RunLog, message: LatentFrame | End) -> bool:
        """Queue an append; False when the queue is full (then nobody is acked, and the publisher sends it again)."""
        return self._queue.put((log, message))

    def delete(self, log: RunLog) -> None:
        """Remove a log, behind what is queued for it."""
        self._queue.put((log, None))

    def results(self) -> list[Written]:
        """What was tried since the last call."""
        done: list[Written] = []
        while self._results:
            done.append(self._results.popleft())
        return done

    def close(self) -> None:
        """Write what is queued, sync, and join the thread."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        next_sync_s = time.monotonic() + SYNC_S
        while not (self._stop.is_set() and not len(self._queue)):
            try:
                self._take(self._queue.get(timeout_s=0.1))
                if time.monotonic() >= next_sync_s:
                    self._sync()
                    next_sync_s = time.monotonic() + SYNC_S
            except Exception as error:  # noqa: BLE001 the role ends with it: without this thread nothing is acked
                self.error = error
                self._wake()
                return
        self._sync()

    def _take(self, taken: tuple[RunLog, LatentFrame | End | None] | None) -> None:
        if taken is None:
            return
        log, message = taken
        if message is None:
            self._touched.discard(log)
            log.delete()
        else:
            self._append(log, message)

    def _append(self, log: RunLog, message: LatentFrame | End) -> None:
        error: str | None = None
        try:
            if isinstance(message, End):
                log.end(message)
            else:
                log.append(message)
            self._touched.add(log)
        except (LogError, ValueError) as failure:
            error = str(failure)
        self._results.append(Written(log, message, error))
        self._wake()

    def _sync(self) -> None:
        for log in self._touched:
            log.sync()
        self._touched.clear()


def _size(item: tuple[RunLog, LatentFrame | End | None]) -> int:
    message = item[1]
    return message.nbytes if isinstance(message, LatentFrame) else 0
