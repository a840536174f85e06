"""The TAESD family as bare networks: latents to pictures and back, by 3x3 convolutions alone.

Layout and layer numbers follow madebyollin/taesd (MIT), taesd.py@5cccb12, so that the original state dicts load
strictly: every network is one nn.Sequential and the keys are its indices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

LATENT_MAGNITUDE: Final = 3.0  # the networks are trained on latents within about [-3, 3]


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """What tells one autoencoder of the family from another.

    widths: channels of the decoder's stages, from latent to full resolution; each step between two doubles the size.
    has_pooled_blocks: the stage at latent resolution normalises over the whole picture (FLUX.2).
    has_strided_stem: the encoder halves twice before its first block (32x families).
    """

    name: str
    latent_channels: int
    widths: tuple[int, ...] = (64, 64, 64, 64)
    has_pooled_blocks: bool = False
    has_strided_stem: bool = False

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, on one side."""
        return int(2 ** (len(self.widths) - 1))


TINY_FAMILIES: Final[dict[str, TinyFamily]] = {
    family.name: family
    for family in (
        TinyFamily(name="taesd", latent_channels=4),
        TinyFamily(name="taesdxl", latent_channels=4),
        TinyFamily(name="taesd3", latent_channels=16),
        TinyFamily(name="taef1", latent_channels=16),
        TinyFamily(name="taef2", latent_channels=32, has_pooled_blocks=True),
        TinyFamily(name="taesana", latent_channels=32, widths=(256, 128, 64, 64, 64, 64), has_strided_stem=True),
    )
}


def conv3x3(channels_in: int, channels_out: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it with `stride=2`."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, stride=stride, bias=bias)


class Clamp(nn.Module):
    """Soft limit of latents to (-3, 3): outliers of a sampler's early steps must not blow up the picture."""

    def forward(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        return torch.tanh(latents / LATENT_MAGNITUDE) * LATENT_MAGNITUDE


class Block(nn.Module):
    """Three 3x3 convolutions beside an identity; with `pooled`, a normalised 1x1 detour is added first.

    The detour's GroupNorm spans the whole picture, so a tile decoded alone has other colours.
    """

    def __init__(self, channels: int, *, pooled: bool = False) -> None:
        super().__init__()
        # In place: the value before a ReLU is needed by nobody, also not by the backward pass.
        self.conv = nn.Sequential(
            conv3x3(channels, channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
        )
        self.fuse = nn.ReLU(inplace=True)
        self.pool: nn.Sequential | None = None
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
                nn.GroupNorm(4, 4 * channels),
                nn.ReLU(inplace=True),
                nn.Conv2d(4 * channels, channels, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, h, w) -> the same shape."""
        if self.pool is not None:
            x = x + self.pool(x)
        fused: Tensor = self.fuse(self.conv(x) + x)
        return fused


def tiny_decoder(family: TinyFamily) -> nn.Sequential:
    """The decoder: (N, C, h, w) latents as the scheduler holds them -> (N, 3, H, W), [0, 1] but not clamped."""
    widths = family.widths
    layers: list[nn.Module] = [Clamp(), conv3x3(family.latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for stage, (width, next_width) in enumerate(itertools.pairwise(widths)):
        layers += [Block(width, pooled=family.has_pooled_blocks and stage == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), conv3x3(width, next_width, bias=False)]
    layers += [Block(widths[-1]), conv3x3(widths[-1], 3)]
    return nn.Sequential(*layers)


def tiny_encoder(family: TinyFamily) -> nn.Sequential:
    """The encoder: (N, 3, H, W) pixels in [0, 1] -> (N, C, h, w) latents; H and W are multiples of the factor."""
    layers: list[nn.Module] = [conv3x3(3, 64)]
    if family.has_strided_stem:
        layers = [conv3x3(3, 32, stride=2), nn.ReLU(inplace=True), conv3x3(32, 64, stride=2), nn.ReLU(inplace=True)]
    layers.append(Block(64))
    for stage in range(3):
        layers.append(conv3x3(64, 64, stride=2, bias=False))
        layers += [Block(64, pooled=family.has_pooled_blocks and stage == 2) for _ in range(3)]
    layers.append(conv3x3(64, family.latent_channels))
    return nn.Sequential(*layers)
