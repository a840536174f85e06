"""The kept part of a run: its log, and how far its recording has come."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from taesd_stream.frames import LatentFrame
from taesd_stream.latent_log import LogError, RunLog

READ_AHEAD_FRAMES: Final = 16
READ_AHEAD_BYTES: Final = 16 << 20
RECORD_STUCK_S: Final = 15.0  # packets that were sent and never written: a new attempt
MAX_STUCK_S: Final = 60.0  # the same, after several that got nowhere
LEAST_FRAMES: Final = 2  # on their way or ready, however large: one is decoded while another is written


@dataclass(slots=True, kw_only=True)
class KeptRun:
    """The kept part of a run: the log, and how far its recording has come. Seqs are inclusive, -1 is none yet."""

    log: RunLog
    queued: int  # last seq handed to the log writer
    logged: int  # last seq that is in the log: acked
    next_seq: int  # next to decode
    written: int  # last seq in the file
    attempt: int = 1
    has_turn: bool = False  # once it is over: LEAST_FRAMES are ready or on their way also where the window is full
    first_attempt: int = 1  # what is said of an earlier one is about another recording of the run
    in_flight: deque[tuple[int, int]] = field(default_factory=deque)  # (seq, bytes) on their way into the file
    in_flight_bytes: int = 0  # of latents
    undecoded: set[int] = field(default_factory=set)  # seqs of those that a worker has not answered
    answered_s: float = 0.0  # when the first of those on their way was answered
    is_over: bool = False  # nothing more will be kept
    front: LatentFrame | None = None  # the first frame, where nobody but us has it: until it is in the log
    is_end_queued: bool = False  # the run's END is on its way into the log
    error: str | None = None  # why the log did not take what it was given last
    vain: int = 0  # attempts that got nowhere, one after the other
    moved_s: float = 0.0  # when the cursor last moved, or the first frame behind it was sent
    not_before_s: float = 0.0  # when the next frame may be tried
    told: int = -1  # last seq in the file, as the streamer last said, of whatever attempt
    blocked: str | None = None  # why it waits: no decoder, say
    gaps: set[int] = field(default_factory=set)  # seqs that give no picture: the cursor passes them
    unreadable: str | None = None  # why the log did not give what it was asked for last, and may yet
    _ahead: list[LatentFrame] = field(default_factory=list)
    _missing: int | None = None  # seq that the log should have, and has not

    def send(self, frame: LatentFrame) -> None:
        """A worker has this frame now: it is on its way into the file."""
        if not self.in_flight:
            self.moved_s = time.monotonic()
        self.in_flight.append((frame.seq, frame.nbytes))
        self.in_flight_bytes += frame.nbytes
        self.undecoded.add(frame.seq)
        self.next_seq = frame.seq + 1

    def on_answered(self, seq: int) -> None:
        """A worker is done with this frame, for better or worse."""
        self.undecoded.discard(seq)
        if self.in_flight and seq == self.in_flight[0][0]:
            self.answered_s = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in the log, or on its way there."""
        return self.queued == self.logged and self.log.first_seq is None

    @property
    def held_until(self) -> int:
        """Last seq that is in the log, on its way there, or here to be sent there again."""
        return max(self.queued, self.front.seq if self.front is not None else -1)

    @property
    def is_damaged(self) -> bool:
        """Whether the log has not what it should have: the next frame cannot be read."""
        return self._missing == self.next_seq and not self.in_flight and self.blocked is None

    def read(self, seq: int) -> LatentFrame | None:
        """A frame out of the log, None where it is not there, or cannot be read now."""
        self.unreadable = None
        try:
            return self.log.read(seq)
        except LogError as error:
            self.unreadable = str(error)
            return None

    def ahead(self, room_bytes: int) -> list[LatentFrame]:
        """The next frames to decode, in order, up to a gap; read from the log, and held until they are sent.

        room_bytes: as much of them as may be held, but LEAST_FRAMES with those on their way, however large, unless it
        waits for its turn. What was held and has no more room is let go.
        """
        least = LEAST_FRAMES if self.has_turn or not self.is_over else 0
        before, self._ahead, self._missing = {frame.seq: frame for frame in self._ahead}, [], None
        room_bytes = min(room_bytes, READ_AHEAD_BYTES)
        # where nothing got into the file one frame tells whether it does now; more would be decoded in vain
        last = min(self.logged, self.written + 1 if self.vain else self.next_seq + READ_AHEAD_FRAMES - 1)
        for seq in range(self.next_seq, last + 1):
            known = before.get(seq)
            room_bytes -= known.nbytes if known is not None else self.log.size_of(seq)
            is_over = room_bytes < 0 and len(self.in_flight) + len(self._ahead) >= least
            if is_over or seq in self.gaps:
                break
            frame = known or self.read(seq)
            if frame is None:
                self._missing = seq if self.unreadable is None else None
                break
            self._ahead.append(frame)
        return self._ahead

    def let_go(self) -> None:
        """Nothing of it can be decoded now: what was read ahead is read again when it can."""
        self._ahead = []

    def held(self, seq: int) -> LatentFrame | None:
        """A frame that `ahead` gave, if it is still to be sent."""
        return next((frame for frame in self._ahead if frame.seq == seq >= self.next_seq), None)

    @property
    def is_stuck(self) -> bool:
        """Whether the next frame was decoded and does not get into the file; at a worker it takes as long as it takes.

        However many come behind it: a sampler that goes on must not hold up what its file waits for.
        """
        if self.in_flight and self.in_flight[0][0] in self.undecoded:
            return False
        is_behind = bool(self.in_flight) or (self.told < self.written and self.log.first_seq is not None)
        quiet_s = time.monotonic() - max(self.moved_s, self.answered_s)
        return is_behind and quiet_s > min(MAX_STUCK_S, RECORD_STUCK_S * 2**self.vain)

    def try_again(self) -> None:
        """It is stuck: a new attempt."""
        self.vain += 1
        self.restart(min(self.written, self.told), self.attempt + 1)

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
        self.undecoded.clear()
        self._missing = None
        self.moved_s = time.monotonic()

    def on_cursor(self, written: int) -> None:
        """The streamer has written so far."""
        if written > self.written:
            self.written = written
            self.next_seq = max(self.next_seq, written + 1)
            self.moved_s = time.monotonic()
            self.vain = 0
        while self.in_flight and self.in_flight[0][0] <= written:
            self.in_flight_bytes -= self.in_flight.popleft()[1]
