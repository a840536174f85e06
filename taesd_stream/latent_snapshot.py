"""A sampler's latents as immutable bytes, so that later in-place writes can't show. Torch is never imported here.

The sampler's thread only copies (take()); every conversion is the side thread's (to_bytes()).
"""

from __future__ import annotations

import sys
from typing import Any, Final, Protocol

import numpy as np

from taesd_stream.device_snapshot import DeviceTensor
from taesd_stream.frames import WireDtype
from taesd_stream.host_snapshot import ConvertedHostTensor, HostArray, HostTensor
from taesd_stream.messages import Part

_NUMPY_FLOATS: Final = frozenset({"float64", "float32", "float16"})
_TORCH_FLOATS: Final = _NUMPY_FLOATS | {"bfloat16"}


class Snapshot(Protocol):
    """How latents of one type, dtype, shape and device become bytes; used again as long as they stay the same.

    dtype, shape: of what travels. held_bytes: what a copy occupies until it is fetched. is_on_device: it is not there
    at once.
    """

    is_on_device: bool
    dtype: WireDtype
    shape: tuple[int, ...]
    held_bytes: int

    def take(self, latents: Any) -> Any:
        """Copy them now; nothing is waited for. None where they are not of that type, dtype, shape and device."""

    def is_ready(self, taken: Any) -> bool:
        """Whether to_bytes() would not wait for a device. The side thread."""

    def to_bytes(self, taken: Any) -> Part:
        """What travels, C order. The side thread. Raises: RuntimeError, torch's word for a device that failed."""

    def drop(self, taken: Any) -> None:
        """It will not be fetched. Any thread."""

    def to_number(self, value: Any) -> float | None:
        """A noise level, read from its device where it is there. The side thread, after to_bytes()."""


def is_tensor(value: object) -> bool:
    """Whether `value` is a torch tensor, told without importing torch."""
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)  # None too while another thread imports it
    return tensor is not None and isinstance(value, tensor)


def is_on_device(value: object) -> bool:
    """Whether `value` is a tensor that cannot be read without waiting for its device."""
    return is_tensor(value) and value.device.type != "cpu"  # type: ignore[attr-defined]


def snapshot_of(latents: Any, wire_dtype: WireDtype | None, magnitude: float) -> Snapshot:
    """How `latents`, and others like them, travel; nothing is copied yet.

    latents: numpy array or torch tensor, CPU or CUDA, any float dtype.
    wire_dtype: None sends `float16` (`bfloat16` stays as it is: its range does not fit).
    magnitude: |z| that `uint8` still holds.
    Raises: TypeError for anything that is no array of floats.
    """
    if is_tensor(latents):
        name = str(latents.dtype).removeprefix("torch.")
        if name not in _TORCH_FLOATS:
            raise TypeError(f"latents: expected floats, got a tensor of {latents.dtype}")
        dtype = wire_dtype or ("bfloat16" if name == "bfloat16" else "float16")
        in_host = HostTensor if name == dtype else ConvertedHostTensor
        return (in_host if latents.device.type == "cpu" else DeviceTensor)(latents, dtype, magnitude)
    # name, not str: arrays of the other byte order are floats too
    if not isinstance(latents, np.ndarray) or latents.dtype.name not in _NUMPY_FLOATS:
        given = f"{type(latents).__name__} of {getattr(latents, 'dtype', 'no dtype')}"
        raise TypeError(f"latents: expected a numpy array or torch tensor of floats, got {given}")
    if wire_dtype == "bfloat16":
        raise TypeError("latents: numpy has no bfloat16; use wire_dtype='float16'")
    return HostArray(latents, wire_dtype or "float16", magnitude)
