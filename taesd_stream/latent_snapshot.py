"""A sampler's latents as immutable bytes, so that later in-place writes can't show. Torch is never imported here.

The sampler's thread only copies (take()); every conversion is the side thread's (to_bytes()). Host memory is copied as
it is, for a plain memcpy is the cheapest that there is: torch would wake its pool of threads for more than 32768
elements, numpy needs 1.7 ns an element for float16. On a GPU the copy is the driver's, or one kernel that converts on
its way. Memory is used again: on a GPU asking for it costs as much as a launch, in a host each new page is a fault.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections import deque
from collections.abc import Callable
from ctypes import CDLL, PYFUNCTYPE, c_char, c_size_t, c_uint64, c_void_p, memmove, string_at
from typing import Any, Final, NamedTuple, Protocol, cast

import numpy as np

from taesd_stream.frames import WireDtype
from taesd_stream.messages import Part

MAX_SIGMA: Final = 1e30  # what the wire's numbers end at
# at::internal::GRAIN_SIZE: torch runs an operation of so many elements in the thread that asks for it
_GRAIN: Final = 32768
# memmove without letting go of the GIL, so that the side thread's turn does not land inside publish()
_memmove: Final = PYFUNCTYPE(c_void_p, c_void_p, c_void_p, c_size_t)(ctypes.cast(memmove, c_void_p).value or 0)
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
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


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
        in_host = _HostTensor if name == dtype else _ConvertedHostTensor
        return (in_host if latents.device.type == "cpu" else _DeviceTensor)(latents, dtype, magnitude)
    # name, not str: arrays of the other byte order are floats too
    if not isinstance(latents, np.ndarray) or latents.dtype.name not in _NUMPY_FLOATS:
        given = f"{type(latents).__name__} of {getattr(latents, 'dtype', 'no dtype')}"
        raise TypeError(f"latents: expected a numpy array or torch tensor of floats, got {given}")
    if wire_dtype == "bfloat16":
        raise TypeError("latents: numpy has no bfloat16; use wire_dtype='float16'")
    return _HostArray(latents, wire_dtype or "float16", magnitude)


class _InHost:
    """What is in the host's memory is there at once."""

    is_on_device = False

    def is_ready(self, _taken: bytes) -> bool:
        return True

    def drop(self, _taken: bytes) -> None: ...

    def to_number(self, value: Any) -> float | None:
        return _number(value)


class _HostArray(_InHost):
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


class _Tensor:
    """What torch tensors share."""

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        self.dtype, self.shape = dtype, tuple(latents.shape)
        self._torch = sys.modules["torch"]
        self._type, self._source, self._device = type(latents), latents.dtype, latents.device
        self._magnitude = magnitude

    def _fits(self, latents: Any) -> bool:
        return (
            type(latents) is self._type
            and latents.dtype is self._source
            and latents.shape == self.shape
            and latents.device == self._device
        )


class _HostTensor(_InHost, _Tensor):
    """torch tensors in the host's memory that travel as they are."""

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        super().__init__(latents, dtype, magnitude)
        self.held_bytes = latents.numel() * latents.element_size()

    def take(self, latents: Any) -> Any:
        if not self._fits(latents):
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


class _ConvertedHostTensor(_HostTensor):
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


