"""Our own small decoder: a thirtieth of a tiny decoder's arithmetic, small enough to come with the package.

Most of it works at latent resolution, in blocks of a 5x5 depthwise and two 1x1 convolutions (after ConvNeXt, Liu et
al. 2022); the picture appears at the end, by pixel shuffle. What a latent means depends on its whole picture, for the
encoders normalise over all of it: so the network is told the statistics of the whole latent, also where it sees a tile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.networks import Clamp
from taesd_stream.models.strict_loading import StateDict, load_strictly

_KERNEL: Final = 5
_SHUFFLE: Final = 8  # pixels on a side that the last layer makes of a cell; coarser latents are split into cells first
_FILM_WIDTH: Final = 48
_POOLED: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoLayout:
    """What tells one nano decoder from another.

    width, blocks: channels and blocks at latent resolution. fine_width, fine_blocks: of the second stage, at 8 pixels
    a cell, which only latents with more than 8 pixels a cell have.
    Raises: ValueError for a factor that is neither at most 8 nor a multiple of it.
    """

    latent_channels: int
    spatial_factor: int
    width: int = 96
    blocks: int = 7
    fine_width: int = 0
    fine_blocks: int = 0

    def __post_init__(self) -> None:
        if self.spatial_factor > _SHUFFLE and self.spatial_factor % _SHUFFLE:
            expected = f"at most {_SHUFFLE} pixels a cell, or a multiple of it"
            raise ValueError(f"spatial_factor: expected {expected}, got {self.spatial_factor}")
        if (self.split > 1) != (self.fine_width > 0):
            raise ValueError(f"fine_width: expected it for more than {_SHUFFLE} pixels a cell alone")

    @property
    def shuffle(self) -> int:
        """Pixels on a side that the last layer makes of one cell."""
        return min(self.spatial_factor, _SHUFFLE)

    @property
    def split(self) -> int:
        """Fine cells on a side that one latent cell becomes; 1 where there is no second stage."""
        return self.spatial_factor // self.shuffle

    @property
    def halo(self) -> int:
        """Latent cells around a tile that its pixels depend on."""
        fine = self.fine_blocks * (_KERNEL // 2) + 1 if self.split > 1 else 1
        return 1 + self.blocks * (_KERNEL // 2) + -(-fine // self.split)


def default_layout(latent_channels: int, spatial_factor: int) -> NanoLayout:
    """The layout for a latent space: under 1 MB in half precision, under a thirtieth of a tiny decoder's arithmetic."""
    if spatial_factor <= _SHUFFLE:
        return NanoLayout(latent_channels=latent_channels, spatial_factor=spatial_factor)
    return NanoLayout(
        latent_channels=latent_channels,
        spatial_factor=spatial_factor,
        width=112,
        blocks=2,
        fine_width=64,
        fine_blocks=5,
    )


class _Block(nn.Module):
    """What neighbours say by a depthwise convolution, what channels say by two 1x1 ones, beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) -> the same shape."""
        added: Tensor = self.narrow(F.relu(self.widen(self.spatial(x))))
        return x + added


