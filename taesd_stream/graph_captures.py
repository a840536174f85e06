"""CUDA graphs that a sampler captures: what another thread asks of a device meanwhile must not end them."""

from __future__ import annotations

import functools
import sys
from ctypes import CDLL, POINTER, byref, c_int
from typing import Any, Final

RELAXED: Final = 2  # of CUstreamCaptureMode: this thread's calls end no capture


def exempt_thread() -> bool:
    """Let this thread ask a device for anything while another captures a graph in `global` mode, torch's own.

    Else merely asking for an event ends the capture. Returns: whether it is so from now on; torch is imported already.
    """
    driver = _driver()
    return driver is None or driver.cuThreadExchangeStreamCaptureMode(byref(c_int(RELAXED))) == 0


@functools.cache
def _driver() -> Any:
    """NVIDIA's, for torch has no call for this; None where torch uses another."""
    torch: Any = sys.modules["torch"]
    if torch.version.cuda is None:
        return None
    try:
        driver = CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuThreadExchangeStreamCaptureMode.argtypes = [POINTER(c_int)]
    except (OSError, AttributeError):
        return None
    return driver
