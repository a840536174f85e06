"""A load for a decode worker's own parts: latents that melt into each other, and jobs as a broker would give them."""

from __future__ import annotations

import itertools
import queue
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.config import Config
from taesd_stream.decoding.choice import Kind
from taesd_stream.errors import TaesdStreamError
from taesd_stream.latent_formats import latent_format
from taesd_stream.messages import Job, JobItem
from taesd_stream_workers.worker.decode_worker import CREDITS, GPU_CREDITS, lanes_for
from taesd_stream_workers.worker.job_decoder import JobDecoder
from taesd_stream_workers.worker.job_run import JobRun

STREAMS: Final = 16  # that a worker's jobs are of: enough for its encoders to take them for many
PICTURES: Final = 8  # different ones of a stream, in turn
LEAST_JOBS: Final = 3
GPU_WARM_UP_S: Final = 3.0  # kernels that were compiled once are there by then


class BrokenPartError(TaesdStreamError):
    """A part that was to be measured failed; the message is its own."""


@dataclass(frozen=True, slots=True)
class Case:
    """One decoder of one latent format at one picture size (pixels, square)."""

    latent_format: str
    size_px: int
    kind: Kind

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, h, w) of its latents."""
        known = latent_format(self.latent_format)
        cells = round(self.size_px / known.spatial_factor)
        return known.channels, cells, cells

    @property
    def nbytes(self) -> int:
        """Of one frame on the wire: float16."""
        channels, height, width = self.shape
        return 2 * channels * height * width


def worker_frame_s(config: Config, device: torch.device, case: Case, batch: int, seconds: float) -> float:
    """Seconds a frame of a whole worker: the daemon's decoding thread and its encoders, all credits in use.

    Raises: BrokenPartError when a job fails.
    """
    done: queue.SimpleQueue[JobRun] = queue.SimpleQueue()

    def pass_on(item: Any) -> None:
        if isinstance(item, JobRun):
            done.put(item)

    decoder = {"choice": case.kind, "latency_budget_s": 0.0}  # nothing cheaper may stand in
    worker = JobDecoder(
        config.with_values(decoder=decoder), device, time.monotonic_ns, pass_on, lanes=lanes_for(device)
    )
    worker.start()
    try:
        frames, spent_s = _work(worker, done, jobs_of(case, batch), seconds, is_gpu=device.type == "cuda")
    finally:
        worker.close()
    return spent_s / frames


def _work(
    worker: JobDecoder, done: queue.SimpleQueue[JobRun], jobs: Iterator[Job], seconds: float, *, is_gpu: bool
) -> tuple[int, float]:
    """Keep its credits used for so long. Returns: frames that were done, and the seconds that they took."""
    credit = GPU_CREDITS if is_gpu else CREDITS
    for _ in range(credit):
        worker.submit(JobRun(next(jobs)))
    warm_until_s = time.monotonic() + (GPU_WARM_UP_S if is_gpu else 0.0)
    warm = 0
    while warm < credit or time.monotonic() < warm_until_s:
        _next(done, worker)
        worker.submit(JobRun(next(jobs)))
        warm += 1
    began_s, counted, frames = time.monotonic(), 0, 0
    while counted < LEAST_JOBS or time.monotonic() - began_s < seconds:
        frames += len(_next(done, worker).job.items)
        worker.submit(JobRun(next(jobs)))
        counted += 1
    spent_s = time.monotonic() - began_s
    for _ in range(credit):
        _next(done, worker)
    return frames, spent_s


def _next(done: queue.SimpleQueue[JobRun], worker: JobDecoder) -> JobRun:
    """The next job that is over. Raises: BrokenPartError when it failed."""
    while True:
        try:
            run = done.get(timeout=1.0)
        except queue.Empty:
            if worker.error is not None:
                raise BrokenPartError(f"decode worker: {worker.error}") from worker.error
            continue
        if run.failed is not None:
            raise BrokenPartError(f"decode worker: {run.failed.text}")
        return run


def melting_latents(shape: tuple[int, int, int], count: int) -> Tensor:
    """(count, C, h, w) float32: a soft picture with some grain that melts into another; the same in each process."""
    rng = torch.Generator().manual_seed(11)
    coarse = torch.randn(2, shape[0], 5, 5, generator=rng)
    soft = torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic", align_corners=True)
    first, last = soft + 0.3 * torch.randn(2, *shape, generator=rng)  # about 10 KiB of 512x512 pixels, as previews take
    melting: Tensor = torch.lerp(first, last, torch.linspace(0, 1, count).reshape(-1, 1, 1, 1))
    return melting


def jobs_of(case: Case, batch: int) -> Iterator[Job]:
    """Jobs without end, of STREAMS streams in turn: each frame unlike the one before of its stream."""
    runs = [secrets.token_hex(8) for _ in range(STREAMS)]
    latents = melting_latents(case.shape, PICTURES).half().numpy()
    payloads = [one.tobytes() for one in (*latents, *latents[-2:0:-1])]
    turn = itertools.count()
    for number in itertools.count(1):
        items, parts = [], []
        for _ in range(batch):
            seq, stream = divmod(next(turn), STREAMS)
            items.append(_item(case, runs[stream], f"bench/{stream}", seq))
            parts.append(payloads[(seq + stream) % len(payloads)])
        yield Job(
            job=number,
            latent_format=case.latent_format,
            items=tuple(items),
            packets_to="tcp://127.0.0.1:9",  # they go nowhere: their way is not the worker's work
            payloads=tuple(parts),
        )


def _item(case: Case, run: str, stream: str, seq: int) -> JobItem:
    now_ns = time.monotonic_ns()
    return JobItem(
        stream=stream,
        run=run,
        seq=seq,
        index=seq,
        kind="steps",
        shape=case.shape,
        dtype="float16",
        renditions=("live",),
        attempt=0,
        keyframe=False,
        pts=9000 * seq,
        fps=10.0,
        step=seq,
        total_steps=None,
        sigma=None,
        sent_ns=now_ns,
        received_ns=now_ns,
    )
