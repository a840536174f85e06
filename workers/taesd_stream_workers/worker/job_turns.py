"""Whose turn it is on the device: jobs in their order, but others go between the slices of a clip, one each time."""

from __future__ import annotations

import threading
from collections import deque

from taesd_stream_workers.worker.job_run import JobRun


class JobTurns:
    """`next` from one thread, the rest from any. Clips are one after the other, so that each comes in its order."""

    def __init__(self) -> None:
        self._others: deque[JobRun] = deque()
        self._clips: deque[JobRun] = deque()
        self._was_clip = False  # whose turn the last one was
        self._is_closed = False
        self._changed = threading.Condition()  # of all fields

    def put(self, job: JobRun) -> None:
        """A job more."""
        with self._changed:
            (self._clips if job.is_clip else self._others).append(job)
            self._changed.notify()

    def next(self) -> JobRun | None:
        """Wait for a job to go on with: a clip's for a slice, till it is `over`, another for good. None: closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._others or self._clips or self._is_closed)
            if self._is_closed:
                return None
            self._was_clip = bool(self._clips) and not (self._others and self._was_clip)
            return self._clips[0] if self._was_clip else self._others.popleft()

    @property
    def is_waited_for(self) -> bool:
        """Whether a job waits for the one whose turn it is."""
        with self._changed:
            return len(self._others) + len(self._clips) > self._was_clip

    def over(self, job: JobRun) -> None:
        """The last slice of this job is done."""
        if job.is_clip:
            with self._changed:
                self._clips.remove(job)

    def close(self) -> None:
        """Give out no more: what waits, and the rest of a clip, are for another worker."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
