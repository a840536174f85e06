"""Snapshots of latents in the host's memory: numpy's, and torch's, which is never imported here.

Memory is copied as it is, for a plain memcpy is the cheapest that there is: torch would wake its pool of threads for
more than 32768 elements, numpy needs 1.7 ns an element for float16. Memory is used again: each new page is a fault.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections import deque
from ctypes import PYFUNCTYPE, c_char, c_size_t, c_void_p, memmove, string_at
from typing import Any, Final, NamedTuple

import numpy as np

from taesd_stream.frames import WireDtype
from taesd_stream.messages import Part
from taesd_stream.tensor_snapshot import TensorSnapshot, number_of

# at::internal::GRAIN_SIZE: torch runs an operation of so many elements in the thread that asks for it
_GRAIN: Final = 32768
# memmove without letting go of the GIL, so that the side thread's turn does not land inside publish()
_memmove: Final = PYFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t)(ctypes.cast(memmove, c_void_p).value or 0)


class _InHost:
    """What is in the host's memory is there at once."""

    is_on_device = False

    def is_ready(self, _taken: bytes) -> bool:
        return True

    def drop(self, _taken: bytes) -> None: ...

    def to_number(self, value: Any) -> float | None:
        return number_of(value)


class HostArray(_InHost):
    """numpy arrays."""

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        self.dtype, self.shape = dtype, latents.shape
        self.held_bytes = latents.nbytes
        self._type, self._source = type(latents), latents.dtype
        self._magnitude = magnitude

    def take(self, latents: Any) -> bytes | None:
        if type(latents) is not self._type or latents.dtype != self._source or latents.shape != self.shape:
            return None
        # tobytes, not copy: it holds the GIL too
        data: bytes = latents.tobytes()
        return data

    def to_bytes(self, taken: bytes) -> Part:
        if self._source == self.dtype:
            return taken
        return _wire_bytes(np.frombuffer(taken, self._source), self.dtype, self._magnitude)


class HostTensor(_InHost, TensorSnapshot):
    """torch tensors in the host's memory that travel as they are."""

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        super().__init__(latents, dtype, magnitude)
        self.held_bytes = latents.numel() * latents.element_size()

    def take(self, latents: Any) -> Any:
        if not self._fits(latents) or not latents.is_cpu:
            return None
        if not latents.is_contiguous() or latents.is_neg():
            latents = latents.detach().resolve_neg().contiguous()
        address = latents.data_ptr()  # straight from its memory: in cold caches numpy() alone takes 0.06 ms
        if not address:  # a copy would end the sampler's process
            raise TypeError(f"latents: expected a tensor with memory of its own, got a {self._type.__name__} without")
        return self._copy(address)

    def _copy(self, address: int) -> Any:
        return string_at(address, self.held_bytes)

    def to_bytes(self, taken: Any) -> Part:
        data: bytes = taken
        return data


class _Room(NamedTuple):
    """Memory for a copy, at `address`, and for what becomes of it; `pieces` hold both, small enough for one thread."""

    address: int
    pieces: list[tuple[Any, Any]]  # (target, source)
    target: memoryview


class ConvertedHostTensor(HostTensor):
    """torch tensors in the host's memory that travel in another dtype."""

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        super().__init__(latents, dtype, magnitude)
        self._free: deque[_Room] = deque(maxlen=2)

    def drop(self, taken: Any) -> None:
        self._free.append(taken)

    def _copy(self, address: int) -> _Room:
        try:
            room = self._free.pop()
        except IndexError:
            room = self._new()
        _memmove(room.address, address, self.held_bytes)
        return room

    def _new(self) -> _Room:
        torch = self._torch
        with torch.inference_mode(False):
            # a sampler may have made a GPU torch's default device
            source = torch.empty(math.prod(self.shape), dtype=self._source, device="cpu")
            target = torch.empty_like(source, dtype=getattr(torch, "float32" if self.dtype == "uint8" else self.dtype))
        pieces = list(zip(target.split(_GRAIN), source.split(_GRAIN), strict=True))
        return _Room(source.data_ptr(), pieces, _flat(target.view(torch.uint8).numpy()))

    def to_bytes(self, taken: _Room) -> Part:
        for target, source in taken.pieces:
            target.copy_(source)
        if self.dtype == "uint8":
            data = _wire_bytes(np.frombuffer(taken.target, np.float32), self.dtype, self._magnitude)
        else:
            data = bytes(taken.target)
        self._free.append(taken)
        return data


def _wire_bytes(values: np.ndarray[Any, Any], dtype: WireDtype, magnitude: float) -> Part:
    """Floats as what travels; values past a dtype's range become infinite, without a warning on the terminal."""
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "uint8":
            # the field's own uint8 form of latents: AutoencoderTiny.scale_latents, then 8 bits
            unit = np.clip(values.astype(np.float32) / (2 * magnitude) + 0.5, 0, 1)
            return _flat((unit * 255).round().astype(np.uint8))
        torch: Any = sys.modules.get("torch")
        # torch may be just being imported
        if dtype == "float16" and values.dtype == np.float32 and hasattr(torch, "from_numpy"):
            return _by_torch(values, torch)
        return _flat(values.astype(dtype))


def _by_torch(values: np.ndarray[Any, Any], torch: Any) -> Part:
    """float32 as float16: torch takes 0.06 ns an element, numpy 1.7."""
    # Torch warns of memory that is read-only, as bytes are: a view that only seems writable, for a copy costs a lot.
    view = (c_char * values.nbytes).from_address(values.ctypes.data)
    source = torch.frombuffer(view, dtype=torch.float32)
    words = np.empty(values.shape, np.float16)
    target = torch.from_numpy(words)
    for begin in range(0, len(values), _GRAIN):
        target[begin : begin + _GRAIN].copy_(source[begin : begin + _GRAIN])
    return _flat(words)


def _flat(array: np.ndarray[Any, Any]) -> memoryview:
    return array.data.cast("B")
