"""The table of latent spaces: complete, true to its source, strict about shapes."""

from __future__ import annotations

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from taesd_stream.frames import Kind
from taesd_stream.latent_formats import LATENT_FORMATS, TINY_DECODERS, latent_format
from taesd_stream.latent_layouts import LAYOUTS

SHARED = os.environ.get("TAESD_STREAM_SHARED")


def shared_facts() -> dict[str, Any]:
    """The table that ours was taken from."""
    if SHARED is None:
        pytest.skip("TAESD_STREAM_SHARED is not set: no table to compare with")
    facts: dict[str, Any] = json.loads((Path(SHARED) / "latent_formats.json").read_text())
    return facts


def as_tuple(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, list) else value


def test_every_format_is_there_with_its_facts() -> None:
    """Names, channels, factors, normalisation and rgb factors equal the source's, for all formats."""
    theirs = shared_facts()["formats"]
    assert list(LATENT_FORMATS) == list(theirs)
    for name, fact in theirs.items():
        ours, comfyui, normalisation = LATENT_FORMATS[name], fact["comfyui"] or {}, fact["normalisation"]
        assert (ours.channels, ours.spatial_factor) == (fact["latent_channels"], fact["spatial_factor"])
        assert ours.temporal_factor == fact["temporal_factor"]
        assert ours.decoder == (fact["tiny_decoder"] or {}).get("id")
        assert (ours.scale, ours.shift) == (normalisation.get("scaling_factor"), normalisation.get("shift_factor"))
        assert (ours.mean, ours.std) == (as_tuple(normalisation.get("mean")), as_tuple(normalisation.get("std")))
        assert ours.rgb_factors == as_tuple(comfyui.get("latent_rgb_factors"))
        assert ours.rgb_bias == as_tuple(comfyui.get("latent_rgb_factors_bias"))
        assert ours.patchified_channels == fact.get("latent_channels_patchified")
        assert ours.normalisation == normalisation["kind"]
        assert ours.aliases == tuple(fact.get("aliases", ()))


OUR_LAYOUTS = {
    "flux1_2x2_tokens": "tokens_2x2",
    "flux2_tokens_128": "tokens_2x2",
    "qwen_2x2_tokens": "tokens_2x2",
    "qwen_layered_tokens": "layered_tokens_2x2",
    "ideogram4_tokens": "tokens_2x2_channels_last",
    "plain_tokens": "tokens",
    "ltx_tokens": "video_tokens",
    "h3_rows": "video_rows_2x2",
    "frame_pairs_in_channels": "frame_pairs",
    "patchified_spatial_128": "patchified",
}


def layout_of(packing: dict[str, Any]) -> str:
    """Our name of a layout in the source."""
    if packing["layout"] == "none":
        return "frames_third" if ", T, " in packing["held_shape"] else "spatial"
    name: str = packing["layout"]
    return OUR_LAYOUTS.get(name, name)


def test_every_way_to_hold_latents_is_there() -> None:
    """Each packing of the source is a layout of the format, and its order of axes is the source's einops."""
    for name, fact in shared_facts()["formats"].items():
        known = LATENT_FORMATS[name]
        assert set(known.layouts) == {layout_of(packing) for packing in fact["packing"]}
        for packing in fact["packing"]:
            layout, einops = LAYOUTS[layout_of(packing)], packing["to_spatial_einops"]
            if not einops or "->" not in einops or layout.name in ("items_second", "frame_pairs"):
                continue
            assert layout.held == re.sub(r"\w+", our_letter, einops.partition(" ->")[0])


def our_letter(word: re.Match[str]) -> str:
    """What we call an axis of the source's einops."""
    return {"b": "n", "ph": "y", "pw": "x", "l": "t"}.get(word[0], word[0])


def test_comfyui_holds_them_as_its_classes_say() -> None:
    """ComfyUI's latents are pictures or videos by latent_dimensions; its channel count is the layout's."""
    for name, fact in shared_facts()["formats"].items():
        known, comfyui = LATENT_FORMATS[name], fact["comfyui"]
        if comfyui is None:
            continue
        default = "frames_third" if known.temporal_factor else "spatial"
        layout = LAYOUTS[known.comfyui_layout or default]
        assert len(layout.axes) == 2 + comfyui["latent_dimensions"]
        assert layout.channel_counts(known.channels) == (comfyui["latent_channels"],)


