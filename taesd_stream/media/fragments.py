"""Fragmented MP4, bytes only: the head of a file, one fragment a published frame, and the way back from a file to both.

FFmpeg writes a fragment when the next packet comes, so its files are always one picture behind; previews may be seconds
apart. Here a fragment is whole at once, with a provisional duration: the next one's `tfdt` sets the time.
Boxes by ISO/IEC 14496-12:2022 (section numbers below), samples by ISO/IEC 14496-15:2022 5.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import CLOCK_HZ, Packet
from taesd_stream.media.clock import PROVISIONAL_TICKS

MAX_NOTE_BYTES: Final = 1 << 20
_TABLE_ROWS: Final = 8192  # in one note
NOTE_UUID: Final = bytes.fromhex("7461657364537472b65d6e6f74653031")  # our own box: JSON about what follows (4.2.2)

_START_CODE = b"\0\0\1"
_SPS, _PPS, _DELIMITER = 7, 8, 9
_KEY_SAMPLE, _DELTA_SAMPLE = 0x02000000, 0x01010000  # depends on none; on others, and no sync sample (8.8.3.1)
_TRAF_BYTES = 64  # of a track's part of a moof, without its rows of pictures, which have 12 each
_MATRIX = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


class FragmentError(TaesdStreamError):
    """A file is none that this module wrote, or an access unit cannot start one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One coded picture. payload: an Annex B access unit. pts: ticks of 1/90000 s."""

    pts: int
    is_keyframe: bool
    payload: bytes | memoryview

    @classmethod
    def of(cls, packet: Packet) -> Sample:
        """The picture of a packet."""
        return cls(pts=packet.pts, is_keyframe=packet.is_keyframe, payload=packet.payload)


@dataclass(frozen=True, slots=True)
class Entry:
    """What a file holds between two offsets: the frame `seq`, or (tfdt None) the word that it is missing for ever.

    step, of, sigma: what the sampler said of the frame; step -1: nothing.
    """

    seq: int
    offset: int
    end: int
    tfdt: int | None  # pts of its first picture
    last_pts: int = -1  # of its last picture
    ends_at: int = 0  # pts at which its last picture would end
    step: int = -1
    of: int | None = None
    sigma: float | None = None


@dataclass(slots=True)
class FileIndex:
    """What `read_index` found. head: what `init_segment` was given. end: behind the last whole box.

    missing: the seqs among the entries that are missing for ever. Entries come and go by `add` and `cut_before` alone.
    """

    head: dict[str, Any]
    head_end: int
    end: int
    attempt: int = -1  # of the last frame
    entries: list[Entry] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)

    def add(self, entry: Entry, attempt: int) -> None:
        """Another one behind the last."""
        self.entries.append(entry)
        if entry.tfdt is None:
            self.missing.append(entry.seq)
        self.attempt, self.end = attempt, entry.end

    def cut_before(self, seq: int) -> None:
        """Drop the entry of a frame, and all behind it. The lists are new ones: other threads may read the old."""
        self.entries = [entry for entry in self.entries if entry.seq < seq]
        self.missing = [one for one in self.missing if one < seq]
        self.end = self.entries[-1].end if self.entries else self.head_end


def split_nals(access_unit: bytes | memoryview) -> list[bytes]:
    """The NAL units of an Annex B byte stream (ISO/IEC 14496-10 B.1), without start codes and trailing zeros."""
    data = bytes(access_unit)
    nals = []
    start = data.find(_START_CODE)
    while start >= 0:
        following = data.find(_START_CODE, start + 3)
        nal = data[start + 3 : following if following >= 0 else len(data)].rstrip(b"\0")
        if nal:
            nals.append(nal)
        start = following
    return nals


def parameter_sets(access_unit: bytes | memoryview) -> tuple[bytes, bytes] | None:
    """SPS and PPS of an access unit, None when it does not bring both."""
    first: dict[int, bytes] = {}
    for nal in split_nals(access_unit):
        first.setdefault(nal[0] & 31, nal)
    return (first[_SPS], first[_PPS]) if _SPS in first and _PPS in first else None


def _box(kind: bytes, *parts: bytes) -> bytes:
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def _full_box(kind: bytes, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(kind, struct.pack(">I", version << 24 | flags), *parts)


def note(value: Mapping[str, Any]) -> bytes:
    """A box of our own with a JSON object in it; players step over it."""
    return _box(b"uuid", NOTE_UUID, json.dumps(value, separators=(",", ":")).encode())


def _decoder_configuration(sps: bytes, pps: bytes) -> bytes:  # 14496-15 5.3.3.1
    sets = struct.pack(">BBBBBBH", 1, sps[1], sps[2], sps[3], 0xFF, 0xE1, len(sps)) + sps
    sets += struct.pack(">BH", 1, len(pps)) + pps
    if sps[1] in (100, 110, 122, 144):  # High and its kin say chroma format and depths too: 4:2:0, 8 bits
        sets += bytes([0xFC | 1, 0xF8, 0xF8, 0])
    return _box(b"avcC", sets)


def _sample_entry(size: tuple[int, int], sps: bytes, pps: bytes) -> bytes:  # 12.1.3, 14496-15 5.4.2
    fixed = struct.pack(">6xH16xHHIIIH32xHh", 1, *size, 0x480000, 0x480000, 0, 1, 24, -1)
    colour = _box(b"colr", b"nclx", struct.pack(">HHHB", 1, 1, 1, 0))  # BT.709, limited range (12.1.5)
    return _box(b"avc1", fixed, _decoder_configuration(sps, pps), colour)


def _media(size: tuple[int, int], sps: bytes, pps: bytes) -> bytes:
    empty = struct.pack(">I", 0)
    tables = _box(
        b"stbl",
        _full_box(b"stsd", 0, 0, struct.pack(">I", 1), _sample_entry(size, sps, pps)),
        *(_full_box(kind, 0, 0, empty) for kind in (b"stts", b"stsc", b"stco")),
        _full_box(b"stsz", 0, 0, empty, empty),
    )
    data = _box(b"dinf", _full_box(b"dref", 0, 0, struct.pack(">I", 1), _full_box(b"url ", 0, 1)))
    return _box(
        b"mdia",
        _full_box(b"mdhd", 0, 0, struct.pack(">IIIIHH", 0, 0, CLOCK_HZ, 0, 0x55C4, 0)),  # language "und"
        _full_box(b"hdlr", 0, 0, struct.pack(">I4s12x", 0, b"vide"), b"taesd-stream\0"),
        _box(b"minf", _full_box(b"vmhd", 0, 1, bytes(8)), data, tables),
    )


def init_segment(head: Mapping[str, Any], *, width: int, height: int, sps: bytes, pps: bytes, tracks: int = 1) -> bytes:
    """What a file begins with: brands, H.264 tracks that are told in fragments, and `head` as JSON.

    width, height: of the coded picture, pixels. sps, pps: of all tracks, whose encoders are set alike.
    """
    numbers = range(1, tracks + 1)
    movie = struct.pack(">IIIIIH10x", 0, 0, CLOCK_HZ, 0, 0x10000, 0x100) + _MATRIX + struct.pack(">24xI", tracks + 1)
    moov = _box(
        b"moov",
        _full_box(b"mvhd", 0, 0, movie),
        *(_track(number, (width, height), sps, pps) for number in numbers),
        _box(
            b"mvex",
            *(_full_box(b"trex", 0, 0, struct.pack(">IIIII", number, 1, 0, 0, 0)) for number in numbers),
        ),
    )
    return _box(b"ftyp", b"iso5", struct.pack(">I", 512), b"iso5iso6avc1mp41") + moov + note(head)


def _track(number: int, size: tuple[int, int], sps: bytes, pps: bytes) -> bytes:
    said = struct.pack(">IIIII8xHHHH", 0, 0, number, 0, 0, 0, 0, 0, 0) + _MATRIX
    said += struct.pack(">II", size[0] << 16, size[1] << 16)
    return _box(b"trak", _full_box(b"tkhd", 0, 3, said), _media(size, sps, pps))


def sample_data(access_unit: bytes | memoryview) -> bytes:
    """An access unit as MP4 holds it: each NAL behind its length, without what the head or nobody needs."""
    kept = (nal for nal in split_nals(access_unit) if nal[0] & 31 not in (_SPS, _PPS, _DELIMITER))
    return b"".join(struct.pack(">I", len(nal)) + nal for nal in kept)


def durations(times: Sequence[int]) -> list[int]:
    """How long each of the pictures lasts; the last one as long as the one before, a lone one provisionally."""
    steps = [after - before for before, after in itertools.pairwise(times)]
    return [*steps, steps[-1] if steps else PROVISIONAL_TICKS]


def fragment(seq: int, *tracks: Sequence[Sample]) -> bytes:
    """One published frame: a moof with `sequence_number` = seq + 1 and its exact time, and the mdat of its pictures.

    tracks: the pictures of each track: as many in each, at the same times.
    """
    moof_bytes = 24 + len(tracks) * (_TRAF_BYTES + 12 * len(tracks[0]))
    trafs, data = [], b""
    for number, samples in enumerate(tracks, 1):
        mine = [sample_data(sample.payload) for sample in samples]
        trafs.append(_traf(number, samples, list(map(len, mine)), moof_bytes + 8 + len(data)))
        data += b"".join(mine)
    moof = _box(b"moof", _full_box(b"mfhd", 0, 0, struct.pack(">I", seq + 1)), *trafs)
    assert len(moof) == moof_bytes
    return moof + _box(b"mdat", data)


def _traf(number: int, samples: Sequence[Sample], nbytes: Sequence[int], data_offset: int) -> bytes:
    """data_offset: of the track's first sample, from the moof's first byte."""
    rows = b"".join(
        struct.pack(">III", ticks, size, _KEY_SAMPLE if sample.is_keyframe else _DELTA_SAMPLE)
        for sample, size, ticks in zip(samples, nbytes, durations([s.pts for s in samples]), strict=True)
    )
    return _box(
        b"traf",
        _full_box(b"tfhd", 0, 0x020000, struct.pack(">I", number)),  # offsets count from the moof (8.8.7)
        _full_box(b"tfdt", 1, 0, struct.pack(">Q", samples[0].pts)),
        _full_box(b"trun", 0, 0x000701, struct.pack(">Ii", len(samples), data_offset), rows),
    )


def read_head(path: Path) -> dict[str, Any]:
    """What `init_segment` was given for one of our files. Raises: as `read_index`, which it is cheaper than."""
    with path.open("rb") as file:
        return _read_head(path, file, _boxes(file)).head


def read_index(path: Path) -> FileIndex:
    """What one of our files holds; a torn tail is left out.

    Raises: FragmentError when its head is not ours or not whole; OSError when it cannot be read.
    """
    with path.open("rb") as file:
        boxes = _boxes(file)
        index = _read_head(path, file, boxes)
        _read_body(file, boxes, index)
    return index


def read_on(path: Path, known: FileIndex) -> FileIndex:
    """As `read_index`, of a file that held `known` before: read is its last frame, and what has come behind it.

    A file that was cut back meanwhile has another frame there: it is read from its beginning.
    """
    with path.open("rb") as file:
        index = _read_head(path, file, _boxes(file))
        if known.entries and index.head == known.head:
            last = known.entries[-1]
            index.entries, index.attempt, index.end = known.entries[:-1], known.attempt, last.offset
            index.missing = [seq for seq in known.missing if seq < last.seq]
            before = len(index.entries)
            _read_body(file, _boxes(file, last.offset), index)
            if index.entries[before:] and index.entries[before] == last:
                return index
    return read_index(path)


def read_samples(data: bytes, track: int = 0) -> list[tuple[int, bool, bytes]]:
    """Time, whether a keyframe, and sample of each picture of a track in an `Entry`'s bytes. Raises: FragmentError."""
    offset, moof, moof_at = 0, b"", 0
    while offset + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        if length < 8 or offset + length > len(data):
            break
        if kind == b"moof":
            moof, moof_at = data[offset : offset + length], offset
        elif kind == b"mdat" and _read_moof(moof) is not None:
            (traf_bytes,) = struct.unpack_from(">I", moof, 24)
            traf = 24 + track * traf_bytes
            if traf >= len(moof):
                break
            (pts,) = struct.unpack_from(">Q", moof, traf + 36)
            (data_offset,) = struct.unpack_from(">i", moof, traf + 60)
            found = []
            at = moof_at + data_offset
            for place in range(traf + _TRAF_BYTES, traf + traf_bytes, 12):
                ticks, nbytes, flags = struct.unpack_from(">III", moof, place)
                found.append((pts, flags == _KEY_SAMPLE, data[at : at + nbytes]))
                pts, at = pts + ticks, at + nbytes
            return found
        offset += length
    raise FragmentError(f"expected a fragment of ours, moof and mdat, with a track {track}")


