"""Whose turn it is on the device: jobs in their order, but others go between the slices of a long one."""

from __future__ import annotations

import threading
from collections import deque

from taesd_stream_workers.worker.job_run import JobRun


class JobTurns:
    """`next` from one thread, the rest from any. Long jobs are one after the other, and frames of a run in order."""

    def __init__(self) -> None:
        self._others: deque[JobRun] = deque()
        self._long: deque[JobRun] = deque()
        self._was_long = False  # whose turn the last one was
        self._is_closed = False
        self._changed = threading.Condition()  # of all fields

    def put(self, job: JobRun) -> None:
        """A job more; one that goes on with a run whose long job is not over waits for that."""
        with self._changed:
            is_behind = any(job.runs & before.runs for before in self._long)
            (self._long if job.is_sliced or is_behind else self._others).append(job)
            self._changed.notify()

    def next(self) -> JobRun | None:
        """Wait for a job to go on with: a long one for a slice, till it is `over`, another for good. None: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._others or self._long or self._is_closed)
            if self._is_closed:
                return None
            self._was_long = bool(self._long) and not (self._others and self._was_long)
            return self._long[0] if self._was_long else self._others.popleft()

    @property
    def is_waited_for(self) -> bool:
        """Whether a job waits for the one whose turn it is."""
        with self._changed:
            return len(self._others) + len(self._long) > self._was_long

    def over(self, job: JobRun) -> None:
        """The last slice of this job is done."""
        with self._changed:
            if job in self._long:
                self._long.remove(job)

    def close(self) -> None:
        """Give out no more: what waits, and the rest of a long job, are for another worker."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