def test_only_cogvideox_is_divided_by_its_scale() -> None:
    """Every other decoder's input transform in the source leaves the values as they are."""
    for name, fact in shared_facts()["formats"].items():
        transform = (fact["tiny_decoder"] or {}).get("input_transform", "identity")
        divides = "scaling_factor" in transform
        assert (LATENT_FORMATS[name].decoder_scale is not None) == divides == (name == "cogvideox")
    assert LATENT_FORMATS["cogvideox"].decoder_scale == LATENT_FORMATS["cogvideox"].scale


def test_every_decoder_is_there_with_its_files() -> None:
    """Weight sets, their file names and hub ids equal the source's."""
    theirs = shared_facts()["tiny_decoders"]
    assert list(TINY_DECODERS) == list(theirs)
    for name, fact in theirs.items():
        ours = TINY_DECODERS[name]
        assert (ours.kind, ours.latent_channels) == (fact["kind"], fact["latent_channels"])
        assert (ours.spatial_factor, ours.temporal_factor) == (fact["spatial_upscale"], fact["temporal_upscale"])
        assert ours.files == as_tuple(fact["files"])
        assert ours.hub_id == (fact["hub_ids"][0] if fact["hub_ids"] else None)
        assert ours.hub_files == tuple(fact.get("hub_files", ()))
        assert [" ".join(mirror) for mirror in ours.mirrors] == fact.get("mirrors", [])
        assert ours.image_channels == fact["image_channels"]
        assert ours.source.removeprefix("https://github.com/") in fact["where"]


