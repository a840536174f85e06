"""The TAESD family as bare networks: latents to pictures and back, by 3x3 convolutions alone.

Layout and layer numbers follow madebyollin/taesd (MIT), taesd.py@5cccb12, so that the original state dicts load
strictly: every network is one nn.Sequential and the keys are its indices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from taesd_stream.models.fused import residual_relu

LATENT_MAGNITUDE: Final = 3.0  # the networks are trained on latents within about [-3, 3]
# As diffusers names them. A ReLU works in place: nothing needs the value before it, also not the backward pass.
_ACTIVATIONS: Final[dict[str, Callable[[], nn.Module]]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayout:
    """What tells one decoder from another.

    widths, blocks: channels and blocks of each stage, from latent to full resolution; upsampling lies between stages.
    has_pooled_blocks: the stage at latent resolution normalises over the whole picture (FLUX.2).
    Raises: ValueError for a layout that cannot be built.
    """

    latent_channels: int
    out_channels: int = 3
    widths: tuple[int, ...] = (64, 64, 64, 64)
    blocks: tuple[int, ...] = (3, 3, 3, 1)
    activation: str = "relu"
    upsample_mode: str = "nearest"
    upsample_factor: int = 2
    has_pooled_blocks: bool = False

    def __post_init__(self) -> None:
        _check_stages("decoder", self.widths, self.blocks, self.activation)
        modes = ("nearest", "nearest-exact", "bilinear", "bicubic")
        if self.upsample_mode not in modes:
            raise ValueError(f"upsample_fn: expected one of {', '.join(modes)}, got {self.upsample_mode!r}")

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, on one side."""
        return int(self.upsample_factor ** (len(self.widths) - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLayout:
    """What tells one encoder from another.

    widths, blocks: channels and blocks of each stage, from full to latent resolution; each stage but the first halves.
    has_pooled_blocks: the stage at latent resolution normalises over the whole picture (FLUX.2).
    has_strided_stem: it halves twice before its first block (32x families).
    Raises: ValueError for a layout that cannot be built.
    """

    latent_channels: int
    in_channels: int = 3
    widths: tuple[int, ...] = (64, 64, 64, 64)
    blocks: tuple[int, ...] = (1, 3, 3, 3)
    activation: str = "relu"
    has_pooled_blocks: bool = False
    has_strided_stem: bool = False

    def __post_init__(self) -> None:
        _check_stages("encoder", self.widths, self.blocks, self.activation)


def _check_stages(part: str, widths: tuple[int, ...], blocks: tuple[int, ...], activation: str) -> None:
    if not widths or len(widths) != len(blocks):
        given = f"got {len(widths)} and {len(blocks)}"
        raise ValueError(
            f"{part}_block_out_channels and num_{part}_blocks: expected as many of one as the other, {given}"
        )
    if activation not in _ACTIVATIONS:
        raise ValueError(f"act_fn: expected one of {', '.join(_ACTIVATIONS)}, got {activation!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """An autoencoder by name: what DecoderLayout and EncoderLayout say of it, where it is not their default."""

    name: str
    latent_channels: int
    widths: tuple[int, ...] = (64, 64, 64, 64)
    has_pooled_blocks: bool = False
    has_strided_stem: bool = False

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, on one side."""
        return self.decoder_layout.spatial_factor

    @property
    def decoder_layout(self) -> DecoderLayout:
        """Its decoder: three blocks a stage, one in the last."""
        blocks = (*[3] * (len(self.widths) - 1), 1)
        return DecoderLayout(
            latent_channels=self.latent_channels,
            widths=self.widths,
            blocks=blocks,
            has_pooled_blocks=self.has_pooled_blocks,
        )

    @property
    def encoder_layout(self) -> EncoderLayout:
        """Its encoder: always 64 channels wide."""
        return EncoderLayout(
            latent_channels=self.latent_channels,
            has_pooled_blocks=self.has_pooled_blocks,
            has_strided_stem=self.has_strided_stem,
        )


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

    def __init__(self, channels: int, *, pooled: bool = False, activation: str = "relu") -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv3x3(channels, channels),
            _ACTIVATIONS[activation](),
            conv3x3(channels, channels),
            _ACTIVATIONS[activation](),
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
        return residual_relu(self.conv, x, x)


def tiny_decoder(layout: TinyFamily | DecoderLayout) -> nn.Sequential:
    """The decoder: (N, C, h, w) latents as the scheduler holds them -> (N, 3, H, W), [0, 1] but not clamped."""
    if isinstance(layout, TinyFamily):
        layout = layout.decoder_layout
    widths, activation = layout.widths, layout.activation
    layers: list[nn.Module] = [Clamp(), conv3x3(layout.latent_channels, widths[0]), _ACTIVATIONS[activation]()]
    for stage, (width, count) in enumerate(zip(widths, layout.blocks, strict=True)):
        if stage > 0:
            layers.append(nn.Upsample(scale_factor=layout.upsample_factor, mode=layout.upsample_mode))
            layers.append(conv3x3(widths[stage - 1], width, bias=False))
        pooled = layout.has_pooled_blocks and stage == 0
        layers += [Block(width, pooled=pooled, activation=activation) for _ in range(count)]
    return nn.Sequential(*layers, conv3x3(widths[-1], layout.out_channels))


def tiny_encoder(layout: TinyFamily | EncoderLayout) -> nn.Sequential:
    """The encoder: (N, 3, H, W) pixels in [0, 1] -> (N, C, h, w) latents.

    Any size: a side that is no multiple of the factor is rounded up, so the last latent sees what there is and zeros.
    """
    if isinstance(layout, TinyFamily):
        layout = layout.encoder_layout
    widths, activation = layout.widths, layout.activation
    layers: list[nn.Module] = [conv3x3(layout.in_channels, widths[0])]
    if layout.has_strided_stem:
        half = widths[0] // 2
        layers = [conv3x3(layout.in_channels, half, stride=2), _ACTIVATIONS[activation]()]
        layers += [conv3x3(half, widths[0], stride=2), _ACTIVATIONS[activation]()]
    for stage, (width, count) in enumerate(zip(widths, layout.blocks, strict=True)):
        if stage > 0:
            layers.append(conv3x3(widths[stage - 1], width, stride=2, bias=False))
        pooled = layout.has_pooled_blocks and stage == len(widths) - 1
        layers += [Block(width, pooled=pooled, activation=activation) for _ in range(count)]
    return nn.Sequential(*layers, conv3x3(widths[-1], layout.latent_channels))
