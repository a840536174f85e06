"""The nano decoder: what is packaged, what it is told of a whole latent, and when it is the one that is used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.decoding.choice import Choice, NoDecoderError, open_engine
from taesd_stream.decoding.nano_tiles import decode_in_strips
from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.checkpoints import load_state_dict
from taesd_stream.models.linear import linear_decoder
from taesd_stream.models.nano import NanoDecoder, NanoLayout, default_layout, layout_of, nano_from_weights
from taesd_stream.training.quality import psnr_db
from tests.pictures import smooth_picture

PACKAGED = ("flux2", "sana")
PLENTY = 1 << 30
SHARED = os.environ.get("TAESD_STREAM_SHARED")


def packaged(name: str) -> NanoDecoder:
    """The shipped decoder of a format."""
    network = build_decoder("nano", latent_format=name)
    assert isinstance(network, NanoDecoder)
    return network


def random_nano(layout: NanoLayout) -> NanoDecoder:
    """A decoder with seeded random weights, whose statistics matter."""
    torch.manual_seed(0)
    network = NanoDecoder(layout).eval()
    nn.init.normal_(network.film_out.weight, std=0.1)
    return network


def multiplications(network: nn.Module, latents: Tensor) -> int:
    """Of all convolutions, while the network decodes."""
    counts: list[int] = []

    def count(layer: nn.Module, _: object, made: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        counts.append(layer.weight.numel() * made.shape[-2] * made.shape[-1])

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        network(latents)
    return sum(counts)


@pytest.mark.parametrize(("name", "tiny"), [("flux2", "taef2"), ("sana", "taesana")])
def test_a_packaged_decoder_is_small_and_quick(name: str, tiny: str) -> None:
    """Under 1 MB in the package, and at most a thirtieth of its tiny decoder's arithmetic."""
    known = latent_format(name)
    file = Path(__file__).parents[1] / "taesd_stream" / "data" / f"nano_{name}.safetensors"
    assert file.stat().st_size <= 1_000_000
    side = 256 // round(known.spatial_factor)
    latents = torch.zeros(1, known.channels, side, side)
    assert 30 * multiplications(packaged(name), latents) <= multiplications(build_decoder(tiny), latents)


@pytest.mark.parametrize("name", PACKAGED)
def test_pictures_come_in_full_size(name: str) -> None:
    """(N, C, h, w) latents give (N, 3, H, W) pictures with values about [0, 1], wherever the latents come from."""
    known = latent_format(name)
    torch.manual_seed(0)
    with torch.inference_mode():
        pictures = packaged(name)(torch.randn(2, known.channels, 3, 5))
    assert pictures.shape == (2, 3, *known.picture_size(3, 5))
    assert pictures.isfinite().all()
    assert -0.5 < pictures.mean() < 1.5


@pytest.mark.skipif(SHARED is None, reason="TAESD_STREAM_SHARED is not set: no encoder")
@pytest.mark.parametrize(("name", "tiny", "least_db"), [("flux2", "taef2", 33.0), ("sana", "taesana", 25.0)])
def test_a_picture_comes_back_through_the_real_encoder(name: str, tiny: str, least_db: float) -> None:
    """A smooth picture, encoded by the real encoder, is decoded far better than by the projection."""
    path = Path(SHARED or "") / "weights" / f"{tiny}_encoder.pth"
    encoder = build_encoder(tiny, load_state_dict(path, "encoder")).float()
    picture = smooth_picture(256, 320)
    with torch.inference_mode():
        latents = encoder(picture)
        by_nano = packaged(name)(latents).clamp(0, 1)
        by_linear = linear_decoder(latent_format(name)).float()(latents).clamp(0, 1)
    assert psnr_db(by_nano[0], picture[0]) >= least_db
    assert psnr_db(by_nano[0], picture[0]) >= psnr_db(by_linear[0], picture[0]) + 5


