"""A growing file becomes an ordinary fast-start MP4 by packet copy, with what was painted in its metadata."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import av

from taesd_stream.fields import as_utf8
from taesd_stream.frames import CLOCK_HZ, is_run_id, is_stream_name
from taesd_stream.media.fragments import FileIndex, read_index, table
from taesd_stream.media.growing_file import FINISHED_SUFFIX, PART_SUFFIX, free_name, sync_folder

SUMMARY_KEY: Final = "taesd_stream"  # the tag that holds everything, as JSON
_MAX_STEP_TICKS: Final = 6 * 3600 * CLOCK_HZ  # FFmpeg's muxer cannot write 2**31 ticks, and would ruin all later times
_MP4: Final = {"movflags": "faststart+use_metadata_tags", "video_track_timescale": str(CLOCK_HZ)}


def finish_file(growing: Path) -> list[Path]:
    """Make `NAME.mp4` of a whole `NAME.mp4.part`, which goes; a file of that name is never overwritten.

    One of several tracks becomes as many files, `NAME.1.mp4`, `NAME.2.mp4`… A death at any point leaves the growing
    file, beside those that are done: then only the others have to be made.
    Raises: OSError, FragmentError, av.FFmpegError; the growing file is there still.
    """
    index = read_index(growing)
    parts = range(1, index.head.get("parts", 1) + 1)
    finished = [_finish_part(growing, index, part) for part in parts]
    growing.unlink(missing_ok=True)  # somebody else may have removed it meanwhile
    return finished


def _check_room(growing: Path, parts: int) -> None:
    """Raises: OSError where a copy of one part would fill the disk: of many GiB it is not tried over and over."""
    free_bytes = shutil.disk_usage(growing.parent).free
    if 0 < free_bytes < growing.stat().st_size // parts:  # some file systems say 0 for unknown
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(growing))


def _finish_part(growing: Path, index: FileIndex, part: int) -> Path:
    summary = summary_of(index, part)
    name = growing.name.removesuffix(PART_SUFFIX) + (f".{part}" if "part" in summary else "")
    wanted, number, target = json.dumps(summary), 1, growing.with_name(name + FINISHED_SUFFIX)
    while target.exists() and json.dumps(read_summary(target)) != wanted:  # another one's
        number += 1
        target = growing.with_name(f"{name}-{number}{FINISHED_SUFFIX}")
    if not target.exists():
        _check_room(growing, index.head.get("parts", 1))
        working = growing.with_name(growing.name + "-finish")
        try:
            copy_pictures(growing, working, summary, part=part)
            _append_table(working, index)
            if target.exists():
                target = growing.with_name(free_name(growing.parent, name) + FINISHED_SUFFIX)
            working.rename(target)
        finally:
            working.unlink(missing_ok=True)  # a failed one must not hold the space that ran out
        sync_folder(growing.parent)
    return target


def copy_pictures(
    source: Path, target: Path, summary: Mapping[str, Any], *, until: int | None = None, part: int = 1
) -> None:
    """Copy the pictures of a recording to an ordinary MP4 that begins at time 0, and force it to the disk.

    summary: `stream`, `run`, `started`, `meta` and more: the new file's tags, each key of `meta` one by itself too.
    A wait of more than 6 h becomes one of 6 h. until: where in the source to stop, ticks. part: from 1, of tracks.
    Raises: OSError, av.FFmpegError; what is at `target` then is worth nothing.
    """
    with av.open(source) as reader, av.open(target, "w", format="mp4", options=_MP4) as writer:
        stream = reader.streams.video[part - 1]
        copy = writer.add_stream_from_template(stream)
        writer.metadata.update(tags_of(summary))
        time, before = 0, None
        for packet in reader.demux(stream):
            if packet.pts is None or (until is not None and packet.pts >= until):
                break
            time += min(packet.pts - before, _MAX_STEP_TICKS) if before is not None else 0
            before = packet.pts
            packet.pts = packet.dts = time  # no B frames: they are shown as they come
            packet.stream = copy
            writer.mux_one(packet)
    _force_to_disk(target)


def read_summary(path: Path) -> dict[str, Any] | None:
    """What `copy_pictures` was told about a file; None when there is none, or not one of ours.

    stream, run, segment, started, meta, missing, frames, first_seq, last_seq; of a batch recorded in files of their
    own, part, from 1, of parts.
    """
    with contextlib.suppress(OSError, av.FFmpegError, ValueError), av.open(path) as container:
        text = container.metadata.get(SUMMARY_KEY, "")
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()  # half a character has no place in an answer
        return value if isinstance(value, dict) and _is_summary(value) else None
    return None


def _no_number(_word: str) -> None:
    """NaN and infinity: no JSON, and no page could read them."""


_NUMBERS: Final = {"frames": 0, "first_seq": 0, "last_seq": -1, "parts": 1}
_LARGEST: Final = 1 << 53


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _is_summary(value: dict[str, Any]) -> bool:
    """The file may be anybody's: what lists it and sorts by it must find what it expects."""
    numbers = [value.get(key, default) for key, default in _NUMBERS.items()]
    return (
        isinstance(value.get("stream"), str)
        and is_stream_name(value["stream"])
        and isinstance(value.get("run"), str)
        and is_run_id(value["run"])
        and isinstance(value.get("meta", {}), dict)
        and isinstance(value.get("missing", []), list)
        and isinstance(value.get("part"), int | None)
        and isinstance(value.get("started"), int | float)
        and all(isinstance(number, int) for number in numbers)
        and all(abs(number) < _LARGEST for number in (*numbers, value["started"], value.get("part") or 0))
    )


