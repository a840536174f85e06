"""A run straight into an MP4, without a daemon: decoded and encoded as a recording is, in a thread of this process.

That costs what a daemon spares: processor time, memory and the interpreter's lock of the process that samples.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.config import load_config
from taesd_stream.decoding.choice import open_engine
from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.few_threads import be_guest
from taesd_stream.decoding.payloads import latents_from_payload
from taesd_stream.decoding.sheet import grid
from taesd_stream.decoding.slicing import decode_budget
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.frames import EndReason, Kind, Packet, Stamps
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.latent_snapshot import Snapshot, snapshot_of
from taesd_stream.media.clock import picture_pts, steps_pts
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream.media.recording import Recording

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 64  # frames that wait for the thread: past that the sampler waits too


@dataclass(frozen=True, slots=True, kw_only=True)
class _Frame:
    seq: int
    step: int
    total_steps: int | None
    sigma: float | None
    sent_ns: int
    snapshot: Snapshot
    taken: Any  # what the snapshot makes latents of


_running: Final[dict[threading.Thread, queue.Queue[_Frame | None]]] = {}


class SavedRun:
    """Takes publishes as a LatentPublisher does, every one of them, and makes `path` of them when it is closed.

    Until then the file grows, playable, in the folder `PATH.saving`; a file that was at `path` is replaced.
    Where the sampler is faster than the decoder by more than 64 frames, publish() waits.
    """

    wanted: Final = True
    stopped: Final = False

    def __init__(
        self, path: Path, *, stream: str, known: LatentFormat, kind: Kind, fps: float | None, meta: Mapping[str, Any]
    ) -> None:
        self.path = path
        self._known = known
        self._seq = 0
        self._frames: queue.Queue[_Frame | None] = queue.Queue(MAX_WAITING)
        self._writer = _Writer(path, stream, known, kind, fps, meta)
        self._thread = threading.Thread(target=self._writer.run, args=(self._frames,), name="saved run", daemon=True)
        self._thread.start()
        _running[self._thread] = self._frames
        atexit.unregister(_finish_all)  # once, however many runs
        atexit.register(_finish_all)
        # where this is forgotten, the file is finished, and nobody waits for it
        weakref.finalize(self, _end, self._thread, self._frames).atexit = False

    @property
    def error(self) -> str | None:
        """Why there is no file, or not all of it."""
        return self._writer.error

    def publish(
        self, latents: Tensor, *, step: int, total_steps: int | None = None, sigma: float | None = None
    ) -> None:
        """Save these latents; as LatentPublisher.publish takes them."""
        if self._writer.error is not None or not self._thread.is_alive():  # closed, or in a forked child
            return
        snapshot = snapshot_of(latents, None, self._known.magnitude)
        frame = _Frame(
            seq=self._seq,
            step=step,
            total_steps=total_steps,
            sigma=sigma,
            sent_ns=time.monotonic_ns(),
            snapshot=snapshot,
            taken=snapshot.take(latents),
        )
        self._seq += 1
        self._frames.put(frame)

    def close(self, *, reason: EndReason = "done", text: str = "") -> None:  # noqa: ARG002 as a publisher's
        """Decode and write what waits, then finish the file; it says what that cost."""
        _end(self._thread, self._frames)
        self._thread.join()


def _finish_all() -> None:
    """At the program's exit: every file is finished."""
    for thread, frames in list(_running.items()):
        _end(thread, frames)
        thread.join()


def _end(thread: threading.Thread, frames: queue.Queue[_Frame | None]) -> None:
    """Nothing more comes. A thread that is over, or that a fork left behind, is told nothing: put() could hang."""
    if thread.is_alive():
        frames.put(None)


