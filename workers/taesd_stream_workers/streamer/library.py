"""The recording folder as people see it: growing and finished files, each with what was painted in it."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext

from taesd_stream.config import RecordingConfig
from taesd_stream.media.encoder import JpegEncoder
from taesd_stream.media.finished import copy_pictures, read_summary
from taesd_stream.media.fragments import FragmentError, read_head
from taesd_stream.media.growing_file import FINISHED_SUFFIX, PART_SUFFIX, files_in
from taesd_stream.media.steps import StepPicture, cut_behind

logger = logging.getLogger(__name__)

RETENTION_S: Final = 10.0
LOOK_S: Final = 2.0  # what others did in the folder is seen so late: thousands of files take 50 ms


@dataclass(frozen=True, slots=True)
class _Known:
    mtime_ns: int
    row: dict[str, Any]


class Library:
    """Finished recordings of one folder, read once a file; growing ones are the recorder's. Any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, _Known] = {}
        self._looked_s = float("-inf")
        self._lock = threading.Lock()

    def rows(self) -> list[dict[str, Any]]:
        """One row a finished file that is ours, newest first."""
        rows = [known.row for known in self._look(LOOK_S).values() if known.row]
        return sorted(rows, key=lambda row: (-float(row["started"]), row["first_seq"], row["part"] or 0))

    def last_seqs(self) -> dict[str, int]:
        """Runs in finished files, and the last frame of each; it takes a look at every file of the folder."""
        found: dict[str, int] = {}
        for row in (known.row for known in self._look().values() if known.row):
            found[row["run"]] = max(found.get(row["run"], -1), int(row["last_seq"]))
        return found

    def path_of(self, recording_id: str) -> Path | None:
        """The finished file of an id that `rows` gave; ids from outside are only looked up, never made into paths."""
        known = self._look(LOOK_S).get(recording_id) or self._look().get(recording_id)
        path = self.folder / f"{recording_id}{FINISHED_SUFFIX}"
        return path if known and known.row and path.exists() else None

    def changed(self) -> None:
        """A file came or went: the next look is a new one."""
        self._looked_s = float("-inf")

    def delete(self, recording_id: str) -> bool:
        """Remove a finished file. Returns whether there was one."""
        path = self.path_of(recording_id)
        if path is None:
            return False
        path.unlink(missing_ok=True)
        self.changed()
        with contextlib.suppress(OSError):  # the folders that its name made, as far as they are empty
            for folder in path.parents[: len(path.relative_to(self.folder).parents) - 1]:
                folder.rmdir()
        return True

    def delete_expired(self, *, max_age_s: float, max_bytes: int) -> list[tuple[str, str]]:
        """Remove whole finished recordings, oldest first: too old, or too many bytes of them. 0: no such bound.

        Returns: id and reason of each that went.
        """
        known = self._look()
        ours = sorted((one.mtime_ns, name, int(one.row["bytes"])) for name, one in known.items() if one.row)
        held = sum(nbytes for _, _, nbytes in ours)
        gone = []
        for mtime_ns, name, nbytes in ours:
            age_s = time.time() - mtime_ns / 1e9
            if max_age_s and age_s > max_age_s:
                reason = f"older than recording.max_age_s = {max_age_s:g}"
            elif max_bytes and held > max_bytes:
                reason = f"recordings have more than recording.max_bytes = {max_bytes}"
            else:
                break
            held -= nbytes
            if self.delete(name):
                gone.append((name, reason))
        return gone

    def id_of(self, path: Path) -> str:
        """The id of a finished file of this folder."""
        return path.relative_to(self.folder).as_posix().removesuffix(FINISHED_SUFFIX)

    def _look(self, max_age_s: float = 0.0) -> dict[str, _Known]:
        """Every file of the folder by name, read where it is new, as it was so long ago. The dict stays as it is."""
        with self._lock:
            now_s = time.monotonic()
            if now_s - self._looked_s < max_age_s:
                return self._known
            self._looked_s = now_s
            known: dict[str, _Known] = {}
            for path in files_in(self.folder, FINISHED_SUFFIX):
                with contextlib.suppress(OSError):  # removed since
                    known[self.id_of(path)] = self._read(path)
            self._known = known
            return known

    def _read(self, path: Path) -> _Known:
        name, stat = self.id_of(path), path.stat()
        known = self._known.get(name)
        if known is not None and known.mtime_ns == stat.st_mtime_ns:
            return known
        summary = read_summary(path)
        return _Known(stat.st_mtime_ns, _row(name, summary, path) if summary else {})


