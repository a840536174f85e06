"""LatentPublisher: the one import of a sampler. It never slows, changes or kills the run."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import socket
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, monotonic_ns
from types import TracebackType
from typing import Any, Final, SupportsFloat

from taesd_stream import message_fields, wire
from taesd_stream.current_run import continued
from taesd_stream.daemons import Addresses, Daemons, addresses_of
from taesd_stream.errors import ConfigError, WireError
from taesd_stream.fields import MAX_NUMBER, as_utf8, quoted
from taesd_stream.frames import (
    DTYPE_BYTES,
    END_REASONS,
    KINDS,
    NAME_RULE,
    RECORD_MODES,
    EndReason,
    Kind,
    LatentFrame,
    RecordMode,
    StreamInfo,
    WireDtype,
    is_stream_name,
)
from taesd_stream.keys import KEYS_VARIABLE, Keys, load_keys
from taesd_stream.latent_formats import LATENT_FORMATS, magnitude_of
from taesd_stream.latent_snapshot import Snapshot, is_on_device, snapshot_of
from taesd_stream.outbox import RESTING_NS, Outbox, count_of
from taesd_stream.publisher_exit import end_at_exit, reason_of
from taesd_stream.publisher_link import PublisherLink

logger = logging.getLogger(__name__)

RING_BYTES: Final = 256 << 20
MAX_SAID: Final = 16  # publishes while the side thread rests, most of them taken back
MAX_LOGGED: Final = 8  # faults of publish(); each is said once
MAX_STEPS: Final = 1 << 31  # what the wire takes without a closer look
CLOSE_S: Final = 5.0
CLOSED: Final = "the publisher is closed"
FORKED: Final = "this process was forked from the one that opened the publisher: a forked child must open its own"


def own_log_folder() -> Path | None:
    """Where frames go that no broker took: a folder of the user's state, by the platform's custom.

    None for a user that has no home, as in a container that runs as any user.
    """
    with contextlib.suppress(RuntimeError):
        return _state_folder() / "taesd-stream" / "unsent"
    return None


def _state_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")


class LatentPublisher:
    """One run of a stream: give it each step's latents, and whoever watches sees them.

    address: the broker's, else $TAESD_STREAM_ADDRESS, else tcp://127.0.0.1:5760. No daemon there is no error. Several,
        as a sequence or between commas: a hash of the stream's name chooses one. When that is gone for 5 s the stream
        goes on at the next, as a new run with everything unacked, whose meta says `continues`: the former run's id.
    stream: up to 4 parts joined by "/", each of at most 64 letters, digits, ".", "_", "-", the first of them a letter
        or digit.
    latent_format: a key of taesd_stream.latent_formats.LATENT_FORMATS, or a name that the daemon was taught.
    kind: "steps" (a picture a publish), "clip" (a whole video a publish), "live" (appended in video time).
    fps: pictures a second of "clip" and "live".
    record: "off", "last" (only the final frame), "all"; None follows the daemon's `recording.default`.
    meta: what people want to read beside the picture: prompt, seed, sampler, guidance.
    wire_dtype: None sends float16 (bfloat16 stays); "float32" exact, "uint8" smallest.
    keys_folder: what `taesd-stream keys new` made for this host, else $TAESD_STREAM_KEYS_FOLDER; None: no keys.
    Raises: ValueError for a bad address, name, kind, mode, key file; nothing after that.
    """

    def __init__(
        self,
        address: Addresses | None = None,
        *,
        stream: str,
        latent_format: str,
        kind: Kind = "steps",
        fps: float | None = None,
        record: RecordMode | None = None,
        meta: Mapping[str, Any] | None = None,
        wire_dtype: WireDtype | None = None,
        keys_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        addresses = addresses_of(address)
        info = checked_info(stream, latent_format, kind, fps, record, meta, wire_dtype)
        if len(addresses) > 1:
            _check_travels(continued(info, info.run, info.opened_ns))  # its meta says more
        keys = _checked_keys(keys_folder)
        self._wire_dtype = wire_dtype
        self._format = LATENT_FORMATS.get(latent_format)
        self._kind = kind
        self._pid = os.getpid()
        self._snapshot: Snapshot | None = None  # of the latents that came last: the next are mostly like them
        self._fault: str | None = None  # the last publish's
        self._logged: set[str] = set()
        self._holes = 0  # publishes that were to be kept and failed
        self._early_holes = 0  # that failed before the broker said whether they are kept
        self._first_hole = ""
        self._is_closed = False
        self._outbox = Outbox(info, ring_bytes=RING_BYTES, log_folder=own_log_folder())
        self._link = PublisherLink(Daemons(addresses, stream, monotonic()), info, self._outbox, keys)
        self._signal = self._link.wakes.signal
        self._link.start()
        end_at_exit(self._link)
        # a publisher that is forgotten ends its run: nobody waits for it, for this may be any thread
        self._forgotten = weakref.finalize(self, self._link.end_soon, CLOSE_S, "done", "")
        self._forgotten.atexit = False

    @property
    def stream(self) -> str:
        """The stream's name; the broker may have added ~2 where another run of that name lives."""
        return self._link.run.info.stream

    @property
    def address(self) -> str:
        """The broker that has the stream, or, until one answers, is tried."""
        return self._link.address

    @property
    def run(self) -> str:
        """This opening of the stream, 16 hex digits; another one once the stream goes on at another daemon."""
        return self._link.run.info.run

    @property
    def stopped(self) -> bool:
        """Whether a viewer pressed stop. Reading it tells the daemon that this program can be stopped."""
        self._link.is_stoppable = True
        return self._link.is_stopped

    @property
    def wanted(self) -> bool:
        """Whether a publish would be sent now: else latents need not even be made, but for the last step's."""
        return self._outbox.wanted

    @property
    def error(self) -> str | None:
        """Why something is not shown or kept; None while all is well.

        The broker's complaint, or a publish's: of one that was to be kept until the end, else until the next good one.
        """
        return self._link.error or self._outbox.error or self._hole or self._fault

    @property
    def fault(self) -> str | None:
        """Why the last publish that was wanted was not taken; None where it was."""
        return self._fault

    def publish(
        self, latents: Any, *, step: int, total_steps: int | None = None, sigma: SupportsFloat | None = None
    ) -> None:
        """Show these latents. Never raises, never waits for a device or a socket.

        latents: numpy array or torch tensor (CPU or CUDA) of floats, z as the scheduler holds it, spatial:
            `steps` (C,h,w) or (N,C,h,w); `clip` (T,C,h,w); `live` (C,h,w) or (t,C,h,w).
        step: 0-based. total_steps: where it is told the last step is sent whatever the demand, and a step that the next
            one will replace before a frame may go is only counted, for 0.1 s at most.
        sigma: the noise level that the model saw at this step; a tensor on a GPU is read later, and must not be written
            to again.
        """
        # Every line here is paid for by the sampler, in cold caches: what can wait is the side thread's.
        try:
            outbox = self._outbox
            if not outbox.wanted and (total_steps is None or step < total_steps - 1):
                outbox.said.append(count_of(latents.shape) if self._kind == "live" else 1)
                return
            if outbox.is_closed:
                raise RuntimeError(CLOSED if self._pid == os.getpid() else FORKED)
            is_plain = (
                type(step) is int
                and 0 <= step < MAX_STEPS
                and (total_steps is None or (type(total_steps) is int and 0 < total_steps < MAX_STEPS))
                and (sigma is None or (type(sigma) is float and -MAX_NUMBER < sigma < MAX_NUMBER))
            )
            if not is_plain:
                step, total_steps, sigma = _checked_numbers(step, total_steps, sigma)
            sent_ns = monotonic_ns()
            if sent_ns < outbox.outrun_before_ns and total_steps is not None and step < total_steps - 1:
                outbox.said.append(1)
                return
            outbox.is_busy = True
            try:
                snapshot = self._snapshot
                if snapshot is None or (taken := snapshot.take(latents)) is None:
                    snapshot = self._snapshot = self._snapshot_of(latents)
                    taken = snapshot.take(latents)
            finally:
                outbox.is_busy = False
            said = outbox.said
            is_resting = outbox.wake_before_ns == RESTING_NS and len(said) < MAX_SAID
            if is_resting and len(said) > 1:
                outbox.unsay()
            said.append((step, total_steps, sigma, sent_ns, snapshot, taken))
            if len(said) > 1 and not is_resting:
                outbox.place()
            if sent_ns < outbox.wake_before_ns or (total_steps is not None and step >= total_steps - 1):
                self._signal()
            self._fault = None
        except Exception as error:  # noqa: BLE001 the run is worth more than its preview
            self._complain(error)

    def wait_until_acked(self, timeout_s: float) -> bool:
        """Wait until the daemon's log has every kept frame, so that this program may exit.

        Returns: True when it has (at once when nothing is kept); False on time out, or on refusal or where a publish
            that was to be kept failed (`error` has the text).
        Raises: ValueError for a time that is none.
        """
        seconds = _seconds(timeout_s)
        return self._pid == os.getpid() and self._link.wait_until_acked(seconds) and self._hole is None

    def close(self, timeout_s: float = CLOSE_S, *, reason: EndReason = "done", text: str = "") -> None:
        """End the run: send what is kept, then END. What is not acked by then goes to a log file, and it says where."""
        if self._is_closed or self._pid != os.getpid():
            return
        if reason not in END_REASONS:
            raise ValueError(f"reason: expected one of {', '.join(END_REASONS)}, got {reason!r}")
        seconds = _seconds(timeout_s)
        self._is_closed = True
        self._forgotten.detach()
        self._link.end_soon(seconds, reason, text)
        self._link.join()

    def __enter__(self) -> LatentPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reason, text = reason_of(error)
        self.close(reason=reason, text=text)

    def _snapshot_of(self, latents: Any) -> Snapshot:
        snapshot = snapshot_of(latents, self._wire_dtype, magnitude_of(self._link.run.info.latent_format))
        self._check_shape(snapshot.shape, snapshot.dtype)
        return snapshot

    def _check_shape(self, shape: tuple[int, ...], dtype: WireDtype) -> None:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if nbytes > wire.MAX_FRAME_BYTES:
            raise ValueError(f"latents: {nbytes} bytes, over the {wire.MAX_FRAME_BYTES} that a message may hold")
        if self._format is not None:
            self._format.check_shape(self._kind, shape)
        elif len(shape) not in ((4,) if self._kind == "clip" else (3, 4)):
            forms = "(T, C, h, w)" if self._kind == "clip" else "(C, h, w) or (N, C, h, w)"
            raise ValueError(f"latents: {self._kind} latents are {forms}, got shape {shape}")
        if not nbytes:
            raise ValueError(f"latents: expected values, got none, shape {shape}")

    @property
    def _hole(self) -> str | None:
        """What is not in the recording, and why."""
        count = self._holes + (self._early_holes if self._outbox.kept_from == 0 else 0)
        if count < 2:
            return self._first_hole if count else None
        return f"{self._first_hole} (and {count - 1} more not kept)"

    def _complain(self, error: Exception) -> None:
        self._fault = text = f"publish: {error}"
        mode = self._outbox.mode
        if mode in (None, "all") and not self._outbox.is_closed:
            self._holes += mode == "all"
            self._early_holes += mode is None
            self._first_hole = self._first_hole or text
        if text not in self._logged and len(self._logged) < MAX_LOGGED:
            self._logged.add(text)
            logger.warning("publish_failed stream=%s error=%s (said once; the run goes on)", self.stream, error)


