"""The broker's writing thread: kept frames go to their logs here, so that a slow disk never holds the broker's loop."""

from __future__ import annotations

import contextlib
import threading
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
        # hundreds of logs take a second to be forced to disk: what comes meanwhile must not wait for that
        self._syncer = threading.Thread(target=self._sync_each_second, name="log sync")
        self._touched: set[RunLog] = set()
        self._touched_lock = threading.Lock()

    def start(self) -> None:
        """Start the threads."""
        self._thread.start()
        self._syncer.start()

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
        """Write what is queued, sync, and join the threads."""
        self._stop.set()
        self._thread.join()
        self._syncer.join()
        self._sync()

    def _run(self) -> None:
        while not (self._stop.is_set() and not len(self._queue)):
            try:
                self._take(self._queue.get(timeout_s=0.1))
            except Exception as error:  # noqa: BLE001 the role ends with it: without this thread nothing is acked
                self.error = error
                self._wake()
                return

    def _take(self, taken: tuple[RunLog, LatentFrame | End | None] | None) -> None:
        if taken is None:
            return
        log, message = taken
        if message is None:
            with self._touched_lock:
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
            with self._touched_lock:
                self._touched.add(log)
        except (LogError, ValueError) as failure:
            error = str(failure)
            with contextlib.suppress(OSError):  # where it is gone, it is there for the next try
                log.folder.mkdir(parents=True, exist_ok=True)
        self._results.append(Written(log, message, error))
        self._wake()

    def _sync_each_second(self) -> None:
        while not self._stop.wait(SYNC_S):
            self._sync()

    def _sync(self) -> None:
        with self._touched_lock:
            touched, self._touched = self._touched, set()
        for log in touched:
            log.sync()


def _size(item: tuple[RunLog, LatentFrame | End | None]) -> int:
    message = item[1]
    return message.nbytes if isinstance(message, LatentFrame) else 0
