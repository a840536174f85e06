"""Snapshots of latents on a GPU: one launch on the sampler's stream. Torch is never imported here.

Memory is used again, for asking for it costs as much as a launch.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any, Final

from taesd_stream.frames import WireDtype
from taesd_stream.graph_captures import exempt_thread
from taesd_stream.messages import Part
from taesd_stream.tensor_snapshot import TensorSnapshot, number_of

CAPTURED: Final = "latents: they have no values while a CUDA graph is captured; publish them after it was replayed"


class DeviceTensor(TensorSnapshot):
    """torch tensors on a GPU: the sampler's thread launches one copy, the side thread fetches it, on its own stream."""

    is_on_device = True

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        super().__init__(latents, dtype, magnitude)
        self._staged = self._torch.float16 if dtype == "uint8" else getattr(self._torch, dtype)
        self.held_bytes = latents.numel() * self._staged.itemsize
        self._device, self._index = latents.device, latents.get_device()
        self._is_cuda = self._device.type == "cuda"
        # What torch.cuda asks itself, by less Python; the first tells the current stream by its handle.
        asks: Any = self._torch._C if self._is_cuda else None
        self._raw_stream: Any = getattr(asks, "_cuda_getCurrentRawStream", None)
        self._current_index: Any = getattr(asks, "_cuda_getDevice", self._torch.cuda.current_device)
        self._is_capturing: Any = getattr(
            asks, "_cuda_isCurrentStreamCapturing", self._torch.cuda.is_current_stream_capturing
        )
        self._is_exempt = not self._is_cuda  # the side thread
        self._free: deque[Any] = deque(maxlen=4)  # (memory, event) that nothing is copied to any more, used again
        # Held until they are free: perhaps the copy is on another stream than the one that the memory was made on, to
        # which torch would give it back, for something else to be written there.
        self._dropped: deque[Any] = deque()
        self._stream: Any = None
        self._host: Any = None  # pinned, used again for each frame

    def take(self, latents: Any) -> Any:
        if not self._fits(latents) or latents.get_device() != self._index:
            return None
        is_current = self._is_cuda and self._current_index() == self._index
        if self._is_cuda and self._is_captured(is_current=is_current):
            raise RuntimeError(CAPTURED)
        if latents.requires_grad:
            latents = latents.detach()  # or the memory would hold on to how they came about
        stream = self._raw_stream(self._index) if self._raw_stream else None
        staged, event = self._room(stream)
        if self._is_cuda:
            # An operation like the sampler's own, the way to which lies in the caches; copy_() and the driver's copy
            # take up to twice as long.
            self._torch.mul(latents, 1, out=staged)
        else:
            staged.copy_(latents, non_blocking=True)
        if is_current:
            event.record()  # to look the stream up in Python takes 0.03 ms
        elif event is not None:
            event.record(self._torch.cuda.current_stream(self._device))
        return staged, event, stream

    def _is_captured(self, *, is_current: bool) -> bool:
        """Whether what the latents' device is told now goes into a CUDA graph."""
        if is_current:
            return bool(self._is_capturing())
        with self._torch.cuda.device(self._device):
            return bool(self._is_capturing())

    def _room(self, stream: Any) -> tuple[Any, Any]:
        """Memory for a copy on that stream and, on CUDA, its event."""
        try:  # no contextlib: its calls would be the sampler's
            if self._free:
                room: tuple[Any, Any] = self._free.pop()
                return room
            if self._dropped:
                dropped = staged, event, used_by = self._dropped.pop()
                if used_by == stream and stream is not None:  # whose order keeps the two copies apart; nothing is asked
                    return staged, event
                self._dropped.append(dropped)
        except IndexError:  # another thread was faster
            return self._new()
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
        self._exempt()
        try:
            return taken[1] is None or bool(taken[1].query())
        except RuntimeError:  # the device failed: to_bytes() says so
            return True

    def to_bytes(self, taken: Any) -> Part:
        self._exempt()
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
        if self._stream is None:  # not CUDA's
            return number_of(value)
        with self._torch.cuda.stream(self._stream):  # the thread's own would wait for all that the sampler has queued
            return number_of(value)

    def _pick_up(self) -> None:
        """Use again what was dropped, as far as it is done; the sampler's thread may take some of it meanwhile."""
        with contextlib.suppress(IndexError):
            while self.is_ready(dropped := self._dropped.popleft()):
                self._free.append(dropped[:2])
            self._dropped.appendleft(dropped)

    def _exempt(self) -> None:
        if not self._is_exempt:
            self._is_exempt = exempt_thread()

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
