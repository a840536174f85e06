"""Fused blocks: the same values as layer by layer, and only where nobody could tell the difference otherwise."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taesd_stream.models.fused import residual_relu
from taesd_stream.models.networks import Block, conv3x3
from tests.operators import Operators


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A random batch as a CPU engine holds it."""
    return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)


def row(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The convolutions of a block that changes the number of channels, as video blocks do."""
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(conv3x3(16, 8), relu, conv3x3(8, 8), relu, conv3x3(8, 8)).to(dtype).requires_grad_(False)


def plain(layers: nn.Sequential, given: Tensor, beside: Tensor) -> Tensor:
    """What residual_relu is to give, layer by layer."""
    return torch.relu(layers(given) + beside)


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (7, 5)])
def test_fused_equals_layer_by_layer(dtype: torch.dtype, tolerance: float, size: tuple[int, int]) -> None:
    """The result is that of the layers in a row, its shape, dtype and memory format too; the inputs are unharmed."""
    layers, given, beside = (
        row(dtype),
        channels_last(2, 16, *size, dtype=dtype),
        channels_last(2, 8, *size, dtype=dtype),
    )
    copies = given.clone(), beside.clone()
    expected = plain(layers, given, beside)
    result = residual_relu(layers, given, beside)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(given, copies[0])
    assert torch.equal(beside, copies[1])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="fused on x86 only")
def test_a_block_is_fused_on_x86() -> None:
    """In channels_last and without gradients a block is three operators."""
    block, x = Block(8), channels_last(1, 8, 4, 4)
    with torch.inference_mode(), Operators() as operators:
        block(x)
    assert operators.fused == len(operators.names) == 3


def hooked(layers: nn.Sequential) -> None:
    """Somebody watches a layer."""
    layers[1].register_forward_hook(lambda *_: None)


def replaced(layers: nn.Sequential) -> None:
    """Somebody put another layer in."""
    layers[3] = nn.SiLU()


UNFUSED: dict[str, tuple[Any, Callable[[nn.Sequential], None] | None, torch.memory_format]] = {
    "gradients": (torch.enable_grad(), None, torch.channels_last),
    "contiguous": (contextlib.nullcontext(), None, torch.contiguous_format),
    "autocast": (torch.autocast("cpu", torch.bfloat16), None, torch.channels_last),
    "mkldnn off": (torch.backends.mkldnn.flags(enabled=False, allow_tf32=None), None, torch.channels_last),
    "hook": (contextlib.nullcontext(), hooked, torch.channels_last),
    "another layer": (contextlib.nullcontext(), replaced, torch.channels_last),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_elsewhere_the_layers_run_one_by_one(case: str) -> None:
    """With gradients, another memory format, autocast, oneDNN off, hooks or foreign layers nothing is fused."""
    context, change, memory_format = UNFUSED[case]
    layers = row()
    if change is not None:
        change(layers)
    given, beside = (torch.randn(1, n, 3, 4).contiguous(memory_format=memory_format) for n in (16, 8))
    with torch.no_grad(), context:
        expected = plain(layers, given, beside)
        with Operators() as operators:
            result = residual_relu(layers, given, beside)
    assert operators.fused == 0
    torch.testing.assert_close(result, expected)


def test_gradients_flow_through_a_block() -> None:
    """Training sees the plain layers: every weight of a block gets its gradient."""
    block = Block(8)
    block(channels_last(1, 8, 4, 4)).sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())