@pytest.mark.parametrize("factor", [4, 8, 32])
def test_each_picture_of_a_batch_has_statistics_of_its_own(factor: int) -> None:
    """A picture in a batch is the picture alone."""
    network = random_nano(default_layout(6, factor))
    latents = torch.cat([torch.randn(1, 6, 4, 5), torch.randn(1, 6, 4, 5) * 2 + 1])
    with torch.inference_mode():
        together = network(latents)
        alone = torch.cat([network(latents[index : index + 1]) for index in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("factor", [8, 32])
@pytest.mark.parametrize("budget_rows", [1, 40, 70])
def test_strips_are_the_whole_picture(factor: int, budget_rows: int) -> None:
    """Strip by strip, each told the whole latent's statistics, gives what the network gives at once."""
    network = random_nano(default_layout(6, factor))
    latents = torch.randn(2, 6, 47, 3)
    with torch.inference_mode():
        whole = network(latents)
        parts = decode_in_strips(network, latents, bytes_per_cell=100, budget_bytes=100 * 3 * budget_rows)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


def test_a_tile_needs_the_statistics_of_the_whole() -> None:
    """Without them a tile has other colours: what `statistics` is for."""
    network = random_nano(default_layout(6, 8))
    latents = torch.randn(1, 6, 40, 4) + torch.linspace(-2, 2, 40)[None, None, :, None]
    with torch.inference_mode():
        whole = network(latents)[:, :, : 4 * 8]
        told = network(latents[:, :, :24], network.statistics(latents))[:, :, : 4 * 8]
        untold = network(latents[:, :, :24])[:, :, : 4 * 8]
    torch.testing.assert_close(told, whole, atol=1e-4, rtol=0)
    assert (untold - whole).abs().max() > 0.05


@pytest.mark.parametrize("factor", [4, 8, 16, 32])
def test_weights_tell_their_layout(factor: int) -> None:
    """A file needs no settings beside its tensors; those of something else are refused by name."""
    network = random_nano(default_layout(5, factor))
    again = nano_from_weights(network.state_dict(), "nano test")
    assert layout_of(again.state_dict()) == network.layout
    with pytest.raises(WeightsError, match="no nano decoder"):
        nano_from_weights(build_decoder("taesd").state_dict(), "nano test")


def test_layouts_that_cannot_be_are_refused() -> None:
    """A factor that is no multiple of 8 and above it has no layout."""
    with pytest.raises(ValueError, match="multiple of it, got 12"):
        default_layout(4, 12)


@pytest.mark.parametrize(
    ("choice", "is_fast", "has_weights", "decoder"),
    [
        ("auto", True, True, "taef2"),
        ("auto", True, False, "nano"),
        ("auto", False, True, "taef2"),
        ("auto", False, False, "nano"),
        ("tiny", True, True, "taef2"),
        ("nano", False, True, "nano"),
        ("linear", True, True, "linear"),
    ],
)
def test_the_choice(tmp_path: Path, choice: Choice, is_fast: bool, has_weights: bool, decoder: str) -> None:
    """The full decoder where its weights are, else nano, and the reason why; a word decides otherwise."""
    if has_weights:
        save_file(build_decoder("taef2").state_dict(), tmp_path / "taef2_decoder.safetensors")
    engine = open_engine("flux2", weights_folder=tmp_path, choice=choice, is_fast=is_fast)
    assert (engine.decoder, engine.is_full) == (decoder, decoder == "taef2")
    if decoder == "nano":
        assert "nano comes with the package" in engine.reason
    if decoder == "nano" and choice == "auto":
        assert "no weights of taef2 were found" in engine.reason


def test_a_stream_over_the_budget_is_decoded_in_strips() -> None:
    """The engine's pictures are the same, whole or strip by strip."""
    engine = open_engine("flux2", weights_folder=None, choice="nano")
    latents = torch.randn(1, 32, 48, 2)
    whole = torch.cat([rgb for _, rgb in engine.decode(latents, budget_bytes=PLENTY)])
    small = torch.cat([rgb for _, rgb in engine.decode(latents, budget_bytes=1)])
    torch.testing.assert_close(small, whole, atol=1e-4, rtol=0)


def test_a_format_without_one_says_so() -> None:
    """Where there is no nano decoder, "nano" is an error that names the command which makes one."""
    with pytest.raises(NoDecoderError, match=r"No decoder for sdxl: .*`taesd-stream distill` makes one"):
        open_engine("sdxl", weights_folder=None, choice="nano")
    with pytest.raises(WeightsError, match="no nano decoder for sdxl"):
        build_decoder("nano", latent_format="sdxl")


def test_the_projection_of_a_cell_matches_the_packaged_factors() -> None:
    """Sana's packaged projection is one colour a cell, stretched to 32 pixels."""
    network = linear_decoder(latent_format("sana"))
    latents = torch.randn(1, 32, 2, 2)
    with torch.inference_mode():
        picture = network(latents)
    assert picture.shape == (1, 3, 64, 64)
    assert F.avg_pool2d(picture, 64).isfinite().all()