def keys_in(folder: str | os.PathLike[str] | None) -> Keys | None:
    """The keys in a folder, else in $TAESD_STREAM_KEYS_FOLDER, else none. Raises: ConfigError for bad files."""
    folder = folder or os.environ.get(KEYS_VARIABLE)
    return load_keys(Path(folder).expanduser()) if folder else None


def _checked_keys(folder: str | os.PathLike[str] | None) -> Keys | None:
    try:
        return keys_in(folder)
    except (ConfigError, OSError, RuntimeError) as error:  # the last of a home folder that nobody has
        raise ValueError(f"keys_folder: {error}") from error


def checked_info(
    stream: str,
    latent_format: str,
    kind: Kind,
    fps: float | None,
    record: RecordMode | None,
    meta: Mapping[str, Any] | None,
    wire_dtype: WireDtype | None = None,
) -> StreamInfo:
    """A new run with these options, as LatentPublisher takes them. Raises: ValueError for one that cannot be."""
    if not isinstance(stream, str) or not is_stream_name(stream) or "~" in stream:
        raise ValueError(f"stream: expected {NAME_RULE}, got {quoted(stream)}")
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if record is not None and record not in RECORD_MODES:
        raise ValueError(f"record: expected one of {', '.join(RECORD_MODES)} or None, got {record!r}")
    if wire_dtype is not None and wire_dtype not in DTYPE_BYTES:
        raise ValueError(f"wire_dtype: expected one of {', '.join(DTYPE_BYTES)}, got {wire_dtype!r}")
    try:
        told = _plain({"from": f"pid {os.getpid()} on {socket.gethostname()}", **dict(meta or {})})
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"meta: expected a mapping of plain values, got {quoted(repr(type(meta)))}: {error}"
        ) from error
    info = StreamInfo(
        stream=stream,
        run=secrets.token_hex(8),
        kind=kind,
        latent_format=latent_format,
        fps=fps,
        record=record,
        meta=told,
        opened_ns=monotonic_ns(),
    )
    _check_travels(info)
    return info


