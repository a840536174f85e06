"""A decoder beside a sampler on one NVIDIA GPU: it keeps to its budget, and leaves a full GPU alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from taesd_stream import LatentPublisher
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.video_engine import LivePart, VideoEngine
from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_decoder
from taesd_stream.models.tiny_video import VideoDecoder
from tests.daemon import Daemon, wait_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
BUDGET_BYTES = 1 << 30


def sd1_engine() -> Engine:
    """The format's decoder with random weights."""
    torch.manual_seed(0)
    network = build_decoder("taesd")
    return Engine(latent_format("sd1"), network, decoder="taesd", reason="", is_full=True, device="cuda")


@pytest.mark.parametrize(("count", "cells"), [(16, 64), (2, 256), (1, 512)])
def test_memory_stays_within_the_budget(count: int, cells: int) -> None:
    """Batches of 512x512, 2048x2048, and 4096x4096 in tiles, allocate no more than the budget and their planes."""
    engine = sd1_engine()
    latents = torch.randn(count, 4, cells, cells)
    list(engine.decode_planes(torch.randn(1, 4, 8, 8), budget_bytes=BUDGET_BYTES))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    planes_bytes = 0
    for _, planes in engine.decode_planes(latents, budget_bytes=BUDGET_BYTES):
        planes_bytes = max(planes_bytes, 4 * planes.nbytes)  # as RGB in half precision before
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= BUDGET_BYTES + planes_bytes


def test_copies_are_whole_when_they_are_said_to_be() -> None:
    """Up and down again, many at once and of many sizes, every byte is there once `wait` has returned."""
    copies = HostCopies(torch.device("cuda", 0))
    sent, back = [], []
    for number in range(40):
        staged = copies.staging((1 + number % 7, 64, 96 + number), torch.uint8)
        staged.random_()
        sent.append(staged.numpy().copy())
        back.append(copies.download(copies.upload(staged).bitwise_not()))
    for expected, copy in zip(sent, back, strict=True):
        copy.wait()
        np.testing.assert_array_equal(copy.array, ~expected)
    assert copies.waiting_since_s == float("inf")


def test_live_streams_stepped_together_are_those_stepped_alone() -> None:
    """By graphs and our kernels, each stream's frames are what it gets alone, over a change of who is in the batch."""
    torch.manual_seed(0)
    network = build_decoder("taew2_1")
    assert isinstance(network, VideoDecoder)
    exact = build_decoder("taew2_1", network.state_dict()).float().cuda().eval()
    assert isinstance(exact, VideoDecoder)
    known = latent_format("wan2_1")
    engine = VideoEngine(known, network, decoder="taew2_1", reason="", is_full=True, device="cuda")
    memories = {name: exact.start(1, 6, 9) for name in "abc"}
    for index in range(6):
        latents = {name: torch.randn(1, 16, 6, 9) for name in "abc"}
        names = "abc" if index % 2 else "bca"
        parts = [LivePart(run=name, index=index, latents=latents[name]) for name in names]
        for shown in engine.decode_live(parts, budget_bytes=BUDGET_BYTES):
            for one in shown:
                name = names[one.place]
                with torch.inference_mode():
                    frames, memories[name] = exact.step(latents[name].cuda(), memories[name])
                assert one.frames.shape == frames[0].shape
                assert (one.frames - frames[0]).abs().max() < 0.02


def test_a_full_gpu_is_left_to_its_sampler(tmp_path: Path) -> None:
    """With 1 GiB free on the only GPU the daemon starts on the processor, shows pictures, and takes no GPU memory."""
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(free - (1 << 30), dtype=torch.uint8, device="cuda")
    left, _ = torch.cuda.mem_get_info()
    latents = np.zeros((4, 8, 8), np.float32)
    with (
        Daemon(tmp_path, environment={"CUDA_VISIBLE_DEVICES": "0"}) as daemon,
        LatentPublisher(daemon.broker, stream="one", latent_format="sd1") as publisher,
    ):
        publisher.publish(latents, step=0, total_steps=1)
        worker = next(row for row in daemon.facts["roles"] if row["role"] == "worker 0")
        assert worker["device"] == "cpu", json.dumps(worker)
        assert "MiB free" in worker["reason"]
        wait_for(lambda: daemon.get("/streams/one/latest.jpg")[0] == 200, 60, of="a picture")
        assert left - torch.cuda.mem_get_info()[0] < 600 << 20  # no more than to look
    del taken
