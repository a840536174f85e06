"""The protocol: every message, how it becomes bytes and back, versions and limits. No sockets, no torch.

A message is one msgpack map (`v`, `type`, its fields), then, for FRAME, JOB and PACKET, payloads that are never copied.
`FIELDS` is the protocol itself: one row a message, one checker a field. Unknown keys are ignored, so that an older peer
keeps working; a field with a default may be absent. docs/wire.md tells the same to other languages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypeVar

import msgpack

from taesd_stream.errors import WireError
from taesd_stream.frames import (
    DEMANDS,
    DTYPE_BYTES,
    END_REASONS,
    KINDS,
    RECORD_MODES,
    RENDITIONS,
    LatentFrame,
    Packet,
    Stamps,
    StreamInfo,
    is_run_id,
    is_stream_name,
)
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
    JobItem,
    Keyframe,
    Part,
    Progress,
    PublisherHello,
    Record,
    Refused,
    RunHello,
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
MAX_META_BYTES: Final = 16 << 10
MAX_MESSAGE_BYTES: Final = MAX_FRAME_BYTES + (64 << 10)  # MAXMSGSIZE of every socket that binds
MAX_STATE_BYTES: Final = 16 << 20  # STATE and JOB headers grow with the number of streams; only our own roles send them

DEFAULT_ADDRESS: Final = "tcp://127.0.0.1:5760"

Check: TypeAlias = Callable[[Any], Any]
M = TypeVar("M")


# --- checkers: value from outside -> value, or WireError ---


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(low: int, high: int = (1 << 63) - 1) -> Check:
    def check(value: Any) -> int:
        if not _is_int(value) or not low <= value <= high:
            raise WireError(f"expected an integer from {low} to {high}, got {value!r:.60}")
        return int(value)

    return check


def _number(low: float = -1e30, high: float = 1e30) -> Check:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN fails too
            raise WireError(f"expected a number from {low} to {high}, got {value!r:.60}")
        return float(value)

    return check


def _text(max_chars: int) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or len(value) > max_chars:
            raise WireError(f"expected text of at most {max_chars} characters, got {value!r:.60}")
        return value

    return check


def _choice(choices: Sequence[str]) -> Check:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise WireError(f"expected one of {', '.join(choices)}, got {value!r:.60}")
        return value

    return check


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise WireError(f"expected true or false, got {value!r:.60}")
    return value


def _stream(value: Any) -> str:
    if not isinstance(value, str) or not is_stream_name(value):
        raise WireError(f"expected a stream name, got {value!r:.80}")
    return value


def _run(value: Any) -> str:
    if not isinstance(value, str) or not is_run_id(value):
        raise WireError(f"expected a run of 16 hex digits, got {value!r:.60}")
    return value


def _optional(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _list(check: Check, max_items: int) -> Check:
    def checked(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) > max_items:
            raise WireError(f"expected a list of at most {max_items}, got {type(value).__name__}")
        return tuple(check(item) for item in value)

    return checked


def _map(check_key: Check, check_value: Check, max_items: int) -> Check:
    def checked(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict) or len(value) > max_items:
            raise WireError(f"expected a map of at most {max_items}, got {type(value).__name__}")
        return {check_key(key): check_value(item) for key, item in value.items()}

    return checked


def _any(value: Any) -> Any:
    return value


def _meta(value: Any) -> dict[str, Any]:
    meta: dict[str, Any] = _map(_text(64), _any, 64)(value)
    if len(msgpack.packb(meta)) > MAX_META_BYTES:
        raise WireError(f"meta: expected at most {MAX_META_BYTES} bytes")
    return meta


def _shape(value: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = _list(_integer(1, 1 << 20), 5)(value)
    if len(shape) < 3:
        raise WireError(f"shape: expected 3 to 5 axes, got {list(shape)}")
    return shape


def _nested(cls: type) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise WireError(f"expected a map, got {type(value).__name__}")
        return _build(cls, value)

    return check


_SEQ = _integer(0, 1 << 40)
_SEQ_OR_NONE_YET = _integer(-1, 1 << 40)
_COUNT = _integer(0, 1 << 31)
_NS = _integer(-(1 << 62), 1 << 62)
_SIGMA = _optional(_number())
_STEPS = _optional(_integer(1, 1 << 31))
_DTYPE = _choice(tuple(DTYPE_BYTES))
_RENDITION = _choice(RENDITIONS)
_MODE = _choice(RECORD_MODES)
_CODE = _text(64)
_TEXT = _text(4000)
_MAPS = _list(_map(_text(64), _any, 256), 1 << 16)

FIELDS: Final[dict[type, dict[str, Check]]] = {
    StreamInfo: {
        "stream": _stream,
        "run": _run,
        "kind": _choice(KINDS),
        "latent_format": _text(64),
        "fps": _optional(_number(0.001, 1000)),
        "record": _optional(_MODE),
        "meta": _meta,
        "opened_ns": _NS,
    },
    LatentFrame: {
        "run": _run,
        "seq": _SEQ,
        "index": _SEQ,
        "step": _COUNT,
        "total_steps": _STEPS,
        "sigma": _SIGMA,
        "dtype": _DTYPE,
        "shape": _shape,
        "kept": _boolean,
        "sent_ns": _NS,
    },
    RunHello: {"next_seq": _SEQ, "kept_from": _optional(_SEQ), "stoppable": _boolean},
    PublisherHello: {"runs": _map(_run, _nested(RunHello), 4096), "echo_ns": _NS, "offset_ns": _NS},
    End: {"run": _run, "last_seq": _SEQ_OR_NONE_YET, "reason": _choice(END_REASONS), "text": _TEXT},
    DemandUpdate: {"run": _run, "level": _choice(DEMANDS), "max_fps": _number(0, 1000), "record": _MODE},
    Ack: {"run": _run, "seq": _SEQ_OR_NONE_YET, "ended": _boolean},
    StopRun: {"run": _run},
    Refused: {"stream": _stream, "run": _run, "code": _CODE, "text": _TEXT, "use": _optional(_stream)},
    Echo: {"echo_ns": _NS, "now_ns": _NS},
    WorkerHello: {
        "device": _text(200),
        "credits": _integer(0, 64),
        "engines": _map(_text(64), _map(_text(64), _any, 16), 256),
        "memories": _map(_run, _SEQ, 4096),
        "echo_ns": _NS,
        "offset_ns": _NS,
    },
    Progress: {"job": _SEQ},
    Done: {"job": _SEQ, "ms": _number(0)},
    Failed: {
        "job": _SEQ,
        "items": lambda value: list(_list(_COUNT, 4096)(value)),
        "code": _CODE,
        "text": _TEXT,
        "retry": _boolean,
    },
    JobItem: {
        "stream": _stream,
        "run": _run,
        "seq": _SEQ,
        "kind": _choice(KINDS),
        "shape": _shape,
        "dtype": _DTYPE,
        "renditions": _list(_RENDITION, len(RENDITIONS)),
        "attempt": _COUNT,
        "keyframe": _boolean,
        "pts": _NS,
        "picture_ticks": _COUNT,
        "step": _COUNT,
        "total_steps": _STEPS,
        "sigma": _SIGMA,
        "sent_ns": _NS,
        "received_ns": _NS,
    },
    Job: {"job": _SEQ, "latent_format": _text(64), "items": _list(_nested(JobItem), 4096), "packets_to": _text(512)},
    Forget: {"run": _run},
    Drain: {},
    Cursor: {
        "run": _run,
        "attempt": _COUNT,
        "written": _SEQ_OR_NONE_YET,
        "synced": _SEQ_OR_NONE_YET,
        "finished": _boolean,
    },
    StreamerHello: {"endpoint": _text(512), "cursors": _list(_nested(Cursor), 1 << 16), "echo_ns": _NS},
    Watch: {"stream": _stream, "rendition": _RENDITION, "viewers": _COUNT},
    Keyframe: {"stream": _stream, "rendition": _RENDITION},
    Record: {"stream": _stream, "mode": _MODE},
    StopStream: {"stream": _stream},
    State: {
        "streams": lambda value: list(_MAPS(value)),
        "runs": _map(_run, _map(_text(64), _any, 64), 1 << 16),
        "workers": lambda value: list(_MAPS(value)),
        "stats": _map(_text(64), _any, 256),
        "desired_workers": _COUNT,
        "now_ns": _NS,
    },
    Gap: {"run": _run, "seq": _SEQ, "attempt": _COUNT, "code": _CODE},
    Stats: {},
    Stamps: dict.fromkeys([f.name for f in dataclasses.fields(Stamps)], _NS),
    Packet: {
        "stream": _stream,
        "run": _run,
        "seq": _SEQ,
        "index": _COUNT,
        "count": _integer(1, 1 << 20),
        "rendition": _RENDITION,
        "attempt": _COUNT,
        "is_keyframe": _boolean,
        "pts": _NS,
        "width": _integer(1, 1 << 20),
        "height": _integer(1, 1 << 20),
        "decoder": _text(64),
        "step": _COUNT,
        "total_steps": _STEPS,
        "sigma": _SIGMA,
        "stamps": _nested(Stamps),
    },
}

_NAMES: Final[dict[type, str]] = {
    StreamInfo: "OPEN",
    LatentFrame: "FRAME",
    PublisherHello: "HELLO",
    WorkerHello: "HELLO",
    StreamerHello: "HELLO",
    DemandUpdate: "DEMAND",
    StopRun: "STOP",
    StopStream: "STOP",
}

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
    Stats,
)
TO_WORKER: Final = (Job, Forget, Drain, Echo)
TO_STREAMER: Final = (State, Gap, Echo)
FROM_WORKER_TO_STREAMER: Final = (Packet,)

_DEFAULTED: Final[dict[type, frozenset[str]]] = {
    cls: frozenset(
        f.name
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    )
    for cls in FIELDS
}


def type_name(cls: type) -> str:
    """The word that stands for a message class on the wire."""
    return _NAMES.get(cls, cls.__name__.upper())


def _plain(value: Any) -> Any:
    """Dataclasses inside a message as maps; everything else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _plain(getattr(value, name)) for name in FIELDS[type(value)]}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def pack(message: Any) -> list[Part]:
    """One of our messages as the parts to send: the header, then its payloads uncopied."""
    cls = type(message)
    header = {"v": VERSION, "type": type_name(cls), **_plain(message)}
    role = getattr(cls, "ROLE", None)
    if role:
        header["role"] = role
    parts: list[Part] = [msgpack.packb(header)]
    if isinstance(message, LatentFrame | Packet):
        parts.append(message.payload)
    elif isinstance(message, Job):
        parts.extend(message.payloads)
    return parts


