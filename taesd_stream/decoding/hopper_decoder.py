"""A tiny decoder by our own kernels where they fit, 64 channels to 64, and by cuDNN's fused calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from taesd_stream.decoding.decoder_plan import Block, Conv, Step, Up, decoder_plan
from taesd_stream.decoding.float8 import Block8, blocks_in_float8, with_last
from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError
from taesd_stream.decoding.kernels.launching import Kernels
from taesd_stream.decoding.kernels.packing import CHANNELS, pack_conv, pack_conv_last, pack_up
from taesd_stream.decoding.stock_decoder import block_entry, stock_step


class HopperDecoder:
    """The same interface and results as StockDecoder's, but for rounding."""

    def __init__(self, network: nn.Module, kernels: Kernels, *, is_float8: bool = False) -> None:
        """network: float16, on the kernels' device. is_float8: the largest blocks in float8: faster, less exact.

        Raises: UnsupportedNetworkError, KernelsUnavailableError.
        """
        *steps, block, last = decoder_plan(network)
        if not isinstance(block, Block) or not isinstance(last, Conv):
            raise KernelsUnavailableError("the decoder does not end in a block and a convolution")
        shapes = [tuple(conv.weight.shape[:2]) for conv in (*block.convs, last)]
        if shapes != [(CHANNELS, CHANNELS)] * 3 + [(3, CHANNELS)] or block.detour is not None:
            raise KernelsUnavailableError(f"the last layers' channels are {shapes}, not 64 and then RGB")
        self._kernels = kernels
        self._last_bias = last.bias.float()
        packed = blocks_in_float8([*steps, block], _noise(network)) if is_float8 else {}
        self._steps = [_step(step, kernels, packed.get(number)) for number, step in enumerate(steps)]
        if is_float8:
            last_block = packed[len(steps)]
            self._pair, self._third = (last_block.first, last_block.second), with_last(last_block.third, last)
            self._conv = kernels.conv8
        else:
            first, second, third = [(pack_conv(conv.weight), conv.bias.float()) for conv in block.convs]
            self._pair, self._third = (first, second), (pack_conv_last(block.convs[2].weight, last.weight), third[1])
            self._conv = kernels.conv

    def rgb(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) float16 in channels_last -> (N, 3, H, W) float16, NCHW, in [0, 1]."""
        x, y = self._features(latents)
        return self._kernels.rgb(y, *self._third, x, self._last_bias)

    def planes(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) float16 in channels_last -> I420 planes for video, (N, H*3//2, W) uint8."""
        x, y = self._features(latents)
        return self._kernels.planes(y, *self._third, x, self._last_bias)

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The last block's input, and what its third convolution takes."""
        for step in self._steps:
            x = step(x)
        first, second = self._pair
        x = x.contiguous(memory_format=torch.channels_last)
        return x, self._conv(self._conv(x, *first), *second)


def _noise(network: nn.Module) -> Tensor:
    """Two latents of the size of what samplers make, to measure with."""
    convolution = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    noise = torch.randn((2, convolution.in_channels, 24, 24), generator=torch.Generator().manual_seed(0))
    return noise.to(convolution.weight).contiguous(memory_format=torch.channels_last)


def _step(step: Step, kernels: Kernels, float8: Block8 | None) -> Callable[[Tensor], Tensor]:
    if float8 is not None:
        return partial(_block, kernels.conv8, [float8.first, float8.second, float8.third], block_entry(None))
    match step:
        case Up(weight) if tuple(weight.shape[:2]) == (CHANNELS, CHANNELS):
            return partial(_up, kernels, pack_up(weight))
        case Block(convs, detour) if tuple(convs[0].weight.shape[:2]) == (CHANNELS, CHANNELS):
            packed = [(pack_conv(conv.weight), conv.bias.float()) for conv in convs]
            return partial(_block, kernels.conv, packed, block_entry(detour))
        case _:
            return stock_step(step)


def _up(kernels: Kernels, weights: Tensor, x: Tensor) -> Tensor:
    return kernels.up(x.contiguous(memory_format=torch.channels_last), weights)


def _block(
    conv: Callable[..., Tensor], convs: list[tuple[Tensor, Tensor]], entry: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    x = entry(x)
    first, second, third = convs
    return conv(conv(conv(x, *first), *second), *third, residual=x)
