"""Whole recordings become ordinary files in a thread of their own: a copy of many GiB takes minutes."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeAlias

from taesd_stream.media.recording import Recording

CLOSE_S: Final = 2.0  # a copy that takes longer is made anew by the next process

Finished: TypeAlias = Future[list[Path]]  # or its RecordingError


class Finisher:
    """One recording after the other. From `finish` until its answer is there nobody else writes or syncs it."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Recording, Finished] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="finisher", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self, one: Recording) -> Finished:
        """Queue a recording."""
        answer: Finished = Future()
        self._jobs.put((one, answer))
        return answer

    def close(self) -> None:
        """Begin no other one, and wait a moment for the one at hand."""
        self._is_closed = True
        self._jobs.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_closed:
            one, answer = job
            try:
                answer.set_result(one.finish())
            except Exception as error:  # noqa: BLE001 the recorder is told, whatever it is
                answer.set_exception(error)
