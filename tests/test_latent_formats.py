"""The table of latent spaces: complete, true to its source, strict about shapes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taesd_stream.frames import Kind
from taesd_stream.latent_formats import LATENT_FORMATS, TINY_DECODERS, latent_format

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
    spatial = latent_format("flux2").to_spatial(latents)
    assert spatial.shape == (2, 32, 6, 10)
    for c, dy, dx in [(0, 0, 0), (7, 0, 1), (20, 1, 0), (31, 1, 1)]:
        np.testing.assert_array_equal(spatial[:, c, dy::2, dx::2], latents[:, c * 4 + dy * 2 + dx])


def test_unfolding_is_the_same_in_torch() -> None:
    """Tensors unfold as arrays do; what is spatial already stays as it is."""
    latents = np.random.default_rng(0).standard_normal((128, 3, 5))
    flux2 = latent_format("flux2")
    spatial = flux2.to_spatial(torch.from_numpy(latents))
    np.testing.assert_array_equal(spatial.numpy(), flux2.to_spatial(latents))
    assert flux2.to_spatial(spatial) is spatial


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
