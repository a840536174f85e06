"""The fields of every message, and what each may hold: the protocol as a table. `wire` makes bytes of it and back.

`FIELDS` has one row a message, one checker a field. Unknown keys are ignored, so that an older peer keeps working; a
field with a default may be absent. docs/wire.md tells the same to other languages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgpack

from taesd_stream.errors import WireError
from taesd_stream.fields import (
    ANY,
    BOOLEAN,
    PLAIN,
    RUN,
    STREAM,
    Check,
    as_list,
    choice,
    integer,
    mapping,
    number,
    optional,
    sequence,
    text,
)
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
)
from taesd_stream.messages import (
    Ack,
    Cursor,
    Degraded,
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
    Progress,
    PublisherHello,
    Record,
    Refused,
    RefusedPeer,
    RunHello,
    State,
    Stats,
    StopRun,
    StopStream,
    StreamerHello,
    Watch,
    WorkerHello,
)

MAX_META_BYTES: Final = 16 << 10
MAX_TEXT_CHARS: Final = 4000

M = TypeVar("M")


def _meta(value: Any) -> dict[str, Any]:
    meta: dict[str, Any] = _META(value)
    if len(msgpack.packb(meta)) > MAX_META_BYTES:
        raise WireError(f"expected at most {MAX_META_BYTES} bytes")
    return meta


def _nested(cls: type) -> Check:
    def take(value: Any) -> Any:
        if not isinstance(value, dict):
            raise WireError(f"expected a map, got {type(value).__name__}")
        return build(cls, value)

    return Check(f"a map as {cls.__name__}", take)


_META = mapping(text(64), PLAIN, 64)
_SEQ = integer(0, 1 << 40)
_FRAME_SEQ = integer(0, (1 << 32) - 2)  # a file has 32 bits for it and 1
_SEQ_OR_NONE_YET = integer(-1, 1 << 40)
_COUNT = integer(0, 1 << 31)
_NS = integer(-(1 << 62), 1 << 62)
_FPS = optional(number(0.001, 1000))
_PEER_NS = integer(-(1 << 61), 1 << 61)  # a publisher's time plus its offset is still an _NS
_SHAPE = sequence(integer(1, 1 << 20), 5, min_items=3)
_SIGMA = optional(number())
_STEPS = optional(integer(1, 1 << 31))
_DTYPE = choice(tuple(DTYPE_BYTES))
_RENDITION = choice(RENDITIONS)
_MODE = choice(RECORD_MODES)
_CODE = text(64)
_TEXT = text(MAX_TEXT_CHARS)
_MAPS = as_list(sequence(mapping(text(64), ANY, 256), 1 << 16))

FIELDS: Final[dict[type, dict[str, Check]]] = {
    StreamInfo: {
        "stream": STREAM,
        "run": RUN,
        "kind": choice(KINDS),
        "latent_format": text(64),
        "fps": _FPS,
        "record": optional(_MODE),
        "meta": Check(f"{_META.says}, at most {MAX_META_BYTES} bytes", _meta),
        "opened_ns": _PEER_NS,
        "owner": optional(text(64)),
    },
    LatentFrame: {
        "run": RUN,
        "seq": _FRAME_SEQ,
        "index": _FRAME_SEQ,  # so that no run is too far on for what is said of its memory and its times
        "step": _COUNT,
        "total_steps": _STEPS,
        "sigma": _SIGMA,
        "dtype": _DTYPE,
        "shape": _SHAPE,
        "kept": BOOLEAN,
        "sent_ns": _PEER_NS,
    },
    RunHello: {"next_seq": _SEQ, "kept_from": optional(_SEQ), "stoppable": BOOLEAN},
    PublisherHello: {"runs": mapping(RUN, _nested(RunHello), 4096), "echo_ns": _PEER_NS, "offset_ns": _PEER_NS},
    End: {"run": RUN, "last_seq": _SEQ_OR_NONE_YET, "reason": choice(END_REASONS), "text": _TEXT},
    DemandUpdate: {"run": RUN, "level": choice(DEMANDS), "max_fps": number(0, 1000), "record": _MODE},
    Ack: {"run": RUN, "seq": _SEQ_OR_NONE_YET, "ended": BOOLEAN},
    StopRun: {"run": RUN},
    Refused: {"stream": STREAM, "run": RUN, "code": _CODE, "text": _TEXT, "use": optional(STREAM)},
    RefusedPeer: {"code": _CODE, "text": _TEXT},
    Echo: {"echo_ns": _NS, "now_ns": _NS},
    WorkerHello: {
        "device": text(200),
        "credits": integer(0, 64),
        "draining": BOOLEAN,
        "engines": mapping(text(64), mapping(text(64), ANY, 16), 256),
        "memories": mapping(RUN, _SEQ, 4096),
        "encoders": sequence(RUN, 4096),
        "echo_ns": _NS,
        "offset_ns": _NS,
    },
    Progress: {"job": _SEQ},
    Degraded: {"run": RUN, "code": _CODE, "text": _TEXT},
    Done: {"job": _SEQ, "ms": number(0), "degraded": sequence(_nested(Degraded), 4096)},
    Failed: {
        "job": _SEQ,
        "items": as_list(sequence(_COUNT, 4096)),
        "code": _CODE,
        "text": _TEXT,
        "retry": BOOLEAN,
    },
    JobItem: {
        "stream": STREAM,
        "run": RUN,
        "seq": _SEQ,
        "index": _SEQ,
        "kind": choice(KINDS),
        "shape": _SHAPE,
        "dtype": _DTYPE,
        "renditions": sequence(_RENDITION, len(RENDITIONS)),
        "attempt": _COUNT,
        "keyframe": BOOLEAN,
        "pts": _NS,
        "fps": _FPS,
        "step": _COUNT,
        "total_steps": _STEPS,
        "sigma": _SIGMA,
        "sent_ns": _NS,
        "received_ns": _NS,
        "history": integer(0, 64),
        "expects_memory": BOOLEAN,
        "is_repeat": BOOLEAN,
        "placed_ns": _NS,
    },
    Job: {"job": _SEQ, "latent_format": text(64), "items": sequence(_nested(JobItem), 4096), "packets_to": text(512)},
    Forget: {"run": RUN},
    Drain: {},
    Cursor: {
        "run": RUN,
        "attempt": _COUNT,
        "written": _SEQ_OR_NONE_YET,
        "synced": _SEQ_OR_NONE_YET,
        "finished": BOOLEAN,
    },
    StreamerHello: {"endpoint": text(512), "cursors": sequence(_nested(Cursor), 1 << 16), "echo_ns": _NS},
    Watch: {"stream": STREAM, "rendition": _RENDITION, "viewers": _COUNT},
    Keyframe: {"stream": STREAM, "rendition": _RENDITION},
    Record: {"stream": STREAM, "mode": _MODE},
    StopStream: {"stream": STREAM},
    State: {
        "streams": _MAPS,
        "runs": mapping(RUN, mapping(text(64), ANY, 64), 1 << 16),
        "workers": _MAPS,
        "stats": mapping(text(64), ANY, 256),
        "desired_workers": _COUNT,
        "now_ns": _NS,
    },
    Gap: {"run": RUN, "seq": _SEQ, "attempt": _COUNT, "code": _CODE},
    Stats: {},
    Stamps: dict.fromkeys([f.name for f in dataclasses.fields(Stamps)], _NS),
    Packet: {
        "stream": STREAM,
        "run": RUN,
        "seq": _SEQ,
        "index": _COUNT,
        "count": integer(1, 1 << 20),
        "rendition": _RENDITION,
        "attempt": _COUNT,
        "is_keyframe": BOOLEAN,
        "pts": _NS,
        "width": integer(1, 1 << 20),
        "height": integer(1, 1 << 20),
        "decoder": text(64),
        "step": _COUNT,
        "total_steps": _STEPS,
        "sigma": _SIGMA,
        "stamps": _nested(Stamps),
        "kind": choice(KINDS),
        "parts": integer(1, 1 << 20),
        "columns": integer(1, 1 << 20),
        "tracks": integer(1, 1 << 20),
        "placed_ns": _NS,
    },
}

_NAMES: Final[dict[type, str]] = {
    StreamInfo: "OPEN",
    LatentFrame: "FRAME",
    PublisherHello: "HELLO",
    WorkerHello: "HELLO",
    StreamerHello: "HELLO",
    DemandUpdate: "DEMAND",
    RefusedPeer: "REFUSED",
    StopRun: "STOP",
    StopStream: "STOP",
}


def _takers(cls: type) -> list[tuple[str, Callable[[Any], Any], bool]]:
    """Name, check and whether it may be absent, of each field."""
    defaults = {one.name: (one.default, one.default_factory) for one in dataclasses.fields(cls)}
    none = (dataclasses.MISSING, dataclasses.MISSING)
    return [(name, check.take, defaults[name] != none) for name, check in FIELDS[cls].items()]


_TAKERS: Final = {cls: _takers(cls) for cls in FIELDS}


def type_name(cls: type) -> str:
    """The word that stands for a message class on the wire."""
    return _NAMES.get(cls, cls.__name__.upper())


def check(cls: type, **values: Any) -> None:
    """Check some fields of a message of ours, as they would travel, before it is sent. Raises: WireError."""
    for name, value in values.items():
        _checked(cls, name, value)


def _checked(cls: type, name: str, value: Any) -> Any:
    try:
        return FIELDS[cls][name](value)
    except WireError as error:
        raise WireError(f"{type_name(cls)} {name}: {error}") from None


def build(cls: type[M], header: Mapping[str, Any], **extra: Any) -> M:
    """A message of ours from a map that came; extra: what travels beside it. Raises: WireError."""
    values: dict[str, Any] = extra
    for name, take, has_default in _TAKERS[cls]:  # of each frame, on the broker's one thread
        if name in header:
            try:
                values[name] = take(header[name])
            except WireError as error:
                raise WireError(f"{type_name(cls)} {name}: {error}") from None
        elif not has_default:
            raise WireError(f"{type_name(cls)}: {name} is missing")
    return cls(**values)
