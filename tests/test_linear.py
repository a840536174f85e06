"""The linear projections: the published factors, and those fitted by least squares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import LATENT_FORMATS, latent_format
from taesd_stream.models import build_decoder
from taesd_stream.models.linear import (
    FactorProjection,
    FactorSquares,
    LeastSquares,
    ShuffleProjection,
    fit,
    fit_factors,
    has_linear_decoder,
)


def random_projection(channels: int, factor: int) -> ShuffleProjection:
    """A projection with seeded random weights."""
    torch.manual_seed(0)
    network = ShuffleProjection(channels, factor)
    nn.init.normal_(network.weight, std=0.05)
    nn.init.uniform_(network.bias)
    return network


@pytest.mark.parametrize("name", [name for name, known in LATENT_FORMATS.items() if known.rgb_factors])
def test_factors_give_the_published_colours(name: str) -> None:
    """A flat latent becomes the flat colour (z @ factors + bias + 1) / 2, in the picture's full size."""
    known = latent_format(name)
    torch.manual_seed(0)
    z = torch.randn(known.channels)
    factors, bias = torch.tensor(known.rgb_factors), torch.tensor(known.rgb_bias or (0.0, 0.0, 0.0))
    with torch.inference_mode():
        pictures = FactorProjection(known)(z[None, :, None, None].expand(1, -1, 2, 3))
    assert pictures.shape == (1, 3, *known.picture_size(2, 3))
    expected = ((z @ factors + bias + 1) / 2).clamp(0, 1)[None, :, None, None].expand_as(pictures)
    torch.testing.assert_close(pictures, expected, atol=1e-5, rtol=0)


def test_fit_finds_the_projection_that_made_the_pictures() -> None:
    """Least squares on pictures that a projection made gives back that projection's pictures."""
    torch.manual_seed(1)
    truth, latents = random_projection(4, 2), torch.randn(2, 4, 12, 10)
    with torch.no_grad():
        fitted = fit(latents, truth(latents))
        unseen = torch.randn(1, 4, 5, 7)
        torch.testing.assert_close(fitted(unseen), truth(unseen), atol=1e-3, rtol=0)


def test_pairs_may_come_in_parts() -> None:
    """Pairs added one by one give the same projection as all at once."""
    torch.manual_seed(2)
    latents, pictures = torch.randn(3, 4, 8, 8), torch.rand(3, 3, 16, 16)
    equations = LeastSquares(4, 2)
    for index in range(3):
        equations.add(latents[index : index + 1], pictures[index : index + 1])
    torch.testing.assert_close(equations.solve().weight, fit(latents, pictures).weight, atol=1e-4, rtol=1e-3)


def test_fit_refuses_pairs_that_do_not_belong_together() -> None:
    """Wrong channels and sizes are errors that name the expected and the given."""
    equations = LeastSquares(4, 2)
    with pytest.raises(ValueError, match="expected 4 channels, got 5"):
        equations.add(torch.zeros(1, 5, 2, 2), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"expected shape \(1, 3, 4, 4\), got \(1, 3, 4, 6\)"):
        equations.add(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 4, 6))
    with pytest.raises(ValueError, match="no pairs"):
        equations.solve()


def test_a_projection_is_built_by_its_format() -> None:
    """The families "nano" and "linear" take the format that they are for, and no other family does."""
    with torch.inference_mode():
        assert build_decoder("linear", latent_format="flux2")(torch.zeros(1, 32, 4, 6)).shape == (1, 3, 32, 48)
    with pytest.raises(ValueError, match="needs latent_format"):
        build_decoder("linear")
    with pytest.raises(ValueError, match="belongs to the families nano and linear"):
        build_decoder("taesd", latent_format="sd1")


def test_a_format_without_factors_says_so() -> None:
    """CogVideoX has no published factors: known beforehand, and an error when built."""
    assert not has_linear_decoder(latent_format("cogvideox"))
    with pytest.raises(WeightsError, match="no rgb factors are known for cogvideox"):
        build_decoder("linear", latent_format="cogvideox")


def test_factors_are_found_on_the_mean_colour_of_each_box() -> None:
    """Pictures whose boxes have the true mean, whatever their pixels, give back the factors that made the means."""
    torch.manual_seed(3)
    latents, factors, bias = torch.randn(2, 5, 6, 7), torch.randn(5, 3) * 0.1, torch.tensor([0.1, 0.0, -0.1])
    means = (torch.einsum("nchw,cr->nrhw", latents, factors) + bias.reshape(3, 1, 1) + 1) / 2
    texture = torch.randn(2, 3, 6, 4, 7, 4) * 0.1
    texture -= texture.mean((3, 5), keepdim=True)
    pictures = (means[:, :, :, None, :, None] + texture).reshape(2, 3, 24, 28)
    found, found_bias = fit_factors(latents, pictures)
    torch.testing.assert_close(found, factors, atol=1e-4, rtol=0)
    torch.testing.assert_close(found_bias, bias, atol=1e-4, rtol=0)


def test_factors_refuse_pairs_that_do_not_belong_together() -> None:
    """Another number of channels or of pictures is an error that names the expected and the given."""
    equations = FactorSquares(4)
    with pytest.raises(ValueError, match="latents: expected 4 channels, got 5"):
        equations.add(torch.zeros(1, 5, 2, 2), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"pictures: expected \(2, 3, H, W\), got \(1, 3, 4, 4\)"):
        equations.add(torch.zeros(2, 4, 2, 2), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="no pairs"):
        equations.solve()


@pytest.mark.parametrize("name", LATENT_FORMATS)
def test_every_format_with_known_factors_has_a_projection(name: str, shared: Path) -> None:
    """Where the facts have rgb factors, and for Sana, whose factors are our own, the package projects; nowhere else."""
    facts = json.loads((shared / "latent_formats.json").read_text())["formats"][name]
    factors = (facts["comfyui"] or {}).get("latent_rgb_factors")
    known = latent_format(name)
    is_known = factors is not None or name == "sana"
    assert has_linear_decoder(known) == is_known
    if is_known:
        network = build_decoder("linear", latent_format=name)
        with torch.inference_mode():
            assert network(torch.zeros(1, known.channels, 2, 3)).shape == (1, 3, *known.picture_size(2, 3))