def table(rows: Sequence[Any]) -> bytes:
    """Notes that list rows, for behind everything else in a finished file. A row has at most 120 bytes of JSON."""
    return b"".join(note({"frames": rows[first : first + _TABLE_ROWS]}) for first in range(0, len(rows), _TABLE_ROWS))


def read_table(path: Path) -> list[Any]:
    """The rows of a file's `table`; none where it has none. Raises: OSError."""
    rows: list[Any] = []
    with path.open("rb") as file:
        for box in _boxes(file):
            said = _read_note(file, box) if box[0] == b"uuid" else None
            found = said.get("frames") if said is not None else None
            rows += found if isinstance(found, list) else []
    return rows


def _read_head(path: Path, file: IO[bytes], boxes: Iterator[tuple[bytes, int, int]]) -> FileIndex:
    first = list(itertools.islice(boxes, 3))
    head = _read_note(file, first[2]) if [box[0] for box in first] == [b"ftyp", b"moov", b"uuid"] else None
    if head is None:
        raise FragmentError(f"{path}: no recording of ours, or its head is torn")
    return FileIndex(head=head, head_end=first[2][2], end=first[2][2])


def _read_body(file: IO[bytes], boxes: Iterator[tuple[bytes, int, int]], index: FileIndex) -> None:
    """Add each whole entry to the index; stops at the first thing that `Recording` would not have written."""
    frame: tuple[int, int, int, int] | None = None  # what the moof said that waits for its mdat
    start, attempt, shown = index.end, index.attempt, _shown({})
    for kind, offset, end in boxes:
        entry: Entry | None = None
        if kind == b"uuid" and frame is None and (said := _read_note(file, (kind, offset, end))) is not None:
            attempt, shown = _number(said, "attempt", attempt), _shown(said)
            if "missing" in said:
                entry = Entry(_number(said, "missing", -1), start, end, None)
        elif kind == b"moof" and frame is None:
            file.seek(offset)
            frame = _read_moof(file.read(end - offset))
            if frame is None:
                return
        elif kind == b"mdat" and frame is not None:
            entry, frame = Entry(frame[0], start, end, *frame[1:], *shown), None
        else:
            return
        if entry is not None:  # a note alone says nothing: it belongs to the fragment behind it
            if entry.seq <= (index.entries[-1].seq if index.entries else -1):
                return
            index.add(entry, attempt)
            start = end


