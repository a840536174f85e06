"""The streamer's writing thread: record packets into files, cursors back. A file itself tells how far it is."""

from __future__ import annotations

import errno
import functools
import heapq
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

from taesd_stream.config import Config
from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import END_REASONS, Packet
from taesd_stream.latent_log import bytes_by_run
from taesd_stream.media.recording import Recording, RecordingError, find_unfinished
from taesd_stream.messages import Cursor, Gap, State
from taesd_stream.queues import ByteBoundedQueue
from taesd_stream_workers.role.broken_chains import BrokenChains
from taesd_stream_workers.role.seldom import Seldom
from taesd_stream_workers.streamer.films import Films
from taesd_stream_workers.streamer.finisher import Finished, Finisher
from taesd_stream_workers.streamer.library import Library, Retention
from taesd_stream_workers.streamer.recording_rows import cursor_of, growing_row, meta_of, stuck_row
from taesd_stream_workers.streamer.run_files import RunFiles
from taesd_stream_workers.streamer.unwritten import Unwritten

logger = logging.getLogger(__name__)

QUEUE_BYTES: Final = 64 << 20
FILM_BYTES: Final = 32 << 20
EARLY_BYTES: Final = 16 << 20
ITEM_BYTES: Final = 512  # of one in a queue, without its picture
SYNC_S: Final = 1.0
TELL_S: Final = 0.2
IDLE_S: Final = 0.1
RETRY_S: Final = 5.0
MAX_BLOCKED: Final = 64  # rows of runs that wait for a decoder


