"""Whole decoders on an NVIDIA GPU: every family, eagerly and by graphs, and what happens when kernels are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from taesd_stream.decoding.acceleration import AcceleratedDecoder, accelerated, latent_channels
from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.cuda_graphs import MAX_GRAPHS
from taesd_stream.decoding.kernels.cubins import kernel_cubin
from taesd_stream.decoding.kernels.later import lacks_for_kernels
from taesd_stream.models import build_decoder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
FAMILIES = ("taesd", "taesdxl", "taesd3", "taef1", "taef2", "taesana")


def decoder(family: str) -> nn.Module:
    """A decoder with seeded random weights, float16, on the GPU."""
    torch.manual_seed(3)
    return build_decoder(family).half().cuda().eval().requires_grad_(False)


def latents_for(network: nn.Module, count: int, height: int, width: int) -> Tensor:
    """Random latents on the GPU."""
    return torch.randn(count, latent_channels(network), height, width, device="cuda").half()


def opened(network: nn.Module) -> AcceleratedDecoder:
    """The accelerated decoder, with the kernels in use where this GPU can run them."""
    fast, reason = accelerated(network, "cuda")
    assert fast is not None, reason
    fast.wait()
    return fast


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_the_network_s(family: str) -> None:
    """Every family's picture is the float32 network's, eagerly and by a graph, at sizes that fit no tile."""
    network = decoder(family)
    fast = opened(network)
    if lacks_for_kernels(torch.cuda.get_device_capability()) is None:
        assert fast.reason == "our own kernels"
    exact = build_decoder(family, network.state_dict()).float().cuda().eval()
    for count, height, width in [(1, 5, 3), (3, 9, 17), (2, 16, 16)]:
        for _ in range(3):  # eager, captured, replayed
            latents = latents_for(network, count, height, width)
            expected = exact(latents.float()).clamp(0, 1)
            assert (fast.rgb(latents).float() - expected).abs().max() < 0.01
            assert (fast.planes(latents).int() - video_planes(expected).int()).abs().max() <= 2


@torch.inference_mode()
def test_a_picture_stays_what_it_is() -> None:
    """What a call returned is the caller's: later calls, and graphs that were dropped for others, leave it alone."""
    network = decoder("taesd")
    fast = opened(network)
    first = latents_for(network, 21, 6, 6)
    for _ in range(2):
        kept = fast.planes(first)
    copy = kept.clone()
    for size in range(5, 7 + MAX_GRAPHS):
        for _ in range(2):
            fast.planes(latents_for(network, 21, size, size))
    assert torch.equal(kept, copy)
    assert (fast.planes(first).int() - copy.int()).abs().max() <= 1


@torch.inference_mode()
def test_broken_machine_code_is_refused_and_forgotten(tmp_path: Path) -> None:
    """With a broken cache the stock calls go on, the reason says what the driver answered, and the file is gone."""
    if lacks_for_kernels(torch.cuda.get_device_capability()) is not None:
        pytest.skip("no Hopper GPU here")
    kernel_cubin(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\x7fELF no kernel")
    network = decoder("taesd")
    fast = AcceleratedDecoder(network, torch.device("cuda", 0), cache=tmp_path)
    fast.wait()
    assert fast.reason.startswith("cuDNN's fused calls: the CUDA driver answers")
    assert not file.exists()
    assert fast.planes(latents_for(network, 1, 8, 8)).shape == (1, 96, 64)
