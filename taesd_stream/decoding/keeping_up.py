"""The best decoder that keeps up with a live view: measured on the device at hand, not guessed from what it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final, TypeAlias

import torch

from taesd_stream.decoding.engine import Engine

_LARGEST_PROBE: Final = 32  # cells a side: a larger picture's time is this one's by area, so that measuring stays short
# The first ones also pay for what is made once; and where something else runs beside, many in a row stand still for a
# hundred times what they take, until the threads that compute find each other.
_LEAST_TIMES: Final = 3
_LONG_ENOUGH_S: Final = 0.6
Shape: TypeAlias = tuple[int, int, int]  # C, h, w


def best_that_keeps_up(seconds: Sequence[float], most_s: Sequence[float]) -> int:
    """Which of several decoders shows a live view. seconds: what a picture takes each, the best decoder first.

    most_s: what it may take each. Returns: the first that is as fast; where none is, the fastest, of equals the better.
    """
    for place, (one, most) in enumerate(zip(seconds, most_s, strict=True)):
        if one <= most:
            return place
    return min(range(len(seconds)), key=seconds.__getitem__)


def probe_of(shape: Shape) -> tuple[Shape, float]:
    """What is measured in place of latents (C, h, w), no larger than 32x32 cells; and how many of it those are."""
    channels, height, width = shape
    probe = channels, min(height, _LARGEST_PROBE), min(width, _LARGEST_PROBE)
    return probe, height * width / (probe[1] * probe[2])


def seconds_a_picture(engine: Engine, shape: Shape, *, enough_s: float, budget_bytes: int) -> float:
    """How long the engine takes for a picture of latents of that shape: the least of some measurements.

    enough_s: it is measured no more once it is as fast. Raises: RuntimeError when memory is short.
    """
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    least_s, times, begun_s = float("inf"), 0, time.monotonic()
    while least_s > enough_s and (times < _LEAST_TIMES or time.monotonic() - begun_s < _LONG_ENOUGH_S):
        started_s = time.monotonic()
        for _, rgb in engine.decode(noise, budget_bytes=budget_bytes, are_finite=True):
            if rgb.is_cuda:
                torch.cuda.synchronize(rgb.device)
        least_s = min(least_s, time.monotonic() - started_s)
        times += 1
    return least_s