class _Writer:
    """The thread's side: latents in, a finished file out."""

    def __init__(
        self, path: Path, stream: str, known: LatentFormat, kind: Kind, fps: float | None, meta: Mapping[str, Any]
    ) -> None:
        self.error: str | None = None
        self._path = path
        self._known, self._kind = known, kind
        self._fps = fps
        self._run = secrets.token_hex(8)
        self._stream = stream
        self._folder = path.with_name(path.name + ".saving")
        self._meta = dict(meta)
        self._encoder = VideoEncoder("record")
        self._first_ns: int | None = None
        self._last_pts = -1
        self._cost_s = 0.0

    def run(self, frames: queue.Queue[_Frame | None]) -> None:
        """Until None comes. Never raises: the sampler goes on."""
        be_guest()
        recording: Recording | None = None
        engine: Engine | None = None
        while (frame := frames.get()) is not None:
            if self.error is not None:
                continue  # taken, so that nobody waits
            started_s = time.perf_counter()
            try:
                if engine is None or recording is None:
                    self._budget_bytes, engine = self._open_engine()
                    self._folder.mkdir(parents=True, exist_ok=True)
                    recording = Recording.open(
                        self._folder, stream=self._stream, run=self._run, meta=self._meta, kept_from=0
                    )
                self._write(recording, engine, frame)
            except Exception as error:  # noqa: BLE001 the run is worth more than its film
                self._fail(error)
            self._cost_s += time.perf_counter() - started_s
        self._encoder.close()
        if recording is not None and engine is not None:
            self._close(recording, engine)
        _running.pop(threading.current_thread(), None)

    def _open_engine(self) -> tuple[int, Engine]:
        config = load_config()
        is_free = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] >= config.decoder.min_free_bytes
        engine = open_engine(
            self._known.name, weights_folder=config.weights_folder, device="cuda" if is_free else "cpu"
        )
        return decode_budget(config.decoder, engine.device), engine

    def _write(self, recording: Recording, engine: Engine, frame: _Frame) -> None:
        form = frame.snapshot
        held = latents_from_payload(form.to_bytes(frame.taken), form.dtype, form.shape, self._known.magnitude)
        latents = self._known.unfold(held)
        if not bool(latents.isfinite().all()):  # no picture can be made of it
            recording.skip(frame.seq, 0)
            return
        self._first_ns = frame.sent_ns if self._first_ns is None else self._first_ns
        begin = 0 if self._kind == "clip" else max(self._last_pts + 1, steps_pts(frame.sent_ns, self._first_ns))
        self._last_pts = begin
        pictures = list(self._pictures(engine, latents))
        # without a video decoder a picture stands for all frames of its latent
        stretch = 1 if isinstance(engine, VideoEngine) else engine.temporal_factor or 1
        for index, rgb in enumerate(pictures):
            planes = video_planes(rgb.unsqueeze(0))[0].cpu().numpy()
            pts = begin + picture_pts(index * stretch, self._fps)
            picture = self._encoder.encode(planes, pts, force_keyframe=index == 0 and self._kind == "clip")
            recording.write(
                Packet(
                    stream=self._stream,
                    run=self._run,
                    seq=frame.seq,
                    index=index,
                    count=len(pictures),
                    rendition="record",
                    attempt=0,
                    is_keyframe=picture.is_keyframe,
                    pts=pts,
                    width=picture.width,
                    height=picture.height,
                    decoder=engine.decoder,
                    step=frame.step,
                    total_steps=frame.total_steps,
                    sigma=frame.sigma,
                    stamps=Stamps(),
                    payload=picture.payload,
                )
            )

    def _pictures(self, engine: Engine, latents: Tensor) -> Iterator[Tensor]:
        """(3, H, W) each: the frames of a clip, or one picture a step, of a batch one sheet."""
        if isinstance(engine, VideoEngine) and self._kind == "clip":
            for _, frames in engine.decode_clip(latents, budget_bytes=self._budget_bytes):
                yield from frames
            return
        batch = latents if latents.ndim == 4 else latents.unsqueeze(0)
        pictures = torch.cat([rgb for _, rgb in engine.decode(batch, budget_bytes=self._budget_bytes)])
        if self._kind == "clip":
            yield from pictures
        else:
            yield grid(pictures) if len(pictures) > 1 else pictures[0]

    def _close(self, recording: Recording, engine: Engine) -> None:
        pictures = recording.frames
        try:
            for number, path in enumerate(recording.finish()):  # more than one where the size changed
                path.replace(self._path if not number else self._path.with_stem(f"{self._path.stem}-part{number + 1}"))
                _remove_empty(path.parent, self._folder)
            _remove_empty(self._folder, self._folder)
        except Exception as error:  # noqa: BLE001 what was written stays where it is
            self._fail(error)
            return
        logger.info(
            "run_saved path=%s frames=%d decoder=%s cost_s=%.2f", self._path, pictures, engine.decoder, self._cost_s
        )

    def _fail(self, error: Exception) -> None:
        self.error = f"{self._path}: {error}"
        logger.warning("run_not_saved path=%s error=%s (the run goes on)", self._path, error)


def _remove_empty(folder: Path, top: Path) -> None:
    """Remove the folders from `folder` up to `top`, as far as they are empty: another's film may lie there."""
    with contextlib.suppress(OSError):
        while folder.is_relative_to(top):
            folder.rmdir()
            folder = folder.parent
