"""Append-only files of wire messages: what must be kept lies here, acked, before anybody decodes it.

One run is a chain of segments `RUN.NNNN.latents`. A record is `length, crc32, header length` (big-endian uint32), then
the header and the payload just as they travel. Each segment begins with the run's OPEN, so that any one of them can be
read, and published again, alone. A torn tail is cut when the file is opened next; a damaged record costs itself alone.
A file is open only while it is read or written: logs that wait for a recording, however many, hold no descriptor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from taesd_stream import wire
from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.log_records import HEAD, Record, pack_record, read_record, walk
from taesd_stream.messages import End, Part

logger = logging.getLogger(__name__)

SUFFIX: Final = ".latents"
SEGMENT_BYTES: Final = 64 << 20

_FILE = re.compile(r"([0-9a-f]{16})\.([0-9]{4,8})\.latents")


class LogError(TaesdStreamError):
    """The disk did not take a record, and the file ends at its last whole one; or it does not give one back."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """Bytes of a segment file that are no whole record: damaged, or torn at its end."""

    nbytes: int


def read_messages(path: Path) -> Iterator[StreamInfo | LatentFrame | End | Damaged]:
    """Every whole record of one segment file, in order, and what is between them."""
    with _opened(path, os.O_RDONLY) as fd:
        size, behind = os.fstat(fd).st_size, 0
        for record in walk(fd, size):
            if record.offset > behind:
                yield Damaged(record.offset - behind)
            behind = record.end
            yield read_record(fd, record.offset) or Damaged(record.end - record.offset)
        if size > behind:
            yield Damaged(size - behind)


def read_run(path: Path) -> Iterator[StreamInfo | LatentFrame | End | Damaged]:
    """What read_messages gives of each of run_paths(path). Raises: ValueError as that does."""
    for segment in run_paths(path):
        yield from read_messages(segment)


def run_paths(path: Path) -> list[Path]:
    """The segment files, oldest first, of the run whose oldest is `path`; a file of another name stands alone.

    Raises: ValueError that names the oldest, where `path` is a later one.
    """
    match = _FILE.fullmatch(path.name)
    paths = segment_paths(path.parent, match[1]) if match else [path]
    if paths[0] != path:
        raise ValueError(f"{path}: is a later part of {paths[0].name}; give that one, for the whole run")
    return paths


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | getattr(os, "O_BINARY", 0))
    try:
        yield fd
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Segment:
    number: int
    path: Path
    first_seq: int | None = None
    offsets: list[int] = field(default_factory=list)  # of frame first_seq + i; -1: it is damaged
    end: int = 0  # behind the last whole record
    info: StreamInfo | None = None
    ended: End | None = None
    damaged: int = 0  # records that are lost, as far as can be told
    changed_unix: float = 0.0  # when it was last written to
    is_gone: bool = False  # somebody removed the file


class RunLog:
    """The log of one kept run. One thread appends; any thread may read what was appended."""

    def __init__(
        self, folder: Path, info: StreamInfo, *, first_seq: int | None = None, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        """Begin an empty log; no file is made before the first append.

        first_seq: what the first frame must have, None: any. One that the disk did not take must not be passed over.
        """
        self.info = info
        self.ended: End | None = None
        self.damaged = 0  # records that were found damaged when it was reopened
        self.folder = folder
        self._begins_at = first_seq
        self._segment_bytes = segment_bytes
        self._segments: list[_Segment] = []
        self._next_number = 0

    @classmethod
    def reopen(cls, folder: Path, run: str, *, segment_bytes: int = SEGMENT_BYTES) -> RunLog | None:
        """The log that a former process left; torn tails are cut. None when no segment holds its OPEN.

        A damaged record is passed over: `read` of its seq gives None, and what is behind it stays.
        Raises: OSError for a file that cannot be read.
        """
        segments = [_scan(number, path) for number, path in _segments_of(folder, run)]
        info = next((one.info for one in reversed(segments) if one.info is not None), None)
        log = None if info is None else cls(folder, info, segment_bytes=segment_bytes)
        for segment in segments:
            if log is None or (segment.info is None and not segment.offsets):
                _put_away(segment.path)
                continue
            if segment.end < segment.path.stat().st_size:  # else its time of change, which is its age, would be new
                os.truncate(segment.path, segment.end)
            log.ended = segment.ended or log.ended
            log.damaged += segment.damaged
            log._segments.append(segment)
            log._next_number = segment.number + 1
        return log

    @property
    def first_seq(self) -> int | None:
        """seq of the oldest frame still here, None when there is none."""
        return next((segment.first_seq for segment in self._segments if segment.first_seq is not None), None)

    @property
    def next_seq(self) -> int | None:
        """seq that the next frame must have; None: any."""
        for segment in reversed(self._segments):
            if segment.first_seq is not None:
                return segment.first_seq + len(segment.offsets)
        return self._begins_at

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(segment.end for segment in self._segments)

    @property
    def changed_unix(self) -> float:
        """When it was last written to; 0 while it has no file."""
        return max((segment.changed_unix for segment in self._segments), default=0.0)

    @property
    def paths(self) -> list[Path]:
        """The segment files, oldest first."""
        return [segment.path for segment in self._segments]

    def append(self, frame: LatentFrame, *, may_skip: bool = False) -> None:
        """Append the next frame.

        may_skip: keeping was off for a while; the frame may be a later one, and begins a segment.
        Raises: ValueError when its seq leaves a hole; LogError when the disk takes it not.
        """
        expected = self.next_seq
        skips = expected is not None and frame.seq != expected
        if expected is not None and skips and not (may_skip and frame.seq > expected):
            raise ValueError(f"run {frame.run}: expected seq {expected}, got {frame.seq}")
        segment = self._segment(is_new=skips)
        offset = self._write(segment, pack_record(frame))
        if segment.first_seq is None:
            segment.first_seq = frame.seq
        segment.offsets.append(offset)

    def end(self, end: End) -> None:
        """Append the END of the run."""
        self._write(self._segment(), pack_record(end))
        self.ended = end

    def read(self, seq: int) -> LatentFrame | None:
        """The frame `seq`, None when it is not here (any more). Raises: LogError where it cannot be read now."""
        segment, place = self._place_of(seq)
        if segment is None or (offset := segment.offsets[place]) < 0:
            return None
        try:
            with _opened(segment.path, os.O_RDONLY) as fd:
                found = read_record(fd, offset)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LogError(f"{segment.path}: {error.strerror}") from error
        return found if isinstance(found, LatentFrame) and found.seq == seq else None

    def size_of(self, seq: int) -> int:
        """Bytes of the frame's record on disk, 0 when it is not here."""
        segment, place = self._place_of(seq)
        if segment is None or (offset := segment.offsets[place]) < 0:
            return 0
        later = (segment.offsets[behind] for behind in range(place + 1, len(segment.offsets)))
        return next((one for one in later if one >= 0), segment.end) - offset

    def release(self, before_seq: int) -> None:
        """Free whole segments, but the last, whose frames are all older than `before_seq`."""
        while len(self._segments) > 1:
            oldest = self._segments[0]
            if oldest.first_seq is None or oldest.first_seq + len(oldest.offsets) > before_seq:
                return
            self._begins_at = oldest.first_seq + len(oldest.offsets)  # those behind it may have no frame yet
            self._remove(oldest)

    def sync(self) -> None:
        """Force what was appended to the disk. Any thread; where the log goes meanwhile there is nothing to force."""
        with contextlib.suppress(OSError, IndexError), _opened(self._segments[-1].path, os.O_RDWR) as fd:
            os.fsync(fd)

    def delete(self) -> None:
        """Remove every segment."""
        while self._segments:
            self._remove(self._segments[0])

    def _place_of(self, seq: int) -> tuple[_Segment | None, int]:
        """The segment that has the frame, and which of its offsets is the frame's."""
        for segment in self._segments:
            first = segment.first_seq
            if first is not None and first <= seq < first + len(segment.offsets):
                return segment, seq - first
        return None, -1

    def _remove(self, segment: _Segment) -> None:
        self._segments.remove(segment)
        try:
            segment.path.unlink(missing_ok=True)
        except OSError as error:  # it costs room, no frame; a next start finds it again
            logger.error("log_segment_stays path=%s error=%s", segment.path, error.strerror)

    def _segment(self, *, is_new: bool = False) -> _Segment:
        """The segment to write to, a new one where the last is full, or gone."""
        last = self._segments[-1] if self._segments else None
        if last is not None and last.end < self._segment_bytes and not is_new and not last.is_gone:
            return last
        self.sync()  # a later sync() sees the new one only
        path = self.folder / f"{self.info.run}.{self._next_number:04d}{SUFFIX}"
        segment = _Segment(self._next_number, path)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            self._next_number += isinstance(error, FileExistsError)  # one that could not be removed: not that again
            raise LogError(f"{path}: {error.strerror}") from error
        try:
            self._write(segment, pack_record(self.info))
        except LogError:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        self._segments.append(segment)
        self._next_number += 1
        return segment

    @staticmethod
    def _write(segment: _Segment, record: list[Part]) -> int:
        offset, data = segment.end, b"".join(record)
        try:
            with _opened(segment.path, os.O_WRONLY) as fd:
                _write_at(fd, offset, data)
        except OSError as error:
            segment.is_gone = isinstance(error, FileNotFoundError)
            raise LogError(f"{segment.path}: {error.strerror}") from error
        segment.end, segment.changed_unix = offset + len(data), time.time()
        return offset


