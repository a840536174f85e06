"""The RGBA image autoencoder: shapes, keys and size, and what is shown of its alpha."""

from __future__ import annotations

import torch

from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.families import families_that_fit
from taesd_stream.models.tiny_rgba import RGBA_FAMILY, OverWhite


def test_a_picture_has_four_channels_at_sixteen_times_the_size() -> None:
    """The decoder gives RGBA at 16 pixels a cell; the encoder goes back."""
    with torch.inference_mode():
        rgba = build_decoder(RGBA_FAMILY)(torch.zeros(2, 64, 2, 3))
        assert rgba.shape == (2, 4, 32, 48)
        assert build_encoder(RGBA_FAMILY)(rgba).shape == (2, 64, 2, 3)


def test_the_keys_are_the_layers_numbers() -> None:
    """The first and last convolutions are where the original has them, so that its files load."""
    decoder, encoder = build_decoder(RGBA_FAMILY).state_dict(), build_encoder(RGBA_FAMILY).state_dict()
    assert (decoder["1.weight"].shape, decoder["19.weight"].shape) == ((256, 64, 3, 3), (16, 64, 3, 3))
    assert (encoder["1.weight"].shape, encoder["16.weight"].shape) == ((64, 16, 3, 3), (64, 256, 3, 3))
    assert families_that_fit(decoder) == [f"{RGBA_FAMILY} decoder"]


def test_the_weights_fill_the_published_file() -> None:
    """In half precision the decoder takes the published file's 15,314,938 bytes, less torch's own head."""
    nbytes = 2 * sum(weight.numel() for weight in build_decoder(RGBA_FAMILY).parameters())
    assert 0 < 15_314_938 - nbytes < 40_000


def test_clear_pixels_are_white() -> None:
    """Colour counts as much as it is opaque, over white; values beyond [0, 1] are no stronger than its ends."""
    rgba = torch.tensor([[0.5, 0.0, 2.0, 1.5], [0.5, 0.0, 1.0, -1.0], [1.0, 0.0, 0.0, 0.5]])
    rgb = OverWhite()(rgba.reshape(3, 4, 1, 1)).reshape(3, 3)
    assert rgb.tolist() == [[0.5, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.5, 0.5]]
