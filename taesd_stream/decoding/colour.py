"""RGB to planar YUV 4:2:0, and smaller pictures: the only place where pixels are converted.

Rounded, never truncated; chroma is the mean of each 2x2 box. Whoever encodes the planes must say the same matrix and
range: BT.709 limited for video, BT.601 full for JPEG.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from taesd_stream.decoding.few_threads import few_threads


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourMatrix:
    """How R'G'B' becomes Y'CbCr in 8 bits: luma weights, and the range of codes.

    kr, kb: weights of red and blue in luma; luma_base + luma_span * Y' and 128 + chroma_span * Cb (Cb in [-0.5, 0.5]).
    """

    kr: float
    kb: float
    luma_base: float
    luma_span: float
    chroma_span: float


# Rec. ITU-R BT.709-6, items 3.2 and 4.6: what players assume of HD video. White is 235, black 16.
BT709_LIMITED: Final = ColourMatrix(kr=0.2126, kb=0.0722, luma_base=16, luma_span=219, chroma_span=224)
# JFIF (ITU-T T.871, section 7): BT.601 weights over all codes. White is 255, black 0.
BT601_FULL: Final = ColourMatrix(kr=0.299, kb=0.114, luma_base=0, luma_span=255, chroma_span=255)

# A half less a hair: cut after adding it, values are rounded, and exact ties go down whatever the float error. The ends
# of full-range chroma are such ties: 0.5 and 255.5, which would wrap to 0.
_HALF: Final = 0.5 - 2**-10


def video_planes(rgb: Tensor) -> Tensor:
    """RGB (N, 3, H, W) in [0, 1] -> I420 planes for video, BT.709 limited range; layout as `planes_420` says."""
    return planes_420(rgb, BT709_LIMITED)


def jpeg_planes(rgb: Tensor) -> Tensor:
    """RGB (N, 3, H, W) in [0, 1] -> I420 planes for JPEG, BT.601 full range; layout as `planes_420` says."""
    return planes_420(rgb, BT601_FULL)


def planes_420(rgb: Tensor, matrix: ColourMatrix) -> Tensor:
    """RGB -> planar YUV 4:2:0, 8 bits a sample, on the same device.

    rgb: (N, 3, H, W) float in [0, 1]; what lies outside is clamped, NaN becomes mid grey: never a wrong colour (the
    caller finds out by `count_nan`). Odd sizes are padded to even ones by their last row and column; the true size
    is the caller's `rgb.shape[-2:]`.
    Returns: (N, H*3//2, W) uint8, C order, H and W even now: H rows of Y, then U, then V at half size, without gaps:
    `av.VideoFrame.from_numpy_buffer(planes[i], "yuv420p")` wraps it.
    """
    _check(rgb)
    with few_threads(rgb.device, len(rgb) * rgb.shape[-2] * rgb.shape[-1]):
        rgb = pad_to_even(_clean(rgb))
        count, _, height, width = rgb.shape
        planes, luma, blue, red = _empty_planes(count, height, width, rgb.device)
        luma.copy_(_luma_codes(rgb, matrix))
        small = F.avg_pool2d(rgb, 2)  # the matrix is linear: means of RGB have the means of chroma
        for plane, values in zip((blue, red), _chroma_codes(small, matrix), strict=True):
            plane.copy_(values)
    return planes


def stretched_planes(cells: Tensor, factor: int) -> Tensor:
    """As `video_planes` of a picture whose every cell became factor x factor pixels, bilinearly, without that picture.

    For processors, where memory is most of the time: on a GPU its many small calls would be.
    The matrix is linear, and so is stretching: they may change places, and of the larger maps there are half as many
    values. A box of 2x2 pixels never lies on both sides of a cell's middle, so its mean is that of cells stretched by
    half the factor.
    cells: (N, 3, h, w) float in [0, 1]; what lies outside is clamped, NaN becomes mid grey, before they are stretched.
    factor: a multiple of 4. Raises: ValueError otherwise.
    """
    _check(cells)
    if factor < 4 or factor % 4:
        raise ValueError(f"factor: expected a multiple of 4, got {factor}")
    count, _, height, width = cells.shape
    height, width = height * factor, width * factor
    with few_threads(cells.device, count * height * width):
        cells = _clean(cells)
        planes, luma, blue, red = _empty_planes(count, height, width, cells.device)
        luma.copy_(_stretched(_luma_codes(cells, BT709_LIMITED), factor))
        for plane, values in zip((blue, red), _chroma_codes(cells, BT709_LIMITED), strict=True):
            plane.copy_(_stretched(values, factor // 2))
    return planes


def _check(rgb: Tensor) -> None:
    if rgb.ndim != 4 or rgb.shape[1] != 3:
        raise ValueError(f"rgb: expected (N, 3, H, W), got shape {tuple(rgb.shape)}")


def _clean(rgb: Tensor) -> Tensor:
    """Within [0, 1], in new memory."""
    return torch.nan_to_num(rgb.float(), nan=0.5, posinf=1.0, neginf=0.0).clamp_(0, 1)


def _empty_planes(count: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Planes to write to, and Y, (N, H, W), U and V, (N, H/2, W/2), within them."""
    planes = torch.empty(count, height * 3 // 2, width, dtype=torch.uint8, device=device)
    quarter, half = height * width // 4, (count, height // 2, width // 2)
    luma, blue, red = torch.split(planes.flatten(1), [4 * quarter, quarter, quarter], dim=1)
    return planes, luma.view(count, height, width), blue.view(half), red.view(half)


def _luma_codes(rgb: Tensor, matrix: ColourMatrix) -> Tensor:
    """(N, 3, H, W) -> codes of Y, (N, H, W), to be cut to integers; new memory.

    Few maps in between: on a processor their memory is most of the time.
    """
    return _grey(rgb, matrix).mul_(matrix.luma_span).add_(matrix.luma_base + _HALF)


def _chroma_codes(rgb: Tensor, matrix: ColourMatrix) -> Iterator[Tensor]:
    """(N, 3, H, W) -> codes of U, then of V, (N, H, W) each, to be cut to integers; new memory."""
    grey = _grey(rgb, matrix)
    for colour, weight in ((2, matrix.kb), (0, matrix.kr)):
        yield (rgb[:, colour] - grey).mul_(matrix.chroma_span / (2 * (1 - weight))).add_(128 + _HALF)


def _grey(rgb: Tensor, matrix: ColourMatrix) -> Tensor:
    red, green, blue = rgb.unbind(1)
    return (matrix.kr * red).add_(green, alpha=1 - matrix.kr - matrix.kb).add_(blue, alpha=matrix.kb)


def _stretched(values: Tensor, factor: int) -> Tensor:
    """(N, h, w) -> (N, h*factor, w*factor) bilinearly, as F.interpolate does, in a fifth of its time on a processor.

    factor: even.
    """
    count, height, width = values.shape
    wide = _stretched_rows(values.reshape(count * height, width, 1), factor)
    return _stretched_rows(wide.reshape(count, height, width * factor), factor)


def _stretched_rows(rows: Tensor, factor: int) -> Tensor:
    """(N, n, m) -> (N, n*factor, m): from the middle of one row to that of the next; first and last are repeated."""
    ends = torch.cat([rows[:, :1], rows, rows[:, -1:]], dim=1)
    part = (torch.arange(factor, dtype=rows.dtype, device=rows.device) + 0.5) / factor
    gaps = torch.lerp(ends[:, :-1, None], ends[:, 1:, None], part[:, None])
    return gaps.flatten(1, 2)[:, factor // 2 : -(factor // 2)]


def count_nan(rgb: Tensor) -> int:
    """How many values are NaN, which `planes_420` shows as mid grey."""
    return int(torch.isnan(rgb).sum())


def pad_to_even(rgb: Tensor) -> Tensor:
    """(N, C, H, W) -> both sizes even, by repeating the last row and column; as it is if they are."""
    height, width = rgb.shape[-2:]
    if height % 2 == 0 and width % 2 == 0:
        return rgb
    return F.pad(rgb, (0, width % 2, 0, height % 2), mode="replicate")


def fit_within(rgb: Tensor, long_side_px: int) -> Tensor:
    """Shrink (N, 3, H, W) by means over areas so that no side is longer than `long_side_px`; never grows.

    A shrunk picture has even sides, at least 2 (the ratio moves by less than a pixel); one that fits comes back as
    it is. Raises: ValueError if `long_side_px` is under 2.
    """
    if long_side_px < 2:
        raise ValueError(f"long_side_px: expected at least 2, got {long_side_px}")
    height, width = rgb.shape[-2:]
    longest = max(height, width)
    if longest <= long_side_px:
        return rgb
    limit = long_side_px - long_side_px % 2
    size = [min(limit, max(2, round(side * long_side_px / longest / 2) * 2)) for side in (height, width)]
    with few_threads(rgb.device, len(rgb) * height * width):
        return F.interpolate(rgb, size=size, mode="area")
