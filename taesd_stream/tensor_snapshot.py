"""What snapshots share: which torch tensors one fits, wherever those are, and how a noise level becomes a number."""

from __future__ import annotations

import math
import sys
from typing import Any

from taesd_stream.fields import MAX_NUMBER
from taesd_stream.frames import WireDtype
from taesd_stream.graph_captures import exempt_thread


class TensorSnapshot:
    """Which tensors a snapshot fits, and what travels of them."""

    def __init__(self, latents: Any, dtype: WireDtype, magnitude: float) -> None:
        self.dtype, self.shape = dtype, tuple(latents.shape)
        self._torch = sys.modules["torch"]
        self._type, self._source = type(latents), latents.dtype
        self._magnitude = magnitude

    def _fits(self, latents: Any) -> bool:
        """Whether they are like the first; of where they are each kind says more."""
        return type(latents) is self._type and latents.dtype is self._source and latents.shape == self.shape


def number_of(value: Any) -> float | None:
    """A noise level, None for what the wire has no number for."""
    if getattr(value, "is_cuda", False):
        exempt_thread()
    number = math.nan if value is None else float(value)
    return number if abs(number) <= MAX_NUMBER else None
