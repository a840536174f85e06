"""The nano decoder: what is packaged, what it is told of a whole latent, and when it is the one that is used."""

from __future__ import annotations

import os
import re
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
from taesd_stream.models.nano import (
    NanoDecoder,
    NanoLayout,
    NanoStage,
    default_layout,
    layout_of,
    nano_from_weights,
)
from taesd_stream.training.quality import psnr_db
from tests.pictures import smooth_picture
from tools.figures import balloons, lighthouse
from tools.landscapes import aurora, sunrise

PACKAGED = ("flux2", "sana")
PLENTY = 1 << 30
SHARED = os.environ.get("TAESD_STREAM_SHARED")
# All that a layout can have, and what files of earlier versions were of.
STEPS = NanoLayout(
    latent_channels=6,
    stages=(
        NanoStage(cell_px=32, width=12, blocks=1, passes=2),
        NanoStage(cell_px=16, width=8, blocks=2),
        NanoStage(cell_px=4, width=8, blocks=2, passes=3),
    ),
    gates=True,
)
EARLIER = NanoLayout(
    latent_channels=6,
    stages=(NanoStage(cell_px=32, width=12, blocks=2), NanoStage(cell_px=8, width=8, blocks=3)),
)


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


def real_encoder(tiny: str) -> nn.Module:
    """The published encoder of a tiny family."""
    path = Path(SHARED or "") / "weights" / f"{tiny}_encoder.pth"
    return build_encoder(tiny, load_state_dict(path, "encoder")).float()


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
@pytest.mark.parametrize(
    ("name", "tiny", "least_db", "over_linear_db"), [("flux2", "taef2", 33.0, 9.0), ("sana", "taesana", 34.0, 8.0)]
)
def test_a_picture_comes_back_through_the_real_encoder(
    name: str, tiny: str, least_db: float, over_linear_db: float
) -> None:
    """A smooth picture, encoded by the real encoder, is decoded far better than by the projection."""
    encoder = real_encoder(tiny)
    picture = smooth_picture(256, 320)
    with torch.inference_mode():
        latents = encoder(picture)
        by_nano = packaged(name)(latents).clamp(0, 1)
        by_linear = linear_decoder(latent_format(name)).float()(latents).clamp(0, 1)
    assert psnr_db(by_nano[0], picture[0]) >= least_db
    assert psnr_db(by_nano[0], picture[0]) >= psnr_db(by_linear[0], picture[0]) + over_linear_db


@pytest.mark.skipif(SHARED is None, reason="TAESD_STREAM_SHARED is not set: no encoder")
def test_sanas_is_well_over_the_projection_on_painted_scenes() -> None:
    """Scenes that it was not trained on: 6.5 dB over the rgb factors on the mean, as on photographs held out."""
    encoder, linear = real_encoder("taesana"), linear_decoder(latent_format("sana")).float()
    over_db = []
    for paint in (sunrise, aurora, balloons, lighthouse):
        picture = torch.from_numpy(paint(256, 256)).float().permute(2, 0, 1)[None]
        with torch.inference_mode():
            latents = encoder(picture)
            shown, flat = (network(latents).clamp(0, 1)[0] for network in (packaged("sana"), linear))
        over_db.append(psnr_db(shown, picture[0]) - psnr_db(flat, picture[0]))
    assert sum(over_db) / len(over_db) >= 6.5


@pytest.mark.skipif(SHARED is None, reason="TAESD_STREAM_SHARED is not set: no encoder")
def test_as_much_noise_as_picture_leaves_the_colours_of_large_areas() -> None:
    """With noise of 1 on Sana's latents each quarter of a scene keeps its mean colour to a tenth."""
    encoder, sana = real_encoder("taesana"), packaged("sana")
    for paint in (sunrise, lighthouse):
        picture = torch.from_numpy(paint(256, 256)).float().permute(2, 0, 1)[None]
        with torch.inference_mode():
            latents = encoder(picture)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            shown = sana(latents + noise).clamp(0, 1)
        assert F.avg_pool2d(shown - picture, 128).abs().max() < 0.1


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("deviation", [1, 3, 1e4])
def test_noise_in_place_of_latents_stays_small(name: str, deviation: float) -> None:
    """However wild the latents, no value comes near to what half precision cannot hold."""
    torch.manual_seed(0)
    latents = deviation * torch.randn(1, latent_format(name).channels, 12, 12)
    with torch.inference_mode():
        assert packaged(name)(latents).abs().max() < 20


