"""One tensor on its way to the host: what whoever encodes it waits for. Torch is not imported here."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HostCopy:
    """A tensor on its way to the host. `array` is its memory there, right once `wait` has returned. Any thread."""

    def __init__(self, array: NDArray[np.uint8], event: Any = None) -> None:
        self.array = array
        self._event = event  # None: it is there
        self._here_ns = time.monotonic_ns() if event is None else 0

    @property
    def is_here(self) -> bool:
        """Whether `wait` would return at once. Raises: RuntimeError when the device failed."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> int:
        """Wait for the device, without the GIL. Returns: when it was first seen here, time.monotonic_ns().

        Raises: RuntimeError when the device failed.
        """
        if not self._here_ns:
            self._event.synchronize()
            self._here_ns = time.monotonic_ns()
        return self._here_ns
