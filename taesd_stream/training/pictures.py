"""Pictures for training: crops at many scales, in other colours, so that few photographs go a long way."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

_STEP: Final = 0.75  # from one size of a picture to the next smaller one
PYRAMID: Final = 1 / (1 - _STEP**2)  # bytes of all sizes of a picture, for each of its largest
LARGEST_PX: Final = 1152  # short side; larger pictures are scaled down
_BLURRED: Final = 0.1  # share of the crops: a sampler's early estimates look so
_COLOURED: Final = 0.5


class PicturePool:
    """Pictures on a device, each at every scale down to the smallest crop; 8 bits a value.

    pictures: (3, H, W) uint8 each. smallest: side of the smallest crop; a picture with a shorter side is passed over.
    weights: how often each is taken, one a picture; None for all alike.
    Raises: ValueError if none is large enough.
    """

    def __init__(
        self,
        pictures: Iterable[Tensor],
        *,
        device: torch.device,
        smallest: int = 128,
        weights: list[float] | None = None,
    ) -> None:
        self._device = device
        self._levels: list[list[Tensor]] = []
        kept: list[float] = []
        for index, picture in enumerate(pictures):
            if min(picture.shape[-2:]) >= smallest:
                self._levels.append(_pyramid(picture.to(device), smallest))
                kept.append(1.0 if weights is None else weights[index])
        if not self._levels:
            raise ValueError(f"expected pictures of at least {smallest} pixels on the short side, got none")
        self._weights = torch.tensor(kept, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self._levels)

    def batch(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Random crops (count, 3, *size) in [0, 1], augmented. generator: of the CPU; the same one, the same crops."""
        chosen = torch.multinomial(self._weights, count, replacement=True, generator=generator)
        crops = torch.stack([self._crop(index, size, generator) for index in chosen.tolist()])
        return _augmented(crops.to(self._device).float() / 255, generator)

    def _crop(self, index: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """One crop of a picture, at a scale where it fits; a picture that is too small is scaled up to it."""
        height, width = size
        levels = [one for one in self._levels[index] if one.shape[-2] >= height and one.shape[-1] >= width]
        if not levels:
            whole = self._levels[index][0]
            scale = max(height / whole.shape[-2], width / whole.shape[-1])
            levels = [_resized(whole, math.ceil(whole.shape[-2] * scale), math.ceil(whole.shape[-1] * scale))]
        level = levels[_integer(len(levels), generator)]
        top = _integer(level.shape[-2] - height + 1, generator)
        left = _integer(level.shape[-1] - width + 1, generator)
        crop = level[:, top : top + height, left : left + width]
        return crop.flip(-1) if _integer(2, generator) else crop


def shrunk(picture: Tensor) -> Tensor:
    """A picture (3, H, W) uint8, at most as large as a pool takes it: who reads many need not hold more of each."""
    return _scaled(picture, _largest_scale(picture))


def _integer(end: int, generator: torch.Generator) -> int:
    return int(torch.randint(end, (), generator=generator))


def _pyramid(picture: Tensor, smallest: int) -> list[Tensor]:
    """The picture at every scale whose short side is at least `smallest`, the largest first."""
    scale = _largest_scale(picture)
    levels = []
    while scale * min(picture.shape[-2:]) >= smallest:
        levels.append(_scaled(picture, scale))
        scale *= _STEP
    return levels


def _largest_scale(picture: Tensor) -> float:
    return min(1.0, LARGEST_PX / min(picture.shape[-2:]))


def _scaled(picture: Tensor, scale: float) -> Tensor:
    height, width = picture.shape[-2:]
    return _resized(picture, round(height * scale), round(width * scale))


def _resized(picture: Tensor, height: int, width: int) -> Tensor:
    if (height, width) == tuple(picture.shape[-2:]):
        return picture
    smooth = F.interpolate(picture[None].float(), size=(height, width), mode="bicubic", antialias=True)
    return smooth[0].round().clamp(0, 255).byte()


def _augmented(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Other colours for most crops, and a blur for some."""
    count = len(crops)
    crops = torch.where(_some(count, _COLOURED, crops, generator), _recoloured(crops, generator), crops)
    return torch.where(_some(count, _BLURRED, crops, generator), _blurred(crops, generator), crops)


def _some(count: int, share: float, like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(count, 1, 1, 1, generator=generator) < share).to(like.device)


def _recoloured(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Channels turned, contrast, saturation, a cast and a gamma, different for each crop; some are negatives."""
    count, device = len(crops), crops.device

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return (torch.rand(count, channels, 1, 1, generator=generator) * (high - low) + low).to(device)

    order = torch.stack([torch.randperm(3, generator=generator) for _ in range(count)]).to(device)
    is_turned = uniform(0, 1) < 0.3
    crops = torch.where(is_turned, crops.gather(1, order[:, :, None, None].expand_as(crops)), crops)
    crops = torch.where(uniform(0, 1) < 0.08, 1 - crops, crops)
    grey = crops.mean(dim=1, keepdim=True)
    crops = grey + (crops - grey) * uniform(0.0, 1.8)
    level = crops.mean(dim=(1, 2, 3), keepdim=True)
    crops = level + (crops - level) * uniform(0.5, 1.5) + uniform(-0.12, 0.12)
    return (crops * uniform(0.8, 1.2, 3)).clamp(0, 1) ** torch.exp(uniform(-0.6, 0.6))


def _blurred(crops: Tensor, generator: torch.Generator) -> Tensor:
    """Smoothed, as much as the whole batch's draw says."""
    factor = 2 ** (1 + _integer(4, generator))
    small = F.avg_pool2d(crops, factor)
    return F.interpolate(small, size=crops.shape[-2:], mode="bicubic", align_corners=False).clamp(0, 1)
