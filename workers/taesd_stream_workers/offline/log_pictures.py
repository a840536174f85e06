"""Pictures of a latent log, decoded anew: by the best decoder that is here now, whatever showed them then."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taesd_stream.errors import ConfigError
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_formats import magnitude_of, unfolded
from taesd_stream.latent_log import read_run
from taesd_stream.media.clock import ForwardPts, steps_pts
from taesd_stream.messages import JobItem

if TYPE_CHECKING:
    from torch import Tensor

    from taesd_stream.decoding.engine import Engine

logger = logging.getLogger(__name__)


def log_pictures(path: Path, engine: Engine, budget_bytes: int) -> Iterator[tuple[Tensor, int]]:
    """(3, H, W) RGB, about [0, 1], of every picture, and its time from the first, 1/90000 s; a frame at a time.

    Raises: ConfigError for a file that holds no frame, ValueError for latents that the format does not have.
    """
    from taesd_stream.decoding.payloads import latents_from_payload
    from taesd_stream_workers.worker.job_pictures import Rows, pictures_of
    from taesd_stream_workers.worker.rendering import as_pictures

    info: StreamInfo | None = None
    forward, first = ForwardPts(), None
    for message in read_run(path):
        if isinstance(message, StreamInfo):
            info = message
        elif isinstance(message, LatentFrame) and info is not None:
            magnitude = magnitude_of(info.latent_format)
            held = latents_from_payload(message.payload, message.dtype, message.shape, magnitude)
            latents = as_pictures(unfolded(info.latent_format, held))
            entry = (0, _item(info, message), Rows(latents, 0, len(latents)))
            if not latents.isfinite().all():
                logger.warning("%s: frame %d holds NaN or infinity: no picture of it", path, message.seq)
                continue
            for shown in pictures_of(engine, [entry], budget_bytes):
                for one, values in zip(shown.pictures, shown.rgb, strict=True):
                    pts = forward.stamp(one.pts, index=one.index)
                    first = pts if first is None else first
                    yield values, pts - first
    if first is None:
        raise ConfigError(f"{path}: no whole frame is in it")


def _item(info: StreamInfo, frame: LatentFrame) -> JobItem:
    known: dict[str, Any] = {name: getattr(frame, name) for name in ("seq", "index", "shape", "dtype", "step")}
    return JobItem(
        **known,
        stream=info.stream,
        run=info.run,
        kind=info.kind,
        renditions=("record",),
        attempt=0,
        keyframe=False,
        pts=steps_pts(frame.sent_ns, info.opened_ns),
        fps=info.fps,
        total_steps=frame.total_steps,
        sigma=frame.sigma,
        sent_ns=frame.sent_ns,
        received_ns=0,
    )