class NanoDecoder(nn.Module):
    """(N, C, h, w) latents as the scheduler holds them -> (N, 3, H, W), in [0, 1] but not clamped."""

    def __init__(self, layout: NanoLayout) -> None:
        super().__init__()
        self.layout = layout
        channels, width = layout.latent_channels, layout.width
        last = layout.fine_width or width
        pixels = 3 * layout.shuffle**2
        self.clamp = Clamp()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.pooled = nn.Conv2d(channels, _POOLED, 1)
        self.film_in = nn.Linear(2 * channels + _POOLED, _FILM_WIDTH)
        self.film_out = nn.Linear(_FILM_WIDTH, 2 * width)
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(layout.blocks)))
        self.split = nn.Conv2d(width, layout.fine_width * layout.split**2, 1) if layout.split > 1 else None
        self.fine_blocks = nn.Sequential(*(_Block(layout.fine_width) for _ in range(layout.fine_blocks)))
        self.head = nn.Conv2d(last, pixels, 3, padding=1)
        self.linear = nn.Conv2d(channels, pixels, 1)  # the picture as far as a linear map can tell
        nn.init.zeros_(self.film_out.weight)  # no gain and no bias from the statistics at first
        nn.init.zeros_(self.film_out.bias)

    def statistics(self, latents: Tensor) -> Tensor:
        """What the network wants to know of whole latents (N, C, h, w): (N, K), one row a picture."""
        latents = self.clamp(latents)
        deviation, mean = torch.std_mean(latents.float(), dim=(2, 3), correction=0)
        pooled = F.relu(self.pooled(latents)).float().mean(dim=(2, 3))
        return torch.cat([mean, deviation, pooled], dim=1).to(latents.dtype)

    def forward(self, latents: Tensor, statistics: Tensor | None = None) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W).

        statistics: (N, K), what `statistics` says of the pictures that the latents are tiles of; None for whole ones.
        """
        if statistics is None:
            statistics = self.statistics(latents)
        latents = self.clamp(latents)
        gain, bias = self.film_out(F.relu(self.film_in(statistics)))[:, :, None, None].chunk(2, dim=1)
        x = self.stem(latents)
        x = self.blocks(x * (1 + gain) + bias)
        if self.split is not None:
            x = self.fine_blocks(F.pixel_shuffle(self.split(x), self.layout.split))
        details = F.pixel_shuffle(self.head(F.relu(x)), self.layout.shuffle)
        base = F.pixel_shuffle(self.linear(latents), self.layout.shuffle)
        if self.layout.split > 1:
            base = F.interpolate(base, scale_factor=self.layout.split, mode="bilinear", align_corners=False)
        return base + details


def layout_of(state: StateDict) -> NanoLayout:
    """The layout of a decoder by its weights. Raises: WeightsError if they are none."""
    try:
        width, channels = state["stem.weight"].shape[:2]
        shuffle = round((state["head.weight"].shape[0] / 3) ** 0.5)
        fine_width = state["head.weight"].shape[1] if "split.weight" in state else 0
        split = round((state["split.weight"].shape[0] / fine_width) ** 0.5) if fine_width else 1
        return NanoLayout(
            latent_channels=channels,
            spatial_factor=shuffle * split,
            width=width,
            blocks=_count(state, r"blocks\.(\d+)\.spatial\.weight"),
            fine_width=fine_width,
            fine_blocks=_count(state, r"fine_blocks\.(\d+)\.spatial\.weight"),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"these weights are no nano decoder: {error}") from error


def is_nano(state: StateDict) -> bool:
    """Whether weights look like a nano decoder's."""
    return "film_in.weight" in state


def _count(state: StateDict, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


def nano_from_weights(state: StateDict, name: str) -> NanoDecoder:
    """The decoder that weights are of. Raises: WeightsError if they are none."""
    network = NanoDecoder(layout_of(state))
    load_strictly(network, state, name=name)
    return network.eval()


def has_nano_decoder(latent_format: LatentFormat) -> bool:
    """Whether the package has a nano decoder of that format."""
    return _packaged(latent_format).is_file()


def nano_decoder(latent_format: LatentFormat) -> NanoDecoder:
    """The nano decoder that comes with the package. Raises: WeightsError if there is none for the format."""
    file = _packaged(latent_format)
    if not file.is_file():
        raise WeightsError(
            f"the package has no nano decoder for {latent_format.name}; `taesd-stream distill` makes one"
        )
    return nano_from_weights(load(file.read_bytes()), f"nano {latent_format.name}")


def _packaged(latent_format: LatentFormat) -> Traversable:
    return resources.files("taesd_stream") / "data" / f"nano_{latent_format.name}.safetensors"
