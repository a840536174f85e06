"""Copies between the host and a GPU that nobody waits for: pinned memory, and a stream of its own each way.

So the next job's latents come in, and the last one's pictures go out, while the GPU computes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taesd_stream.decoding.host_copy import HostCopy


class HostCopies:
    """Used by the thread that owns the device, `staging` by any. On a processor nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: deque[tuple[HostCopy, float]] = deque()
        self._in: Any = None
        self._out: Any = None
        if device.type == "cuda":
            self._in = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def staging(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory to fill and then to `upload`; pinned where that helps."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._in is not None)

    def upload(self, staged: Tensor) -> Tensor:
        """The same on the device, for what is launched on its current stream from now on."""
        if self._in is None:
            return staged.to(self._device)
        with torch.cuda.stream(self._in):
            there = staged.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._in)
        there.record_stream(current)
        return there

    def download(self, planes: Tensor) -> HostCopy:
        """Bring bytes to the host. planes: uint8, contiguous; may be dropped at once."""
        if self._out is None:
            return HostCopy(planes.cpu().numpy())
        return self.fill(planes.shape, lambda here: here.copy_(planes, non_blocking=True), reads=planes)

    def fill(self, shape: Sequence[int], write: Callable[[Tensor], object], *, reads: Tensor) -> HostCopy:
        """Have a GPU write bytes into the host's memory, beside what else it does.

        write: launches that on the current stream; gets the memory, uint8, which it may write to itself before. reads:
        what it reads on the device, as it is by now; may be dropped at once.
        """
        here = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            write(here)
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # a waiter sleeps, not spins
            event.record(self._out)
        reads.record_stream(self._out)
        copy = HostCopy(here.numpy(), event)
        self._under_way.append((copy, time.monotonic()))
        return copy

    @property
    def waiting_since_s(self) -> float:
        """When the oldest download that is not here began, time.monotonic(); infinite if all are. Any one thread.

        Raises: RuntimeError when the device failed.
        """
        while self._under_way:
            copy, since_s = self._under_way[0]
            if not copy.is_here:
                return since_s
            self._under_way.popleft()
        return float("inf")