def _check_travels(info: StreamInfo) -> None:
    try:
        wire.unpack(wire.pack(info), (StreamInfo,))
    except (WireError, TypeError) as error:
        raise ValueError(str(error)) from error


def _plain(value: Any) -> Any:
    """Numbers and texts stay; what JSON has no form for becomes text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return as_utf8(value)
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 64 else str(value)  # msgpack's own bounds; a seed may be larger
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {as_utf8(str(key)): _plain(item) for key, item in value.items()}
    return as_utf8(str(value))


def _seconds(timeout_s: SupportsFloat) -> float:
    try:
        seconds = float(timeout_s)
    except TypeError:
        seconds = math.nan
    if math.isnan(seconds):
        raise ValueError(f"timeout_s: expected seconds, got {timeout_s!r}")
    return seconds


def _checked_numbers(step: Any, total_steps: Any, sigma: Any) -> tuple[int, int | None, Any]:
    """Numbers of any kind as the wire takes them; a tensor on a device stays there. Raises: ValueError and its like."""
    step = int(step)
    total_steps = None if total_steps is None else int(total_steps)
    message_fields.check(LatentFrame, step=step, total_steps=total_steps)
    if sigma is None or (is_on_device(sigma) and sigma.numel() == 1):
        return step, total_steps, sigma
    sigma = float(sigma)
    if not math.isfinite(sigma):
        return step, total_steps, None
    message_fields.check(LatentFrame, sigma=sigma)
    return step, total_steps, sigma