def _write_at(fd: int, offset: int, data: bytes) -> None:
    """Write behind `offset`; where the disk does not take all of it, the file is cut back. Raises: OSError."""
    left = memoryview(data)
    try:
        os.lseek(fd, offset, os.SEEK_SET)
        while left:
            left = left[os.write(fd, left) :]  # a short write is no exception
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(fd, offset)
        raise


def _segments_of(folder: Path, run: str) -> list[tuple[int, Path]]:
    """The run's segment files, oldest first; files that only look like one are not ours."""
    matches = ((_FILE.fullmatch(path.name), path) for path in folder.glob(f"{run}.*{SUFFIX}"))
    return sorted((int(match[2]), path) for match, path in matches if match)


def _put_away(path: Path) -> None:
    """A segment whose OPEN is not whole: torn while it was made it holds nothing; else frames may lie behind it."""
    if path.stat().st_size <= HEAD.size + wire.MAX_HEADER_BYTES:
        path.unlink()
        return
    path.replace(path.with_suffix(".damaged"))
    logger.error("log_segment_damaged set_aside=%s", path.with_suffix(".damaged"))


def _scan(number: int, path: Path) -> _Segment:
    """A segment file and what is in it, by the records' headers; its last record must be right in every byte."""
    segment = _Segment(number, path)
    with _opened(path, os.O_RDONLY) as fd:
        stat = os.fstat(fd)
        segment.changed_unix = stat.st_mtime
        records = list(walk(fd, stat.st_size))
        if records and read_record(fd, records[-1].offset) is None:
            del records[-1]  # a crash may have left its length without its bytes
        behind = 0
        for record in records:
            segment.damaged += record.offset > behind
            behind = record.end
            if record.seq is None:
                _take_word(segment, fd, record)
            else:
                _index(segment, fd, record, record.seq)
    segment.end = behind
    return segment


