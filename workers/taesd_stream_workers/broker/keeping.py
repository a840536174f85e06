"""What is kept of runs: frames and ends go into their logs, acks back, and people hear of a disk in trouble."""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from typing import Final

from taesd_stream.config import Config
from taesd_stream.frames import LatentFrame
from taesd_stream.messages import Ack, End, RunHello
from taesd_stream_workers.broker.kept_run import KeptRun
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.log_writer import LogWriter
from taesd_stream_workers.broker.registry import Registry
from taesd_stream_workers.broker.runs import Run

logger = logging.getLogger(__name__)

LOG_ROOM_AGAIN: Final = 0.9  # of what may wait: under it, the alert goes
OWN_SHARE: Final = 0.95  # of it: no client that holds more than half takes what is left for the others
MAX_KEPT: Final = 10_000  # runs with a log: STATE must hold a row of each
_TOO_MANY: Final = "{} runs wait to be recorded, of {}: no other is kept. Check that a worker has their decoders."


class Keeping:
    """Used in the broker's loop alone; the log's writes happen in the writer's thread."""

    def __init__(self, config: Config, registry: Registry, writer: LogWriter, links: Links) -> None:
        self._config = config
        self._registry = registry
        self._writer = writer
        self._links = links
        self._log_max_bytes = config.broker.log_max_bytes
        self._log_bytes: Counter[str] = Counter()  # by client, counted anew at each tick
        self._kept_runs: Counter[str] = Counter()

    def open(self) -> None:
        """Find out how much the log holds, and may hold."""
        self._count()
        if not self._log_max_bytes:  # what it holds was free once: the bound is the same after each start
            free = shutil.disk_usage(self._registry.log_folder).free
            self._log_max_bytes = (free + self._log_bytes.total()) // 2

    def _count(self) -> None:
        self._log_bytes.clear()
        self._kept_runs.clear()
        for run in self._registry.by_run.values():
            if run.kept is not None:
                self._log_bytes[run.client] += run.kept.log.nbytes
                self._kept_runs[run.client] += 1

    def keep(self, run: Run, frame: LatentFrame) -> None:
        """A frame that is to be kept: into the log, if it is the next one. When full: no ack, so it comes again."""
        kept = run.kept
        if kept is None:
            if frame.seq <= run.recorded_until or _is_behind_a_lost_one(run, frame):
                return  # HELLO's ACK says that it is in a file already, or that one before it is missing
            if self._is_one_too_many(run):
                return
            kept = self._begin_keeping(run, frame)
        for one in (kept.front, frame) if not kept.is_over else ():  # else its recording is being finished
            if one is not None:
                self._log(run, kept, one)

    def _log(self, run: Run, kept: KeptRun, frame: LatentFrame) -> None:
        if frame.seq != kept.queued + 1:
            return  # it is there already, or one before it is not
        if _is_full(self._log_bytes, run.client, self._log_max_bytes):
            if "log_full" not in self._links.alerts:
                self._links.alert("log_full", self._full_text())
        elif self._writer.submit(kept.log, frame):
            kept.queued = frame.seq
            self._log_bytes[run.client] += frame.nbytes

    def _is_one_too_many(self, run: Run) -> bool:
        is_full = _is_full(self._kept_runs, run.client, MAX_KEPT)
        if is_full:
            self._links.alert("too_many_runs", _TOO_MANY.format(self._kept_runs.total(), MAX_KEPT))
        return is_full

    def _full_text(self) -> str:
        held: Counter[str] = Counter()
        for run in self._registry.by_run.values():
            held[run.info.stream] += run.kept.log.nbytes if run.kept is not None else 0
        ((stream, nbytes),) = held.most_common(1)
        is_full = held.total() > self._log_max_bytes
        state = "full" if is_full else "nearly full, and a client that has most of it gets no more"
        largest = f"Its largest stream, {stream}, has {nbytes >> 20} of {held.total() >> 20} MiB."
        return f"The latent log is {state}: recordings wait. Free space or raise broker.log_max_bytes. {largest}"

    def _begin_keeping(self, run: Run, frame: LatentFrame) -> KeptRun:
        """Keep from this frame on, or from the newest one we hold if it is the one before (PROTOCOL 2)."""
        newest = run.newest
        follows = newest is not None and newest.seq == frame.seq - 1 and newest.shape == frame.shape
        if newest is None or not follows or newest.kept or run.record != "all":
            return self._keep_log(run, frame.seq)
        kept = self._keep_log(run, newest.seq)
        kept.front = newest
        return kept

    def _keep_log(self, run: Run, first_seq: int) -> KeptRun:
        self._kept_runs[run.client] += 1
        return self._registry.keep_log(run, first_seq)

    def ack_written(self) -> None:
        """ACK what the log has since the last call; what it could not take is not acked, and so sent again."""
        for done in self._writer.results():
            run = self._registry.by_run.get(done.log.info.run)
            if run is None:
                continue
            kept = run.kept if run.kept is not None and run.kept.log is done.log else None
            if isinstance(done.message, End):
                self._end_written(run, kept, done.error)
            elif kept is not None:
                self._frame_written(run, kept, done.message.seq, done.error)

    def _frame_written(self, run: Run, kept: KeptRun, seq: int, error: str | None) -> None:
        if error is not None and seq != kept.logged + 1:
            return  # it only followed one that failed, which was sent again since
        kept.error = error
        if error is not None:
            kept.queued = kept.logged
            self._say_error(error)
            return
        kept.logged = seq
        if kept.front is not None and kept.front.seq <= seq:
            kept.front = None
        self._registry.touch(run)
        if run.peer is not None:
            self._links.to_publisher(run.peer, Ack(run=run.info.run, seq=seq))

    def _end_written(self, run: Run, kept: KeptRun | None, error: str | None) -> None:
        if kept is None or error is None:
            self.ack_end(run)
        else:
            kept.is_end_queued, kept.error = False, error  # it is tried again
            self._say_error(error)

    def _say_error(self, error: str) -> None:
        self._links.counts["log_errors"] += 1
        self._links.alert("log_error", f"The latent log cannot be written: {error}")

    def tick(self) -> None:
        """Twice a second: what is over, what waits for a disk, and how much is held."""
        now = time.monotonic()
        for run in self._registry.by_run.values():
            is_lost = run.end is None and now - run.heard_s > self._config.recording.lost_after_s
            if is_lost and (last := run.owed_frame) is not None:
                self._keep_last(run, last)
            kept = run.kept
            if kept is None:
                continue
            kept.is_over |= is_lost
            if kept.is_over and kept.front is not None:
                self._log(run, kept, kept.front)  # only we have it: it waits here until the disk has room
                continue
            if self.log_end(run) and kept.is_over:
                kept.error = None  # it waits for no disk
            if kept.is_over and kept.is_empty:
                self._forget_log(run)  # there is nothing to record
        self._say_of_disk()
        self._drop_old_logs()
        self._count()
        if self._log_bytes.total() < LOG_ROOM_AGAIN * self._log_max_bytes:
            self._links.resolve("log_full")
        if self._kept_runs.total() < LOG_ROOM_AGAIN * MAX_KEPT:
            self._links.resolve("too_many_runs")

    def _keep_last(self, run: Run, last: LatentFrame) -> None:
        """Of a lost run that keeps its last frame: nobody but us has it."""
        if self._is_one_too_many(run):
            logger.error("frame_not_kept stream=%s run=%s seq=%d", run.info.stream, run.info.run, last.seq)
            run.let_go()
        else:
            self._keep_log(run, last.seq).front = last

    def _say_of_disk(self) -> None:
        kept_runs = [run.kept for run in self._registry.by_run.values() if run.kept is not None]
        if not any(kept.error for kept in kept_runs):
            self._links.resolve("log_error")
        unreadable = next((kept.unreadable for kept in kept_runs if kept.unreadable), None)
        if unreadable is None:
            self._links.resolve("log_unreadable")
        else:
            self._links.alert("log_unreadable", f"The latent log cannot be read, recordings wait: {unreadable}")

    def log_end(self, run: Run) -> bool:
        """Whether the END of a run is in its log, or need not be; else it goes there, again where the disk was full."""
        kept = run.kept
        if run.end is None or kept is None or kept.is_empty or kept.log.ended is not None:
            return True
        if not kept.is_end_queued:
            kept.is_end_queued = self._writer.submit(kept.log, run.end)
        return False

    def give_up(self, run: Run, why: str) -> None:
        """What waits of a run that is over is not recorded any more."""
        text = "log_given_up stream=%s run=%s frames=%d reason=%s"
        logger.error(text, run.info.stream, run.info.run, run.frames_behind, why)
        self._forget_log(run)

    def _forget_log(self, run: Run) -> None:
        self._writer.delete(run.finish_keeping())
        self._registry.touch(run)
        self._links.is_changed = True

    def _drop_old_logs(self) -> None:
        """What nobody could record for `broker.log_max_age_s` goes; never without that key."""
        max_age_s = self._config.broker.log_max_age_s
        if not max_age_s:
            return
        for run in self._registry.by_run.values():
            changed_unix = run.kept.log.changed_unix if run.kept is not None and run.kept.is_over else 0.0
            if not changed_unix or time.time() - changed_unix < max_age_s:
                continue
            self._links.counts["logs_expired"] += 1
            self.give_up(run, "broker.log_max_age_s")

    def ack_end(self, run: Run) -> None:
        """Tell its publisher that all of the run is safe."""
        if run.peer is not None:
            self._links.to_publisher(run.peer, Ack(run=run.info.run, seq=logged_seq(run), ended=True))


def _is_full(held: Counter[str], client: str, most: int) -> bool:
    """Whether a client gets no more of what all share."""
    every = held.total()
    return every >= most or (every > OWN_SHARE * most and 2 * held[client] > every)


def ends_keeping(run: Run, kept: KeptRun, row: RunHello) -> bool:
    """Whether nothing more comes for this recording: keeping is off, or was, and began again behind a hole."""
    if row.kept_from is None:
        return run.record != "all"
    return row.kept_from > kept.held_until + 1


def _is_behind_a_lost_one(run: Run, frame: LatentFrame) -> bool:
    """Whether an earlier kept frame did not come in: to begin here would ack it. Both are sent again."""
    return run.unacked_from is not None and frame.seq > max(run.unacked_from, run.recorded_until + 1)


def logged_seq(run: Run) -> int:
    """The last seq that its publisher need not keep, -1 for none."""
    return run.kept.logged if run.kept is not None else run.recorded_until