class Recorder:
    """All recordings of a daemon. `put` from the streamer's thread; `on_change` is called in the writing thread."""

    def __init__(
        self,
        config: Config,
        tell_broker: Callable[[Any], None],
        on_change: Callable[[list[dict[str, Any]], dict[str, int]], None],
        on_error: Callable[[], None] = lambda: None,
        on_film_error: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder = config.recording_folder
        self.films = Films(folder / ".films", config.recording, on_film_error)
        self.library = Library(folder)
        self.log_folder = config.log_folder
        self._name = config.recording.name
        self._tell_broker = tell_broker
        self._on_change = on_change
        self._on_error = on_error
        self._retention = Retention(self.library, config.recording)
        self._queue: ByteBoundedQueue[Packet | Gap | State] = ByteBoundedQueue(QUEUE_BYTES, _size)
        self._film_queue: ByteBoundedQueue[Packet] = ByteBoundedQueue(FILM_BYTES, _size)  # behind all of the other
        self._open: dict[str, Recording] = {}
        self._finished: dict[str, int] = {}  # run -> attempt that its finished file ended with
        self._runs: dict[str, dict[str, Any]] = {}
        self._shown: dict[str, dict[str, Any]] = {}  # rows of all streams, by run
        self._finisher = Finisher()
        self._finishing: dict[str, Finished] = {}  # by run, of those in _open: they are not written any more
        self.files = RunFiles(self._open, self.films, self.library)
        self._wishes: deque[tuple[str, Future[str]]] = deque()  # films of runs that are over, to be kept
        self._kept: dict[str, Future[str]] = {}  # by run: who waits for its film to be finished
        self._errors: dict[str, str] = {}
        self._blocked: dict[str, str] = {}  # runs that are not decoded, and why: the newest
        self._retry_at_s: dict[str, float] = {}  # when a file that could not be finished is tried again
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder")
        self._broken_films = BrokenChains(lambda _stream: None)  # for want of room; `put`'s alone
        self._unwritten = Unwritten()
        self._seldom = Seldom()
        self._early: ByteBoundedQueue[Packet] = ByteBoundedQueue(EARLY_BYTES, _size)  # that no STATE has named yet
        self._next_sync_s = 0.0
        self._next_tell_s = 0.0
        self._is_dirty = True

    def start(self) -> None:
        """Take over what a former process left, then start the thread."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.films.load()
        for one in find_unfinished(self.folder):
            try:
                recording = Recording.open(
                    self.folder, stream=one.stream, run=one.run, meta={}, name=self._name, paths=one.paths
                )
            except (RecordingError, ValueError) as error:
                logger.error("recording_not_readable run=%s error=%s", one.run, error)
                continue
            if recording.paths:
                self._open[one.run] = recording
        self._finisher.start()
        self._thread.start()

    def put(self, item: Packet | Gap | State) -> bool:
        """Queue work; False when full: the packet is lost, and the broker sends it again (of a film: a hole)."""
        if isinstance(item, State):
            self._queue.put_newest(item)
            return True
        if not isinstance(item, Packet) or item.rendition != "film":
            return self._queue.put(item)
        if not self._broken_films.takes(item):
            return False
        if self._film_queue.put(item):
            return True
        self._broken_films.lose(item)
        return False

    def keep_film(self, run: str) -> Future[str]:
        """Make a recording of the film of a run that is over; the future has its id, or KeyError. Any thread."""
        wish: Future[str] = Future()
        self._wishes.append((run, wish))
        return wish

    def cursors(self) -> tuple[Cursor, ...]:
        """How far every file is; any thread."""
        return tuple(cursor_of(one) for one in list(self._open.values()))

    def close(self) -> None:
        """Write what is queued, sync, close the files (playable as they are), join the thread."""
        self._stop.set()
        self._thread.join()

    def rows(self) -> list[dict[str, Any]]:
        """Every recording, growing ones first; the writing thread alone."""
        errors = self._blocked | self._errors
        logs = bytes_by_run(self.log_folder) if errors else {}
        ended = {run for run, row in self._runs.items() if row["ended"]} | self._finishing.keys()
        growing = [
            growing_row(one, error=errors.get(run), is_ended=run in ended, log_bytes=logs.get(run))
            for run, one in self._open.items()
            if one.paths or errors.get(run)
        ]
        stuck = [
            stuck_row(self.folder, run, self._runs[run], error=error, log_bytes=logs.get(run))
            for run, error in errors.items()
            if run not in self._open and run in self._runs
        ]
        return [*growing, *stuck, *self.library.rows()]

    def _run(self) -> None:
        while not (self._stop.is_set() and not len(self._queue) + len(self._film_queue)):
            item = self._queue.get(timeout_s=0 if len(self._film_queue) else IDLE_S)
            try:
                self._handle(item or self._film_queue.get(timeout_s=0))
                self._keep_films()
                self._take_finished()
                self._sync_all()
                self._is_dirty |= self._retention.tick()
                self._tell_people()
            except Exception as error:  # the thread's outermost loop: one bad file must not end the others
                if self._seldom.may_say(repr(error)):
                    logger.exception("recorder_failed error=%s (said once a minute)", error)
        self._finisher.close()
        self._take_finished()
        for run, one in self._open.items():
            if run not in self._finishing:
                self._sync(one)
                one.close()
        self.films.close()

    def _handle(self, item: Packet | Gap | State | None) -> None:
        if isinstance(item, Packet):
            self._write(item)
        elif isinstance(item, Gap):
            self._skip(item)
        elif isinstance(item, State):
            self._runs = item.runs
            self._shown = {row["run"]: row for row in item.streams}
            self.films.tick(run for run, row in self._shown.items() if row["state"] not in END_REASONS)
            for run, row in item.runs.items():
                if run in self._open and row["kept_from"] is not None:
                    self._open[run].begin_at(row["kept_from"])
            self._finished = {run: attempt for run, attempt in self._finished.items() if run in item.runs}
            self._errors = {run: text for run, text in self._errors.items() if run in item.runs or run in self._open}
            waiting = [(row["started"], run, row["blocked"]) for run, row in item.runs.items() if row["blocked"]]
            blocked = {run: why for _, run, why in heapq.nlargest(MAX_BLOCKED, waiting)}
            self._is_dirty |= blocked != self._blocked
            self._blocked = blocked
            self._write_early(item.now_ns)
            self._finish_what_ended()

    def _write_early(self, state_ns: int) -> None:
        """Packets may overtake the STATE that names their attempt; one that a later STATE does not name is nobody's."""
        for _ in range(len(self._early)):
            packet = self._early.get(timeout_s=0)
            assert packet is not None
            if self._is_named(packet) or packet.stamps.encoded_ns > state_ns:
                self._write(packet)

    def _is_named(self, packet: Packet) -> bool:
        """Whether what we know of its run is as new as the packet: a run may be recorded again, from another frame."""
        if packet.rendition == "film":
            return packet.run in self._shown or packet.run in self.films.films  # another run may have its name by now
        row = self._runs.get(packet.run)
        is_told = row is not None and row["meta"] is not None and row["attempt"] >= packet.attempt
        return packet.run in self._open or is_told

    def _write(self, packet: Packet) -> None:
        if not self._is_named(packet) and self._early.put(packet):
            return None
        if packet.rendition == "film":
            return self._write_film(packet)
        if self._unwritten.takes(packet):
            return None
        try:
            recording = self._recording(packet.run, packet.attempt, packet.seq)
            is_written = recording is not None and recording.write(packet)
        except RecordingError as error:
            self._unwritten.put(packet)
            return self._fail(packet.run, error)  # the cursor stays, until the disk takes it
        if recording is not None and is_written:
            self._errors.pop(packet.run, None)
            self._tell(recording)
        return None

    def _skip(self, gap: Gap) -> None:
        try:
            recording = self._recording(gap.run, gap.attempt, gap.seq)
            if recording is not None:
                recording.skip(gap.seq, gap.attempt)
                self._tell(recording)
        except RecordingError as error:
            self._fail(gap.run, error)

    def _fail(self, run: str, why: object) -> None:
        """Say that a recording stands still; it goes on by itself when its cause is gone."""
        if run not in self._errors:
            logger.error("recording_failed run=%s error=%s", run, why)
        self._errors[run] = str(why)
        if isinstance(why, Exception) and getattr(why.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            self.films.give_way()
        self._is_dirty = True
        self._on_error()

    def _write_film(self, packet: Packet) -> None:
        run, shown, kept = packet.run, self._shown.get(packet.run), self._runs.get(packet.run)
        film = self.films.films.get(run)
        meta = meta_of(shown) if shown else film.meta if film else None
        is_in_a_file = run in self._open or (run in self._finished and (kept is None or kept["takes_film"]))
        if meta is not None and not is_in_a_file:
            self._is_dirty |= self.films.write(packet, meta)

    def _keep_films(self) -> None:
        """Films that people want kept, of runs that are over: those of living ones are the broker's to record."""
        for _ in range(len(self._wishes)):
            run, wish = self._wishes.popleft()
            if run in self._open and run in self.films.films:  # its last picture is recorded: one after the other
                self._wishes.append((run, wish))
                continue
            if not wish.set_running_or_notify_cancel():
                continue  # who asked is gone
            try:
                film = self.films.move(run, self.folder, self._name)
                if film is None:
                    raise KeyError(run)
            except Exception as error:  # noqa: BLE001 whoever waits for it is told, whatever it is
                wish.set_exception(error)
                continue
            self._is_dirty = True
            self._open[run], self._kept[run] = film, wish
            self._finish(run)

    def _take_film(self, run: str, kept_from: int | None) -> Recording | None:
        """The film of a run that is recorded from now on: the recording goes on in it."""
        for packet in self._film_queue.take_all(lambda packet: packet.run == run):
            self._write_film(packet)
        try:
            film = self.films.move(run, self.folder, self._name)
        except RecordingError as error:
            logger.error("film_not_kept run=%s error=%s", run, error)
            return None
        if film is not None and kept_from is not None:
            film.begin_at(kept_from)
        return film

    def _recording(self, run: str, attempt: int, seq: int) -> Recording | None:
        if run in self._finishing:
            return None
        if run not in self._open:
            if attempt <= self._finished.get(run, -1):
                return None  # late, of a file that is finished
            row = self._runs.get(run)
            if row is None or row["meta"] is None:
                return None  # a run that the broker no longer keeps, or has not told all of
            last = self.library.last_seqs().get(run, -1)
            if row["ended"] and last >= row["last_seq"]:
                return None  # its file is finished
            if last >= seq:
                # it comes again, for its ACK was lost with the broker: the rest of the run goes to another file
                self._tell_broker(Cursor(run=run, attempt=attempt, written=last, synced=last))
                return None
            film = self._take_film(run, row["kept_from"]) if row["takes_film"] else None
            self._open[run] = film or Recording.open(
                self.folder,
                stream=row["stream"],
                run=run,
                meta=meta_of(row),
                kept_from=row["kept_from"],
                name=self._name,
            )
            logger.info("recording_begins stream=%s run=%s", row["stream"], run)
        return self._open[run]

    def _finish_what_ended(self) -> None:
        for run in [run for run in self._open if run not in self._runs]:
            self._finish(run)  # the broker has forgotten it: what a shutdown left
        last_seqs = functools.cache(self.library.last_seqs)  # once for all: in a folder of thousands it takes 0.1 s
        for run, row in self._runs.items():
            if not row["ended"]:
                continue
            one = self._open.get(run)
            if one is not None:
                if one.written >= row["last_seq"]:
                    self._finish(run)
            elif run in self._retry_at_s:  # of a batch in tracks some files may be done, and others not
                if time.monotonic() >= self._retry_at_s[run]:
                    self._reopen(run, row["stream"], meta_of(row), row["attempt"])
            elif self._finished.get(run, -1) >= row["attempt"] or last_seqs().get(run, -1) >= row["last_seq"]:
                self._tell_broker(Cursor(run=run, attempt=row["attempt"], written=-1, synced=-1, finished=True))

    def _reopen(self, run: str, stream: str, meta: dict[str, Any], attempt: int) -> None:
        try:
            one = Recording.open(self.folder, stream=stream, run=run, meta=meta, name=self._name)
        except RecordingError as error:
            self._retry_at_s[run] = time.monotonic() + RETRY_S
            self._fail(run, str(error))
            return
        if one.paths:
            self._open[run] = one
        else:  # somebody removed its files: what the log still has begins another one
            self._retry_at_s.pop(run, None)
            self._tell_broker(Cursor(run=run, attempt=attempt, written=-1, synced=-1))

    def _finish(self, run: str) -> None:
        """Begin to make ordinary files of a recording, unless that must wait."""
        if run not in self._finishing and time.monotonic() >= self._retry_at_s.get(run, 0.0):
            self._finishing[run] = self._finisher.finish(self._open[run])

    def _take_finished(self) -> None:
        for run in [run for run, answer in self._finishing.items() if answer.done()]:
            one, answer, wish = self._open.pop(run), self._finishing.pop(run), self._kept.pop(run, None)
            self._is_dirty = True
            error = answer.exception()
            if error is None:
                self._on_finished(one, answer.result())
            else:
                self._fail(run, error)
                self._retry_at_s[run] = time.monotonic() + RETRY_S
                self._reopen(run, one.stream, one.meta, max(0, one.attempt))
            if wish is not None and error is None:
                wish.set_result(self.library.id_of(answer.result()[0]))
            elif wish is not None:  # it is tried again, as every recording is
                wish.set_exception(error)

    def _on_finished(self, one: Recording, paths: list[Path]) -> None:
        run, attempt = one.run, max(0, one.attempt)
        self._retry_at_s.pop(run, None)
        self._errors.pop(run, None)
        self._finished[run] = attempt
        self.library.changed()
        logger.info("recording_finished stream=%s files=%s", one.stream, ", ".join(path.name for path in paths))
        self._tell_broker(Cursor(run=run, attempt=attempt, written=-1, synced=-1, finished=True))

    def _tell(self, one: Recording) -> None:
        self._is_dirty = True
        self._tell_broker(cursor_of(one))

    def _sync_all(self) -> None:
        now = time.monotonic()
        if now < self._next_sync_s:
            return
        self._next_sync_s, self._is_dirty = now + SYNC_S, True  # a person may have removed a file
        for run, one in [(run, one) for run, one in self._open.items() if run not in self._finishing]:
            if (path := one.lost_path) is not None:
                self._lose(run, one, path)
            elif one.synced < one.written:
                self._sync(one)
                self._tell(one)
        for packet in self._unwritten.take_all():
            self._write(packet)

    def _lose(self, run: str, one: Recording, path: Path) -> None:
        """Its file is gone, with what the log no longer has; the rest begins another one."""
        self._fail(run, f"{path}: was removed while it grew")
        attempt = max(0, one.attempt)
        one.close()
        del self._open[run]
        self._tell_broker(Cursor(run=run, attempt=attempt, written=-1, synced=-1))

    def _tell_people(self) -> None:
        now = time.monotonic()
        if self._is_dirty and now >= self._next_tell_s:
            self._next_tell_s, self._is_dirty = now + TELL_S, False
            self._on_change(self.rows(), {run: film.last_seq for run, film in self.films.films.items()})

    def _sync(self, one: Recording) -> None:
        try:
            one.sync()
        except TaesdStreamError as error:
            self._fail(one.run, f"not safe from a power cut: {error}")


def _size(item: Packet | Gap | State) -> int:
    return ITEM_BYTES + (len(item.payload) if isinstance(item, Packet) else 0)
