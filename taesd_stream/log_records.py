"""Records of the latent log: wire messages in a file, each with its length and CRC, and the way past damaged ones."""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import msgpack

from taesd_stream import wire
from taesd_stream.errors import WireError
from taesd_stream.frames import DTYPE_BYTES, LatentFrame, StreamInfo
from taesd_stream.messages import End, Part

HEAD: Final = struct.Struct(">III")  # length of header and payload, their CRC-32, length of the header
_ALLOWED = (StreamInfo, LatentFrame, End)
_MARK: Final = b"\xa1v" + msgpack.packb(wire.VERSION) + msgpack.packb("type")  # near the begin of every header
_PEEK_BYTES: Final = 4096  # of a record, to see its header; one with much meta needs a second look
_SEARCH_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Record:
    """One record that looks whole. seq: of a FRAME, else None; its payload is not read yet."""

    offset: int
    end: int
    type: str
    seq: int | None


def pack_record(message: StreamInfo | LatentFrame | End) -> list[Part]:
    """A message as it lies in the file."""
    header, *payload = wire.pack(message)
    body: Part = payload[0] if payload else b""
    crc = zlib.crc32(body, zlib.crc32(header))
    return [HEAD.pack(len(header) + len(body), crc, len(header)), header, body]


def read_record(fd: int, offset: int) -> Any | None:
    """The message at `offset`; None at the end, at a torn or at a damaged record."""
    head = _read(fd, HEAD.size, offset)
    if len(head) < HEAD.size:
        return None
    length, crc, header_bytes = HEAD.unpack(head)
    if length > wire.MAX_MESSAGE_BYTES or header_bytes > length:
        return None
    body = _read(fd, length, offset + HEAD.size)
    if len(body) < length or zlib.crc32(body) != crc:
        return None
    parts = [body[:header_bytes]] + ([memoryview(body)[header_bytes:]] if header_bytes < length else [])
    try:
        return wire.unpack(parts, _ALLOWED)
    except WireError:
        return None


def walk(fd: int, size: int) -> Iterator[Record]:
    """Every record of a file of `size` bytes by its header alone, in order; damaged stretches are passed over.

    Payloads are not read: two GiB of large frames take a second. Whether one is right tells `read_record`.
    """
    offset = 0
    while offset < size:
        record = _peek(fd, offset, size)
        if record is None:
            offset = _next_begin(fd, offset + 1, size)
        else:
            yield record
            offset = record.end


def _peek(fd: int, offset: int, size: int) -> Record | None:
    start = _read(fd, min(_PEEK_BYTES, size - offset), offset)
    if len(start) < HEAD.size:
        return None
    length, _, header_bytes = HEAD.unpack_from(start)
    end = offset + HEAD.size + length
    if not 0 < header_bytes <= length or header_bytes > wire.MAX_HEADER_BYTES or end > size:
        return None
    header = start[HEAD.size : HEAD.size + header_bytes]
    if len(header) < header_bytes:
        header = _read(fd, header_bytes, offset + HEAD.size)
    try:
        fields = msgpack.unpackb(header, strict_map_key=False)
        word = fields["type"]
        expected = math.prod(fields["shape"]) * DTYPE_BYTES[fields["dtype"]] if word == "FRAME" else 0
        seq = fields["seq"] if word == "FRAME" else None
    except Exception:  # noqa: BLE001 damaged bytes can be anything
        return None
    if word not in ("OPEN", "FRAME", "END") or length - header_bytes != expected:
        return None  # its length would lead astray
    if seq is not None and (type(seq) is not int or seq < 0):
        return None
    return Record(offset, end, word, seq)


def _next_begin(fd: int, offset: int, size: int) -> int:
    """Where the next record that looks whole begins; `size` where none does."""
    overlap = len(_MARK) - 1
    while offset < size:
        chunk = _read(fd, min(_SEARCH_BYTES, size - offset), offset)
        place = chunk.find(_MARK)
        while place >= 0:
            for map_bytes in (1, 3):  # msgpack's head of a small map, and of a larger one
                begin = offset + place - map_bytes - HEAD.size
                if begin >= 0 and _peek(fd, begin, size) is not None:
                    return begin
            place = chunk.find(_MARK, place + 1)
        if len(chunk) <= overlap:
            break
        offset += len(chunk) - overlap
    return size


def _read(fd: int, count: int, offset: int) -> bytes:
    data = os.pread(fd, count, offset) if hasattr(os, "pread") else _seek_and_read(fd, count, offset)
    while len(data) < count:
        more = os.pread(fd, count - len(data), offset + len(data)) if hasattr(os, "pread") else b""
        if not more:
            break
        data += more
    return data


def _seek_and_read(fd: int, count: int, offset: int) -> bytes:  # Windows has no pread
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, count)