def _build(cls: type[M], header: Mapping[str, Any], **extra: Any) -> M:
    values: dict[str, Any] = extra
    for name, check in FIELDS[cls].items():
        if name in header:
            try:
                values[name] = check(header[name])
            except WireError as error:
                raise WireError(f"{type_name(cls)} {name}: {error}") from None
        elif name not in _DEFAULTED[cls]:
            raise WireError(f"{type_name(cls)}: {name} is missing")
    return cls(**values)


def _header(head: Part) -> dict[str, Any]:
    try:
        header = msgpack.unpackb(head, strict_map_key=False)
    except Exception as error:  # msgpack raises many kinds for bytes from outside; each means the same here
        raise WireError(f"header is no msgpack: {type(error).__name__}") from error
    if not isinstance(header, dict):
        raise WireError(f"header: expected a map, got {type(header).__name__}")
    if header.get("v") != VERSION:
        raise WireError(f"version: expected {VERSION}, got {header.get('v')!r:.20}")
    return header


def _payload_of_frame(frame: LatentFrame) -> None:
    if frame.nbytes > MAX_FRAME_BYTES:
        raise WireError(
            f"FRAME: expected at most {MAX_FRAME_BYTES} bytes, {frame.shape} {frame.dtype} is {frame.nbytes}"
        )
    if len(frame.payload) != frame.nbytes:
        raise WireError(
            f"FRAME payload: expected {frame.nbytes} bytes for {frame.shape} {frame.dtype}, got {len(frame.payload)}"
        )