@pytest.mark.parametrize("factor", [4, 8, 32])
def test_each_picture_of_a_batch_has_statistics_of_its_own(factor: int) -> None:
    """A picture in a batch is the picture alone."""
    network = random_nano(default_layout(6, factor))
    latents = torch.cat([torch.randn(1, 6, 4, 5), torch.randn(1, 6, 4, 5) * 2 + 1])
    with torch.inference_mode():
        together = network(latents)
        alone = torch.cat([network(latents[index : index + 1]) for index in range(2)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("layout", "budget_rows"),
    [(layout, rows) for layout in (default_layout(6, 8), STEPS, EARLIER) for rows in (1, 40, 70)]
    + [(default_layout(6, 32), rows) for rows in (1, 70)],
)
def test_strips_are_the_whole_picture(layout: NanoLayout, budget_rows: int) -> None:
    """Strip by strip, each told the whole latent's statistics, gives what the network gives at once."""
    network = random_nano(layout)
    latents = torch.randn(2, 6, 47, 3)
    with torch.inference_mode():
        whole = network(latents)
        parts = decode_in_strips(network, latents, bytes_per_cell=100, budget_bytes=100 * 3 * budget_rows)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


def test_strips_cost_three_times_the_work_at_the_most() -> None:
    """However small the budget, the rows that strips compute are at most three times those of the picture."""
    network = build_decoder("nano", latent_format="sana")
    assert isinstance(network, NanoDecoder)
    computed: list[int] = []
    network.stem.register_forward_hook(lambda _layer, given, _made: computed.append(given[0].shape[-2]))
    height = 4 * network.layout.halo
    with torch.inference_mode():
        decode_in_strips(network, torch.randn(1, 32, height, 2), bytes_per_cell=1, budget_bytes=1)
    assert len(computed) > 1
    assert sum(computed) <= 3 * height


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


@pytest.mark.parametrize("layout", [STEPS, EARLIER, *(default_layout(5, factor) for factor in (4, 8, 16, 24, 32, 64))])
def test_weights_tell_their_layout(layout: NanoLayout) -> None:
    """A file needs no settings beside its tensors; those of something else are refused by name."""
    network = random_nano(layout)
    again = nano_from_weights(network.state_dict(), "nano test")
    assert layout_of(again.state_dict()) == network.layout
    with pytest.raises(WeightsError, match="no nano decoder"):
        nano_from_weights(build_decoder("taesd").state_dict(), "nano test")


@pytest.mark.parametrize(
    "layout",
    [
        NanoLayout(latent_channels=2, stages=(NanoStage(cell_px=4, width=4, blocks=2),)),
        NanoLayout(latent_channels=2, stages=(NanoStage(cell_px=4, width=4, blocks=1, passes=3),)),
        STEPS,
    ],
)
def test_the_halo_is_as_wide_as_it_must_be(layout: NanoLayout) -> None:
    """The last row of cells that is counted to a tile's halo still moves pixels of the tile, and none beyond does."""
    network = random_nano(layout).double()
    latents = torch.randn(1, layout.latent_channels, 2 * layout.halo + 1, 3, dtype=torch.float64)
    changed = latents.clone()
    changed[:, :, 0] += 1
    statistics = network.statistics(latents)
    with torch.inference_mode():
        apart = (network(changed, statistics) - network(latents, statistics)).abs().amax(dim=(0, 1, 3))
    assert int(apart.nonzero().max()) // layout.spatial_factor == layout.halo


def test_files_of_earlier_versions_load() -> None:
    """Tensors by the names that files of one or two stages gave them are the same decoder."""
    network = random_nano(EARLIER)
    earlier = {}
    for key, value in network.state_dict().items():
        name = re.sub(r"^stages\.(\d)\.spatial\.(\d+)", r"stages.\1.\2.spatial", key)
        name = name.replace("stages.0.", "blocks.").replace("stages.1.", "fine_blocks.").replace("mixes.", "")
        earlier[name.replace("splits.0.", "split.")] = value
    assert {"blocks.1.narrow.bias", "fine_blocks.2.spatial.weight", "split.bias"} < earlier.keys()
    latents = torch.randn(1, 6, 3, 2)
    with torch.inference_mode():
        torch.testing.assert_close(nano_from_weights(earlier, "earlier")(latents), network(latents), atol=0, rtol=0)


def test_layouts_that_cannot_be_are_refused() -> None:
    """A factor above 8 is a multiple of it, and stages have ever smaller cells that fit."""
    with pytest.raises(ValueError, match="multiple of it, got 12"):
        default_layout(4, 12)
    with pytest.raises(ValueError, match="fraction of 16, got 16"):
        NanoLayout(latent_channels=4, stages=(NanoStage(cell_px=16, width=8, blocks=1),) * 2)
    with pytest.raises(ValueError, match="one at least, got none"):
        NanoLayout(latent_channels=4, stages=())


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