class _DeviceTensor(_Tensor):
    """torch tensors on a GPU: the sampler's thread launches one copy, the side thread fetches it, on its own stream."""

    is_on_device = True

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        super().__init__(latents, dtype, magnitude)
        self._staged = self._torch.float16 if dtype == "uint8" else getattr(self._torch, dtype)
        self.held_bytes = latents.numel() * self._staged.itemsize
        # of one device the current stream is known without asking torch.cuda in Python, which takes 0.03 ms
        is_cuda = self._device.type == "cuda"
        self._is_only = is_cuda and hasattr(self._torch, "Event") and self._torch.cuda.device_count() == 1
        is_plain = self._type in (self._torch.Tensor, self._torch.nn.Parameter) and self._source == self._staged
        self._driver_copy = _driver_copy() if self._is_only and is_plain else None
        self._free: deque[Any] = deque(maxlen=2)  # (memory, event) that nothing is copied to any more, used again
        # Held until they are free: perhaps the copy is on another stream than the one that the memory was made on, to
        # which torch would give it back, for something else to be written there.
        self._dropped: deque[Any] = deque()
        self._stream: Any = None
        self._host: Any = None  # pinned, used again for each frame

    def take(self, latents: Any) -> Any:
        if not self._fits(latents):
            return None
        if latents.requires_grad:
            latents = latents.detach()  # or the memory would hold on to how they came about
        try:
            taken = staged, event = self._free.pop()
        except IndexError:
            taken = staged, event = self._new()
        if not self._copy_by_driver(staged, latents):
            staged.copy_(latents, non_blocking=True)
        if self._is_only:
            event.record()
        elif event is not None:
            # of the tensor's device, perhaps not the current one
            event.record(self._torch.cuda.current_stream(self._device))
        return taken

    def _copy_by_driver(self, staged: Any, latents: Any) -> bool:
        """Returns: whether it took the copy; a thread that has not used CUDA yet, for one, torch has to make ready."""
        if self._driver_copy is None or not latents.is_contiguous() or latents.is_neg():
            return False
        stream = self._torch._C._cuda_getCurrentRawStream(self._device.index)
        return self._driver_copy(staged.data_ptr(), latents.data_ptr(), self.held_bytes, stream) == 0

    def _new(self) -> tuple[Any, Any]:
        """Memory for a copy and, on CUDA, its event."""
        torch = self._torch
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            staged = torch.empty(self.shape, dtype=self._staged, device=self._device)
        if self._device.type != "cuda":
            return staged, None
        return staged, torch.Event("cuda", enable_timing=False) if self._is_only else torch.cuda.Event()

    def drop(self, taken: Any) -> None:
        self._dropped.append(taken)

    def is_ready(self, taken: Any) -> bool:
        try:
            return taken[1] is None or bool(taken[1].query())
        except RuntimeError:  # the device failed: to_bytes() says so
            return True

    def to_bytes(self, taken: Any) -> Part:
        staged, event = taken
        if event is None:
            host = self._quantised(staged).cpu()
        else:
            event.synchronize()  # without the GIL; at once, but at a run's end, for is_ready() was asked before
            host = self._fetch(staged)
        self._free.append(taken)
        while self._dropped and self.is_ready(self._dropped[0]):
            self._free.append(self._dropped.popleft())
        words = host.view(self._torch.int16) if self.dtype == "bfloat16" else host
        data: bytes = words.numpy().tobytes()
        return data

    def to_number(self, value: Any) -> float | None:
        with self._torch.cuda.stream(self._stream):  # the thread's own would wait for all that the sampler has queued
            return _number(value)

    def _fetch(self, staged: Any) -> Any:
        torch = self._torch
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
            self._host = torch.empty(self.shape, dtype=getattr(torch, self.dtype), device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            self._host.copy_(self._quantised(staged), non_blocking=True)
            self._stream.synchronize()
        return self._host

    def _quantised(self, staged: Any) -> Any:
        if self.dtype != "uint8":
            return staged
        unit = staged.mul_(255 / (2 * self._magnitude)).add_(127.5)
        return unit.clamp_(0, 255).round_().to(self._torch.uint8)


@functools.cache
def _driver_copy() -> Callable[[int, int, int, int], int] | None:
    """cuMemcpyDtoDAsync(target, source, bytes, stream) of NVIDIA's driver, 0 on success; None where it is not.

    copy_ comes to the same by a way through torch that costs the sampler's thread 0.04 ms more.
    """
    torch: Any = sys.modules["torch"]
    if torch.version.cuda is None or not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return None
    try:
        copy = CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuMemcpyDtoDAsync_v2
    except (OSError, AttributeError):
        return None
    copy.argtypes = [c_uint64, c_uint64, c_size_t, c_void_p]
    return cast("Callable[[int, int, int, int], int]", copy)


def _number(value: Any) -> float | None:
    """A noise level, None for what the wire has no number for."""
    number = math.nan if value is None else float(value)
    return number if abs(number) <= MAX_SIGMA else None


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
