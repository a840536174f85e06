"""Machine code that is loaded into a device's context, through the CUDA driver."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError


class Library:
    """The kernels of one program, on one device. driver: cuda.bindings.driver; untyped."""

    def __init__(self, cubin: bytes, device: torch.device) -> None:
        """Raises: KernelsUnavailableError if the driver refuses the machine code."""
        self.driver: Any = importlib.import_module("cuda.bindings.driver")
        self.device = device
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the device's context current for the driver
            (self._library,) = self.do(self.driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))

    def kernel(self, name: str) -> Any:
        """By its name in the source, as the driver's launches take it. Raises: KernelsUnavailableError without it."""
        (kernel,) = self.do(self.driver.cuLibraryGetKernel(self._library, name.encode()))
        return self.driver.CUfunction(int(kernel))

    def stream(self) -> Any:
        """Torch's current stream of the device."""
        return self.driver.CUstream(torch.cuda.current_stream(self.device).cuda_stream)

    def do(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a call of the driver has answered, but for its status. Raises: KernelsUnavailableError if it failed."""
        status, *values = result
        if status != self.driver.CUresult.CUDA_SUCCESS:
            raise KernelsUnavailableError(f"the CUDA driver answers {status}")
        return tuple(values)
