"""LatentPublisher: the one import of a sampler. It never slows, changes or kills the run."""

from __future__ import annotations

import atexit
import logging
import math
import os
import secrets
import socket
import sys
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from taesd_stream import wire
from taesd_stream.errors import WireError
from taesd_stream.frames import (
    CLOCK_HZ,
    DTYPE_BYTES,
    KINDS,
    RECORD_MODES,
    EndReason,
    Kind,
    LatentFrame,
    RecordMode,
    StreamInfo,
    WireDtype,
    is_stream_name,
)
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.latent_snapshot import snapshot
from taesd_stream.outbox import Outbox
from taesd_stream.publisher_link import PublisherLink

logger = logging.getLogger(__name__)

RING_BYTES: Final = 256 << 20
NS_PER_TICK: Final = math.ceil(1e9 / CLOCK_HZ)
UINT8_MAGNITUDE: Final = 3.0  # PROTOCOL: uint8 = clamp(z / (2 m) + 0.5); m of every format in use


def default_address() -> str:
    """The broker's address: $TAESD_STREAM_ADDRESS, else the daemon's default."""
    return os.environ.get("TAESD_STREAM_ADDRESS") or wire.DEFAULT_ADDRESS


def own_log_folder() -> Path:
    """Where frames go that no broker took: a folder of the user's state, by the platform's custom."""
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "taesd-stream" / "unsent"


class LatentPublisher:
    """One run of a stream: give it each step's latents, and whoever watches sees them.

    address: the broker's, else $TAESD_STREAM_ADDRESS, else tcp://127.0.0.1:5760. No daemon there is no error.
    stream: up to 4 parts joined by "/", each of letters, digits, ".", "_", "-".
    latent_format: a key of taesd_stream.latent_formats.LATENT_FORMATS, or a name that the daemon was taught.
    kind: "steps" (a picture a publish), "clip" (a whole video a publish), "live" (appended in video time).
    fps: pictures a second of "clip" and "live".
    record: "off", "last" (only the final frame), "all"; None follows the daemon's `recording.default`.
    meta: what people want to read beside the picture: prompt, seed, sampler, guidance.
    wire_dtype: None sends float16 (bfloat16 stays); "float32" exact, "uint8" smallest.
    Raises: ValueError for a bad name, kind, mode; nothing after that.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        stream: str,
        latent_format: str,
        kind: Kind = "steps",
        fps: float | None = None,
        record: RecordMode | None = None,
        meta: Mapping[str, Any] | None = None,
        wire_dtype: WireDtype | None = None,
    ) -> None:
        info = _checked_info(stream, latent_format, kind, fps, record, dict(meta or {}))
        if wire_dtype is not None and wire_dtype not in DTYPE_BYTES:
            raise ValueError(f"wire_dtype: expected one of {', '.join(DTYPE_BYTES)}, got {wire_dtype!r}")
        self.address = address or default_address()
        self._wire_dtype = wire_dtype
        self._format = LATENT_FORMATS.get(latent_format)
        self._kind = kind
        self._pid = os.getpid()
        self._index = 0
        self._sent_ns = 0
        self._faults = 0
        self._is_closed = False
        self._outbox = Outbox(info, ring_bytes=RING_BYTES, log_folder=own_log_folder())
        self._link = PublisherLink(self.address, info, self._outbox)
        self._link.start()
        self._at_exit = _close_at_exit(self)

    @property
    def stream(self) -> str:
        """The stream's name; the broker may have added ~2 where another run of that name lives."""
        return self._link.info.stream

    @property
    def run(self) -> str:
        """This opening of the stream, 16 hex digits."""
        return self._link.info.run

    @property
    def stopped(self) -> bool:
        """Whether a viewer pressed stop. Reading it tells the daemon that this program can be stopped."""
        self._link.is_stoppable = True
        return self._link.is_stopped

    @property
    def error(self) -> str | None:
        """Why nothing is shown or kept: the broker's or the last publish's complaint; None while all is well."""
        return self._link.error

    def publish(self, latents: Any, *, step: int, total_steps: int | None = None, sigma: float | None = None) -> None:
        """Show these latents. Never raises, never waits for a device or a socket.

        latents: numpy array or torch tensor (CPU or CUDA) of floats, z as the scheduler holds it, spatial:
            `steps` (C,h,w) or (N,C,h,w); `clip` (T,C,h,w); `live` (C,h,w) or (t,C,h,w).
        step: 0-based. sigma: the noise level that the model saw at this step.
        """
        outbox = self._outbox
        with outbox.changed:
            seq = outbox.next_seq
            outbox.next_seq = seq + 1
        is_last = total_steps is not None and step >= total_steps - 1
        if not (outbox.wanted or is_last):
            return
        try:
            self._offer(latents, seq, int(step), total_steps, sigma)
        except Exception as error:  # noqa: BLE001 the run is worth more than its preview
            self._complain(error)

    def wait_until_acked(self, timeout_s: float) -> bool:
        """Wait until the daemon's log has every kept frame, so that this program may exit.

        Returns: True when it has (at once when nothing is kept), False on time out or refusal (`error` has the text).
        """
        return self._link.wait_until_acked(timeout_s)

    def close(self, timeout_s: float = 5.0, *, reason: EndReason = "done", text: str = "") -> None:
        """End the run: send what is kept, then END. What is not acked by then goes to a log file, and it says where."""
        if self._is_closed or self._pid != os.getpid():
            return
        self._is_closed = True
        atexit.unregister(self._at_exit)
        if reason == "done" and self._link.is_stopped:
            reason = "stopped"
        self._link.close(timeout_s, reason, text)

    def __enter__(self) -> LatentPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.close(reason="stopped" if isinstance(error, KeyboardInterrupt) else "failed", text=repr(error)[:500])

    def _offer(self, latents: Any, seq: int, step: int, total_steps: int | None, sigma: float | None) -> None:
        if self._is_closed or self._pid != os.getpid():
            raise RuntimeError(
                "the publisher is closed"
                if self._is_closed
                else "a forked child must open a LatentPublisher of its own"
            )
        if self._format is not None:
            self._format.check_shape(self._kind, tuple(latents.shape))
        # two frames never share a tick of the pictures' 90 kHz clock
        self._sent_ns = sent_ns = max(time.monotonic_ns(), self._sent_ns + NS_PER_TICK)
        fetch, dtype, shape = snapshot(latents, self._wire_dtype, UINT8_MAGNITUDE)
        frame = LatentFrame(
            run=self.run,
            seq=seq,
            index=self._index if self._kind == "live" else seq,
            step=step,
            total_steps=None if total_steps is None else int(total_steps),
            sigma=None if sigma is None or not math.isfinite(float(sigma)) else float(sigma),
            dtype=dtype,
            shape=shape,
            kept=False,
            sent_ns=sent_ns,
            payload=b"",
        )
        if frame.nbytes > wire.MAX_FRAME_BYTES:
            raise ValueError(f"latents: {frame.nbytes} bytes, over the {wire.MAX_FRAME_BYTES} that a message may hold")
        if self._kind == "live":
            self._index += shape[0] if len(shape) == 4 else 1
        with self._outbox.changed:
            self._outbox.offer(frame, fetch)
        self._link.wake()

    def _complain(self, error: Exception) -> None:
        self._faults += 1
        self._link.error = f"publish: {error}"
        if self._faults == 1:
            logger.warning("publish_failed stream=%s error=%s (said once; the run goes on)", self.stream, error)


