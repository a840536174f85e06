"""A sampler's latents as immutable bytes, so that later in-place writes can't show. Torch is never imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import numpy as np

from taesd_stream.frames import WireDtype

# What the side thread calls to get the bytes: at once for host memory, after the copy from the device else.
Snapshot: TypeAlias = Callable[[], bytes]

_FLOATS: Final = frozenset({"float64", "float32", "float16"})


def is_tensor(latents: object) -> bool:
    """Whether `latents` is a torch tensor, told without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(latents, torch.Tensor)


def wire_form(latents: Any, wire_dtype: WireDtype | None) -> tuple[WireDtype, tuple[int, ...]]:
    """The dtype and shape that `latents` will travel in; nothing is copied yet.

    latents: numpy array or torch tensor, CPU or CUDA, any float dtype.
    wire_dtype: None sends `float16` (`bfloat16` stays as it is: its range does not fit).
    Raises: TypeError for anything that is no array of floats.
    """
    if is_tensor(latents):
        if not latents.is_floating_point():
            raise TypeError(f"latents: expected floats, got a tensor of {latents.dtype}")
        own: WireDtype = "bfloat16" if str(latents.dtype) == "torch.bfloat16" else "float16"
        return wire_dtype or own, tuple(latents.shape)
    # name, not str: arrays of the other byte order are floats too
    if not isinstance(latents, np.ndarray) or latents.dtype.name not in _FLOATS:
        given = f"{type(latents).__name__} of {getattr(latents, 'dtype', 'no dtype')}"
        raise TypeError(f"latents: expected a numpy array or torch tensor of floats, got {given}")
    if wire_dtype == "bfloat16":
        raise TypeError("latents: numpy has no bfloat16; use wire_dtype='float16'")
    return wire_dtype or "float16", latents.shape


def snapshot(latents: Any, dtype: WireDtype, magnitude: float) -> Snapshot:
    """Copy `latents` now, in the form that wire_form() told.

    magnitude: |z| that `uint8` still holds. Returns: a call that gives the bytes, C order.
    """
    if is_tensor(latents):
        return _of_tensor(latents, dtype, magnitude)
    # values past the dtype's range become infinite: no warning on the sampler's terminal
    with np.errstate(over="ignore", invalid="ignore"):
        data = (_quantised(latents, magnitude) if dtype == "uint8" else latents.astype(dtype, copy=False)).tobytes()
    # tobytes, not copy: it holds the GIL, so the side thread's turn does not land inside publish()
    return lambda: data


def _quantised(latents: np.ndarray[Any, Any], magnitude: float) -> np.ndarray[Any, Any]:
    # the field's own uint8 form of latents: AutoencoderTiny.scale_latents, then 8 bits
    unit: np.ndarray[Any, Any] = np.clip(latents.astype(np.float32) / (2 * magnitude) + 0.5, 0, 1)
    return (unit * 255).round().astype(np.uint8)


def _of_tensor(latents: Any, dtype: WireDtype, magnitude: float) -> Snapshot:
    torch = sys.modules["torch"]
    with torch.no_grad():
        source = latents.detach()
        if dtype == "uint8":
            source = (source.float() / (2 * magnitude) + 0.5).clamp(0, 1).mul(255).round()
        copy = source.to(dtype=getattr(torch, dtype), copy=True, memory_format=torch.contiguous_format)
    if copy.device.type == "cpu":
        data = _bytes_of(torch, copy)
        return lambda: data
    return _later(torch, copy)


def _bytes_of(torch: Any, tensor: Any) -> bytes:
    words = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
    data: bytes = words.numpy().tobytes()
    return data


def _later(torch: Any, copy: Any) -> Snapshot:
    """The sampler's thread has only launched the conversion; the side thread waits for it on a stream of its own."""
    if copy.device.type != "cuda":
        return lambda: _bytes_of(torch, copy.cpu())
    event = torch.cuda.Event()
    event.record()

    def fetch() -> bytes:
        with torch.cuda.device(copy.device):
            stream = torch.cuda.Stream()
            stream.wait_event(event)
            with torch.cuda.stream(stream):
                host = torch.empty(copy.shape, dtype=copy.dtype, pin_memory=True)
                host.copy_(copy, non_blocking=True)
            stream.synchronize()  # releases the GIL
        return _bytes_of(torch, host)

    return fetch
