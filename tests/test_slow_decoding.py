"""A picture that takes a processor long: its worker says that it goes on, and is not taken for hung."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from taesd_stream.config import load_config
from taesd_stream.frames import Rendition
from taesd_stream.messages import Job, Progress
from taesd_stream.models import build_decoder
from taesd_stream_workers.worker.encode_threads import EncodeThreads
from taesd_stream_workers.worker.job_decoder import JobDecoder
from taesd_stream_workers.worker.job_run import JobRun
from tests.daemon import wait_for
from tests.golden_messages import JOB_ITEM

SHAPE = (4, 64, 64)  # 512 x 512 pixels: a second or so


def job_of(shape: tuple[int, ...], *renditions: Rendition) -> Job:
    """One step of noise."""
    item = replace(JOB_ITEM, shape=shape, renditions=renditions)
    payload = np.random.default_rng(1).standard_normal(shape).astype(np.float16).tobytes()
    return Job(job=1, latent_format="sd1", items=(item,), packets_to="tcp://127.0.0.1:9", payloads=(payload,))


def save_weights(folder: Path) -> None:
    """A TAESD of random weights."""
    torch.manual_seed(3)
    save_file(build_decoder("taesd").state_dict(), folder / "taesd_decoder.safetensors")


def test_one_slice_that_takes_long_says_that_it_goes_on(tmp_path: Path) -> None:
    """Between its beginning and its end PROGRESS is said at each beat, and it counts as busy since the last one."""
    save_weights(tmp_path)
    said: list[Any] = []
    config = load_config(sets=[f"weights.folder={tmp_path}", "decoder.choice=tiny"])
    decoder = JobDecoder(config, torch.device("cpu"), time.monotonic_ns, said.append, lanes=EncodeThreads(2, 1))
    run = JobRun(job_of(SHAPE, "record"))
    decoder.start()
    wait_for(lambda: decoder.is_warm, 60, of="the decoder")
    decoder.submit(run)
    waits: list[float] = []

    def is_over() -> bool:
        decoder.beat()
        waits.append(time.monotonic() - decoder.busy_since_s)
        return run in said

    wait_for(is_over, 60, of="the picture")
    decoder.close()
    (packet,) = (one[1] for one in said if isinstance(one, tuple))
    took_s = (packet.stamps.decoded_ns - packet.stamps.started_ns) / 1e9
    assert sum(isinstance(one, Progress) for one in said) > 3
    assert max(waits) < took_s / 2
    decoder.beat()
    assert decoder.busy_since_s == float("inf")


def test_each_slice_counts_as_busy_anew(tmp_path: Path) -> None:
    """Of a picture shown by factors and recorded by the network, when the second slice ends it is busy since the first
    one ended, not since the job began: many slices together may take longer than a hung one."""
    save_weights(tmp_path)
    done = threading.Event()
    busy_since_s: list[float] = []

    def take(one: Any) -> None:
        if isinstance(one, Progress):
            busy_since_s.append(decoder.busy_since_s)
        elif isinstance(one, JobRun):
            done.set()

    config = load_config(sets=[f"weights.folder={tmp_path}", "decoder.choice=linear"])
    decoder = JobDecoder(config, torch.device("cpu"), time.monotonic_ns, take, lanes=EncodeThreads(2, 1))
    decoder.start()
    decoder.submit(JobRun(job_of((4, 8, 8), "live", "record")))
    assert done.wait(60)
    decoder.close()
    first, second = busy_since_s
    assert first < second
