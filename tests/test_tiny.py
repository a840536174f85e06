"""The TAESD family against the original implementation's outputs, and against diffusers' port of it."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from torch import Tensor, nn

from taesd_stream.errors import WeightsError
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.families import families_that_fit
from taesd_stream.models.networks import TINY_FAMILIES

SHARED = os.environ.get("TAESD_STREAM_SHARED")
needs_shared = pytest.mark.skipif(SHARED is None, reason="TAESD_STREAM_SHARED is not set: no golden vectors")
GOLDEN = ("taesd", "taef1", "taef2", "taesana")  # families with golden vectors; the others share their layouts


def formula_weights(network: nn.Module) -> dict[str, Tensor]:
    """The weights that the golden vectors were made with: seeded by each key's name."""
    weights = {}
    for key, tensor in network.state_dict().items():
        shape = tuple(tensor.shape)
        values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
        values *= 1.0 / np.sqrt(np.prod(shape[1:])) if len(shape) >= 2 else 0.3 / np.sqrt(64)
        values += 1.0 if key.endswith("pool.1.weight") else 0.0
        weights[key] = torch.from_numpy(values.astype(np.float32))
    return weights


def golden(name: str) -> tuple[Tensor, list[int]]:
    """The expected output of one entry, and the shape of its input."""
    folder = Path(SHARED or "") / "golden"
    entry = json.loads((folder / "tiny_decoders.json").read_text())[name]
    return load_file(folder / "tiny_decoders.safetensors")[name], entry["input_shape"]


@needs_shared
@pytest.mark.parametrize("family", GOLDEN)
def test_decoder_equals_the_original(family: str) -> None:
    """With the same weights and latents, the decoder's output is the original implementation's."""
    expected, shape = golden(f"{family}.decode")
    latents = torch.from_numpy(np.random.RandomState(7).standard_normal(shape).astype(np.float32))
    network = build_decoder(family, formula_weights(build_decoder(family)))
    with torch.inference_mode():
        torch.testing.assert_close(network(latents), expected, atol=1e-4, rtol=0)


@needs_shared
@pytest.mark.parametrize("family", GOLDEN)
def test_encoder_equals_the_original(family: str) -> None:
    """With the same weights and pixels, the encoder's latents are the original implementation's."""
    expected, shape = golden(f"{family}.encode")
    pixels = torch.from_numpy((np.random.RandomState(7).standard_normal(shape) * 0.3).astype(np.float32) + 0.5)
    network = build_encoder(family, formula_weights(build_encoder(family)))
    with torch.inference_mode():
        torch.testing.assert_close(network(pixels), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["taesd", "taesd3"])
def test_networks_equal_diffusers(family: str) -> None:
    """On random weights, decoder and encoder agree with diffusers' AutoencoderTiny, its [-1, 1] mapped to [0, 1]."""
    torch.manual_seed(0)
    channels = TINY_FAMILIES[family].latent_channels
    theirs: Any = AutoencoderTiny(latent_channels=channels)  # type: ignore[no-untyped-call]
    decoder = build_decoder(family, renumbered(theirs.decoder, shift=1))
    encoder = build_encoder(family, renumbered(theirs.encoder, shift=0))
    latents, pixels = torch.randn(2, channels, 5, 7), torch.rand(1, 3, 40, 24)
    with torch.inference_mode():
        torch.testing.assert_close(decoder(latents) * 2 - 1, theirs.decode(latents).sample, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder(pixels), theirs.encode(pixels * 2 - 1).latents, atol=1e-5, rtol=0)


def renumbered(network: nn.Module, shift: int) -> dict[str, Tensor]:
    """diffusers' keys as the original's: its decoder has no Clamp layer, so its indices are one less."""
    weights = {}
    for key, tensor in network.state_dict().items():
        _, index, rest = key.split(".", 2)
        weights[f"{int(index) + shift}.{rest}"] = tensor
    return weights


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_a_picture_is_the_latent_times_the_factor(name: str) -> None:
    """A decoder gives three channels at spatial_factor times the latent's size; the encoder goes back."""
    family = TINY_FAMILIES[name]
    with torch.inference_mode():
        pixels = build_decoder(name)(torch.zeros(1, family.latent_channels, 2, 3))
        assert pixels.shape == (1, 3, 2 * family.spatial_factor, 3 * family.spatial_factor)
        assert build_encoder(name)(pixels).shape == (1, family.latent_channels, 2, 3)


def test_wrong_weights_name_the_key_and_the_family_that_fits() -> None:
    """Weights of another family are refused with the first key that differs and the families they do fit."""
    weights = build_decoder("taef1").state_dict()
    with pytest.raises(WeightsError, match=r"'1\.weight': expected shape \(64, 4, 3, 3\).*taesd3 decoder or taef1"):
        build_decoder("taesd", weights)


def test_a_missing_key_is_named() -> None:
    """One key less than the network has is refused by that key's name."""
    weights = dict(build_decoder("taesd").state_dict())
    del weights["7.weight"]
    with pytest.raises(WeightsError, match=r"key '7\.weight' is missing"):
        build_decoder("taesd", weights)


def test_a_key_without_a_place_is_named() -> None:
    """One key more than the network has is refused by that key's name."""
    weights = {**build_decoder("taesd").state_dict(), "20.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match=r"key '20\.weight' has no place"):
        build_decoder("taesd", weights)


def test_an_encoder_given_as_decoder_is_recognised() -> None:
    """Mixing up the two files of a family is told as what it is."""
    assert families_that_fit(build_encoder("taef2").state_dict()) == ["taef2 encoder"]


def test_an_unknown_family_lists_the_known_ones() -> None:
    """A family's name that does not exist is a ValueError that lists those that do."""
    with pytest.raises(ValueError, match=r"'taesd4'.*taesd, taesdxl"):
        build_decoder("taesd4")


@needs_shared
@pytest.mark.parametrize(("family", "part"), [("taef2", "decoder"), ("taef2", "encoder"), ("taesana", "encoder")])
def test_original_files_load_strictly(family: str, part: str) -> None:
    """The published half-precision files load as they are."""
    weights = torch.load(Path(SHARED or "") / "weights" / f"{family}_{part}.pth", weights_only=True)
    build_decoder(family, weights) if part == "decoder" else build_encoder(family, weights)
