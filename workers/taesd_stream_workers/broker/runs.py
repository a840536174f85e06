"""What the broker knows of one run: its newest frame, who shows it, and, where it is kept, its way into a recording."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

import msgpack

from taesd_stream.config import FilmMode
from taesd_stream.frames import Demand, LatentFrame, RecordMode, Rendition, RunState, StreamInfo, is_sliced
from taesd_stream.latent_log import RunLog
from taesd_stream.messages import End, History
from taesd_stream.scheduling import Candidate
from taesd_stream_workers.broker.kept_run import KeptRun
from taesd_stream_workers.broker.live_latents import LiveLatents, history_before, latent_bytes, latents_in
from taesd_stream_workers.broker.troubles import Troubles

LOST_AFTER_S: Final = 10.0
MAX_LIVE_IN_FLIGHT: Final = 2
MAX_VIDEO_IN_FLIGHT: Final = 8  # frames of a `live` run that nobody keeps: none of them may be passed over
LOGGED_SOON_NS: Final = 50_000_000  # a disk that takes longer holds up no viewer


def meta_bytes(info: StreamInfo) -> int:
    """Bytes of what a run says of itself, as it travels."""
    return len(msgpack.packb(info.meta))


class Run:
    """One run of a stream, as the broker sees it. Used in the broker's loop alone."""

    def __init__(self, info: StreamInfo, *, peer: bytes | None, record: RecordMode, film: FilmMode = "watched") -> None:
        self.info = info
        self.film = film
        self.client = ""  # who speaks for it: a key's name, else a host
        self.counted_bytes = 0  # of what it holds, against that client's limit
        self.meta_bytes = meta_bytes(info)
        self.peer = peer
        self.record = record
        self.started_unix = time.time()
        self.heard_s = time.monotonic() if peer is not None else float("-inf")
        self.is_shown = True  # its pictures and its row are held, though it is over
        self.is_stoppable = False
        self.is_reopened = False  # from a former broker's log; its publisher has not said OPEN since
        self.stop_asked = False
        self.offset_ns = 0  # broker clock minus publisher clock
        self.newest: LatentFrame | None = None
        self.newest_received_ns = 0
        self.interval_s: float | None = None  # mean time between frames
        self.dispatched: dict[Rendition, int] = {}  # newest seq that went to a worker
        self.forced: set[Rendition] = set()  # renditions that must start anew
        self.worker: bytes | None = None
        self.moves_to: bytes | None = None  # another worker, once nothing is under way at this one
        self.refused_by: set[bytes] = set()  # workers that have no decoder for it
        self.moved_s = float("-inf")
        self.placed_ns = time.monotonic_ns()  # it was made, left its worker or moved: older pictures are not shown
        self.live_in_flight = 0  # frames that a worker decodes for viewers
        self.live_since_ns = 0
        self.live = LiveLatents() if info.kind == "live" else None
        self.memory: tuple[bytes, int] | None = None  # which worker holds the temporal memory, before which index
        self.items_out = 0  # given to its worker, and not answered yet
        self.kept: KeptRun | None = None
        self.attempts = 0  # of its film, and of its finished recordings: a later one's packets must not pass for theirs
        self.recorded_until = -1  # last seq of those recordings
        self.unacked_from: int | None = None  # oldest seq that the publisher still keeps for us
        self.end: End | None = None
        self.ended_unix: float | None = None
        self.troubles = Troubles()
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

    @property
    def is_being_recorded(self) -> bool:
        """Whether something of it is on its way into a file."""
        return self.kept is not None and bool(self.kept.in_flight or self.kept.gaps)

    @property
    def frames_behind(self) -> int:
        """How far its recording is behind the newest kept frame."""
        return max(0, self.kept.logged - self.kept.written) if self.kept else 0

    @property
    def owed_frame(self) -> LatentFrame | None:
        """The newest frame, where the last one was to be kept and was not: kept should the run be lost."""
        if self.record != "last" or self.kept is not None or self.end is not None or self.newest is None:
            return None
        return self.newest if self.newest.seq > self.recorded_until else None

    @property
    def held_bytes(self) -> int:
        """Latents in memory: the newest frame, or all of `live` that waits or is its history; and `kept.front`."""
        newest_bytes = self.newest.nbytes if self.newest is not None else 0
        return max(newest_bytes, self.live.held_bytes if self.live is not None else 0) + self.front_bytes

    @property
    def front_bytes(self) -> int:
        """Latents of `kept.front`."""
        front = self.kept.front if self.kept is not None else None
        return front.nbytes if front is not None else 0

    def is_newer(self, frame: LatentFrame) -> bool:
        """Whether a frame that came in is the newest one, and not sent again."""
        return self.newest is None or frame.seq > self.newest.seq

    @property
    def is_newest_waiting(self) -> bool:
        """Whether no worker was given the newest frame for viewers: the next one takes its place."""
        return self.newest is not None and self.newest.seq > max(self.dispatched.values(), default=-1)

    def take(self, frame: LatentFrame, received_ns: int, *, is_watched: bool, share_bytes: int) -> int:
        """A frame came in: it is the newest, unless it was sent again.

        share_bytes: most that may wait of a `live` run. Returns: latents of it that were left out, for they were late.
        """
        if not self.is_newer(frame):
            return 0
        if self.newest is not None:
            interval_s = (received_ns - self.newest_received_ns) / 1e9
            self.interval_s = interval_s if self.interval_s is None else 0.8 * self.interval_s + 0.2 * interval_s
        self.newest = frame
        self.newest_received_ns = received_ns
        if not self.live_since_ns:
            self.live_since_ns = received_ns
        if self.live is None:
            return 0
        self.live.add(frame, received_ns, waits=is_watched and not frame.kept)
        return self.live.cut(received_ns, share_bytes)

    def candidates(self, wanted: dict[Rendition, int], room_bytes: int) -> list[Candidate]:
        """What of this run could be decoded now, in its order. room_bytes: how much more may be on its way to files."""
        if self.live is not None:
            return self._video_candidates(self.live, wanted, room_bytes)
        live = self._live_renditions(wanted)
        records = self._record_frames(room_bytes)
        if records and live and self.newest is not None and records[0].seq == self.newest.seq:
            return [self._candidate(records[0], (*live, "record"))]
        if live and self.is_being_logged:
            return []
        found = [self._candidate(frame, ("record",)) for frame in records]
        if live and self.newest is not None:
            found.append(self._candidate(self.newest, live))
        return found

    @property
    def is_being_logged(self) -> bool:
        """Whether the newest frame is the recording's next one, and about to be in the log: then once for both."""
        kept, newest = self.kept, self.newest
        if kept is None or newest is None or kept.blocked is not None or kept.next_seq != newest.seq:
            return False
        quick = time.monotonic_ns() - self.newest_received_ns < LOGGED_SOON_NS
        return quick and kept.logged < newest.seq <= kept.queued

    def _live_renditions(self, wanted: dict[Rendition, int]) -> tuple[Rendition, ...]:
        newest = self.newest
        if newest is None or self.live_in_flight >= MAX_LIVE_IN_FLIGHT or self.troubles.is_poison(newest.seq):
            return ()
        due = tuple(
            rendition
            for rendition, viewers in wanted.items()
            if viewers and (rendition in self.forced or self.dispatched.get(rendition, -1) < newest.seq)
        )
        return self._with_film(due, newest)

    def _with_film(self, due: tuple[Rendition, ...], frame: LatentFrame) -> tuple[Rendition, ...]:
        is_filmed = self.film == "watched" and self.record != "all" and self.kept is None
        return (*due, "film") if due and is_filmed and self.dispatched.get("film", -1) < frame.seq else due

    def _video_candidates(self, live: LiveLatents, wanted: dict[Rendition, int], room_bytes: int) -> list[Candidate]:
        """Of a `live` run every frame, in order: what is kept once for file and viewers, else what waits."""
        shown: tuple[Rendition, ...] = tuple(rendition for rendition, viewers in wanted.items() if viewers)
        kept = self.kept
        first_kept = kept.next_seq if kept is not None and kept.next_seq <= kept.logged else None
        room = max(0, MAX_VIDEO_IN_FLIGHT - self.live_in_flight) if shown else 0
        waiting = [one for one in live.waiting() if not self.troubles.is_poison(one.seq)] if shown else []
        early = waiting if first_kept is None else [one for one in waiting if one.seq < first_kept]
        frames = [(frame, self._with_film(shown, frame)) for frame in early[:room]]
        if len(early) <= room:
            for frame in self._record_frames(room_bytes):
                new = tuple(rendition for rendition in shown if self.dispatched.get(rendition, -1) < frame.seq)
                frames.append((frame, (*new, "record")))
        if frames or self.items_out or first_kept is not None:
            return self._in_order(frames)
        return self._newest_again(wanted)

    def _newest_again(self, wanted: dict[Rendition, int]) -> list[Candidate]:
        """Of a `live` run of which nothing waits the newest frame, for viewers that have not seen it."""
        newest = self.newest
        if newest is None or (newest.kept and self.kept is not None and newest.seq > self.kept.logged):
            return []  # a kept one comes out of the log, soon
        again = self._live_renditions(wanted)
        is_shown = self.memory is not None and self.memory[1] == newest.index + latents_in(newest)
        memory = self.memory[0] if self.memory is not None and is_shown else self._memory_at(newest)
        return [self._candidate(newest, again, memory=memory, is_repeat=True)] if again else []

    def _in_order(self, frames: Sequence[tuple[LatentFrame, tuple[Rendition, ...]]]) -> list[Candidate]:
        """Candidates up to the first hole in the video, of which none is due before the one that it follows."""
        found: list[Candidate] = []
        memory = self._memory_at(frames[0][0]) if frames else None
        due_ns, index = 0, frames[0][0].index if frames else 0
        for frame, renditions in frames:
            if frame.index != index:
                break
            one = self._candidate(frame, renditions, memory=memory, not_before_ns=due_ns)
            due_ns, index = one.due_ns, index + latents_in(frame)
            found.append(one)
        return found

    def _record_frames(self, room_bytes: int) -> list[LatentFrame]:
        kept = self.kept
        if kept is None or kept.blocked is not None or kept.next_seq > kept.logged:
            return []
        if time.monotonic() < kept.not_before_s:
            return []
        return kept.ahead(room_bytes)

    def _candidate(
        self,
        frame: LatentFrame,
        renditions: tuple[Rendition, ...],
        *,
        memory: bytes | None = None,
        is_repeat: bool = False,
        not_before_ns: int = 0,
    ) -> Candidate:
        is_record = "record" in renditions
        kept_since = int(self.kept.moved_s * 1e9) if self.kept else 0
        since_ns = self.live_since_ns
        if renditions == ("record",) or (is_record and self.live is not None):
            since_ns = kept_since
        elif self.live is not None:
            since_ns = self.live.received_ns(frame.seq) or since_ns
        return Candidate(
            run=self.info.run,
            seq=frame.seq,
            group=(self.info.latent_format, frame.shape, frame.dtype),
            renditions=renditions,
            nbytes=frame.nbytes,
            since_ns=max(since_ns, not_before_ns),
            worker=self.worker,
            is_suspect=frame.seq in self.troubles.failures,
            is_sliced=is_sliced(self.info.kind, frame.shape),
            attempt=self._attempt(is_record=is_record),
            memory=memory,
            history_bytes=self._history_bytes(frame),
            is_repeat=is_repeat,
        )

    def _attempt(self, *, is_record: bool) -> int:
        if is_record and self.kept is not None:
            return self.kept.attempt
        return self.live.epoch if self.live is not None else 0

    def is_late(self, candidate: Candidate) -> bool:
        """Whether the order that it was part of has been given up since."""
        return candidate.attempt != self._attempt(is_record=candidate.is_record)

    def _memory_at(self, frame: LatentFrame) -> bytes | None:
        return self.memory[0] if self.memory is not None and self.memory[1] == frame.index else None

    def _history_bytes(self, frame: LatentFrame) -> int:
        if self.live is None:
            return 0
        return min(frame.index, self.live.history) * latent_bytes(frame)

    @property
    def history(self) -> int:
        """Latents that are needed before a frame; 0 of pictures."""
        return self.live.history if self.live is not None else 0

    def history_of(self, frame: LatentFrame) -> History:
        """What a worker without the run's memory needs before a `live` frame: from the log, and from what came last."""
        assert self.live is not None
        return history_before(frame, self._frame_at, self.live.history)

    def _frame_at(self, seq: int) -> LatentFrame | None:
        found = self.live.get(seq) if self.live is not None else None
        return found or (self.kept.read(seq) if self.kept is not None else None)

    def received_ns(self, frame: LatentFrame) -> int:
        """When a frame came in; 0 of one that has waited in the log."""
        if self.live is not None:
            return self.live.received_ns(frame.seq)
        return self.newest_received_ns if self.newest is not None and self.newest.seq == frame.seq else 0

    def frame_of(self, candidate: Candidate) -> LatentFrame | None:
        """The frame that a candidate stands for, if it is still here."""
        if candidate.is_record and self.kept is not None:
            return self.kept.held(candidate.seq)
        found = self.live.get(candidate.seq) if self.live is not None else None
        if found is not None:
            return found
        return self.newest if self.newest is not None and self.newest.seq == candidate.seq else None

    def on_dispatched(self, candidate: Candidate, frame: LatentFrame, worker: bytes) -> None:
        """A worker has it now."""
        self.worker = worker
        self.items_out += 1
        for rendition in candidate.renditions:
            if rendition != "record":
                self.dispatched[rendition] = frame.seq
        if candidate.renditions != ("record",):
            self.live_in_flight += 1
            self.forced -= set(candidate.renditions)
            self.live_since_ns = 0
        if self.live is not None:
            self.memory = (worker, frame.index + latents_in(frame))
            if not candidate.is_record:
                self.live.on_dispatched(frame.seq)
        if candidate.is_record and self.kept is not None:
            self.kept.send(frame)

    def on_answered(self, candidate: Candidate) -> None:
        """The worker is done with it, for better or worse."""
        self.items_out = max(0, self.items_out - 1)
        if candidate.is_record and self.kept is not None and not self.is_late(candidate):
            self.kept.on_answered(candidate.seq)
        if candidate.renditions != ("record",):
            self.live_in_flight = max(0, self.live_in_flight - 1)
        if self.live is not None and not candidate.is_record and not self.is_late(candidate):
            self.live.on_over(candidate.seq)

    def on_memory_told(self, worker: bytes, next_index: int | None) -> None:
        """A worker says where its memory of this `live` run goes on, None: nowhere. What is under way counts more."""
        if self.items_out:
            return
        if next_index is not None and self.worker in (None, worker):
            self.worker, self.memory = worker, (worker, next_index)
        elif self.memory is not None and self.memory[0] == worker:
            self.memory = None

    def show_again(self, candidate: Candidate) -> None:
        """A `live` frame gave no picture for want of its history: it goes again, with what follows it."""
        self.memory = None
        self.forced |= {rendition for rendition in candidate.renditions if rendition not in ("record", "film")}
        if self.live is not None and not candidate.is_repeat and not candidate.is_record:
            self.live.return_to(candidate.seq)

    def let_go(self) -> None:
        """It is over, and shown no more: nothing of it is held in memory that is in its log."""
        self.newest = None
        if self.live is not None:
            self.live.clear()

    def finish_keeping(self) -> RunLog:
        """Its recording is finished. Returns: the log, which has done its work."""
        assert self.kept is not None
        log = self.kept.log
        self.attempts, self.recorded_until = self.kept.attempt, self.kept.logged
        self.kept = None
        return log

    def demand(self, watchers: int) -> Demand:
        """How much of it is wanted now."""
        if self.record == "all" or (watchers and self.live is not None):
            return "every"
        return "watched" if watchers else "idle"

    def move(self) -> None:
        """Go on with the worker that it moves to: another encoder begins, with a keyframe; nothing is done again."""
        self.worker, self.moves_to, self.moved_s = self.moves_to, None, time.monotonic()
        self.placed_ns = time.monotonic_ns()
        self.attempts += 1
        if self.kept is not None:
            self.kept.attempt += 1

    def drop_worker(self) -> None:
        """Its worker is gone: what was in flight is done again by another."""
        self.worker = self.moves_to = self.memory = None
        self.placed_ns = time.monotonic_ns()
        self.live_in_flight = self.items_out = 0
        self.dispatched.clear()
        self.live_since_ns = self.live_since_ns or time.monotonic_ns()  # what it had waits again
        self.forced.add("live")  # should it come back, its encoder would go on from a picture that nobody saw last
        if self.live is not None:
            self.live.return_to_in_flight()
        self.attempts += 1
        if self.kept is not None and (self.kept.in_flight or self.kept.next_seq > self.kept.written + 1):
            self.kept.restart(self.kept.written, self.kept.attempt + 1)
        elif self.kept is not None:
            self.kept.attempt += 1  # another encoder begins, with a keyframe
