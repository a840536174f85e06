"""The image autoencoder of Qwen-Image 2.1: 64 channels, 16 pixels a cell, RGBA with straight alpha.

Its layout is that of a newer taesd.py of madebyollin/taesd (MIT) than 5cccb12, seen as a copy in another repository:
the layers, their order and the straight alpha are read from there, and the size that is said of the published decoder
is that of these weights in half precision. Neither the weights nor outputs were at hand, and that the latents are z as
the scheduler holds it is third parties' word.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from taesd_stream.models.networks import DecoderLayout, EncoderLayout, tiny_decoder, tiny_encoder

RGBA_FAMILY: Final = "taeqi2_1"
LATENT_CHANNELS: Final = 64

_PATCH: Final = 2  # side of the pixel shuffle at full resolution
_CHANNELS: Final = 4 * _PATCH**2
_WIDTHS: Final = (256, 128, 64, 64)


def rgba_decoder() -> nn.Sequential:
    """The decoder: (N, 64, h, w) latents -> (N, 4, 16h, 16w) RGBA, [0, 1] but not clamped."""
    layout = DecoderLayout(latent_channels=LATENT_CHANNELS, out_channels=_CHANNELS, widths=_WIDTHS)
    return nn.Sequential(*tiny_decoder(layout), nn.PixelShuffle(_PATCH))


def rgba_encoder() -> nn.Sequential:
    """The encoder: (N, 4, H, W) RGBA in [0, 1] -> (N, 64, h, w) latents; H and W are even."""
    layout = EncoderLayout(latent_channels=LATENT_CHANNELS, in_channels=_CHANNELS, widths=_WIDTHS[::-1])
    first, *others = tiny_encoder(layout)
    return nn.Sequential(nn.PixelUnshuffle(_PATCH), first, nn.ReLU(inplace=True), *others)


class OverWhite(nn.Module):
    """RGBA laid over white, where a viewer has no alpha."""

    def forward(self, rgba: Tensor) -> Tensor:
        """(N, 4, H, W), not clamped -> (N, 3, H, W) in [0, 1]."""
        rgba = rgba.clamp(0, 1)
        alpha = rgba[:, 3:]
        return rgba[:, :3] * alpha + (1 - alpha)
