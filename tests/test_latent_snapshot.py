"""A sampler's latents as bytes: every float form of numpy and torch, and what it costs their owner (nothing)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from taesd_stream.frames import WireDtype
from taesd_stream.latent_snapshot import snapshot_of

VALUES = np.linspace(-3, 3, 4 * 6 * 10, dtype=np.float64).reshape(4, 6, 10)
READ_ONLY = VALUES.astype(np.float32)
READ_ONLY.flags.writeable = False


class Wrapper(torch.Tensor):
    """A tensor without memory, as those are that stand for several others."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(func)


def sent(latents: Any, wire_dtype: WireDtype | None = None) -> tuple[WireDtype, tuple[int, ...], bytes]:
    """What travels of `latents`."""
    snapshot = snapshot_of(latents, wire_dtype, 3.0)
    return snapshot.dtype, snapshot.shape, bytes(snapshot.to_bytes(snapshot.take(latents)))


@pytest.mark.parametrize(
    "latents",
    [
        VALUES,
        VALUES.astype(np.float32),
        VALUES.astype(np.float16),
        VALUES.astype(">f4"),
        VALUES.astype(">f8"),
        READ_ONLY,
        np.asfortranarray(VALUES),
        VALUES[:, ::-1][:, ::-1],
        np.repeat(VALUES, 2, axis=2)[:, :, ::2],
        torch.from_numpy(VALUES),
        torch.from_numpy(VALUES).float(),
        torch.from_numpy(VALUES).half(),
        torch.from_numpy(VALUES).float().requires_grad_(),
        torch.from_numpy(np.ascontiguousarray(VALUES.transpose(2, 0, 1))).permute(1, 2, 0),
        torch.from_numpy(VALUES)[None].to(memory_format=torch.channels_last)[0],
        torch.nn.Parameter(torch.from_numpy(VALUES)),
        torch._neg_view(torch.from_numpy(-VALUES).float()),
    ],
    ids=lambda latents: f"{type(latents).__name__}-{latents.dtype}",
)
def test_every_float_form_travels_as_float16_in_c_order(latents: Any) -> None:
    """Precision, byte order, strides, write protection and gradients do not change what is sent."""
    assert sent(latents) == ("float16", (4, 6, 10), VALUES.astype(np.float16).tobytes())


def test_bfloat16_stays() -> None:
    """bfloat16 is sent as it is, for its range does not fit into float16."""
    latents = torch.tensor([[[1e20, -1.5, 3e-30]]], dtype=torch.bfloat16)
    dtype, shape, data = sent(latents)
    assert (dtype, shape) == ("bfloat16", (1, 1, 3))
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16), latents.flatten())


@pytest.mark.parametrize("latents", [VALUES.astype(np.float32), torch.from_numpy(VALUES).float()])
def test_wire_dtype_float32_is_exact(latents: Any) -> None:
    """wire_dtype="float32" sends every bit."""
    assert sent(latents, "float32")[2] == VALUES.astype(np.float32).tobytes()


@pytest.mark.parametrize("latents", [VALUES, VALUES.astype(np.float16), torch.from_numpy(VALUES).float()])
def test_uint8_is_the_field_s_own_form(latents: Any) -> None:
    """wire_dtype="uint8" sends round(255 * clamp(z / 6 + 0.5)), whatever the input's precision, to one step."""
    dtype, _, data = sent(latents, "uint8")
    expected = (np.clip(VALUES / 6 + 0.5, 0, 1) * 255).round()
    assert dtype == "uint8"
    assert np.abs(np.frombuffer(data, np.uint8).reshape(VALUES.shape) - expected).max() <= 1


@pytest.mark.parametrize("wire_dtype", [None, "float32", "uint8"])
@pytest.mark.parametrize("value", [1e30, -1e30, np.nan, np.inf])
def test_wild_values_warn_nobody(wire_dtype: WireDtype | None, value: float) -> None:
    """NaN, infinity and what float16 cannot hold are sent without a warning on the sampler's terminal."""
    sent(np.full((4, 8, 8), value, np.float32), wire_dtype)


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16", "float32", "uint8"])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.bfloat16])
def test_copies_that_wait_together_stay_apart(source: torch.dtype, wire_dtype: WireDtype) -> None:
    """More copies than memory is kept for, fetched or dropped in any order, each are what was copied; every time."""
    latents = [torch.full((3, 150, 100), 0.25 * number, dtype=source) for number in range(5)]  # two pieces of torch's
    expected = [snapshot_of(one, wire_dtype, 3.0) for one in latents]
    alone = [bytes(one.to_bytes(one.take(each))) for one, each in zip(expected, latents, strict=True)]
    snapshot = snapshot_of(latents[0], wire_dtype, 3.0)
    for _ in range(3):
        taken = [snapshot.take(one) for one in latents]
        snapshot.drop(taken[1])
        assert [bytes(snapshot.to_bytes(taken[number])) for number in (4, 0, 2, 3)] == [alone[n] for n in (4, 0, 2, 3)]
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("wire_dtype", ["float16", "float32"])
def test_a_tensor_without_memory_is_an_error(wire_dtype: WireDtype) -> None:
    """Subclasses that hold their values elsewhere, as DTensor does, are refused, not read at address 0."""
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (4, 8, 8), dtype=torch.float32)
    with pytest.raises(TypeError, match="a tensor with memory of its own, got a Wrapper without"):
        sent(wrapper, wire_dtype)


def test_a_default_device_is_not_taken_for_copies() -> None:
    """Where a sampler has made another device torch's default, what lies in the host's memory stays there."""
    latents = torch.from_numpy(VALUES).float()
    with torch.device("meta"):
        assert sent(latents)[2] == VALUES.astype(np.float16).tobytes()


def test_the_copy_is_taken_at_once() -> None:
    """What the owner writes into its array after take() does not show, also where no conversion is needed."""
    for latents in (VALUES.astype(np.float16), torch.from_numpy(VALUES).half()):
        snapshot = snapshot_of(latents, None, 3.0)
        taken = snapshot.take(latents)
        latents[:] = 0
        assert snapshot.to_bytes(taken) == VALUES.astype(np.float16).tobytes()


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (np.zeros((4, 8, 8), np.int32), "ndarray of int32"),
        (np.zeros((4, 8, 8), np.complex64), "ndarray of complex64"),
        (torch.zeros((4, 8, 8), dtype=torch.int64), "torch.int64"),
        (torch.zeros((4, 8, 8), dtype=torch.bool), "torch.bool"),
        ([[[0.0]]], "list of no dtype"),
        ("latents", "str"),
    ],
)
def test_what_is_no_array_of_floats_is_said(latents: Any, words: str) -> None:
    """Integers, complex numbers, lists: a TypeError that says what came."""
    with pytest.raises(TypeError, match=f"floats.*{words}"):
        snapshot_of(latents, None, 3.0)


def test_torch_is_not_imported() -> None:
    """A sampler that has no torch does not get it from us, also while it publishes."""
    code = (
        "import sys, numpy as np; from taesd_stream import LatentPublisher\n"
        "with LatentPublisher('tcp://127.0.0.1:9', stream='a', latent_format='sd1') as publisher:\n"
        "    publisher.publish(np.zeros((4, 8, 8), np.float32), step=0)\n"
        "    assert publisher.error is None, publisher.error\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
