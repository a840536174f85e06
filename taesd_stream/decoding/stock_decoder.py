"""A tiny decoder by cuDNN's fused calls: for every NVIDIA card, and what our own kernels are checked against."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.decoder_plan import Apply, Block, Conv, Step, Up, decoder_plan
from taesd_stream.decoding.pooled_detour import pooled_detour

_KEEPS_SIZE = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups


class StockDecoder:
    """The decoder, step by step, in channels_last: bias, ReLU and residual cost no pass over memory of their own.

    On a CPU the same steps run as separate operations, in the weights' dtype: there to be checked, not to be fast.
    """

    def __init__(self, network: nn.Module) -> None:
        """Raises: UnsupportedNetworkError if the network is not of the family."""
        *steps, last = decoder_plan(network)
        assert isinstance(last, Conv)
        self.spatial_factor: int = 2 ** sum(isinstance(step, Up) for step in steps)
        self._steps = [stock_step(step) for step in steps]
        self._last = stock_step(last)

    def rgb(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) in channels_last, the weights' dtype -> (N, 3, H, W) in [0, 1], clamped."""
        return self._picture(latents).clamp_(0, 1)

    def planes(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) in channels_last -> I420 planes for video, (N, H*3//2, W) uint8, as `colour.video_planes`."""
        return video_planes(self._picture(latents))

    def _picture(self, x: Tensor) -> Tensor:
        for step in self._steps:
            x = step(x)
        return self._last(x)


def stock_step(step: Step) -> Callable[[Tensor], Tensor]:
    """What runs one step; weights in channels_last."""
    match step:
        case Apply(layer):
            return layer
        case Conv():
            return partial(_conv, _weights_last(step))
        case Up(weight):
            return partial(_up, weight.to(memory_format=torch.channels_last))
        case Block(convs, detour):
            first, second, third = map(_weights_last, convs)
            return partial(_block, (first, second, third), block_entry(detour))


def _weights_last(conv: Conv) -> Conv:
    return Conv(conv.weight.to(memory_format=torch.channels_last), conv.bias, conv.relu)


def _conv(conv: Conv, x: Tensor) -> Tensor:
    if conv.relu and x.is_cuda:
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, *_KEEPS_SIZE)
    plain = F.conv2d(x, conv.weight, conv.bias, padding=1)
    return plain.relu_() if conv.relu else plain


def _up(weight: Tensor, x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, weight, stride=2, padding=1)


def _block(convs: tuple[Conv, Conv, Conv], entry: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = entry(x)
    first, second, third = convs
    y = _conv(second, _conv(first, x))
    if x.is_cuda:
        return torch.cudnn_convolution_add_relu(y, third.weight, x, 1.0, third.bias, *_KEEPS_SIZE)
    return F.conv2d(y, third.weight, third.bias, padding=1).add_(x).relu_()


def block_entry(detour: nn.Module | None) -> Callable[[Tensor], Tensor]:
    """What a block does before its convolutions: nothing, or adding its detour. Gives and takes channels_last."""
    if detour is None:
        return partial(torch.Tensor.contiguous, memory_format=torch.channels_last)
    return pooled_detour(detour) or partial(_with_detour, detour)


def _with_detour(detour: nn.Module, x: Tensor) -> Tensor:
    added: Tensor = x + detour(x)
    return added.contiguous(memory_format=torch.channels_last)
