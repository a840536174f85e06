"""The small signals of the protocol: all that is said besides latents (OPEN, FRAME) and pictures (PACKET).

What travels is in frames.py; how any of it becomes bytes, and what may be in each field, is in wire.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from taesd_stream.frames import Demand, EndReason, Kind, RecordMode, Rendition, WireDtype

Part: TypeAlias = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class RunHello:
    """One run in a publisher's HELLO. stoppable: the program reads `publisher.stopped`."""

    next_seq: int
    kept_from: int | None = None
    stoppable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PublisherHello:
    """publisher -> broker, each second. echo_ns: its clock now; offset_ns: its guess of broker clock minus its own."""

    runs: dict[str, RunHello]
    echo_ns: int
    offset_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """publisher -> broker: the run is over. last_seq: -1 when nothing was published; text: why, for `failed`."""

    run: str
    last_seq: int
    reason: EndReason
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandUpdate:
    """broker -> publisher: who wants this run. record: what is kept, once settled."""

    TYPE: ClassVar[str] = "DEMAND"
    run: str
    level: Demand
    max_fps: float
    record: RecordMode


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """broker -> publisher: the log has every kept frame up to seq (-1: none yet). ended: the END too."""

    run: str
    seq: int
    ended: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRun:
    """broker -> publisher: a person pressed stop."""

    TYPE: ClassVar[str] = "STOP"
    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """broker -> publisher: this run is not taken. Codes: taken (`use` is free), unknown_run, format, limit, key."""

    stream: str
    run: str
    code: str
    text: str
    use: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedPeer:
    """broker -> worker, streamer: nothing is taken from you any more. Codes: key (it was revoked)."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """broker -> anyone who said HELLO: its echo_ns back, and the broker's clock. Least round trip gives the offset."""

    echo_ns: int
    now_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHello:
    """worker -> broker, each second. engines: latent format -> {decoder, reason, history}; memories: run -> next index.

    encoders: runs whose encoders it has open; of those that went to another worker meanwhile FORGET is the answer.
    history: latents that a `live` frame needs before it where the run's memory is not there; 0 for pictures.
    draining: it wants to go: no more jobs, its streams move, and DRAIN is the answer once it holds none.
    """

    ROLE: ClassVar[str] = "worker"
    device: str
    credits: int
    draining: bool = False
    engines: dict[str, dict[str, Any]] = field(default_factory=dict)
    memories: dict[str, int] = field(default_factory=dict)
    encoders: tuple[str, ...] = ()
    echo_ns: int = 0
    offset_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """worker -> broker: one slice more of the job is done; its deadline counts from here."""

    job: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Degraded:
    """What was made worse than it could be, of one run in one job. code: for counters; text: for people."""

    run: str
    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """worker -> broker: the job's packets are on their way. One credit comes back."""

    job: int
    ms: float
    degraded: tuple[Degraded, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """worker -> broker: items (places in the job; empty: all) gave no picture. One credit comes back.

    retry: another try may help (out of memory); else the frame itself is at fault.
    Codes: bad_frame, no_decoder, memory, no_memory (of a `live` run: it needs its history), not_encoded (for its
    recording), internal.
    """

    job: int
    items: list[int]
    code: str
    text: str
    retry: bool


@dataclass(frozen=True, slots=True)
class History:
    """The `count` latents of a `live` run just before a frame, of its latent shape and dtype: (count, C, h, w)."""

    count: int
    payload: Part


@dataclass(frozen=True, slots=True, kw_only=True)
class JobItem:
    """One frame to decode. keyframe: its `live` chain must start anew here; times as in Stamps.

    index: place in the run of its first latent (`live`), else seq. pts: of a `steps` picture, 1/90000 s; fps: pictures
    a second of a `clip` or `live` frame, as its StreamInfo says.
    history: latents just before it, in a payload of their own. expects_memory: none is sent, for the worker should have
    the memory of the run; where it has not, it says no_memory. is_repeat: a `live` frame that was shown, once more.
    placed_ns: when the run was made, left its former worker or moved, broker's clock; its packets carry it.
    """

    stream: str
    run: str
    seq: int
    index: int
    kind: Kind
    shape: tuple[int, ...]
    dtype: WireDtype
    renditions: tuple[Rendition, ...]
    attempt: int
    keyframe: bool
    pts: int
    fps: float | None
    step: int
    total_steps: int | None
    sigma: float | None
    sent_ns: int
    received_ns: int
    history: int = 0
    expects_memory: bool = False
    is_repeat: bool = False
    placed_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """broker -> worker: decode these items, all of one latent format and shape, send the packets to `packets_to`.

    payloads: of each item its latents, then its history if it has one.
    """

    job: int
    latent_format: str
    items: tuple[JobItem, ...]
    packets_to: str
    payloads: tuple[Part, ...] = ()

    def parts(self) -> Iterator[tuple[JobItem, Part, Part | None]]:
        """Each item with its latents and its history."""
        payloads = iter(self.payloads)
        for item in self.items:
            yield item, next(payloads), next(payloads) if item.history else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """broker -> worker: drop the encoders and memories of a run. streamer -> broker: what waits of it is given up."""

    run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """broker -> worker, the answer to HELLO with `draining`: no more jobs come; send what is done, and exit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """streamer -> broker: the recording of a run holds seq up to `written`; up to `synced` for ever (-1: none)."""

    run: str
    attempt: int
    written: int
    synced: int
    finished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamerHello:
    """streamer -> broker, each second. endpoint: where workers push packets; cursors: what the files hold."""

    ROLE: ClassVar[str] = "streamer"
    endpoint: str
    cursors: tuple[Cursor, ...] = ()
    echo_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """streamer -> broker: so many viewers of a rendition of a stream (0: nobody any more)."""

    stream: str
    rendition: Rendition
    viewers: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Keyframe:
    """streamer -> broker: a viewer needs a picture to begin with. A worker says it of a chain that it broke."""

    stream: str
    rendition: Rendition


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """streamer -> broker: from now on keep this of the stream's newest run, or of its next one."""

    stream: str
    mode: RecordMode


@dataclass(frozen=True, slots=True, kw_only=True)
class StopStream:
    """streamer -> broker: a person pressed stop."""

    TYPE: ClassVar[str] = "STOP"
    stream: str


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """broker -> streamer (and to STATS): everything that people see, whole."""

    streams: list[dict[str, Any]]
    runs: dict[str, dict[str, Any]]
    workers: list[dict[str, Any]]
    stats: dict[str, Any]
    desired_workers: int
    now_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """broker -> streamer: this kept frame can't be decoded; the recording's cursor passes it."""

    run: str
    seq: int
    attempt: int
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """anyone -> broker: answered with STATE."""