def _checked_info(
    stream: str, latent_format: str, kind: Kind, fps: float | None, record: RecordMode | None, meta: dict[str, Any]
) -> StreamInfo:
    if not is_stream_name(stream) or "~" in stream:
        raise ValueError(
            f"stream: expected up to 4 parts of letters, digits, '.', '_', '-' (each at most 64) joined by '/', "
            f"got {stream!r}"
        )
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if record is not None and record not in RECORD_MODES:
        raise ValueError(f"record: expected one of {', '.join(RECORD_MODES)} or None, got {record!r}")
    meta.setdefault("from", f"pid {os.getpid()} on {socket.gethostname()}")
    info = StreamInfo(
        stream=stream,
        run=secrets.token_hex(8),
        kind=kind,
        latent_format=latent_format,
        fps=fps,
        record=record,
        meta={str(key): _plain(value) for key, value in meta.items()},
        opened_ns=time.monotonic_ns(),
    )
    try:
        wire.unpack(wire.pack(info), (StreamInfo,))
    except WireError as error:
        raise ValueError(str(error)) from error
    return info


def _plain(value: Any) -> Any:
    """Numbers and texts stay; what msgpack has no form for becomes text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _close_at_exit(publisher: LatentPublisher) -> Any:
    """A program that just ends still says END; held weakly, so that a forgotten publisher can go."""
    reference = weakref.ref(publisher)

    def close() -> None:
        alive = reference()
        if alive is not None:
            alive.close(timeout_s=2.0)

    atexit.register(close)
    return close
