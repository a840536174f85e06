"""The video step by fused calls: split weights and folded growth are the network, its frames and its memories."""

from __future__ import annotations

import pytest
import torch

from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.decoder_plan import UnsupportedNetworkError
from taesd_stream.decoding.video_plan import VideoPlan
from taesd_stream.models import build_decoder
from taesd_stream.models.tiny_video import VideoDecoder

STREAMS, HEIGHT, WIDTH = 2, 3, 5


def decoder(family: str) -> VideoDecoder:
    """With seeded random weights."""
    torch.manual_seed(1)
    network = build_decoder(family).eval().requires_grad_(False)
    assert isinstance(network, VideoDecoder)
    return network


@torch.inference_mode()
@pytest.mark.parametrize("family", ["taew2_1", "taehv1_5"])
def test_steps_are_the_network_s(family: str) -> None:
    """Over several latents, every frame that the network shows and every block's memory are the same, but rounding."""
    network = decoder(family)
    plan = VideoPlan(network)
    memory = network.start(STREAMS, HEIGHT, WIDTH)
    mine = list(memory[1:])
    for position in range(3):
        latents = torch.randn(STREAMS, network.family.latent_channels, HEIGHT, WIDTH)
        frames, memory = network.step(latents, memory)
        given, after = plan.rgb(latents, mine)
        planes, _ = plan.planes(latents, mine)
        mine = after
        assert isinstance(frames, torch.Tensor)
        hidden = network.family.hidden_frames(position, network.frames_per_latent)
        torch.testing.assert_close(given[:, hidden:], frames, atol=2e-5, rtol=0)
        for one, other in zip(mine, memory[1:], strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)
        assert torch.equal(planes.flatten(0, 1), video_planes(given.flatten(0, 1)))


def test_another_layout_is_refused() -> None:
    """Families that are not laid out as TAEHV are left to the plain network, with the reason."""
    with pytest.raises(UnsupportedNetworkError, match="taesdv is not laid out as TAEHV"):
        VideoPlan(decoder("taesdv"))
