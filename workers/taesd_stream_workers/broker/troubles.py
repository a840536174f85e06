"""What was wrong with a run's frames: which of them ended jobs, and what people are told of it."""

from __future__ import annotations

import time
from typing import Final

MAX_TRIES: Final = 2  # jobs that may end on one frame
MAX_ENCODINGS: Final = 10  # of one frame that its encoder could not take: it may have been short of memory
MAX_FAILURES: Final = 256  # frames of one run
NOTE_S: Final = 1.0  # so long at least a person can read what was wrong


class Troubles:
    """Of one run. Used in the broker's loop alone."""

    def __init__(self) -> None:
        self.failures: dict[int, int] = {}  # seq -> how many jobs ended on it
        self._unencoded: dict[int, int] = {}  # seq -> how often its encoder failed
        self.note: str | None = None  # what is wrong with its pictures
        self._is_note_over = False
        self._noted_s = 0.0

    def say(self, note: str) -> None:
        """Something is wrong with its pictures: the page shows it."""
        self.note, self._noted_s, self._is_note_over = note, time.monotonic(), False

    def are_over(self) -> None:
        """It has shown a picture again: what was wrong with a frame is not wrong with the next."""
        self._is_note_over = True

    def drop_old_note(self) -> bool:
        """Whether a note went just now: it is over, and a person had time to read it."""
        is_due = self.note is not None and self._is_note_over and time.monotonic() - self._noted_s > NOTE_S
        if is_due:
            self.note = None
        return is_due

    def failed(self, seq: int, times: int = 1) -> int:
        """So many jobs more ended on a frame. Returns how many have; of the newest MAX_FAILURES frames it is known."""
        return _count(self.failures, seq, times)

    def not_encoded(self, seq: int) -> int:
        """An encoder failed at a frame. Returns how often one has."""
        return _count(self._unencoded, seq, 1)

    def succeeded(self, seq: int) -> None:
        """A frame gave its pictures."""
        self.failures.pop(seq, None)
        self._unencoded.pop(seq, None)
        self.are_over()

    def absolve(self, seq: int) -> None:
        """One of the jobs that seemed to end on a frame did not."""
        if seq in self.failures:
            self.failures[seq] = max(0, self.failures[seq] - 1)

    def is_poison(self, seq: int) -> bool:
        """Whether so many jobs ended on a frame that nobody gets it any more."""
        return self.failures.get(seq, 0) >= MAX_TRIES


def _count(counts: dict[int, int], seq: int, times: int) -> int:
    """So many more of a frame; of the newest MAX_FAILURES frames it is known. Returns how many."""
    counts[seq] = counts.get(seq, 0) + times
    if len(counts) > MAX_FAILURES:
        del counts[min(counts)]
    return counts.get(seq, times)
