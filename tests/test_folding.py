"""Folded decoders: fewer multiplications, the same picture to its last border pixel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from taesd_stream.decoding.choice import open_engine
from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.models import build_decoder
from taesd_stream.models.networks import TINY_FAMILIES
from tests.operators import Operators


def random_decoder(family: str) -> nn.Sequential:
    """A bare decoder whose values stay near 1 through all layers."""
    decoder = build_decoder(family).requires_grad_(False)
    assert isinstance(decoder, nn.Sequential)
    generator = torch.Generator().manual_seed(0)
    for weight in decoder.parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.05
        weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return decoder


@torch.inference_mode()
@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 5)])
def test_a_folded_decoder_equals_the_decoder(family: str, size: tuple[int, int]) -> None:
    """All families, from one latent up, agree to 1e-5 of the largest value, borders included."""
    decoder = random_decoder(family)
    latents = torch.randn(2, TINY_FAMILIES[family].latent_channels, *size) * 2
    expected = decoder(latents)
    difference = (fold_upsampling(decoder)(latents) - expected).abs().max().item()
    assert difference <= 1e-5 * max(1.0, expected.abs().max().item())


def test_every_upsampling_is_folded_and_the_rest_is_shared() -> None:
    """No upsampling is left; other layers are the decoder's own, and the decoder itself is as it was."""
    decoder = random_decoder("taesana")
    before = list(decoder)
    folded = fold_upsampling(decoder)
    assert list(decoder) == before
    assert not any(isinstance(layer, nn.Upsample) for layer in folded)
    assert sum(isinstance(layer, nn.ConvTranspose2d) for layer in folded) == 5
    assert [layer for layer in folded if not isinstance(layer, nn.ConvTranspose2d)] == [
        layer for place, layer in enumerate(before) if place not in upsampled_pairs(before)
    ]


def upsampled_pairs(layers: list[nn.Module]) -> set[int]:
    """Places of upsampling layers and of those behind them."""
    places = [place for place, layer in enumerate(layers) if isinstance(layer, nn.Upsample)]
    return {*places, *(place + 1 for place in places)}


@torch.inference_mode()
def test_half_precision_is_folded_from_its_own_weights() -> None:
    """A bfloat16 decoder stays one, and its picture near the unfolded one's."""
    decoder = random_decoder("taesd").to(torch.bfloat16)
    latents = torch.randn(1, 4, 3, 3).bfloat16()
    expected = decoder(latents)
    given = fold_upsampling(decoder)(latents)
    assert given.dtype == torch.bfloat16
    assert (given - expected).abs().max() <= 2e-2 * max(1.0, expected.abs().max().item())


KEPT = [
    nn.Sequential(nn.Upsample(scale_factor=3), nn.Conv2d(2, 2, 3, padding=1)),
    nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(2, 2, 3, padding=1)),
    nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")),
    nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3)),
    nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, padding=1, groups=2)),
    nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)),
]


@pytest.mark.parametrize("network", KEPT)
def test_what_does_not_fold_is_kept(network: nn.Sequential) -> None:
    """Pairs for which the sum of weights would be wrong stay as they are."""
    assert list(fold_upsampling(network)) == list(network)


def test_a_hooked_layer_is_kept() -> None:
    """Who watches a layer sees it run."""
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 3, padding=1))
    network[1].register_forward_hook(lambda *_: None)
    assert list(fold_upsampling(network)) == list(network)


@torch.inference_mode()
def test_a_bias_is_kept() -> None:
    """A convolution with a bias folds with it."""
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2, 3, 3, padding=1))
    folded, x = fold_upsampling(network), torch.randn(1, 2, 2, 3)
    assert isinstance(folded[0], nn.ConvTranspose2d)
    torch.testing.assert_close(folded(x), network(x), atol=1e-5, rtol=0)


def test_an_engine_on_the_cpu_folds(tmp_path: Path) -> None:
    """A decode worker's network on a processor upsamples in its convolutions, and shows the decoder's picture."""
    decoder = random_decoder("taesd")
    save_file(decoder.state_dict(), tmp_path / "taesd_decoder.safetensors")
    engine, latents = open_engine("sd1", weights_folder=tmp_path), torch.randn(1, 4, 3, 5)
    with Operators() as operators:
        ((_, given),) = engine.decode(latents, budget_bytes=1 << 30)
    assert sum("convolution" in name for name in operators.names) > 0
    assert not any("upsample" in name for name in operators.names)
    torch.testing.assert_close(given, decoder(latents).clamp(0, 1), atol=1e-5, rtol=0)
