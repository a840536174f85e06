"""The latest latents of a `live` run: those that wait, in order, and before them what a decoder needs as history."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import takewhile
from typing import Final

from taesd_stream.frames import DTYPE_BYTES, LatentFrame
from taesd_stream.messages import History
from taesd_stream.wire import MAX_FRAME_BYTES

MAX_HISTORY: Final = 10  # latents; no network needs more, and it counts until a worker says how many its own needs
LATE_NS: Final = 1_000_000_000  # what waits for so long makes the rest late too: it goes, as one cut


def latents_in(frame: LatentFrame) -> int:
    """How many latents of a `live` run a frame holds: (C,h,w) is one, (t,C,h,w) t."""
    return frame.shape[0] if len(frame.shape) == 4 else 1


def history_before(frame: LatentFrame, read: Callable[[int], LatentFrame | None], latents: int) -> History:
    """The latents just before a frame, as many as are there without a hole, up to `latents` and what one part holds.

    read: the frame of a seq, None where it is not at hand.
    """
    latents = min(latents, MAX_FRAME_BYTES // latent_bytes(frame))  # more would cost the worker its connection
    parts: list[bytes | memoryview] = []
    count, later = 0, frame
    while count < latents and later.index > 0:
        before = read(later.seq - 1)
        if before is None or before.index + latents_in(before) != later.index or not _is_like(before, frame):
            break
        parts.append(before.payload)
        count += latents_in(before)
        later = before
    excess = max(0, count - latents) * latent_bytes(frame)
    return History(count=min(count, latents), payload=b"".join(reversed(parts))[excess:])


def latent_bytes(frame: LatentFrame) -> int:
    """Bytes of one latent."""
    return math.prod(frame.shape[-3:]) * DTYPE_BYTES[frame.dtype]


def _is_like(one: LatentFrame, other: LatentFrame) -> bool:
    return (one.shape[-3:], one.dtype) == (other.shape[-3:], other.dtype)


class LiveLatents:
    """Of one run that nobody keeps, or before it is kept. Used in the broker's loop alone.

    epoch: counts the returns to an earlier frame; an answer about a frame of a former one is late.
    history: latents that its decoder needs before a frame.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.next_seq = 0  # the first frame that waits
        self._frames: dict[int, tuple[LatentFrame, int]] = {}  # by seq, rising: the frame, and when it came
        self.held_bytes = 0  # of all of them
        self._in_flight: set[int] = set()
        self.history = MAX_HISTORY

    def add(self, frame: LatentFrame, received_ns: int, *, waits: bool) -> None:
        """The next frame came in. waits: somebody wants its pictures."""
        self._frames[frame.seq] = (frame, received_ns)
        self.held_bytes += frame.nbytes
        if not waits:
            self.next_seq = frame.seq + 1
        self._forget_old()

    def waiting(self) -> list[LatentFrame]:
        """What waits, oldest first."""
        return [frame for seq, (frame, _) in self._frames.items() if seq >= self.next_seq]

    def cut(self, now_ns: int, max_bytes: int) -> int:
        """All but the newest go, where the oldest is late, or all are too many bytes. Returns how many latents went."""
        waiting = self.waiting()
        if len(waiting) < 2:
            return 0
        is_late = now_ns - self.received_ns(waiting[0].seq) > LATE_NS
        if not is_late and sum(frame.nbytes for frame in waiting) <= max_bytes:
            return 0
        self.next_seq = waiting[-1].seq
        self._forget_old()
        return sum(latents_in(frame) for frame in waiting[:-1])

    def get(self, seq: int) -> LatentFrame | None:
        """The frame of that seq, if it is still here."""
        found = self._frames.get(seq)
        return found[0] if found else None

    def received_ns(self, seq: int) -> int:
        """When it came, 0 where it is not here."""
        found = self._frames.get(seq)
        return found[1] if found else 0

    def on_dispatched(self, seq: int) -> None:
        """A worker has it now."""
        self._in_flight.add(seq)
        self.next_seq = max(self.next_seq, seq + 1)

    def on_over(self, seq: int) -> None:
        """The worker has answered."""
        self._in_flight.discard(seq)
        self._forget_old()

    def return_to(self, seq: int) -> None:
        """It gave no picture, and may yet: it waits again, and what follows it too."""
        self.epoch += 1
        self._in_flight.clear()
        if seq in self._frames:
            self.next_seq = min(self.next_seq, seq)

    def return_to_in_flight(self) -> None:
        """Its worker is gone, and what it had waits again."""
        self.return_to(min(self._in_flight, default=self.next_seq))

    def forget_history(self) -> None:
        """Keep only what waits or is in flight."""
        for seq in [seq for seq in self._frames if seq < min([self.next_seq, *self._in_flight])]:
            self._drop(seq)

    def clear(self) -> None:
        """Hold none any more."""
        self._frames.clear()
        self.held_bytes = 0

    def _forget_old(self) -> None:
        """Keep what waits or is in flight, the newest, and the history before the oldest of those."""
        if not self._frames:
            return
        newest = next(reversed(self._frames))
        oldest = min([self.next_seq, newest, *self._in_flight])
        held = 0
        for seq in reversed([*takewhile(oldest.__gt__, self._frames)]):
            if held >= self.history:
                self._drop(seq)
            else:
                held += latents_in(self._frames[seq][0])

    def _drop(self, seq: int) -> None:
        self.held_bytes -= self._frames.pop(seq)[0].nbytes
