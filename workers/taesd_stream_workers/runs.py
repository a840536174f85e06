"""What the broker knows of one run: its newest frame, who shows it, and, where it is kept, its way into a recording."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from taesd_stream.config import FilmMode
from taesd_stream.frames import (
    Demand,
    LatentFrame,
    RecordMode,
    Rendition,
    RunState,
    StreamInfo,
)
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.latent_log import RunLog
from taesd_stream.messages import End
from taesd_stream.scheduling import Candidate

LOST_AFTER_S: Final = 10.0
MAX_LIVE_IN_FLIGHT: Final = 2
MAX_TRIES: Final = 2  # jobs that may end on one frame
READ_AHEAD_FRAMES: Final = 16
READ_AHEAD_BYTES: Final = 16 << 20
RECORD_STUCK_S: Final = 15.0  # packets that were sent and never written: a new attempt


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
    is_over: bool = False  # nothing more will be kept
    moved_s: float = 0.0  # when the cursor last moved, or the first frame behind it was sent
    not_before_s: float = 0.0  # when the next frame may be tried
    told: int = -1  # last seq in the file, as the streamer last said, of whatever attempt
    blocked: str | None = None  # why it waits: no decoder, say
    gaps: set[int] = field(default_factory=set)  # seqs that give no picture: the cursor passes them
    _ahead: deque[LatentFrame] = field(default_factory=deque)

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of latents that are on their way into the file."""
        return sum(nbytes for _, nbytes in self.in_flight)

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
        self.moved_s = time.monotonic()

    def on_cursor(self, written: int) -> None:
        """The streamer has written so far."""
        if written > self.written:
            self.written = written
            self.next_seq = max(self.next_seq, written + 1)
            self.moved_s = time.monotonic()
        while self.in_flight and self.in_flight[0][0] <= written:
            self.in_flight.popleft()


def meta_bytes(info: StreamInfo) -> int:
    """Bytes of what a run says of itself, as it travels."""
    return len(msgpack.packb(info.meta))


