"""One job in work, as the threads of a decode worker share it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

from torch import Tensor

from taesd_stream.frames import is_sliced
from taesd_stream.messages import Degraded, Failed, Job, JobItem
from taesd_stream_workers.worker.staging import Staged


class JobRun:
    """A job in work: how many pictures are still to be encoded, and what went wrong. Any thread.

    started_s: when it began, time.monotonic(), later by what others took between its slices. slices: its work, of which
    each next one is a slice; the device thread's. staged: its latents, once a thread has them ready.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started_s = time.monotonic()
        self.slices: Iterator[None] | None = None
        self.staged: Future[Staged] | None = None
        self._paused_s: float | None = None
        self.failed: Failed | None = None
        self.degraded: dict[tuple[str, str], Degraded] = {}
        self.histories: dict[str, Tensor] = {}  # by run: the latents (k,C,h,w) before its first item here
        self._waiting = 1  # one for the decoding itself
        self._lock = threading.Lock()

    @property
    def is_sliced(self) -> bool:
        """Whether it is long, and decoded in slices. Such items share no job with others."""
        return is_sliced(self.job.items[0].kind, self.job.items[0].shape)

    @property
    def runs(self) -> set[str]:
        """Whose frames they are."""
        return {item.run for item in self.job.items}

    def take_staged(self) -> Staged:
        """Its latents; waits for them, and lets go of them. Raises: as `Stager.stage` says."""
        assert self.staged is not None
        staged, self.staged = self.staged.result(), None
        return staged

    def goes_on(self) -> None:
        """Its first slice begins, or the next one."""
        now = time.monotonic()
        self.started_s = now if self._paused_s is None else self.started_s + now - self._paused_s

    def pauses(self) -> None:
        """A slice is done."""
        self._paused_s = time.monotonic()

    def add(self, pictures: int) -> None:
        """So many pictures more go to the encoders."""
        with self._lock:
            self._waiting += pictures

    def is_last(self) -> bool:
        """One of the pictures, or the decoding, is over. Returns whether it was the last: the credit may go back."""
        with self._lock:
            self._waiting -= 1
            return self._waiting == 0

    def degrade(self, run: str, code: str, text: str) -> None:
        """A run's pictures are worse than they could be; the next job tries the better way again."""
        self.degraded[run, code] = Degraded(run=run, code=code, text=text)

    def fail(self, code: str, error: Exception, *, retry: bool) -> None:
        """Nothing of the job counts."""
        text = str(error)[:500] or type(error).__name__
        self.failed = Failed(job=self.job.job, items=[], code=code, text=text, retry=retry)

    def lose(self, item: JobItem, code: str, text: str) -> None:
        """An item gave no picture, and another try may help; what failed before goes again with it."""
        place = next(place for place, one in enumerate(self.job.items) if one is item)
        with self._lock:
            before = self.failed
            if before is None or before.items:  # else all of it goes again
                items = sorted({place, *(before.items if before else ())})
                self.failed = Failed(job=self.job.job, items=items, code=code, text=text, retry=True)