def _take_word(segment: _Segment, fd: int, record: Record) -> None:
    message = read_record(fd, record.offset)
    if isinstance(message, StreamInfo):
        segment.info = message
    elif isinstance(message, End):
        segment.ended = message
    else:
        segment.damaged += 1


def _index(segment: _Segment, fd: int, record: Record, seq: int) -> None:
    """Note where a frame is. Frames that should be before it, and were not found, are damaged.

    A seq that does not follow the one before it, the segment's first among them, may be a damaged byte: all are read.
    """
    expected = seq if segment.first_seq is None else segment.first_seq + len(segment.offsets)
    follows = segment.first_seq is not None and seq == expected
    if not follows and (seq < expected or read_record(fd, record.offset) is None):
        segment.damaged += 1
        return
    if segment.first_seq is None:
        segment.first_seq = seq
    segment.offsets += [-1] * (seq - expected)
    segment.offsets.append(record.offset)


def segment_paths(folder: Path, run: str) -> list[Path]:
    """The run's segment files, oldest first. run: 16 hex digits."""
    return [path for _, path in _segments_of(folder, run)]


def runs_in(folder: Path) -> list[str]:
    """The runs that have segments in `folder`."""
    matches = (_FILE.fullmatch(path.name) for path in folder.glob(f"*{SUFFIX}"))
    return sorted({match[1] for match in matches if match})


def bytes_by_run(folder: Path) -> dict[str, int]:
    """How many bytes the segments of each run in `folder` have, by one look at it."""
    held: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            if match := _FILE.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # removed since
                    held[match[1]] = held.get(match[1], 0) + entry.stat().st_size
    return held
