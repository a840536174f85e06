"""Convolutions that clamp and add before their values reach memory: on a CPU, half of what a block writes is spared.

oneDNN does both inside a convolution; torch reaches it through operators of its compiler only, which are private. So
they are asked for where they are known to be right, and anywhere else the layers run one after the other.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def residual_relu(row: nn.Sequential, given: Tensor, beside: Tensor) -> Tensor:
    """relu(row(given) + beside), the same value fused or not.

    row: convolutions with ReLUs between them; any other layers run unfused. given, beside: (N, C, h, w), alike but in
    their channels. Fused: without gradients, float32 or bfloat16 in channels_last, on an x86 processor.
    """
    if not (_is_fusible_batch(given) and _is_fusible_batch(beside) and _is_fusible_row(row, given.dtype)):
        return F.relu_(row(given) + beside)
    *inner, last = (layer for layer in row if isinstance(layer, nn.Conv2d))
    for convolution in inner:
        given = _pointwise()(given, *_arguments(convolution), "relu", [], "")
    result: Tensor = _pointwise().binary(given, beside, *_arguments(last), "add", 1.0, "relu", [], "")
    return result


def _is_fusible_batch(x: Tensor) -> bool:
    if torch.is_grad_enabled() or x.device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False  # the one changes dtypes, the other fuses itself
    # One pixel or one channel is in both formats: then the operator takes another way, which knows no bfloat16.
    is_channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return is_channels_last and x.dtype in _fusible_dtypes()


def _is_fusible_row(row: nn.Sequential, dtype: torch.dtype) -> bool:
    layers = list(row)
    convolutions, between = layers[::2], layers[1::2]
    are_known = all(type(layer) is nn.Conv2d for layer in convolutions) and all(type(x) is nn.ReLU for x in between)
    if not are_known or len(convolutions) != len(between) + 1:
        return False
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in (row, *layers)):
        return False  # somebody watches the layers run
    return all(_is_plain(layer, dtype) for layer in convolutions)


def _is_plain(convolution: nn.Module, dtype: torch.dtype) -> bool:
    assert isinstance(convolution, nn.Conv2d)
    return (
        convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and convolution.weight.dtype == dtype
    )


def _arguments(convolution: nn.Conv2d) -> Iterator[Any]:
    """Weights and geometry, in the operators' order."""
    yield from (convolution.weight, convolution.bias, convolution.padding, convolution.stride)
    yield from (convolution.dilation, convolution.groups)


def _pointwise() -> Any:
    return torch.ops.mkldnn._convolution_pointwise


@functools.cache
def _fusible_dtypes() -> frozenset[torch.dtype]:
    """Dtypes for which the operators are here and give what the plain layers give; tried once."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return frozenset()
    return frozenset(dtype for dtype in (torch.float32, torch.bfloat16) if _is_right(dtype))


def _is_right(dtype: torch.dtype) -> bool:
    """Whether the operators take `dtype` and agree with the plain layers on a small example."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(1, 8, 3, 3, generator=generator), torch.randn(8, 8, 3, 3, generator=generator) / 8)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    weight = weight.to(dtype)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    try:
        alone = _pointwise()(x, weight, None, *geometry, "relu", [], "")
        added = _pointwise().binary(x, x, weight, None, *geometry, "add", 1.0, "relu", [], "")
    except (AttributeError, RuntimeError):  # another version's operators, or a processor without bfloat16
        return False
    plain = F.conv2d(x.float(), weight.float(), padding=1)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    pairs: list[tuple[Tensor, Tensor]] = [(alone, F.relu(plain)), (added, F.relu(plain + x.float()))]
    return all(bool(torch.allclose(given.float(), right, atol=tolerance, rtol=tolerance)) for given, right in pairs)
