"""A tiny decoder by our own kernels where they fit, 64 channels to 64, and by cuDNN's fused calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from taesd_stream.decoding.decoder_plan import Block, Conv, Step, Up, decoder_plan
from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError
from taesd_stream.decoding.kernels.launching import Kernels
from taesd_stream.decoding.kernels.packing import CHANNELS, pack_conv, pack_conv_last, pack_up
from taesd_stream.decoding.stock_decoder import block_entry, stock_step


class HopperDecoder:
    """The same interface and results as StockDecoder's, but for rounding."""

    def __init__(self, network: nn.Module, kernels: Kernels) -> None:
        """network: float16, on the kernels' device. Raises: UnsupportedNetworkError, KernelsUnavailableError."""
        *steps, block, last = decoder_plan(network)
        if not isinstance(block, Block) or not isinstance(last, Conv):
            raise KernelsUnavailableError("the decoder does not end in a block and a convolution")
        shapes = [tuple(conv.weight.shape[:2]) for conv in (*block.convs, last)]
        if shapes != [(CHANNELS, CHANNELS)] * 3 + [(3, CHANNELS)] or block.detour is not None:
            raise KernelsUnavailableError(f"the last layers' channels are {shapes}, not 64 and then RGB")
        self._kernels = kernels
        self._steps = [_step(step, kernels) for step in steps]
        *self._pair, third = [(pack_conv(conv.weight), conv.bias.float()) for conv in block.convs]
        self._third = pack_conv_last(block.convs[2].weight, last.weight), third[1]
        self._last_bias = last.bias.float()

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
        return x, self._kernels.conv(self._kernels.conv(x, *first), *second)


def _step(step: Step, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    match step:
        case Up(weight) if tuple(weight.shape[:2]) == (CHANNELS, CHANNELS):
            return partial(_up, kernels, pack_up(weight))
        case Block(convs, detour) if tuple(convs[0].weight.shape[:2]) == (CHANNELS, CHANNELS):
            packed = [(pack_conv(conv.weight), conv.bias.float()) for conv in convs]
            return partial(_block, kernels, packed, block_entry(detour))
        case _:
            return stock_step(step)


def _up(kernels: Kernels, weights: Tensor, x: Tensor) -> Tensor:
    return kernels.up(x.contiguous(memory_format=torch.channels_last), weights)


def _block(
    kernels: Kernels, convs: list[tuple[Tensor, Tensor]], entry: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    x = entry(x)
    first, second, third = convs
    y = kernels.conv(kernels.conv(x, *first), *second)
    return kernels.conv(y, *third, residual=x)
