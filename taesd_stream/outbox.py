"""What a publisher still has to say: the hand-over from the sampler's thread to the side thread that owns the socket.

Frames that nobody keeps share one slot, where the newest wins. Kept ones wait, in order, until the broker's log has
them: in memory up to `ring_bytes`, past that in a latent log of our own.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from pathlib import Path
from threading import Condition

from taesd_stream.frames import LatentFrame, RecordMode, StreamInfo
from taesd_stream.latent_log import LogError, RunLog
from taesd_stream.latent_snapshot import Snapshot
from taesd_stream.messages import End

logger = logging.getLogger(__name__)


class KeptFrames:
    """Frames not yet acked, oldest first. Used by the side thread alone."""

    def __init__(self, ring_bytes: int, log_folder: Path) -> None:
        self._ring: deque[LatentFrame] = deque()
        self._ring_bytes = ring_bytes
        self._held_bytes = 0
        self._log_folder = log_folder
        self._log: RunLog | None = None
        self.first_seq: int | None = None  # oldest that is not acked
        self.next_seq = 0

    def __len__(self) -> int:
        return 0 if self.first_seq is None else self.next_seq - self.first_seq

    @property
    def is_full(self) -> bool:
        """Whether the ring is over its bytes, so that it is time to spill."""
        return self._held_bytes > self._ring_bytes

    def append(self, frame: LatentFrame) -> None:
        """Take one more frame."""
        if self.first_seq is None:
            self.first_seq = frame.seq
        self.next_seq = frame.seq + 1
        self._ring.append(frame)
        self._held_bytes += frame.nbytes

    def read(self, seq: int) -> LatentFrame | None:
        """The unacked frame `seq`, from memory or from the log."""
        if self._ring and seq >= self._ring[0].seq:
            place = seq - self._ring[0].seq
            if place < len(self._ring) and self._ring[place].seq == seq:
                return self._ring[place]
            return next((frame for frame in self._ring if frame.seq >= seq), None)
        found = self._log.read(seq) if self._log else None
        return found or (self._ring[0] if self._ring else None)

    def ack(self, seq: int) -> None:
        """Forget everything up to `seq`."""
        while self._ring and self._ring[0].seq <= seq:
            self._held_bytes -= self._ring.popleft().nbytes
        if self.first_seq is not None and seq >= self.first_seq:
            self.first_seq = seq + 1 if seq + 1 < self.next_seq else None
        if self._log and self.first_seq is None:
            self._log.delete()
            self._log = None
        elif self._log and self.first_seq is not None:
            self._log.release(self.first_seq)

    def spill(self, info: StreamInfo) -> Path | None:
        """Move the ring to our own log file. Returns where; raises LogError when the disk takes it not."""
        if self._ring and self._log is None:
            self._log_folder.mkdir(parents=True, exist_ok=True)
            self._log = RunLog(self._log_folder, info)
        while self._ring and self._log:
            self._log.append(self._ring[0])
            self._held_bytes -= self._ring.popleft().nbytes
        return self._log.paths[0] if self._log else None

    def close(self, info: StreamInfo, end: End) -> Path | None:
        """Put what was never acked, and the END, into the log. Returns where it is, None when nothing was left."""
        path = self.spill(info) if len(self) else None
        if self._log:
            self._log.end(end)
            self._log.close()
        return path


class Outbox:
    """Shared by two threads: the sampler's thread offers, the side thread collects and does all the rest.

    Only `pending`, `mode`, `wanted`, `next_seq` and `kept_from` are shared, under `changed`; the lock is never held
    over a disk write or a copy from a device, so that publish() does not wait for them.
    """

    def __init__(self, info: StreamInfo, *, ring_bytes: int, log_folder: Path) -> None:
        self.changed = Condition()
        self.mode: RecordMode | None = info.record  # None: the broker has not said yet
        self.wanted = True  # one test, before anything is built
        self.next_seq = 0
        self.kept_from: int | None = 0 if info.record == "all" else None
        self.pending: deque[tuple[LatentFrame, Snapshot]] = deque()
        self.lost = 0  # kept frames that neither memory nor disk would take
        self.slot: LatentFrame | None = None  # the newest that nobody keeps
        self.kept = KeptFrames(ring_bytes, log_folder)
        self._newest: LatentFrame | None = None  # for "last"
        self._undecided: deque[LatentFrame] = deque()
        self._undecided_bytes = 0
        self._ring_bytes = ring_bytes

    def offer(self, frame: LatentFrame, fetch: Snapshot) -> None:
        """Take one publish, its bytes perhaps still on a device; call with `changed` held."""
        if self.mode in ("off", "last"):
            self.pending.clear()  # a preview is worth its newest frame
        self.pending.append((frame, fetch))

    def collect(self) -> None:
        """Bring what was offered into the slot, the ring or the undecided; the side thread alone."""
        with self.changed:
            offered = list(self.pending)
            self.pending.clear()
        for frame, fetch in offered:
            self._take(dataclasses.replace(frame, payload=fetch()))

    def _take(self, frame: LatentFrame) -> None:
        if self.mode == "all":
            if self.kept_from is not None and frame.seq >= self.kept_from:
                self.kept.append(dataclasses.replace(frame, kept=True))
        elif self.mode is None:
            self._undecided.append(frame)
            self._undecided_bytes += frame.nbytes
            while self._undecided_bytes > self._ring_bytes and len(self._undecided) > 1:
                self._undecided_bytes -= self._undecided.popleft().nbytes
        else:
            self.slot = frame
            self._newest = frame if self.mode == "last" else None

    def settle(self, mode: RecordMode) -> None:
        """The broker said what is kept; the side thread alone, after collect()."""
        if mode == self.mode:
            return
        waiting = list(self._undecided)
        self._undecided.clear()
        self._undecided_bytes = 0
        with self.changed:
            self.mode = mode
            if mode == "all":
                first = waiting[0] if waiting else self.pending[0][0] if self.pending else None
                self.kept_from = first.seq if first else self.next_seq
            else:
                self.kept_from = None
        if mode == "all":
            for frame in waiting:
                self.kept.append(dataclasses.replace(frame, kept=True))
        elif waiting:
            self.slot = waiting[-1]
        self._newest = self.slot if mode == "last" else None

    def keep_last(self) -> None:
        """Turn the newest frame of `record="last"` into a kept one; the side thread alone, at the end of the run."""
        frame = self._newest
        if self.mode == "last" and frame is not None:
            self.kept_from = frame.seq
            self.kept.append(dataclasses.replace(frame, kept=True))
            self._newest = self.slot = None

    def spill_if_full(self, info: StreamInfo) -> None:
        """Move a full ring to disk; where the disk takes it not either, keeping ends, loudly."""
        if not self.kept.is_full:
            return
        try:
            path = self.kept.spill(info)
            logger.warning("ring_full stream=%s kept_in=%s", info.stream, path)
        except LogError as error:
            self.lost += 1
            with self.changed:
                self.mode = "off"
            logger.error("keeping_stopped stream=%s reason=%s", info.stream, error)
