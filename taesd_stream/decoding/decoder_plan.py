"""A tiny decoder as a list of steps that fused GPU calls can run: read from the network's structure, not its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from taesd_stream.decoding.folding import fold_upsampling


class UnsupportedNetworkError(Exception):
    """This network has a layer that the fused calls do not know; the message names it."""


@dataclass(frozen=True, slots=True)
class Apply:
    """A layer that is run as it is: the soft limit of latents."""

    layer: nn.Module


@dataclass(frozen=True, slots=True)
class Conv:
    """A 3x3 convolution that keeps the size, with bias, and a ReLU if `relu`. weight: (out, in, 3, 3)."""

    weight: Tensor
    bias: Tensor
    relu: bool


@dataclass(frozen=True, slots=True)
class Block:
    """ReLU(x + three convolutions of x), the last without a ReLU; x + detour(x) comes before, where there is one."""

    convs: tuple[Conv, Conv, Conv]
    detour: nn.Module | None


@dataclass(frozen=True, slots=True)
class Up:
    """Nearest upsampling by 2 and a 3x3 convolution, folded to a transposed convolution. weight: (in, out, 4, 4)."""

    weight: Tensor


Step: TypeAlias = Apply | Conv | Block | Up


def decoder_plan(network: nn.Module) -> list[Step]:
    """The steps of a decoder of the TAESD family; its weights are shared, but for those that are folded.

    Raises: UnsupportedNetworkError for any layer that is not of that family.
    """
    if not isinstance(network, nn.Sequential):
        raise UnsupportedNetworkError(f"the network is a {type(network).__name__}, not a sequence of layers")
    layers = list(fold_upsampling(network))
    steps: list[Step] = []
    for index, layer in enumerate(layers):
        before = layers[index - 1] if index else None
        if type(layer) is nn.ReLU and type(before) is nn.Conv2d:
            continue  # part of the convolution before it
        has_relu = index + 1 < len(layers) and type(layers[index + 1]) is nn.ReLU
        steps.append(_step(index, layer, has_relu=has_relu))
    if not steps or not isinstance(steps[-1], Conv) or steps[-1].relu:
        raise UnsupportedNetworkError("the last layer is no 3x3 convolution")
    return steps


def _step(index: int, layer: nn.Module, *, has_relu: bool) -> Step:
    if isinstance(layer, nn.Conv2d) and _keeps_size(layer):
        return _conv(layer, relu=has_relu)
    if isinstance(layer, nn.ConvTranspose2d) and layer.bias is None:
        return Up(layer.weight)
    if hasattr(layer, "conv"):
        block = _block(layer)
        if block is not None:
            return block
    if index == 0 and not list(layer.parameters()):
        return Apply(layer)
    raise UnsupportedNetworkError(f"layer {index} is a {type(layer).__name__} that has no fused call")


def _block(layer: nn.Module) -> Block | None:
    convs = layer.conv
    kinds = [type(part) for part in convs] if isinstance(convs, nn.Sequential) else []
    if (
        kinds != [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Conv2d]
        or type(getattr(layer, "fuse", None)) is not nn.ReLU
    ):
        return None
    assert isinstance(convs, nn.Sequential)
    parts = [part for part in convs if isinstance(part, nn.Conv2d)]
    if not all(map(_keeps_size, parts)) or parts[-1].out_channels != parts[0].in_channels:
        return None
    first, second, third = parts
    detour = getattr(layer, "pool", None)
    return Block((_conv(first, relu=True), _conv(second, relu=True), _conv(third, relu=False)), detour)


def _keeps_size(conv: nn.Conv2d) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"


def _conv(conv: nn.Conv2d, *, relu: bool) -> Conv:
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    return Conv(conv.weight.detach(), bias, relu)
