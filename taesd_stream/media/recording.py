"""One run becomes one growing file: what is written is playable, and the file itself tells how far it is.

A frame is one `write` of one fragment; a frame that will never come is a note in the file. A new attempt cuts the file
back to where it begins. A killed writer leaves at most a torn tail, which the next one cuts.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import av

from taesd_stream import __version__
from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import Packet, is_run_id, is_stream_name
from taesd_stream.media.clock import ForwardPts
from taesd_stream.media.file_names import DEFAULT_NAME, file_name
from taesd_stream.media.finished import finish_file
from taesd_stream.media.fragments import (
    FragmentError,
    Sample,
    durations,
    fragment,
    init_segment,
    note,
    parameter_sets,
)
from taesd_stream.media.growing_file import GrowingFile, Unfinished, find_unfinished

__all__ = ["Recording", "RecordingError", "Unfinished", "find_unfinished"]


class RecordingError(TaesdStreamError):
    """The disk did not take it. Frames up to `written` are safe in the file; the same call may be made again later."""

    def __init__(self, text: str, *, written: int) -> None:
        super().__init__(text)
        self.written = written


class Recording:
    """The growing files `NAME.mp4.part` of one run: append fragments, cut back, finish.

    One thread writes, reads and finishes it; another one may call `sync`, but not while it is being finished. Nothing
    is on disk before the first frame.
    """

    def __init__(
        self, folder: Path, *, stream: str, run: str, meta: Mapping[str, Any], kept_from: int | None = None
    ) -> None:
        """Store only; `open` is how to get one. Raises: ValueError for a name that is no stream's or no run's."""
        if not is_stream_name(stream) or not is_run_id(run):
            raise ValueError(f"recording: expected a stream's name and a run, got {stream!r} and {run!r}")
        self.stream, self.run = stream, run
        self.meta: dict[str, Any] = json.loads(json.dumps(meta, default=str, skipkeys=True))
        self.started = time.time()
        self.attempt = -1  # the newest one that was taken
        self.synced = -1  # last seq behind an fdatasync
        self.is_film = False  # nobody asked to keep it: frames may be missing without a word
        self.name = DEFAULT_NAME  # template of its files' names
        self._folder = folder
        self._floor = kept_from or 0
        self._start = kept_from  # seq that an empty recording must begin with
        self._files: list[GrowingFile] = []  # one a size of picture
        self._early_gaps: list[int] = []  # before there is a file
        self._chained = False  # the next frame of this attempt may lean on the one before
        self._pending: list[Packet] = []  # pictures of a frame that is not whole yet
        self._cuts = 0
        self._lock = Lock()  # files come, shrink and go under it: sync() must not meet a closed one

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        stream: str,
        run: str,
        meta: Mapping[str, Any],
        kept_from: int | None = None,
        is_film: bool = False,
        name: str = DEFAULT_NAME,
        paths: Sequence[Path] | None = None,
    ) -> Recording:
        """A new recording, or the one that this run has there already: a torn tail is cut, and it goes on.

        kept_from: seq that the first frame must have; None: the first keyframe that comes begins the file.
        is_film: it takes packets of `film`, whichever come. name: template of new files' names, see `file_name`.
        paths: the growing files of the run, in the order of their frames; None: every head in the folder is read.
        Raises: RecordingError when a file cannot be opened; ValueError for a name that is no stream's or no run's.
        """
        recording = cls(folder, stream=stream, run=run, meta=meta, kept_from=kept_from)
        recording.is_film, recording.name = is_film, name
        try:
            if paths is None:
                paths = next((one.paths for one in find_unfinished(folder) if one.run == run), ())
            for path in paths:
                recording._take_over(path)
        except (OSError, FragmentError) as error:
            recording.close()
            raise RecordingError(f"{folder}: {error}", written=-1) from error
        return recording

    @property
    def written(self) -> int:
        """Last seq whose fragment is wholly in the file, or that a gap let pass; -1: none yet. Any thread."""
        for file in self._files[-1:]:  # one look at the list: the writing thread may empty it meanwhile
            return file.index.entries[-1].seq
        return [-1, *self._early_gaps][-1]

    @property
    def missing(self) -> list[int]:
        """The seqs that will never come, in order."""
        return [*self._early_gaps, *(seq for file in self._files for seq in file.index.missing)]

    @property
    def frames(self) -> int:
        """How many frames are in the files."""
        return sum(len(file.index.entries) - len(file.index.missing) for file in self._files)

    @property
    def first_seq(self) -> int | None:
        """seq of the first frame in the files, None before there is one."""
        return self._files[0].index.entries[0].seq if self._files else None

    @property
    def parts(self) -> int:
        """How many files become of the newest growing one: one for each picture of a batch that is recorded so."""
        return _parts_of(self._files[-1]) if self._files else 1

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(file.index.end for file in self._files)

    @property
    def paths(self) -> list[Path]:
        """The growing files, in the order of their frames."""
        return [file.path for file in self._files]

    @property
    def lost_path(self) -> Path | None:
        """A growing file that somebody has removed: what is written to it is in no folder any more."""
        return next((file.path for file in self._files if not file.is_there), None)

    def write(self, packet: Packet) -> bool:
        """Append the frame of a packet when all its pictures are there; returns whether that happened.

        A newer attempt must start at a keyframe and leave no hole: the file is first cut back to just before it.
        Packets of an older attempt, and any but the next one of this attempt, are dropped; a film may leave frames out.
        Raises: RecordingError when the disk does not take it; ValueError for a packet of another run or rendition, or
        of a count that its tracks do not share evenly.
        """
        rendition = "film" if self.is_film else "record"
        if packet.run != self.run or packet.rendition != rendition:
            raise ValueError(f"packet: expected {rendition} of {self.run}, got {packet.rendition} of {packet.run}")
        if packet.count % packet.tracks:
            raise ValueError(f"packet: expected as many pictures in each of {packet.tracks} tracks, got {packet.count}")
        if packet.index == 0:
            if not self._may_come(packet.seq, packet.attempt, packet.is_keyframe):
                return False
            self._begin(packet.seq, packet.attempt)
        elif not self._continues(packet):
            return False
        pictures = [*self._pending, packet]
        if len(pictures) < packet.count:
            self._pending = pictures
            return False
        return self._append(pictures)

    def skip(self, seq: int, attempt: int) -> None:
        """Let the cursor pass a frame that will never come; the file lists it. Out of turn it does nothing.

        Raises: RecordingError when the disk does not take the note.
        """
        if not self._may_come(seq, attempt, True):
            return
        self._begin(seq, attempt)
        if not self._files:
            self._early_gaps.append(seq)
            return
        file = self._files[-1]
        try:
            file.append(seq, note({"missing": seq, "attempt": attempt}), attempt=attempt, times=None)
        except OSError as error:
            raise self._failed(error, file.path) from error

    def keep(self, folder: Path, name: str = DEFAULT_NAME) -> None:
        """A film becomes a recording: its files move to `folder`; `begin_at` says what comes next.

        name: template of their names there.
        Raises: RecordingError; what has moved is a recording, what has not a film still.
        """
        self._pending, self.name = [], name
        try:
            with self._lock:
                for file in self._files:
                    file.move_to(folder, self._file_name())
        except OSError as error:
            raise self._failed(error, folder) from error
        self._folder, self.is_film = folder, False
        self.attempt, self._chained = -1, False  # those of a film count for nothing

    def begin_at(self, kept_from: int) -> None:
        """From this frame on none will be missing, whatever the file holds before it; once said, it stands."""
        if self._start is None:
            self._floor = self._start = kept_from

    def sync(self) -> None:
        """Force what is written to the disk; `synced` tells how far. Raises: RecordingError."""
        copies: list[int] = []
        try:
            with self._lock:
                target, cuts = self.written if self._files else -1, self._cuts
                copies.extend(os.dup(file.fd) for file in self._files if file.fd >= 0)  # closed below
            for fd in copies:
                getattr(os, "fdatasync", os.fsync)(fd)
        except OSError as error:
            raise self._failed(error, self._folder) from error
        finally:
            for fd in copies:
                os.close(fd)
        with self._lock:
            if cuts == self._cuts:  # else what was synced is not what is there now
                self.synced = max(self.synced, target)

    def finish(self) -> list[Path]:
        """Turn each file into an ordinary fast-start MP4 `NAME.mp4`; returns them. The recording is of no use then.

        A file of several tracks becomes as many, `NAME.1.mp4`, `NAME.2.mp4`… What it tells of itself stays as it
        was, for any thread.
        Raises: RecordingError; what is not finished grows still: open and finish it again.
        """
        written, paths = self.written, self.paths
        with self._lock:
            self._pending = []
            for file in self._files:
                file.close()  # Windows removes no open file
        try:
            return [finished for path in paths for finished in finish_file(path)]
        except (OSError, av.FFmpegError, FragmentError) as error:
            raise RecordingError(f"{self._folder}: cannot finish: {error}", written=written) from error

    def close(self) -> None:
        """Let go of the files as they are; `open` goes on in them."""
        with self._lock:
            for file in self._files:
                file.close()
            self._files = []
            self._pending = []

    def _failed(self, error: OSError, path: Path) -> RecordingError:
        return RecordingError(f"{error.filename or path}: {error.strerror}", written=self.written)

    def _take_over(self, path: Path) -> None:
        file = GrowingFile.reopen(path)
        if file is None:
            return
        head = file.index.head
        self.meta, self.started = head["meta"], head["started"]
        self._early_gaps = self._early_gaps or head["missing"]
        self.attempt = file.index.attempt
        self._chained = file.index.entries[-1].tfdt is not None
        self._files.append(file)
        self._rest_older()

    def _rest_older(self) -> None:
        """Of a run whose sizes alternate each change is a file: none but the newest holds a descriptor for long."""
        for file in self._files[:-1]:
            with self._lock:
                file.rest()

    def _may_come(self, seq: int, attempt: int, is_keyframe: bool) -> bool:
        if self.is_film and attempt == self.attempt:
            return seq > self.written and (self._chained or is_keyframe)
        if self.is_film:
            return is_keyframe and (attempt > self.attempt or seq > self.written)
        expected = max(self.written + 1, self._start or 0) if self.written >= 0 else self._start
        if attempt > self.attempt:
            return is_keyframe and (expected is None or self._floor <= seq <= expected)
        return attempt == self.attempt and seq == expected and (self._chained or is_keyframe)

    def _continues(self, packet: Packet) -> bool:
        if not self._pending:
            return False
        last = self._pending[-1]
        same = all(getattr(packet, key) == getattr(last, key) for key in ("seq", "attempt", "count", "tracks"))
        return same and packet.index == last.index + 1

    def _begin(self, seq: int, attempt: int) -> None:
        """A frame or a gap that may come begins: drop what it replaces."""
        self._pending = []
        if attempt != self.attempt:
            self._cut_back(seq)
            self.attempt, self._chained = attempt, False
        if self.written < 0 and not self.is_film:
            self._start = seq

    def _cut_back(self, seq: int) -> None:
        with self._lock:  # the newest file first: a crash between leaves a run without holes
            self._early_gaps = [gap for gap in self._early_gaps if gap < seq]
            while self.written >= seq:
                file = self._files[-1]
                self._cuts += 1
                self.synced = min(self.synced, seq - 1)
                try:
                    if not file.cut_before(seq):
                        self._files.pop().remove()
                except OSError as error:
                    raise self._failed(error, file.path) from error

    def _append(self, packets: list[Packet]) -> bool:
        parts = packets[0].tracks
        sets = parameter_sets(packets[0].payload) if all(one.is_keyframe for one in packets[:parts]) else None
        file = self._files[-1] if self._files else None
        has_parts = file is not None and _parts_of(file) == parts
        try:
            if sets is not None and (file is None or not has_parts or _sets_of(file) != sets):
                self._begin_file(packets, sets)
            elif file is None or not has_parts:
                return False  # a file cannot begin without them
            else:
                self._put(file, packets)
        except OSError as error:
            raise self._failed(error, file.path if file else self._folder) from error
        self._chained, self._pending = True, []
        return True

    def _begin_file(self, packets: list[Packet], sets: tuple[bytes, bytes]) -> None:
        """A run's first frame, or one of another size: a file of its own. Raises: OSError, and nothing has changed."""
        head = {
            "stream": self.stream,
            "run": self.run,
            "segment": len(self._files) + 1,
            "started": self.started,
            "meta": self.meta,
            "decoder": packets[0].decoder,
            "made_by": f"taesd-stream {__version__}",
            "missing": [] if self._files else self._early_gaps,
            "sps": sets[0].hex(),
            "pps": sets[1].hex(),
        }
        parts = packets[0].tracks
        head |= {"parts": parts} if parts > 1 else {}
        width, height = (side + side % 2 for side in (packets[0].width, packets[0].height))  # as it is coded
        init = init_segment(head, width=width, height=height, sps=sets[0], pps=sets[1], tracks=parts)
        self._rest_older()
        file = GrowingFile.create(self._folder, self._file_name(), head, init)
        try:
            self._put(file, packets)
        except BaseException:  # whatever it was: each try would leave a file, and its descriptor
            file.remove()
            raise
        with self._lock:
            self._files.append(file)

    def _file_name(self) -> str:
        return file_name(self.name, stream=self.stream, run=self.run, started=self.started)

    def _put(self, file: GrowingFile, packets: list[Packet]) -> None:
        before = next((e for f in reversed(self._files) for e in reversed(f.index.entries) if e.tfdt is not None), None)
        forward = ForwardPts(before.last_pts, before.ends_at) if before else ForwardPts()
        tracks = [packets[track :: packets[0].tracks] for track in range(packets[0].tracks)]
        times = [forward.stamp(packet.pts, index=index) for index, packet in enumerate(tracks[0])]
        samples = [
            [
                Sample(pts=pts, is_keyframe=packet.is_keyframe, payload=packet.payload)
                for packet, pts in zip(track, times, strict=True)
            ]
            for track in tracks
        ]
        first, ends_at = packets[0], times[-1] + durations(times)[-1]
        shown = (first.step, first.total_steps, first.sigma)
        said = {"attempt": self.attempt} | dict(zip(("step", "of", "sigma"), shown, strict=True))
        data = note(said) + fragment(first.seq, *samples)
        file.append(first.seq, data, attempt=self.attempt, times=(times[0], times[-1], ends_at), shown=shown)


def _sets_of(file: GrowingFile) -> tuple[bytes, bytes]:
    return bytes.fromhex(file.index.head["sps"]), bytes.fromhex(file.index.head["pps"])


def _parts_of(file: GrowingFile) -> int:
    return int(file.index.head.get("parts", 1))
