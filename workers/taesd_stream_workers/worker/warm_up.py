"""Every kind of picture once, before the first job: what torch and FFmpeg load at first use would hold up a stream."""

from __future__ import annotations

import contextlib
import queue
from typing import Final

import torch

from taesd_stream.decoding.choice import open_engine
from taesd_stream.frames import RENDITIONS
from taesd_stream.latent_formats import latent_format
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream_workers.worker.chain_encoder import Order
from taesd_stream_workers.worker.encode_pool import LOOK_S, EncodePool, EncodeTask
from taesd_stream_workers.worker.rendering import render
from taesd_stream_workers.worker.shower import Outlet

FORMAT: Final = "sd1"  # any one with rgb factors


def warm_up(device: torch.device, outlet: Outlet, *, budget_bytes: int) -> None:
    """Make a picture of every rendition, and wait for them.

    Raises: RuntimeError where one cannot be made.
    """
    engine = open_engine(FORMAT, weights_folder=None, choice="linear", device=str(device))
    latents = torch.zeros(1, latent_format(FORMAT).channels, 8, 8)
    made: queue.SimpleQueue[EncodedPicture | None] = queue.SimpleQueue()
    tasks = [
        EncodeTask(
            run="",
            rendition=one.rendition,
            order=Order(0, True, 0, *one.size, track=0, tracks=1, is_clip=False),
            planes=one.planes,
            copy=one.copy,
            on_done=made.put,
        )
        for _, rgb in engine.decode(latents, budget_bytes=budget_bytes)
        for one in render([rgb[0]], [RENDITIONS], outlet.sizes, outlet.copies)
    ]
    outlet.pool.submit(tasks)
    outlet.pool.forget("")
    for _ in tasks:
        if _next(made, outlet.pool) is None:
            raise RuntimeError("a picture could not be encoded: see the log")
    outlet.coding.take_over()  # and checked here, where its kernels are compiled: no picture waits for that


def _next(made: queue.SimpleQueue[EncodedPicture | None], pool: EncodePool) -> EncodedPicture | None:
    """Wait for a picture; None: it could not be made."""
    while pool.error is None:
        with contextlib.suppress(queue.Empty):
            return made.get(timeout=LOOK_S)
    return None