class Run:
    """One run of a stream, as the broker sees it. Used in the broker's loop alone."""

    def __init__(self, info: StreamInfo, *, peer: bytes | None, record: RecordMode, film: FilmMode = "watched") -> None:
        self.info = info
        self.film = film
        self.meta_bytes = meta_bytes(info)
        self.peer = peer
        self.record = record
        self.started_unix = time.time()
        self.heard_s = time.monotonic() if peer is not None else float("-inf")
        self.is_stoppable = False
        self.stop_asked = False
        self.offset_ns = 0  # broker clock minus publisher clock
        self.newest: LatentFrame | None = None
        self.newest_received_ns = 0
        self.interval_s: float | None = None  # mean time between frames
        self.dispatched: dict[Rendition, int] = {}  # newest seq that went to a worker
        self.forced: set[Rendition] = set()  # renditions that must start anew
        self.failures: dict[int, int] = {}  # seq -> how many jobs ended on it
        self.worker: bytes | None = None
        self.live_in_flight = 0
        self.live_since_ns = 0
        self.kept: KeptRun | None = None
        self.attempts = 0  # of its film, and of its finished recordings: a later one's packets must not pass for theirs
        self.recorded_until = -1  # last seq of those recordings
        self.unacked_from: int | None = None  # oldest seq that the publisher still keeps for us
        self.end: End | None = None
        self.ended_unix: float | None = None
        self.note: str | None = None
        self.told: tuple[Demand, RecordMode] | None = None
        self.faults = 0

    @property
    def is_alive(self) -> bool:
        """Whether its publisher is there."""
        return self.end is None and time.monotonic() - self.heard_s < LOST_AFTER_S

    @property
    def state(self) -> RunState:
        """The state that people see (PROTOCOL 1)."""
        if self.end is not None:
            return self.end.reason
        if not self.is_alive:
            return "lost"
        return "live" if self.newest is not None else "waiting"

    @property
    def is_stalled(self) -> bool:
        """Whether its next step takes much longer than its steps do."""
        if self.state != "live" or self.interval_s is None:
            return False
        quiet_s = (time.monotonic_ns() - self.newest_received_ns) / 1e9
        return quiet_s > max(10.0, 5 * self.interval_s)

    def take(self, frame: LatentFrame, received_ns: int) -> None:
        """A frame came in: it is the newest, unless it was sent again."""
        if self.newest is not None and frame.seq <= self.newest.seq:
            return
        if self.newest is not None:
            interval_s = (received_ns - self.newest_received_ns) / 1e9
            self.interval_s = interval_s if self.interval_s is None else 0.8 * self.interval_s + 0.2 * interval_s
        self.newest = frame
        self.newest_received_ns = received_ns
        if not self.live_since_ns:
            self.live_since_ns = received_ns

    def candidates(self, wanted: dict[Rendition, int], room_bytes: int) -> list[Candidate]:
        """What of this run could be decoded now. room_bytes: how much more may be on its way into files."""
        live = self._live_renditions(wanted)
        records = self._record_frames(room_bytes)
        if records and live and self.newest is not None and records[0].seq == self.newest.seq:
            return [self._candidate(records[0], (*live, "record"))]
        found = [self._candidate(frame, ("record",)) for frame in records]
        if live and self.newest is not None:
            found.append(self._candidate(self.newest, live))
        return found

    def _live_renditions(self, wanted: dict[Rendition, int]) -> tuple[Rendition, ...]:
        newest = self.newest
        if newest is None or self.live_in_flight >= MAX_LIVE_IN_FLIGHT or self.failures.get(newest.seq, 0) >= MAX_TRIES:
            return ()
        due = tuple(
            rendition
            for rendition, viewers in wanted.items()
            if viewers and (rendition in self.forced or self.dispatched.get(rendition, -1) < newest.seq)
        )
        is_filmed = self.film == "watched" and self.record != "all" and self.kept is None
        return (*due, "film") if due and is_filmed and self.dispatched.get("film", -1) < newest.seq else due

    def _record_frames(self, room_bytes: int) -> list[LatentFrame]:
        kept = self.kept
        if kept is None or kept.blocked is not None or kept.next_seq > kept.logged:
            return []
        if time.monotonic() < kept.not_before_s:
            return []
        frames: list[LatentFrame] = []
        for frame in kept.ahead(room_bytes):
            within = frame.nbytes <= room_bytes or len(kept.in_flight) + len(frames) < 2
            if not within or frame.seq in kept.gaps:
                break
            room_bytes -= frame.nbytes
            frames.append(frame)
        return frames

    def _candidate(self, frame: LatentFrame, renditions: tuple[Rendition, ...]) -> Candidate:
        kept_since = int(self.kept.moved_s * 1e9) if self.kept else 0
        return Candidate(
            run=self.info.run,
            seq=frame.seq,
            group=(self.info.latent_format, frame.shape, frame.dtype),
            renditions=renditions,
            nbytes=frame.nbytes,
            since_ns=kept_since if renditions == ("record",) else self.live_since_ns,
            worker=self.worker,
            is_suspect=frame.seq in self.failures,
        )

    def frame_of(self, candidate: Candidate) -> LatentFrame | None:
        """The frame that a candidate stands for, if it is still here."""
        if candidate.is_record and self.kept is not None:
            read = self.kept.ahead(0)  # no more than what the candidates were made of
            return next((frame for frame in read if frame.seq == candidate.seq), None)
        return self.newest if self.newest is not None and self.newest.seq == candidate.seq else None

    def on_dispatched(self, candidate: Candidate, frame: LatentFrame, worker: bytes) -> None:
        """A worker has it now."""
        self.worker = worker
        for rendition in candidate.renditions:
            if rendition != "record":
                self.dispatched[rendition] = frame.seq
        if candidate.renditions != ("record",):
            self.live_in_flight += 1
            self.forced -= set(candidate.renditions)
            self.live_since_ns = 0
        if candidate.is_record and self.kept is not None:
            if not self.kept.in_flight:
                self.kept.moved_s = time.monotonic()
            self.kept.in_flight.append((frame.seq, frame.nbytes))
            self.kept.next_seq = frame.seq + 1

    def finish_keeping(self) -> RunLog:
        """Its recording is finished. Returns: the log, which has done its work."""
        assert self.kept is not None
        log = self.kept.log
        self.attempts, self.recorded_until = self.kept.attempt, self.kept.logged
        self.kept = None
        return log

    def demand(self, watchers: int) -> Demand:
        """How much of it is wanted now."""
        if self.record == "all":
            return "every"
        return "watched" if watchers else "idle"

    def drop_worker(self) -> None:
        """Its worker is gone: what was in flight is done again by another."""
        self.worker = None
        self.live_in_flight = 0
        self.dispatched.clear()
        self.attempts += 1
        if self.kept is not None and (self.kept.in_flight or self.kept.next_seq > self.kept.written + 1):
            self.kept.restart(self.kept.written, self.kept.attempt + 1)
        elif self.kept is not None:
            self.kept.attempt += 1  # another encoder begins, with a keyframe

    def to_state(self, wanted: dict[Rendition, int]) -> dict[str, Any]:
        """The stream's row of STATE and of the HTTP interface."""
        newest = self.newest
        flags = [
            flag
            for flag, is_set in (
                ("stalled", self.is_stalled),
                ("degraded", self.note is not None),
                ("stopping", self.stop_asked and self.end is None),
            )
            if is_set
        ]
        width, height = self._size_px()
        return {
            "name": self.info.stream,
            "run": self.info.run,
            "state": self.state,
            "flags": flags,
            "kind": self.info.kind,
            "latent_format": self.info.latent_format,
            "width": width,
            "height": height,
            "step": newest.step if newest else None,
            "total_steps": newest.total_steps if newest else None,
            "sigma": newest.sigma if newest else None,
            "seq": newest.seq if newest else None,
            "fps": round(1 / self.interval_s, 2) if self.interval_s and self.state == "live" else None,
            "viewers": max(wanted.values(), default=0),
            "record": self.record,
            "stoppable": self.is_stoppable and self.end is None,
            "meta": self.info.meta,
            "started": self.started_unix,
            "ended": self.ended_unix,
            "end_text": self.end.text or None if self.end else None,
            "note": self.note,
            "faults": self.faults,
        }

    def _size_px(self) -> tuple[int | None, int | None]:
        latent_format = LATENT_FORMATS.get(self.info.latent_format)
        if self.newest is None or latent_format is None:
            return None, None
        _, _, rows, columns = latent_format.check_shape(self.info.kind, self.newest.shape)
        height, width = latent_format.picture_size(rows, columns)
        return width, height

    def to_recording_state(self) -> dict[str, Any]:
        """What the streamer must know of a kept run."""
        kept = self.kept
        assert kept is not None
        return {
            "stream": self.info.stream,
            "meta": self.info.meta,
            "kind": self.info.kind,
            "latent_format": self.info.latent_format,
            "takes_film": self.record == "all",
            "ended": kept.is_over and kept.queued == kept.logged,
            "last_seq": kept.logged,
            "kept_from": kept.log.first_seq,
            "attempt": kept.attempt,
        }
