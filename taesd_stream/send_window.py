"""Which kept frame goes to the broker next: a bounded number of bytes on their way, and all again when no ack comes."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from taesd_stream.frames import LatentFrame
from taesd_stream.kept_frames import KeptFrames

RESEND_S: Final = 2.0
MAX_UNACKED_BYTES: Final = 16 << 20  # past it, wait for acks
ACK_PAUSE_S: Final = 0.05  # after a frame: so long what the broker says may wait, to be read with the next publish


class SendWindow:
    """The way of kept frames between the first send and the ack. The side thread's alone; `now` is monotonic."""

    def __init__(self, kept: KeptFrames) -> None:
        self._kept = kept
        self._next_seq = 0
        self._on_way: deque[tuple[int, int]] = deque()  # (seq, bytes)
        self._on_way_bytes = 0
        self._moved_s = 0.0  # when an ack came, or the first of them was sent
        self.listens_s = -math.inf  # from when on what the broker says is worth being woken for

    @property
    def resend_s(self) -> float:
        """When what is on its way counts as lost."""
        return self._moved_s + RESEND_S if self._on_way else math.inf

    def next(self, now: float) -> LatentFrame | None:
        """The frame to send now, None when there is none or enough are on their way."""
        if now >= self.resend_s:  # the broker dropped some, or is a new one
            self.rewind()
        if self._on_way_bytes >= MAX_UNACKED_BYTES:
            return None
        return self._kept.read(self._next_seq)

    def sent(self, frame: LatentFrame, now: float) -> None:
        """That frame is on its way."""
        if not self._on_way:
            self._moved_s = now
        self._on_way.append((frame.seq, frame.nbytes))
        self._on_way_bytes += frame.nbytes
        self._next_seq = frame.seq + 1
        self.listens_s = now + ACK_PAUSE_S if self._on_way_bytes < MAX_UNACKED_BYTES else now

    def ack(self, seq: int, now: float) -> bool:
        """The broker's log has everything up to `seq`. Returns whether that is new."""
        while self._on_way and self._on_way[0][0] <= seq:
            self._on_way_bytes -= self._on_way.popleft()[1]
        is_new = self._kept.ack(seq)
        if is_new:
            self._moved_s = now
        return is_new

    def rewind(self) -> None:
        """Send everything unacked again."""
        self._next_seq = self._on_way_bytes = 0
        self._on_way.clear()