def _number(said: Mapping[str, Any], key: str, otherwise: int) -> int:
    value = said.get(key)
    return value if isinstance(value, int) else otherwise


def _shown(said: Mapping[str, Any]) -> tuple[int, int | None, float | None]:
    of, sigma = said.get("of"), said.get("sigma")
    return (
        _number(said, "step", -1),
        of if isinstance(of, int) else None,
        float(sigma) if isinstance(sigma, int | float) else None,
    )


def _boxes(file: IO[bytes], offset: int = 0) -> Iterator[tuple[bytes, int, int]]:
    """Kind, offset and end of each whole top-level box, from the one at `offset` on."""
    size = file.seek(0, 2)
    while offset + 8 <= size:
        file.seek(offset)
        length, kind = struct.unpack(">I4s", file.read(8))
        if length < 8 or offset + length > size:
            return
        yield kind, offset, offset + length
        offset += length


def _read_note(file: IO[bytes], box: tuple[bytes, int, int]) -> dict[str, Any] | None:
    _, offset, end = box
    if end - offset > MAX_NOTE_BYTES:
        return None
    file.seek(offset + 8)
    body = file.read(end - offset - 8)
    if body[:16] != NOTE_UUID:
        return None
    try:
        value = json.loads(body[16:])
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_moof(moof: bytes) -> tuple[int, int, int, int] | None:
    """seq, time of the first picture, of the last, and its end; None when it is not laid out as `fragment` does."""
    if len(moof) < 100 or moof[12:16] != b"mfhd" or moof[52:56] != b"tfdt" or moof[72:76] != b"trun":
        return None
    (sequence_number,) = struct.unpack_from(">I", moof, 20)
    (tfdt,) = struct.unpack_from(">Q", moof, 60)
    (count,) = struct.unpack_from(">I", moof, 80)
    (traf_bytes,) = struct.unpack_from(">I", moof, 24)
    if count < 1 or traf_bytes != _TRAF_BYTES + 12 * count or (len(moof) - 24) % traf_bytes:
        return None
    ticks = [struct.unpack_from(">I", moof, 88 + 12 * i)[0] for i in range(count)]
    return sequence_number - 1, tfdt, tfdt + sum(ticks[:-1]), tfdt + sum(ticks)
