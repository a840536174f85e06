"""Kept frames that no broker has acked yet: in memory up to a bound, past that in a latent log of our own."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import deque
from pathlib import Path

from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_log import LogError, RunLog
from taesd_stream.messages import End


class KeptFrames:
    """Unacked frames, oldest first. The side thread alone changes it; any thread may read `count`.

    Their seqs leave no hole but where keeping was off for a while.
    """

    def __init__(self, ring_bytes: int, log_folder: Path | None) -> None:
        """log_folder: where frames go that the ring does not hold; None: there is no such place."""
        self.count = 0
        self._spans: deque[tuple[int, int]] = deque()  # [first, behind) of the seqs here
        self._ring: deque[LatentFrame] = deque()  # the newer ones; the older are in the log
        self._ring_bytes = ring_bytes
        self._held_bytes = 0
        self._log_folder = log_folder
        self._log: RunLog | None = None

    @property
    def first_seq(self) -> int | None:
        """seq of the oldest unacked frame."""
        return self._spans[0][0] if self._spans else None

    @property
    def is_full(self) -> bool:
        """Whether the ring is over its bytes, so that it is time to spill."""
        return self._held_bytes > self._ring_bytes

    def append(self, frame: LatentFrame) -> None:
        """Take one more frame, newer than all others."""
        first, behind = self._spans.pop() if self._spans else (frame.seq, frame.seq)
        if frame.seq != behind:
            self._spans.append((first, behind))
            first = frame.seq
        self._spans.append((first, frame.seq + 1))
        self._ring.append(frame)
        self._held_bytes += frame.nbytes
        self.count += 1

    def read(self, seq: int) -> LatentFrame | None:
        """The unacked frame `seq`, or the next one behind it; None when there is none."""
        found = next((max(seq, first) for first, behind in self._spans if seq < behind), None)
        if found is None:
            return None
        if self._ring and found >= self._ring[0].seq:
            return self._ring[bisect_left(self._ring, found, key=lambda frame: frame.seq)]
        with contextlib.suppress(LogError):  # it is asked for again
            return self._log.read(found) if self._log else None
        return None

    def ack(self, seq: int) -> bool:
        """Forget everything up to `seq`. Returns whether there was any."""
        before = self.count
        while self._ring and self._ring[0].seq <= seq:
            self._held_bytes -= self._ring.popleft().nbytes
        while self._spans and self._spans[0][0] <= seq:
            _, behind = self._spans.popleft()
            if seq + 1 < behind:
                self._spans.appendleft((seq + 1, behind))
        self.count = sum(behind - first for first, behind in self._spans)
        if self.count < before:
            self._free_log()
        return self.count < before

    def spill(self, info: StreamInfo) -> list[Path]:
        """Move the ring to our own log. Returns its files; raises LogError when the disk takes it not."""
        if self._ring and self._log is None:
            if self._log_folder is None:
                raise LogError("this user has no home folder for frames that were not taken: set XDG_STATE_HOME")
            try:
                self._log_folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise LogError(f"{self._log_folder}: {error.strerror}") from error
            self._log = RunLog(self._log_folder, info)
        while self._ring and self._log:
            self._log.append(self._ring[0], may_skip=True)
            self._held_bytes -= self._ring.popleft().nbytes
        return self._log.paths if self._log else []

    def close(self, info: StreamInfo, end: End) -> list[Path]:
        """Put what was never acked, and the END, into the log. Returns its files, none when nothing was left.

        Raises: LogError when the disk takes it not; what it took before stays.
        """
        paths = self.spill(info) if self.count else []
        if self._log:
            self._log.end(end)
            paths = self._log.paths
        return paths

    def _free_log(self) -> None:
        if self._log is None:
            return
        first = self._spans[0][0] if self._spans else None
        behind = self._log.next_seq or 0
        with contextlib.suppress(OSError):  # a file that cannot be removed costs space, no frame
            if first is not None and first < behind:
                self._log.release(first)
                return
            self._log.delete()
        self._log = None