def _append_table(path: Path, index: FileIndex) -> None:
    """Say behind the pictures which frame is where, [seq, step, of, sigma, pts]: for walking through steps."""
    rows: list[list[Any]] = []
    time: int = 0
    before: int | None = None
    for entry in index.entries:
        if entry.tfdt is None:
            continue
        time += min(entry.tfdt - before, _MAX_STEP_TICKS) if before is not None else 0
        rows.append([entry.seq, entry.step, entry.of, entry.sigma, time])
        time, before = time + entry.last_pts - entry.tfdt, entry.last_pts
    with path.open("ab") as file:
        file.write(table(rows))
    _force_to_disk(path)


def summary_of(index: FileIndex, part: int | None = None) -> dict[str, Any]:
    """What the head of a growing file says, and which frames are in it. part: of its tracks, from 1."""
    seqs = [entry.seq for entry in index.entries if entry.tfdt is not None]
    gaps = [entry.seq for entry in index.entries if entry.tfdt is None]
    told = {key: value for key, value in index.head.items() if key not in ("sps", "pps")}
    if part is not None and "parts" in told:
        told["part"] = part
    return told | {
        "missing": index.head["missing"] + gaps,
        "frames": len(seqs),
        "first_seq": seqs[0],
        "last_seq": seqs[-1],
    }


def tags_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """A file's tags: each key of `meta` by itself, ours, which win over what a publisher called alike, and all as JSON.

    summary: stream, run, started, meta, and more.
    """
    meta = summary["meta"]
    ours = {"title": summary["stream"], "stream": summary["stream"], "run": summary["run"]}
    ours["creation_time"] = datetime.fromtimestamp(summary["started"], UTC).isoformat()
    ours[SUMMARY_KEY] = json.dumps(summary)
    theirs = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
    tags = {key: value for key, value in theirs.items() if key and key.lower() not in ours}  # FFmpeg tells no case
    return {_text(key): _text(value) for key, value in (tags | ours).items()}


def _text(value: str) -> str:
    return as_utf8(value.replace("\0", " "))


def _force_to_disk(path: Path) -> None:
    fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
