"""The protocol: every message, how it becomes bytes and back, versions and limits. No sockets, no torch.

A message is one msgpack map (`v`, `type`, its fields), then, for FRAME, JOB and PACKET, payloads that are never copied.
What the fields are, and may hold, is in message_fields.py.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgpack

from taesd_stream.errors import WireError
from taesd_stream.fields import quoted
from taesd_stream.frames import DTYPE_BYTES, LatentFrame, Packet, StreamInfo, WireDtype
from taesd_stream.message_fields import FIELDS, build, type_name
from taesd_stream.messages import (
    Ack,
    Cursor,
    DemandUpdate,
    Done,
    Drain,
    Echo,
    End,
    Failed,
    Forget,
    Gap,
    Job,
    Keyframe,
    Part,
    Progress,
    PublisherHello,
    Record,
    Refused,
    RefusedPeer,
    State,
    Stats,
    StopRun,
    StopStream,
    StreamerHello,
    Watch,
    WorkerHello,
)

VERSION: Final = 1
MAX_FRAME_BYTES: Final = 64 << 20  # a 720p clip of 129 frames is 14.5 MiB; a bigger claim is an attack or a bug
MAX_HEADER_BYTES: Final = 64 << 10
MAX_MESSAGE_BYTES: Final = MAX_FRAME_BYTES + (64 << 10)  # MAXMSGSIZE of every socket that binds
MAX_STATE_BYTES: Final = 16 << 20  # STATE and JOB headers grow with the number of streams; only our own roles send them

DEFAULT_ADDRESS: Final = "tcp://127.0.0.1:5760"

# Who may say what to whom: a message outside its table is a WireError, whoever sent it.
FROM_PUBLISHER: Final = (StreamInfo, LatentFrame, End, PublisherHello)
TO_PUBLISHER: Final = (DemandUpdate, Ack, StopRun, Refused, Echo)
FROM_INSIDE: Final = (
    WorkerHello,
    Progress,
    Done,
    Failed,
    StreamerHello,
    Watch,
    Keyframe,
    Record,
    StopStream,
    Cursor,
    Forget,
    Stats,
)
FROM_WORKER: Final = (WorkerHello, Progress, Done, Failed, Keyframe, Stats)  # of those, with a worker's key
TO_WORKER: Final = (Job, Forget, Drain, Echo, RefusedPeer)
TO_STREAMER: Final = (State, Gap, Echo, RefusedPeer)
FROM_WORKER_TO_STREAMER: Final = (Packet,)


def _reader(names: tuple[str, ...]) -> Callable[[Any], Iterable[Any]]:
    if len(names) == 1:  # of one name attrgetter gives the bare value
        return lambda value: (getattr(value, names[0]),)
    return operator.attrgetter(*names) if names else lambda _: ()


_READERS: Final = {cls: (tuple(fields), _reader(tuple(fields))) for cls, fields in FIELDS.items()}


def _as_map(value: Any) -> dict[str, Any]:
    """A dataclass of ours as a map; msgpack asks for those inside it too. Raises: TypeError for other things."""
    if type(value) not in _READERS:
        raise TypeError(f"expected what msgpack has a form for, got {value!r:.40}")
    names, read = _READERS[type(value)]
    return dict(zip(names, read(value), strict=True))


def pack(message: Any) -> list[Part]:
    """One of our messages as the parts to send: the header, then its payloads uncopied."""
    cls = type(message)
    header = {"v": VERSION, "type": type_name(cls), **_as_map(message)}
    role = getattr(cls, "ROLE", None)
    if role:
        header["role"] = role
    parts: list[Part] = [msgpack.packb(header, default=_as_map)]
    if isinstance(message, LatentFrame | Packet):
        parts.append(message.payload)
    elif isinstance(message, Job):
        parts.extend(message.payloads)
    return parts


def _header(head: Part) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(head, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds for bytes from outside; each means the same here
        raise WireError(f"header is no msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise WireError(f"header: expected a map, got {type(header).__name__}")
    version = header.get("v")
    if type(version) is not int or version != VERSION:
        raise WireError(f"version: expected {VERSION}, got {quoted(version, 20)}")
    return header


def _check_payload(cls: type, shape: Sequence[int], dtype: WireDtype, payload: Part) -> None:
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    what = f"{tuple(shape)} {dtype}"
    if expected > MAX_FRAME_BYTES:
        raise WireError(f"{type_name(cls)}: expected at most {MAX_FRAME_BYTES} bytes, {what} is {expected}")
    if len(payload) != expected:
        raise WireError(f"{type_name(cls)} payload: expected {expected} bytes for {what}, got {len(payload)}")


def unpack(parts: Sequence[Part], allowed: Sequence[type]) -> Any:
    """Rebuild a message from received parts; payloads are not copied.

    allowed: the classes that may come this way, one of the tables above.
    Raises: WireError for any malformed input, and nothing else.
    """
    if not parts:
        raise WireError("expected at least 1 part, got 0")
    max_header_bytes, classes = _of_way(tuple(allowed))
    if len(parts[0]) > max_header_bytes:
        raise WireError(f"header: {len(parts[0])} bytes is over the limit")
    header = _header(parts[0])
    word, role = header.get("type"), header.get("role")
    for cls in classes.get(word, ()) if isinstance(word, str) else ():
        if getattr(cls, "ROLE", None) in (None, role):
            return _unpack_as(cls, header, parts[1:])
    raise WireError(f"type: expected one of {', '.join(type_name(cls) for cls in allowed)}, got {quoted(word, 40)}")


@functools.cache
def _of_way(allowed: tuple[type, ...]) -> tuple[int, dict[str, list[type]]]:
    """How long a header may be that comes this way, and the classes that may, by their word."""
    classes: dict[str, list[type]] = {}
    for cls in allowed:
        classes.setdefault(type_name(cls), []).append(cls)
    is_inner = not {State, Job, StreamerHello}.isdisjoint(allowed)
    return MAX_STATE_BYTES if is_inner else MAX_HEADER_BYTES, classes


def _unpack_as(cls: type, header: Mapping[str, Any], payloads: Sequence[Part]) -> Any:
    if cls is Job:
        job = build(Job, header, payloads=tuple(payloads))
        expected = sum(1 + bool(item.history) for item in job.items)
        if len(payloads) != expected:
            raise WireError(f"JOB: {len(job.items)} items need {expected} payloads, got {len(payloads)}")
        for item, payload, history in job.parts():
            _check_payload(cls, item.shape, item.dtype, payload)
            if history is not None:
                _check_payload(cls, (item.history, *item.shape[-3:]), item.dtype, history)
        return job
    with_payload = cls in (LatentFrame, Packet)
    if len(payloads) != int(with_payload):
        raise WireError(f"{type_name(cls)}: expected {1 + with_payload} parts, got {1 + len(payloads)}")
    if not with_payload:
        return build(cls, header)
    message: LatentFrame | Packet = build(cls, header, payload=payloads[0])
    if isinstance(message, LatentFrame):
        _check_payload(cls, message.shape, message.dtype, message.payload)
    return message
