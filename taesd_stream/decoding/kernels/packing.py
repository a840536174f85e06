"""Weights as the kernels' shared memory holds them: byte images that are copied as they are.

An image is one tap after the other; a tap is rows of 64 input channels, 128 bytes, one row an output channel. In row r
the 16-byte chunk c lies at place c ^ (r % 8): the 128-byte swizzle that the tensor cores read.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

CHANNELS: Final = 64
_CHUNK: Final = 8  # halves of 16 bytes


def pack_conv(weight: Tensor) -> Tensor:
    """(64, 64, 3, 3) -> nine taps of 64 rows, the top left tap first."""
    return _swizzled(weight.permute(2, 3, 0, 1).reshape(9, CHANNELS, CHANNELS))


def pack_up(weight: Tensor) -> Tensor:
    """(in 64, out 64, 4, 4) of a transposed convolution with stride 2 -> sixteen taps: [row phase][column phase][2][2].

    Output row 2y + a sees input rows y - 1 + a and y + a, through rows 3 - a and 1 - a of the kernel; columns alike.
    """
    taps = [
        weight[:, :, 3 - a - 2 * i, 3 - b - 2 * j].T
        for a in range(2)
        for b in range(2)
        for i in range(2)
        for j in range(2)
    ]
    return _swizzled(torch.stack(taps))


def pack_conv_last(weight: Tensor, last: Tensor) -> Tensor:
    """A block's third convolution (64, 64, 3, 3), and the last (3, 64, 3, 3) as a tenth tap.

    Its product 3 (3 dy + colour) + dx is of that colour's weights of row dy and column dx. A warp gets sixteen rows
    of a tap, so seven of the 27 products lie at the start of each sixteen: all four warps have as much to write.
    """
    return torch.cat((pack_conv(weight), pack_last(last)))


def pack_last(last: Tensor) -> Tensor:
    """The tenth tap alone: (3, 64, 3, 3) -> (1, 64, 64)."""
    products = F.pad(last.permute(2, 0, 3, 1).reshape(27, CHANNELS), (0, 0, 0, 1))
    return _swizzled(F.pad(products.reshape(4, 7, CHANNELS), (0, 0, 0, 9)).reshape(1, CHANNELS, CHANNELS))


LARGEST_8: Final = 448.0  # of float8 e4m3


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(64, 64, 3, 3) -> the same in float8, and the (64,) scales that its output channels are to be multiplied with."""
    scales = weight.float().abs().amax(dim=(1, 2, 3)).clamp_min(1e-12) / LARGEST_8
    return (weight.float() / scales[:, None, None, None]).to(torch.float8_e4m3fn), scales


def paired(channels: Tensor) -> Tensor:
    """Output channels, along the first axis, in the order in which a float8 output wants them in a product's rows.

    A thread holds rows r and r + 8 of a warp's sixteen: they become channels 2r and 2r + 1, which lie side by side.
    """
    return channels.reshape(4, 8, 2, *channels.shape[1:]).transpose(1, 2).reshape(channels.shape)


def pack_conv8(weight: Tensor) -> Tensor:
    """(64, 64, 3, 3) in float8 -> nine taps of 64 rows, bytes; in row r the 16-byte chunk c is at c ^ (r // 2 % 4)."""
    rows = weight.view(torch.uint8).permute(2, 3, 0, 1).reshape(9, CHANNELS, 4, 16)
    row, place = torch.arange(CHANNELS, device=rows.device)[:, None], torch.arange(4, device=rows.device)[None, :]
    return rows[:, row, place ^ (row // 2 % 4)].reshape(9, CHANNELS, CHANNELS).contiguous()


def _swizzled(taps: Tensor) -> Tensor:
    """(taps, rows, 64) -> the same shape, float16, contiguous."""
    rows = taps.shape[1]
    chunks = taps.half().reshape(-1, rows, CHANNELS // _CHUNK, _CHUNK)
    row, place = torch.arange(rows, device=taps.device)[:, None], torch.arange(8, device=taps.device)[None, :]
    return chunks[:, row, place ^ (row % 8)].reshape(-1, rows, CHANNELS).contiguous()
