"""Blocks whose two inner maps are float8: half the memory traffic there, and products at twice the rate.

A block's input, output and residual stay float16, so errors do not add up along the network. Scales are fixed, from the
largest values seen on random latents; float8 has an exponent, so a scale that is off by some factor costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from taesd_stream.decoding.decoder_plan import Block, Conv, Step, Up
from taesd_stream.decoding.kernels.packing import (
    CHANNELS,
    LARGEST_8,
    pack_conv,
    pack_conv8,
    pack_last,
    paired,
    quantise,
)
from taesd_stream.decoding.stock_decoder import stock_step

_ROOM: Final = 4.0  # times the largest value seen still fits
STAGES: Final = 2  # the largest ones, where nearly all of the time is


@dataclass(frozen=True, slots=True)
class Block8:
    """Packed weights and (128,) biases and scales of a block's three convolutions."""

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    third: tuple[Tensor, Tensor]


def blocks_in_float8(steps: list[Step], latents: Tensor) -> dict[int, Block8]:
    """The blocks of the last stages that have no detour, packed, by their number in `steps`.

    steps: without the last convolution. latents: what to measure scales with, float16 in channels_last.
    """
    packed: dict[int, Block8] = {}
    ups = sum(isinstance(step, Up) for step in steps)
    seen = 0
    for number, (step, x) in enumerate(_inputs(steps, latents)):
        seen += isinstance(step, Up)
        if seen > ups - STAGES and isinstance(step, Block) and _is_known(step):
            packed[number] = _packed(step, x)
    return packed


def _is_known(block: Block) -> bool:
    shape = (CHANNELS, CHANNELS, 3, 3)
    return block.detour is None and all(tuple(conv.weight.shape) == shape for conv in block.convs)


def _inputs(steps: list[Step], x: Tensor) -> Iterator[tuple[Step, Tensor]]:
    for step in steps:
        yield step, x
        x = stock_step(step)(x)


def _packed(block: Block, x: Tensor) -> Block8:
    first, second, third = block.convs
    y = _run(first)(x)
    scale_1 = _scale(y)
    scale_2 = _scale(_run(second)(y))
    weight_2, scales_2 = quantise(second.weight)
    weight_3, scales_3 = quantise(third.weight)
    ones = torch.ones_like(first.bias, dtype=torch.float32)
    return Block8(
        first=(pack_conv(paired(first.weight)), _affine(paired(first.bias.float() / scale_1), ones / scale_1)),
        second=(
            pack_conv8(paired(weight_2.view(torch.uint8)).view(torch.float8_e4m3fn)),
            _affine(paired(second.bias.float() / scale_2), paired(scales_2 * scale_1 / scale_2)),
        ),
        third=(pack_conv8(weight_3), _affine(third.bias.float(), scales_3 * scale_2)),
    )


def _run(conv: Conv) -> Callable[[Tensor], Tensor]:
    return stock_step(conv)


def _scale(values: Tensor) -> float:
    """What one step of float8's numbers is worth, so that `values` fit with room to spare."""
    return max(float(values.max()), 1e-6) * _ROOM / LARGEST_8


def _affine(bias: Tensor, scale: Tensor) -> Tensor:
    return torch.cat((bias, scale))


def with_last(third: tuple[Tensor, Tensor], last: Conv) -> tuple[Tensor, Tensor]:
    """The last block's third convolution with the last one as its tenth tap, which is float16."""
    tenth = pack_last(last.weight).view(torch.uint8)
    return torch.cat((third[0].flatten(), tenth.flatten())), third[1]
