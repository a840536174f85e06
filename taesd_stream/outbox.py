"""What a publisher still has to say: the hand-over from the sampler's thread to the side thread that owns the socket.

Frames that nobody keeps share one slot, where the newest wins. Kept ones wait, in order, until the broker's log has
them (kept_frames.py).
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from threading import Condition
from typing import Final, TypeVar

from taesd_stream.frames import LatentFrame, RecordMode, StreamInfo
from taesd_stream.kept_frames import KeptFrames
from taesd_stream.latent_log import LogError
from taesd_stream.latent_snapshot import Snapshot
from taesd_stream.messages import End

logger = logging.getLogger(__name__)

MAX_FINALS: Final = 8  # last steps' frames that wait for the socket: more only where no broker is

T = TypeVar("T")


def is_final(frame: LatentFrame) -> bool:
    """Whether it is the last step's: it is sent whatever the demand."""
    return frame.total_steps is not None and frame.step >= frame.total_steps - 1


class Outbox:
    """Shared by two threads: the sampler's thread offers, the side thread collects and does all the rest.

    Shared under `changed` are `pending`, `mode`, `wanted`, `next_seq`, `kept_from` and the `is_…` flags. The lock is
    never held over a disk write or a copy from a device, so that publish() does not wait for them.
    """

    def __init__(self, info: StreamInfo, *, ring_bytes: int, log_folder: Path) -> None:
        self.changed = Condition()
        self.mode: RecordMode | None = info.record  # None: the broker has not said yet
        self.wanted = True  # one test, before anything is built
        self.next_seq = 0
        self.kept_from: int | None = 0 if info.record == "all" else None
        self.pending: deque[tuple[LatentFrame, Snapshot]] = deque()
        self.is_over = False  # nobody collects any more
        self.error: str | None = None  # why keeping ended before its time
        self.slot: deque[LatentFrame] = deque()  # not kept, not sent: last steps' frames, then the newest
        self.kept = KeptFrames(ring_bytes, log_folder)
        self._is_collecting = False
        self._pending_bytes = 0
        self._newest: LatentFrame | None = None  # of those that nobody keeps, also when it was sent
        self._undecided: deque[LatentFrame] = deque()
        self._undecided_bytes = 0
        self._ring_bytes = ring_bytes

    @property
    def is_all_acked(self) -> bool:
        """Whether the broker's log has all that is kept; call with `changed` held."""
        if self.mode is None:
            return self.next_seq == 0
        is_coming = self.mode == "all" and (self._is_collecting or bool(self.pending))
        return not is_coming and not self.kept.count and self.error is None

    def offer(self, frame: LatentFrame, fetch: Snapshot) -> None:
        """Take the publish `next_seq`, its bytes perhaps still on a device; call with `changed` held."""
        self.next_seq = frame.seq + 1
        if self.mode == "all" and self._pending_bytes + frame.nbytes > self._ring_bytes and self.pending:
            self._stop_keeping(f"{self._pending_bytes} bytes wait to be taken out of the sampler's way")
        if self.mode in ("off", "last"):
            _drop_older(self.pending, lambda entry: entry[0])
            self._pending_bytes = sum(entry.nbytes for entry, _ in self.pending)
        self.pending.append((frame, fetch))
        self._pending_bytes += frame.nbytes
        while self.mode is None and self._pending_bytes > self._ring_bytes and len(self.pending) > 1:
            self._pending_bytes -= self.pending.popleft()[0].nbytes

    def collect(self) -> None:
        """Bring what was offered into the slot, the ring or the undecided; the side thread alone."""
        with self.changed:
            offered, self.pending, self._pending_bytes = self.pending, deque(), 0
            self._is_collecting = bool(offered)
        for frame, fetch in offered:
            try:
                payload = fetch()
            except RuntimeError as error:  # torch's word for a device that failed
                self._lose(frame, error)
            else:
                self._take(dataclasses.replace(frame, payload=payload))
        if offered:
            with self.changed:
                self._is_collecting = False
                self.changed.notify_all()

    def settle(self, mode: RecordMode) -> bool:
        """The broker said what is kept; the side thread alone. Returns whether that is new.

        What waits, and is the very last before what comes, is kept too: nothing is lost by pressing a button.
        """
        if mode == "all" and self.error is not None:
            mode = "off"  # frames are missing already: a recording has no holes
        if mode == self.mode:
            return False
        waiting = [*self._undecided, *self.slot]
        self._undecided.clear()
        self._undecided_bytes = 0
        self.slot.clear()
        with self.changed:
            self.mode = mode
            begin = self.next_seq - len(_tail_before([frame for frame, _ in self.pending], self.next_seq))
            early = _tail_before(waiting, begin) if mode == "all" else []
            self.kept_from = begin - len(early) if mode == "all" else None
            self.wanted = self.wanted or mode != "off"
        for frame in waiting[: len(waiting) - len(early)]:
            self._show(frame)
        for frame in early:
            self.kept.append(dataclasses.replace(frame, kept=True))
        if mode == "all":
            self._newest = None
        return True

    def keep_last(self) -> bool:
        """Turn the newest frame of `record="last"` into a kept one; the side thread alone, at the end of the run.

        Returns whether there was one.
        """
        frame = self._newest
        if self.mode != "last" or frame is None:
            return False
        self._newest, self.kept_from = None, frame.seq
        self.kept.append(dataclasses.replace(frame, kept=True))
        if self.slot and self.slot[-1] is frame:
            self.slot.pop()
        return True

    def show_again(self) -> None:
        """A broker that does not know the run has no picture of it: send the newest once more."""
        if self._newest is not None and not self.slot:
            self.slot.append(self._newest)

    def spill_if_full(self, info: StreamInfo) -> None:
        """Move a full ring to disk; where the disk takes it not either, keeping ends, loudly."""
        if not self.kept.is_full:
            return
        try:
            paths = self.kept.spill(info)
        except LogError as error:
            if self.error is None:
                self._stop_keeping(str(error))
        else:
            logger.warning("ring_full stream=%s kept_in=%s", info.stream, paths[-1])

    def stop(self, info: StreamInfo, end: End, *, is_end_sent: bool) -> list[Path]:
        """Take nothing more, and leave what no broker took in our own log. Returns its files.

        Raises: LogError when the disk takes it not.
        """
        with self.changed:
            self.is_over, self.wanted = True, False
        self.collect()
        if not is_end_sent:
            self.keep_last()
        return self.kept.close(info, end)

    def _take(self, frame: LatentFrame) -> None:
        if self.mode == "all" and self.kept_from is not None and frame.seq < self.kept_from:
            self.slot.append(frame)  # offered before keeping began, with publishes behind it that were only counted
        elif self.mode == "all":
            self.kept.append(dataclasses.replace(frame, kept=True))
        elif self.mode is None:
            self._undecided.append(frame)
            self._undecided_bytes += frame.nbytes
            while self._undecided_bytes > self._ring_bytes and len(self._undecided) > 1:
                self._undecided_bytes -= self._undecided.popleft().nbytes
        else:
            self._show(frame)

    def _show(self, frame: LatentFrame) -> None:
        _drop_older(self.slot, lambda waiting: waiting)
        self.slot.append(frame)
        self._newest = frame

    def _lose(self, frame: LatentFrame, error: RuntimeError) -> None:
        logger.warning("frame_not_fetched run=%s seq=%d error=%s", frame.run, frame.seq, error)
        if self.mode == "all":
            self._stop_keeping(f"frame {frame.seq} did not come off its device: {error}")

    def _stop_keeping(self, reason: str) -> None:
        """What is kept so far is still sent; what comes is only shown."""
        with self.changed:
            self.mode, self.kept_from = "off", None
            self.error = f"keeping stopped: {reason}"
        logger.error("keeping_stopped reason=%s", reason)


def _drop_older(waiting: deque[T], frame_of: Callable[[T], LatentFrame]) -> None:
    """Make place for a newer one: a preview is worth its newest frame, and the last step's is always sent."""
    finals = [one for one in waiting if is_final(frame_of(one))][-MAX_FINALS:]
    waiting.clear()
    waiting.extend(finals)


def _tail_before(frames: list[LatentFrame], seq: int) -> list[LatentFrame]:
    """The last of `frames` that lead up to `seq` without a hole."""
    count = 0
    for frame in reversed(frames):
        if frame.seq != seq - 1 - count:
            break
        count += 1
    return frames[len(frames) - count :]