def unpack(parts: Sequence[Part], allowed: Sequence[type]) -> Any:
    """Rebuild a message from received parts; payloads are not copied.

    allowed: the classes that may come this way, one of the tables above.
    Raises: WireError for any malformed input, and nothing else.
    """
    if not parts:
        raise WireError("expected at least 1 part, got 0")
    inner = State in allowed or Job in allowed or StreamerHello in allowed
    if len(parts[0]) > (MAX_STATE_BYTES if inner else MAX_HEADER_BYTES):
        raise WireError(f"header: {len(parts[0])} bytes is over the limit")
    header = _header(parts[0])
    word, role = header.get("type"), header.get("role")
    for cls in allowed:
        if type_name(cls) == word and getattr(cls, "ROLE", None) in (None, role):
            return _unpack_as(cls, header, parts[1:])
    raise WireError(f"type: expected one of {', '.join(type_name(cls) for cls in allowed)}, got {word!r:.40}")


def _unpack_as(cls: type, header: Mapping[str, Any], payloads: Sequence[Part]) -> Any:
    if cls is Job:
        job = _build(Job, header, payloads=tuple(payloads))
        if len(job.items) != len(payloads):
            raise WireError(f"JOB: {len(job.items)} items, {len(payloads)} payloads")
        return job
    with_payload = cls in (LatentFrame, Packet)
    if len(payloads) != int(with_payload):
        raise WireError(f"{type_name(cls)}: expected {1 + with_payload} parts, got {1 + len(payloads)}")
    if not with_payload:
        return _build(cls, header)
    message: LatentFrame | Packet = _build(cls, header, payload=payloads[0])
    if isinstance(message, LatentFrame):
        _payload_of_frame(message)
    return message


def is_finite(value: float | None) -> bool:
    """Whether a sigma can go on the wire."""
    return value is None or math.isfinite(value)
