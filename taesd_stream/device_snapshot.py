"""Snapshots of latents on a GPU: a copy by the driver, or a kernel that converts. Torch is never imported here.

Memory is used again, for asking for it costs as much as a launch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import deque
from ctypes import CDLL, POINTER, byref, c_int, c_size_t, c_uint64, c_void_p
from typing import Any, Final

from taesd_stream.frames import WireDtype
from taesd_stream.messages import Part
from taesd_stream.tensor_snapshot import TensorSnapshot, number_of

CAPTURED: Final = "latents: they have no values while a CUDA graph is captured; publish them after it was replayed"
RELAXED: Final = 2  # of CUstreamCaptureMode: this thread's calls end no capture


class DeviceTensor(TensorSnapshot):
    """torch tensors on a GPU: the sampler's thread launches one copy, the side thread fetches it, on its own stream."""

    is_on_device = True

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        super().__init__(latents, dtype, magnitude)
        self._staged = self._torch.float16 if dtype == "uint8" else getattr(self._torch, dtype)
        self.held_bytes = latents.numel() * self._staged.itemsize
        self._is_cuda = self._device.type == "cuda"
        is_plain = self._type in (self._torch.Tensor, self._torch.nn.Parameter) and self._source == self._staged
        self._driver: Any = _driver() if self._is_cuda else None
        self._is_driver_enough = self._driver is not None and is_plain
        # what tells the current stream by its handle
        self._raw_stream: Any = getattr(self._torch._C, "_cuda_getCurrentRawStream", None) if self._is_cuda else None
        self._is_relaxed = self._driver is None  # the side thread
        self._free: deque[Any] = deque(maxlen=4)  # (memory, event) that nothing is copied to any more, used again
        # Held until they are free: perhaps the copy is on another stream than the one that the memory was made on, to
        # which torch would give it back, for something else to be written there.
        self._dropped: deque[Any] = deque()
        self._stream: Any = None
        self._host: Any = None  # pinned, used again for each frame

    def take(self, latents: Any) -> Any:
        if not self._fits(latents):
            return None
        is_current = self._is_cuda and self._torch.cuda.current_device() == self._device.index
        if self._is_cuda and self._is_captured(is_current=is_current):
            raise RuntimeError(CAPTURED)
        if latents.requires_grad:
            latents = latents.detach()  # or the memory would hold on to how they came about
        stream = self._raw_stream(self._device.index) if self._raw_stream else None
        staged, event = self._room(stream)
        if not is_current or not self._copy_by_driver(staged, latents, stream):
            staged.copy_(latents, non_blocking=True)
        if is_current:
            event.record()  # to look the stream up in Python takes 0.03 ms
        elif event is not None:
            event.record(self._torch.cuda.current_stream(self._device))
        return staged, event, stream

    def _is_captured(self, *, is_current: bool) -> bool:
        """Whether what the latents' device is told now goes into a CUDA graph."""
        cuda = self._torch.cuda
        if is_current:
            return bool(cuda.is_current_stream_capturing())
        with cuda.device(self._device):
            return bool(cuda.is_current_stream_capturing())

    def _copy_by_driver(self, staged: Any, latents: Any, stream: Any) -> bool:
        """Returns: whether it took the copy; a thread that has not used CUDA yet, for one, torch has to make ready."""
        if not self._is_driver_enough or not latents.is_contiguous() or latents.is_neg():
            return False
        # Of a thread's device torch may only have taken note, and the default stream has the same handle on each.
        at = c_int(-1)
        if self._driver.cuCtxGetDevice(byref(at)) != 0 or at.value != self._device.index:
            return False
        copy = self._driver.cuMemcpyDtoDAsync_v2
        return bool(copy(staged.data_ptr(), latents.data_ptr(), self.held_bytes, stream) == 0)

    def _room(self, stream: Any) -> tuple[Any, Any]:
        """Memory for a copy on that stream and, on CUDA, its event."""
        with contextlib.suppress(IndexError):
            room: tuple[Any, Any] = self._free.pop()
            return room
        with contextlib.suppress(IndexError):
            dropped = staged, event, used_by = self._dropped.pop()
            if used_by == stream and stream is not None:  # whose order keeps the two copies apart; nothing is asked
                return staged, event
            self._dropped.append(dropped)
        return self._new()

    def _new(self) -> tuple[Any, Any]:
        torch = self._torch
        with torch.inference_mode(False):  # what is made in that mode cannot be written to outside of it
            staged = torch.empty(self.shape, dtype=self._staged, device=self._device)
        if not self._is_cuda:
            return staged, None
        if not hasattr(torch, "Event"):
            return staged, torch.cuda.Event()  # which looks the current stream up in Python
        return staged, torch.Event("cuda", enable_timing=False)

    def drop(self, taken: Any) -> None:
        self._dropped.append(taken)

    def is_ready(self, taken: Any) -> bool:
        self._relax()
        try:
            return taken[1] is None or bool(taken[1].query())
        except RuntimeError:  # the device failed: to_bytes() says so
            return True

    def to_bytes(self, taken: Any) -> Part:
        self._relax()
        staged, event, _ = taken
        if event is None:
            host = self._quantised(staged).cpu()
        else:
            event.synchronize()  # without the GIL; at once, but at a run's end, for is_ready() was asked before
            host = self._fetch(staged)
        self._free.append((staged, event))
        self._pick_up()
        words = host.view(self._torch.int16) if self.dtype == "bfloat16" else host
        data: bytes = words.numpy().tobytes()
        return data

    def to_number(self, value: Any) -> float | None:
        with self._torch.cuda.stream(self._stream):  # the thread's own would wait for all that the sampler has queued
            return number_of(value)

    def _pick_up(self) -> None:
        """Use again what was dropped, as far as it is done; the sampler's thread may take some of it meanwhile."""
        with contextlib.suppress(IndexError):
            while self.is_ready(dropped := self._dropped.popleft()):
                self._free.append(dropped[:2])
            self._dropped.appendleft(dropped)

    def _relax(self) -> None:
        """Leave a CUDA graph whole that the sampler captures meanwhile: else merely asking for an event ends it."""
        if not self._is_relaxed:
            self._is_relaxed = self._driver.cuThreadExchangeStreamCaptureMode(byref(c_int(RELAXED))) == 0

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
def _driver() -> CDLL | None:
    """NVIDIA's driver, where torch uses it and says which stream is current."""
    torch: Any = sys.modules["torch"]
    if torch.version.cuda is None or not hasattr(torch._C, "_cuda_getCurrentRawStream"):
        return None
    try:
        driver = CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        # (target, source, bytes, stream), 0 on success; copy_ comes to the same by a way through torch that costs the
        # sampler's thread 0.04 ms more
        driver.cuMemcpyDtoDAsync_v2.argtypes = [c_uint64, c_uint64, c_size_t, c_void_p]
        driver.cuCtxGetDevice.argtypes = [POINTER(c_int)]
        driver.cuThreadExchangeStreamCaptureMode.argtypes = [POINTER(c_int)]
    except (OSError, AttributeError):
        return None
    return driver
