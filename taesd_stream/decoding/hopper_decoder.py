"""A tiny decoder by our own kernels where they fit, 64 channels to 64, and by cuDNN's fused calls elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from taesd_stream.decoding.decoder_plan import Block, Conv, Step, Up, decoder_plan
from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError
from taesd_stream.decoding.kernels.launching import Kernels
from taesd_stream.decoding.kernels.packing import CHANNELS, pack_conv, pack_last, pack_up
from taesd_stream.decoding.stock_decoder import stock_step, with_detour


class HopperDecoder:
    """The same interface and results as StockDecoder's, but for rounding."""

    def __init__(self, network: nn.Module, kernels: Kernels) -> None:
        """network: float16, on the kernels' device. Raises: UnsupportedNetworkError, KernelsUnavailableError."""
        *steps, last = decoder_plan(network)
        assert isinstance(last, Conv)
        if tuple(last.weight.shape[:2]) != (3, CHANNELS):
            raise KernelsUnavailableError(f"the last layer's weights are {tuple(last.weight.shape)}, not 64 to RGB")
        self._kernels = kernels
        self._steps = [_step(step, kernels) for step in steps]
        self._last = pack_last(last.weight), last.bias.float()

    def rgb(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) float16 in channels_last -> (N, 3, H, W) float16, NCHW, in [0, 1]."""
        return self._kernels.rgb(self._features(latents), *self._last)

    def planes(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) float16 in channels_last -> I420 planes for video, (N, H*3//2, W) uint8."""
        return self._kernels.planes(self._features(latents), *self._last)

    def _features(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return x.contiguous(memory_format=torch.channels_last)


def _step(step: Step, kernels: Kernels) -> Callable[[Tensor], Tensor]:
    match step:
        case Up(weight) if tuple(weight.shape[:2]) == (CHANNELS, CHANNELS):
            return partial(_up, kernels, pack_up(weight))
        case Block(convs, detour) if tuple(convs[0].weight.shape[:2]) == (CHANNELS, CHANNELS):
            packed = [(pack_conv(conv.weight), conv.bias.float()) for conv in convs]
            return partial(_block, kernels, packed, detour)
        case _:
            return stock_step(step)


def _up(kernels: Kernels, weights: Tensor, x: Tensor) -> Tensor:
    return kernels.up(x.contiguous(memory_format=torch.channels_last), weights)


def _block(kernels: Kernels, convs: list[tuple[Tensor, Tensor]], detour: nn.Module | None, x: Tensor) -> Tensor:
    x = with_detour(detour, x).contiguous(memory_format=torch.channels_last)
    first, second, third = convs
    y = kernels.conv(kernels.conv(x, *first), *second)
    return kernels.conv(y, *third, residual=x)
