"""Decoded pictures of a job -> planes for each rendition that is wanted of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from taesd_stream.decoding.colour import fit_within, jpeg_planes, video_planes
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import Planes

GRID_GAP_PX: Final = 4


@dataclass(frozen=True, slots=True)
class Sizes:
    """Longest sides of the renditions that are scaled down, pixels."""

    live_max_px: int
    thumb_max_px: int


def render(
    rgb: Tensor, renditions: tuple[Rendition, ...], sizes: Sizes
) -> Iterator[tuple[Rendition, Planes, tuple[int, int]]]:
    """Planes of one picture for each of its renditions.

    rgb: (3,H,W) float in [0, 1]. Yields: (rendition, (H'*3//2, W') uint8 I420, (width, height) as shown).
    """
    whole = rgb.unsqueeze(0)
    scaled: dict[int, Tensor] = {}
    for rendition in renditions:
        limit = {"record": 0, "film": 0, "thumb": sizes.thumb_max_px}.get(rendition, sizes.live_max_px)
        if limit and limit not in scaled:
            scaled[limit] = fit_within(whole, limit)
        picture = scaled[limit] if limit else whole
        to_planes = jpeg_planes if rendition in ("thumb", "jpeg") else video_planes
        height, width = int(picture.shape[-2]), int(picture.shape[-1])
        yield rendition, to_planes(picture)[0].cpu().numpy(), (width, height)


def grid(pictures: Tensor) -> Tensor:
    """A batch as one picture: (N,3,H,W) -> (3,H',W'), row by row, as near a square as N allows; black gaps of 4 px."""
    count, _, height, width = pictures.shape
    columns = math.ceil(math.sqrt(count * height / width)) if count > 1 else 1
    columns = min(max(1, columns), count)
    rows = math.ceil(count / columns)
    sheet = pictures.new_zeros(
        3, rows * height + (rows - 1) * GRID_GAP_PX, columns * width + (columns - 1) * GRID_GAP_PX
    )
    for place in range(count):
        row, column = divmod(place, columns)
        top, left = row * (height + GRID_GAP_PX), column * (width + GRID_GAP_PX)
        sheet[:, top : top + height, left : left + width] = pictures[place]
    return sheet


def as_pictures(latents: Tensor) -> Tensor:
    """Latents of one frame as a batch: (C,h,w) -> (1,C,h,w); (N,C,h,w) stays."""
    return latents if latents.ndim == 4 else latents.unsqueeze(0)