def config_of(name: str) -> Any:
    """Defaults of a diffusers autoencoder's constructor, by argument."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


AUTOENCODERS = {
    "wan2_1": "AutoencoderKLWan",
    "qwen_image": "AutoencoderKLQwenImage",
    "qwen_image_2_1": "AutoencoderKLQwenImage21",
    "hunyuan_video": "AutoencoderKLHunyuanVideo",
    "hunyuan_video_1_5": "AutoencoderKLHunyuanVideo15",
    "hunyuan_image_2_1_refiner": "AutoencoderKLHunyuanImageRefiner",
    "cogvideox": "AutoencoderKLCogVideoX",
    "ltx_video": "AutoencoderKLLTXVideo",
    "ltx_2": "AutoencoderKLLTX2Video",
    "mochi": "AutoencoderKLMochi",
    "flux2": "AutoencoderKLFlux2",
    "cosmos1_cv8x8x8": "AutoencoderKLCosmos",
    "minimax_h3": "AutoencoderKLMiniMaxH3",
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_facts_are_the_defaults_of_diffusers(name: str) -> None:
    """Channels, scale, statistics and factors that diffusers' class of the space has as defaults are the table's."""
    config, known = config_of(AUTOENCODERS[name]), latent_format(name)
    assert known.channels == config.get("z_dim", config.get("latent_channels"))
    ours = {
        "scaling_factor": known.scale,
        "latents_mean": known.mean,
        "latents_std": known.std,
        "spatial_compression_ratio": known.spatial_factor,
        "scale_factor_spatial": known.spatial_factor,
        "temporal_compression_ratio": known.temporal_factor,
    }
    for key, value in ours.items():
        theirs = as_tuple(list(config[key]) if isinstance(config.get(key), tuple) else config.get(key))
        is_said = theirs is not None and theirs not in ((0.0,) * known.channels, (1.0,) * known.channels)
        assert not is_said or theirs == value, key


@pytest.mark.parametrize("name", LATENT_FORMATS)
def test_a_format_agrees_with_itself(name: str) -> None:
    """A row of factors for each channel, and a decoder that takes as many."""
    known = LATENT_FORMATS[name]
    assert known.rgb_factors is None or len(known.rgb_factors) == known.channels
    assert known.decoder is None or TINY_DECODERS[known.decoder].latent_channels == known.channels
    assert known.decoder is None or TINY_DECODERS[known.decoder].spatial_factor == known.spatial_factor


@pytest.mark.parametrize(
    ("name", "kind", "shape", "spatial"),
    [
        ("sd1", "steps", (4, 8, 6), (1, 4, 8, 6)),
        ("sd1", "steps", (3, 4, 8, 6), (3, 4, 8, 6)),
        ("wan2_1", "clip", (5, 16, 8, 6), (5, 16, 8, 6)),
        ("wan2_1", "live", (16, 8, 6), (1, 16, 8, 6)),
        ("flux2", "steps", (32, 8, 6), (1, 32, 8, 6)),
        ("flux2", "steps", (2, 128, 4, 3), (2, 32, 8, 6)),
    ],
)
def test_shapes_that_fit(name: str, kind: Kind, shape: tuple[int, ...], spatial: tuple[int, ...]) -> None:
    """A shape that fits comes back as (N, C, h, w) in the spatial form."""
    assert latent_format(name).check_shape(kind, shape) == spatial


@pytest.mark.parametrize(
    ("name", "kind", "shape", "message"),
    [
        ("flux2", "steps", (16, 8, 6), r"flux2: expected 32 channels, got 16 \(shape \(16, 8, 6\)\)"),
        ("sd1", "steps", (2, 16, 8, 6), r"sd1: expected 4 channels, got 16"),
        ("sd1", "steps", (128, 8, 6), r"sd1: expected 4 channels, got 128"),
        ("sd1", "steps", (1, 1, 4, 8, 6), r"sd1: steps latents are \(C, h, w\) or \(N, C, h, w\), got shape"),
        ("wan2_1", "clip", (16, 8, 6), r"wan2_1: clip latents are \(T, C, h, w\), got shape"),
        ("sd1", "steps", (4, 0, 6), r"sd1: latents are empty"),
    ],
)
def test_shapes_that_do_not_fit(name: str, kind: Kind, shape: tuple[int, ...], message: str) -> None:
    """A shape that does not fit is an error that names the format, the expected and the given."""
    with pytest.raises(ValueError, match=message):
        latent_format(name).check_shape(kind, shape)


def test_patchified_flux2_unfolds_into_place() -> None:
    """Channel c*4 + dy*2 + dx of cell (y, x) lands at channel c, row 2y + dy, column 2x + dx."""
    latents = np.random.default_rng(0).standard_normal((2, 128, 3, 5))
    spatial = latent_format("flux2").unfold(latents)
    assert spatial.shape == (2, 32, 6, 10)
    for c, dy, dx in [(0, 0, 0), (7, 0, 1), (20, 1, 0), (31, 1, 1)]:
        np.testing.assert_array_equal(spatial[:, c, dy::2, dx::2], latents[:, c * 4 + dy * 2 + dx])


def test_unfolding_is_the_same_in_torch() -> None:
    """Tensors unfold as arrays do; what is spatial already stays as it is."""
    latents = np.random.default_rng(0).standard_normal((128, 3, 5))
    flux2 = latent_format("flux2")
    spatial = flux2.unfold(torch.from_numpy(latents))
    np.testing.assert_array_equal(spatial.numpy(), flux2.unfold(latents))
    assert flux2.unfold(spatial) is spatial


def test_an_unknown_name_gets_the_nearest() -> None:
    """A misspelt name is answered with those near to it; a model's name with the space that it shares."""
    with pytest.raises(ValueError, match=r"unknown latent format 'flux-2'; nearest: flux2"):
        latent_format("flux-2")
    with pytest.raises(ValueError, match=r"'z_image': its latents are those of 'flux1'"):
        latent_format("z_image")


def test_picture_size_is_cells_times_the_factor() -> None:
    """Stable Cascade's prior has a factor that is no whole number; the size is rounded."""
    assert latent_format("flux2").picture_size(64, 40) == (512, 320)
    assert latent_format("stable_cascade_prior").picture_size(24, 24) == (1024, 1024)
