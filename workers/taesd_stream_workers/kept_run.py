"""The kept part of a run: its log, and how far its recording has come."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from taesd_stream.frames import LatentFrame
from taesd_stream.latent_log import RunLog

READ_AHEAD_FRAMES: Final = 16
READ_AHEAD_BYTES: Final = 16 << 20


@dataclass(slots=True, kw_only=True)
class KeptRun:
    """The kept part of a run: the log, and how far its recording has come. Seqs are inclusive, -1 is none yet."""

    log: RunLog
    queued: int  # last seq handed to the log writer
    logged: int  # last seq that is in the log: acked
    next_seq: int  # next to decode
    written: int  # last seq in the file
    attempt: int = 1
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)  # (seq, bytes) on their way into the file
    in_flight_bytes: int = 0  # of latents
    is_over: bool = False  # nothing more will be kept
    moved_s: float = 0.0  # when the cursor last moved, or the first frame behind it was sent
    not_before_s: float = 0.0  # when the next frame may be tried
    told: int = -1  # last seq in the file, as the streamer last said, of whatever attempt
    blocked: str | None = None  # why it waits: no decoder, say
    gaps: set[int] = field(default_factory=set)  # seqs that give no picture: the cursor passes them
    _ahead: deque[LatentFrame] = field(default_factory=deque)

    def send(self, frame: LatentFrame) -> None:
        """A worker has this frame now: it is on its way into the file."""
        if not self.in_flight:
            self.moved_s = time.monotonic()
        self.in_flight.append((frame.seq, frame.nbytes))
        self.in_flight_bytes += frame.nbytes
        self.next_seq = frame.seq + 1

    @property
    def is_damaged(self) -> bool:
        """Whether the log has not what it should have: the next frame cannot be read."""
        is_due = self.next_seq <= self.logged and self.next_seq not in self.gaps and not self.in_flight
        return is_due and self.blocked is None and not self.ahead(1)

    def ahead(self, room_bytes: int = READ_AHEAD_BYTES) -> deque[LatentFrame]:
        """The next frames to decode, read from the log, in order; the first whatever the room."""
        while self._ahead and self._ahead[0].seq < self.next_seq:
            self._ahead.popleft()
        if self._ahead and self._ahead[0].seq != self.next_seq:
            self._ahead.clear()
        seq = self._ahead[-1].seq + 1 if self._ahead else self.next_seq
        held = sum(frame.nbytes for frame in self._ahead)
        limit = min(room_bytes, READ_AHEAD_BYTES)
        while seq <= self.logged and len(self._ahead) < READ_AHEAD_FRAMES and (held < limit or not self._ahead):
            frame = self.log.read(seq)
            if frame is None:
                break
            self._ahead.append(frame)
            held += frame.nbytes
            seq += 1
        return self._ahead

    def pass_gap(self, seq: int) -> None:
        """This frame gives no picture: a new attempt, that leaves it out. The file is told when it is its turn."""
        self.gaps.add(seq)
        self.restart(self.written, self.attempt + 1)

    @property
    def due_gap(self) -> int | None:
        """The gap that the file has come to, None while there is another frame to write first."""
        return self.written + 1 if self.written + 1 in self.gaps else None

    def restart(self, written: int, attempt: int) -> None:
        """Begin a new attempt behind what the file holds."""
        first = self.log.first_seq
        self.written = written if first is None else max(written, first - 1)
        self.next_seq = self.written + 1
        self.attempt = attempt
        self.in_flight.clear()
        self.in_flight_bytes = 0
        self.moved_s = time.monotonic()

    def on_cursor(self, written: int) -> None:
        """The streamer has written so far."""
        if written > self.written:
            self.written = written
            self.next_seq = max(self.next_seq, written + 1)
            self.moved_s = time.monotonic()
        while self.in_flight and self.in_flight[0][0] <= written:
            self.in_flight_bytes -= self.in_flight.popleft()[1]
