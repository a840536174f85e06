"""What travels: StreamInfo (who paints), LatentFrame (one publish), Packet (one encoded picture).

No process, no socket, no torch: a sampler imports this.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

Kind: TypeAlias = Literal["steps", "clip", "live"]
RecordMode: TypeAlias = Literal["off", "last", "all"]
Demand: TypeAlias = Literal["idle", "watched", "every"]
Rendition: TypeAlias = Literal["live", "thumb", "jpeg", "record", "film"]
WireDtype: TypeAlias = Literal["float32", "float16", "bfloat16", "uint8"]
EndReason: TypeAlias = Literal["done", "stopped", "failed"]
RunState: TypeAlias = Literal["waiting", "live", "done", "stopped", "failed", "lost"]

KINDS: Final[tuple[Kind, ...]] = ("steps", "clip", "live")
RECORD_MODES: Final[tuple[RecordMode, ...]] = ("off", "last", "all")
DEMANDS: Final[tuple[Demand, ...]] = ("idle", "watched", "every")
RENDITIONS: Final[tuple[Rendition, ...]] = ("live", "thumb", "jpeg", "record", "film")
END_REASONS: Final[tuple[EndReason, ...]] = ("done", "stopped", "failed")
DTYPE_BYTES: Final[dict[WireDtype, int]] = {"float32": 4, "float16": 2, "bfloat16": 2, "uint8": 1}

CLOCK_HZ: Final = 90_000  # MPEG's clock: PTS of every rendition, ISO/IEC 13818-1 2.4.2

MAX_PART_CHARS: Final = 64
NAME_RULE: Final = (
    f"up to 4 parts joined by '/', each of at most {MAX_PART_CHARS} letters, digits, '.', '_', '-', "
    "the first of them a letter or digit"
)
MAX_LATENTS_AT_ONCE: Final = 8  # of one frame: a worker decodes more in slices, and others' between them
_NAME_PART = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_PART_CHARS - 1}}}"
_NAME = re.compile(rf"{_NAME_PART}(?:/{_NAME_PART}){{0,3}}(?:~[0-9]{{1,4}})?")
_RUN = re.compile(r"[0-9a-f]{16}")


def is_stream_name(text: str) -> bool:
    """Whether `text` can name a stream: up to 4 parts joined by '/', then perhaps the broker's own '~N'."""
    return _NAME.fullmatch(text) is not None


def name_of_one(stream: str, place: int) -> str:
    """The stream of one video of a batch: a part behind its name, or where that has 4 parts the end of the last."""
    name, end = f"{stream}/{place}", f".{place}"
    if is_stream_name(name):
        return name
    batch, _, last = stream.rpartition("/")
    return f"{batch}/{last[: MAX_PART_CHARS - len(end)]}{end}"


def is_run_id(text: str) -> bool:
    """Whether `text` is a run: 16 lower-case hex digits."""
    return _RUN.fullmatch(text) is not None


def is_sliced(kind: Kind, shape: tuple[int, ...]) -> bool:
    """Whether a frame of so many latents, (..., C, h, w), is decoded in slices: it would hold others up for long."""
    return kind == "clip" or math.prod(shape[:-3]) > MAX_LATENTS_AT_ONCE


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamInfo:
    """What a publisher says once about one run of a stream.

    record: None follows the daemon's `recording.default`. fps: pictures a second of `clip` and `live`.
    opened_ns: the publisher's time.monotonic_ns() at its opening: the origin of the run's picture times.
    owner: name of the key that opened it, None where no keys are asked for; the broker's word, no publisher's.
    meta: what people read beside the picture; `continues`: the run, at another daemon, that this one goes on from.
    """

    stream: str
    run: str  # 16 hex digits, one opening of the stream
    kind: Kind
    latent_format: str
    fps: float | None = None
    record: RecordMode | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    opened_ns: int = 0
    owner: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFrame:
    """One publish of a sampler: the unit that travels publisher -> broker -> decode worker.

    payload: the latents' bytes, C order, `shape` and `dtype` as said; z as the scheduler holds it.
    index: place in the run of the first latent, for `live`; else seq.
    sent_ns: the publisher's time.monotonic_ns(); compare it only after the offset of its host is known.
    """

    run: str
    seq: int  # from 0, one a publish(); a run that continues another one at another daemon counts on
    index: int
    step: int  # 0-based, the `i` of a k-diffusion callback
    total_steps: int | None
    sigma: float | None  # noise level the model saw at this step, in the sampler's own schedule
    dtype: WireDtype
    shape: tuple[int, ...]
    kept: bool  # the log must have it before it is acked
    sent_ns: int
    payload: bytes | memoryview

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamps:
    """When one picture passed each hop: nanoseconds on the broker's monotonic clock; 0 is not measured."""

    sent_ns: int = 0  # publish() was called
    received_ns: int = 0  # the broker had it
    started_ns: int = 0  # the decode worker began its slice
    decoded_ns: int = 0  # its planes were in host memory
    encoded_ns: int = 0  # its packet was there


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """One encoded picture: the unit that travels decode worker -> streamer -> viewers and files.

    payload: `thumb` and `jpeg` a JPEG, the others an H.264 access unit (Annex B, SPS and PPS at each IDR).
    pts: ticks of 1/90000 s since the run's first frame.
    index, count: which of the pictures of its frame (a `clip` has many); `steps` 0 of 1, but see `tracks`.
    parts, columns: how many pictures of a batch stand in this one, row by row, and how many in a row.
    tracks: of a recording, into how many tracks the frame's pictures go, in turn: a batch may have one a picture.
    attempt: number of the recording's or the film's try, given by the broker; 0 for other renditions.
    placed_ns: when the run was made, left its former worker or moved, broker's clock: that worker's packets have less.
    """

    stream: str
    run: str
    seq: int
    index: int
    count: int
    rendition: Rendition
    attempt: int
    is_keyframe: bool
    pts: int
    width: int  # of the picture, pixels
    height: int
    decoder: str  # what made it: "taef2", "linear", ...
    step: int
    total_steps: int | None
    sigma: float | None
    stamps: Stamps
    kind: Kind = "steps"
    parts: int = 1
    columns: int = 1
    tracks: int = 1
    placed_ns: int = 0
    payload: bytes | memoryview