class Retention:
    """Whole finished recordings go, oldest first, where they are too old or too much: looked at now and then."""

    def __init__(self, library: Library, config: RecordingConfig) -> None:
        self._library = library
        self._max_age_s, self._max_bytes = config.max_age_s, config.max_bytes
        self._next_s = 0.0

    def tick(self) -> bool:
        """Returns: whether any went."""
        now = time.monotonic()
        if now < self._next_s or not (self._max_age_s or self._max_bytes):
            return False
        self._next_s = now + RETENTION_S
        gone = self._library.delete_expired(max_age_s=self._max_age_s, max_bytes=self._max_bytes)
        for name, reason in gone:
            logger.info("recording_removed id=%s reason=%s", name, reason)
        return bool(gone)


def _row(name: str, summary: dict[str, Any], path: Path) -> dict[str, Any]:
    duration_s, width, height = 0.0, 0, 0
    with contextlib.suppress(av.FFmpegError, OSError), av.open(path) as container:
        stream = container.streams.video[0]
        duration_s = (container.duration or 0) / 1e6
        width, height = stream.width, stream.height
    return {
        "id": name,
        "name": name,
        "stream": summary.get("stream"),
        "run": summary.get("run"),
        "state": "finished",
        "frames": summary.get("frames", 0),
        "first_seq": summary.get("first_seq", 0),
        "last_seq": summary.get("last_seq", -1),
        "gaps": summary.get("missing", []),
        "part": summary.get("part"),
        "parts": summary.get("parts", 1),
        "bytes": path.stat().st_size,
        "started": summary.get("started", 0.0),
        "duration_s": round(duration_s, 3),
        "width": width,
        "height": height,
        "meta": summary.get("meta", {}),
        "error": None,
        "latents": None,
    }


def first_frames(path: Path, count: int | None, part: int = 1, *, folder: Path | None = None) -> Path:
    """An ordinary MP4 of the first `count` frames of a file (None: all), in a temporary file that the caller removes.

    path: finished or growing. part: from 1, of a batch that grows in tracks. folder: for it; None: the system's.
    Raises: OSError, av.FFmpegError, FragmentError; IndexError for a part that it has not.
    """
    growing = path.name.endswith(PART_SUFFIX)
    summary = read_head(path) if growing else (read_summary(path) or {"stream": path.stem, "run": "", "started": 0})
    summary |= {"part": part} if growing and "parts" in summary else {}
    summary = {"meta": {}, **{key: value for key, value in summary.items() if key not in ("sps", "pps")}}
    until = None
    if (found := cut_behind(path, count)) is not None:
        summary["frames"], summary["last_seq"], until = found
    fd, name = tempfile.mkstemp(suffix=FINISHED_SUFFIX, dir=folder)
    os.close(fd)
    target = Path(name)
    try:
        copy_pictures(path, target, summary, until=until, part=part)
    except (OSError, av.FFmpegError, FragmentError, IndexError):
        target.unlink(missing_ok=True)
        raise
    return target


def thumbnail(path: Path, long_side_px: int) -> bytes:
    """The last picture of a file as JPEG. Raises: OSError, av.FFmpegError."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        if stream.duration:
            container.seek(stream.duration, stream=stream)  # to the last keyframe
        return _as_jpeg(deque(container.decode(stream), maxlen=1).pop(), long_side_px)


def picture_of_step(pictures: list[StepPicture], seq: int) -> bytes:
    """The first picture of frame `seq` as JPEG; b"" when it is not among them. Raises: av.FFmpegError."""
    decoder = av.CodecContext.create("h264", "r")
    assert isinstance(decoder, VideoCodecContext)
    decoder.thread_count = 1
    decoder.flags |= Flags.low_delay
    frames: list[av.VideoFrame] = []
    for one in pictures:
        frames += decoder.decode(av.Packet(one.payload))
        if (one.seq, one.index) == (seq, 0):
            frames += decoder.decode(None)
            return _as_jpeg(frames[-1], max(frames[-1].width, frames[-1].height))
    return b""


def _as_jpeg(last: av.VideoFrame, long_side_px: int) -> bytes:
    scale = min(1.0, long_side_px / max(last.width, last.height))
    width, height = (max(2, round(side * scale / 2) * 2) for side in (last.width, last.height))
    picture = last.reformat(
        width, height, format="yuvj420p", src_colorspace="ITU709", dst_colorspace="ITU601", dst_color_range="JPEG"
    )
    return JpegEncoder("jpeg").encode(np.ascontiguousarray(picture.to_ndarray())).payload
