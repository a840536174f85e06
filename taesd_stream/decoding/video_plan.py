"""One latent of many video streams -> their next frames and memories, by fused calls and our own kernels.

What the plain network does otherwise: frames of one moment are a batch, and moments a list, so `[x, x before]` is never
put side by side: the two halves of that convolution's weights have a call each, the second adds to what the first gave.
Growth in time, upsampling and the convolution behind them have no ReLU between them: they are one transposed
convolution for each new frame.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.decoder_plan import UnsupportedNetworkError
from taesd_stream.decoding.folding import folded_weight
from taesd_stream.decoding.kernels.launching import Kernels
from taesd_stream.decoding.kernels.packing import CHANNELS, pack_conv, pack_conv_last, pack_up
from taesd_stream.models.tiny_video import VideoDecoder
from taesd_stream.models.video_blocks import MemoryBlock, TimeGrow

_KEEPS_SIZE: Final = ((1, 1), (1, 1), (1, 1), 1)  # stride, padding, dilation, groups

_Map: TypeAlias = Callable[[Tensor], Tensor]
_Block: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (x, x before) -> the next x


class VideoPlan:
    """The steps of a decoder of TAEHV's layout; its weights are copied where they are folded or packed, else shared.

    On a CPU the same steps run as separate operations: there to be checked, not to be fast.
    """

    def __init__(self, network: VideoDecoder, kernels: Kernels | None = None) -> None:
        """kernels: for layers of 64 channels. Raises: UnsupportedNetworkError if the layout is another."""
        layers = list(network.decoder)
        if network.family.blocks != "memory":
            raise UnsupportedNetworkError(f"{network.family.name} is not laid out as TAEHV")
        self.frames_per_latent = network.frames_per_latent
        self._limit, first, _, *stages = layers
        self._first = _conv_relu(first, None)
        self._stages = [_stage(stages[start : start + 6], kernels) for start in (0, 6, 12)]
        self._last, self._last_planes = _last(stages[-1], network.family.patch_size, kernels)

    def rgb(self, latents: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """latents: (N, C, h, w); memory: of each block (N, C', h', w'), what it was given last; all channels_last.

        Returns: (N, frames, 3, H, W) in [0, 1] and the next memory.
        """
        frames, after = self._maps(latents, memory)
        return torch.stack([self._last(frame) for frame in frames], dim=1), after

    def planes(self, latents: Tensor, memory: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same as I420 planes for video, (N, frames, H*3//2, W) uint8 as `colour.video_planes`."""
        frames, after = self._maps(latents, memory)
        return torch.stack([self._last_planes(frame) for frame in frames], dim=1), after

    def _maps(self, latents: Tensor, memory: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What the last convolution takes, but for its ReLU, of each frame."""
        frames = [self._first(self._limit(latents))]
        befores, after = iter(memory), []
        for blocks, grow in self._stages:
            for block in blocks:
                given = frames
                frames = [block(x, before) for x, before in zip(given, [next(befores), *given], strict=False)]
                after.append(given[-1])
            frames = [one(x) for x in frames for one in grow]
        return frames, after


def _stage(layers: Sequence[nn.Module], kernels: Kernels | None) -> tuple[list[_Block], list[_Map]]:
    """Three blocks, and for each frame that one becomes: growth, upsampling and convolution in one."""
    *blocks, upsample, grow, convolution = layers
    if not all(isinstance(block, MemoryBlock) for block in blocks):
        raise UnsupportedNetworkError(f"expected three memory blocks, got {[type(block).__name__ for block in blocks]}")
    if not isinstance(upsample, nn.Upsample) or upsample.scale_factor not in (2, 2.0):
        raise UnsupportedNetworkError("a stage does not double the picture's sides")
    assert isinstance(grow, TimeGrow)
    assert isinstance(convolution, nn.Conv2d)
    return [_block(block, kernels) for block in blocks], [
        _up(weight, kernels) for weight in grown_weights(convolution.weight, grow.conv.weight, grow.factor)
    ]


def grown_weights(weight: Tensor, growth: Tensor, factor: int) -> list[Tensor]:
    """Weights of the transposed convolutions, (in, out, 4, 4), that make the `factor` frames of one.

    weight: (out, in, 3, 3) of the convolution behind; growth: (factor * in, in, 1, 1). Multiplied in float64, rounded
    once.
    """
    parts = growth.detach().double()[:, :, 0, 0].chunk(factor)
    whole = weight.detach().double()
    return [folded_weight(torch.einsum("omyx,mi->oiyx", whole, part)).to(weight.dtype) for part in parts]


def _block(block: nn.Module, kernels: Kernels | None) -> _Block:
    assert isinstance(block, MemoryBlock)
    first, second, third = (layer for layer in block.conv if isinstance(layer, nn.Conv2d))
    of_x, of_before = first.weight.detach().chunk(2, dim=1)
    before = of_before.contiguous(memory_format=torch.channels_last)
    adds = _conv_add_relu(of_x, first.bias, kernels)
    middle, last = _conv_relu(second, kernels), _conv_add_relu(third.weight, third.bias, kernels)

    def run(x: Tensor, x_before: Tensor) -> Tensor:
        return last(middle(adds(x, F.conv2d(x_before, before, padding=1))), x)

    return run


def _conv_relu(convolution: nn.Module, kernels: Kernels | None) -> _Map:
    assert isinstance(convolution, nn.Conv2d)
    weight, bias = _weights_of(convolution.weight, convolution.bias)
    if kernels is not None and _is_ours(weight):
        return partial(kernels.conv, weights=pack_conv(weight), bias=bias.float())

    def run(x: Tensor) -> Tensor:
        if x.is_cuda:
            return torch.cudnn_convolution_relu(x, weight, bias, *_KEEPS_SIZE)
        return F.conv2d(x, weight, bias, padding=1).relu_()

    return run


def _conv_add_relu(weight: Tensor, bias: Tensor | None, kernels: Kernels | None) -> Callable[[Tensor, Tensor], Tensor]:
    """ReLU(convolution of the first + the second)."""
    weight, bias = _weights_of(weight, bias)
    if kernels is not None and _is_ours(weight):
        packed, exact = pack_conv(weight), bias.float()
        return lambda x, added: kernels.conv(x, packed, exact, residual=added)

    def run(x: Tensor, added: Tensor) -> Tensor:
        if x.is_cuda:
            return torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *_KEEPS_SIZE)
        return F.conv2d(x, weight, bias, padding=1).add_(added).relu_()

    return run


def _up(weight: Tensor, kernels: Kernels | None) -> _Map:
    if kernels is not None and tuple(weight.shape[:2]) == (CHANNELS, CHANNELS):
        return partial(kernels.up, weights=pack_up(weight))
    ready = weight.contiguous(memory_format=torch.channels_last)
    return lambda x: F.conv_transpose2d(x, ready, stride=2, padding=1)


def _last(convolution: nn.Module, patch_size: int, kernels: Kernels | None) -> tuple[_Map, _Map]:
    """ReLU, the last convolution, clamp: to RGB, and to planes."""
    assert isinstance(convolution, nn.Conv2d)
    if kernels is not None and tuple(convolution.weight.shape[:2]) == (3, CHANNELS):
        return _by_last_kernel(kernels.rgb, convolution), _by_last_kernel(kernels.planes, convolution)
    weight, bias = _weights_of(convolution.weight, convolution.bias)

    def rgb(x: Tensor) -> Tensor:
        return F.pixel_shuffle(F.conv2d(x.relu(), weight, bias, padding=1), patch_size).clamp_(0, 1)

    return rgb, lambda x: video_planes(rgb(x))


def _by_last_kernel(kernel: Callable[..., Tensor], convolution: nn.Conv2d) -> _Map:
    """The kernel adds a convolution to a residual before ReLU and the last convolution: here the one of nothing."""
    nothing = convolution.weight.new_zeros(CHANNELS, CHANNELS, 3, 3)
    weights = pack_conv_last(nothing, convolution.weight.detach())
    no_bias = torch.zeros(CHANNELS, dtype=torch.float32, device=nothing.device)
    assert convolution.bias is not None
    bias = convolution.bias.detach().float()
    return lambda x: kernel(x, weights, no_bias, x, bias)


def _weights_of(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    ready = weight.detach().contiguous(memory_format=torch.channels_last)
    return ready, ready.new_zeros(len(ready)) if bias is None else bias.detach()


def _is_ours(weight: Tensor) -> bool:
    return tuple(weight.shape) == (CHANNELS, CHANNELS, 3, 3)
