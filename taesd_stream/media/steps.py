"""The steps of a run out of its files, growing or finished: the list of them, and the pictures around one.

A picture leans on the ones before it, back to a keyframe: what is read and sent is such a group, once, and whoever
shows it walks through its steps without asking again.
"""

from __future__ import annotations

import bisect
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import av
from av.bitstream import BitStreamFilterContext

from taesd_stream.media.fragments import Entry, FileIndex, read_index, read_on, read_samples, read_table
from taesd_stream.media.growing_file import PART_SUFFIX

MAX_KNOWN: Final = 16  # growing files whose frames are remembered
_START_CODE: Final = b"\0\0\0\1"
_lock = threading.Lock()  # of _known


@dataclass(slots=True)
class _Growing:
    """What was read of a growing file."""

    index: FileIndex | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_known: dict[Path, _Growing] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One frame of a run, as its file tells. pts: of its first picture, 1/90000 s in its file; step -1: unknown."""

    seq: int
    step: int
    of: int | None
    sigma: float | None
    pts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPicture:
    """One coded picture. payload: an Annex B access unit, with SPS and PPS where it is a keyframe."""

    seq: int
    index: int
    is_keyframe: bool
    pts: int
    payload: bytes


def steps_of(path: Path, after: int = -1) -> list[Step]:
    """The frames behind seq `after` that a file of ours holds, in order; of a finished one without a table none.

    Raises: OSError, FragmentError.
    """
    if path.name.endswith(PART_SUFFIX):
        entries = _index_of(path).entries
        begin = bisect.bisect_right(entries, after, key=lambda entry: entry.seq)
        return [
            Step(seq=entry.seq, step=entry.step, of=entry.of, sigma=entry.sigma, pts=entry.tfdt)
            for entry in entries[begin:]
            if entry.tfdt is not None
        ]
    rows = _table(path)
    begin = bisect.bisect_right(rows, after, key=lambda row: row[0])
    return [Step(seq=seq, step=step, of=of, sigma=sigma, pts=pts) for seq, step, of, sigma, pts in rows[begin:]]


def cut_behind(path: Path, count: int | None) -> tuple[int, int, int | None] | None:
    """The first `count` frames of a file (None: all): how many there are, the last one's seq, where to cut behind it.

    The cut is in 1/90000 s in the file, None: at its end. Returns: None where no frame is known.
    Raises: OSError, FragmentError.
    """
    if path.name.endswith(PART_SUFFIX):
        entries = [entry for entry in _index_of(path).entries if entry.tfdt is not None][:count]
        return (len(entries), entries[-1].seq, entries[-1].last_pts + 1) if entries else None
    rows = _table(path)
    shown = rows[:count]
    return (len(shown), shown[-1][0], rows[len(shown)][4] if len(shown) < len(rows) else None) if shown else None


def pictures_around(path: Path, seq: int, part: int = 1) -> list[StepPicture]:
    """The coded pictures from the keyframe that frame `seq` leans on up to the next keyframe; empty: not in this file.

    part: from 1, of a batch that grows in tracks; where there are none, all of the file.
    Raises: OSError, FragmentError, av.FFmpegError.
    """
    if path.name.endswith(PART_SUFFIX):
        return _from_growing(path, seq, part)
    return _from_finished(path, seq)


def _from_growing(path: Path, seq: int, part: int) -> list[StepPicture]:
    index = _index_of(path)
    track = part - 1 if "parts" in index.head else 0
    entries = [entry for entry in index.entries if entry.tfdt is not None]
    at = bisect.bisect_left([entry.seq for entry in entries], seq)
    if at == len(entries) or entries[at].seq != seq:
        return []
    found: list[StepPicture] = []
    with path.open("rb") as file:

        def read(entry: Entry) -> list[StepPicture]:
            file.seek(entry.offset)
            return list(_pictures(index, entry, file.read(entry.end - entry.offset), track))

        for entry in reversed(entries[: at + 1]):
            found = read(entry) + found
            if found[0].is_keyframe:
                break
        for entry in entries[at + 1 :]:
            pictures = read(entry)
            if pictures[0].is_keyframe:
                break
            found += pictures
    return found


def _pictures(index: FileIndex, entry: Entry, data: bytes, track: int) -> Iterator[StepPicture]:
    sets = [bytes.fromhex(index.head[name]) for name in ("sps", "pps")]
    for number, (pts, is_keyframe, sample) in enumerate(read_samples(data, track)):
        nals = [*sets, *_nals(sample)] if is_keyframe else list(_nals(sample))
        payload = b"".join(_START_CODE + nal for nal in nals)
        yield StepPicture(seq=entry.seq, index=number, is_keyframe=is_keyframe, pts=pts, payload=payload)


def _nals(sample: bytes) -> Iterator[bytes]:
    offset = 0
    while offset + 4 <= len(sample):
        (length,) = struct.unpack_from(">I", sample, offset)
        yield sample[offset + 4 : offset + 4 + length]
        offset += 4 + length


def _from_finished(path: Path, seq: int) -> list[StepPicture]:
    table = _table(path)
    at = bisect.bisect_left([row[0] for row in table], seq)
    if at == len(table) or table[at][0] != seq:
        return []
    times = [row[4] for row in table]
    found: list[StepPicture] = []
    index, before = 0, -1
    with av.open(path) as container:
        stream = container.streams.video[0]
        to_annex_b = BitStreamFilterContext("h264_mp4toannexb", stream)
        container.seek(times[at], stream=stream)
        for packet in container.demux(stream):
            if packet.pts is None or (packet.is_keyframe and packet.pts > times[at] and _row(times, packet.pts) != at):
                break
            row = _row(times, packet.pts)
            index, before = (index + 1 if row == before else 0), row
            is_keyframe, pts = packet.is_keyframe, packet.pts
            payload = b"".join(bytes(one) for one in to_annex_b.filter(packet))
            picture = StepPicture(seq=table[row][0], index=index, is_keyframe=is_keyframe, pts=pts, payload=payload)
            found.append(picture)
    return found


def _row(times: list[int], pts: int) -> int:
    return max(0, bisect.bisect_right(times, pts) - 1)


def _table(path: Path) -> list[Any]:
    """Rows [seq, step, of, sigma, pts] of a finished file; empty where it has none."""
    return [row for row in read_table(path) if isinstance(row, list) and len(row) == 5]


def _index_of(path: Path) -> FileIndex:
    """What a growing file holds; of one that was looked at lately only what has come since is read. Any thread."""
    with _lock:
        one = _known.pop(path, None) or _Growing()
        _known[path] = one
        while len(_known) > MAX_KNOWN:
            del _known[next(iter(_known))]
    with one.lock:  # who asks for the same file waits, and has little left to read
        one.index = read_on(path, one.index) if one.index is not None else read_index(path)
        return one.index
