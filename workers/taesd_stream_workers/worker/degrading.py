"""Worse ways to show a picture, where the better one does not fit memory or time: for one job, then the best again.

What is recorded takes the exact ways alone, and else waits: its pictures stay for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, get_args

import torch

from taesd_stream.decoding.choice import Choice

LEAST_BYTES: Final = 16 << 20  # of the smallest pieces that are tried
CHEAPER: Final[tuple[Choice, ...]] = tuple(choice for choice in get_args(Choice) if choice in ("nano", "linear"))
FORGET: Final = 0.8  # how much of a slow engine's time is believed at each job that it was spared: it gets its chance


@dataclass(frozen=True, slots=True)
class Way:
    """One way to decode. choice: of another engine, None: the best one; code, text: what is said of it, "": nothing."""

    choice: Choice | None
    budget_bytes: int
    code: str = ""
    text: str = ""


def ways(choice: Choice, memory_bytes: int, *, is_recorded: bool, is_late: bool = False) -> Iterator[Way]:
    """The ways to decode, best first; the next is for when memory was too short.

    choice: of the live view; only "auto" allows another engine. is_late: the best engine would take too long.
    """
    if not is_late:
        yield Way(None, memory_bytes)
        for budget_bytes in (memory_bytes // 4, LEAST_BYTES):
            yield Way(None, budget_bytes, "small_pieces", "Short of memory: decoded in small pieces.")
    if not is_recorded and choice == "auto":
        why = "Too slow here" if is_late else "Short of memory"
        for cheaper in CHEAPER:
            yield Way(cheaper, memory_bytes, cheaper, f"{why}: shown by the {cheaper} decoder.")
    if is_late:  # no cheaper one is there
        yield Way(None, memory_bytes)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or this host, had no memory left; torch's CPU allocator and oneDNN say it in words alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error)
    return isinstance(error, RuntimeError) and any(
        word in words for word in ("can't allocate memory", "out of memory", "could not create a memory", "bad_alloc")
    )


class Pace:
    """Seconds a latent cell takes on each engine, from what was measured last. Used by one thread."""

    def __init__(self) -> None:
        self._s_per_cell: dict[str, float] = {}

    def measured(self, engine: str, cells: int, seconds: float) -> None:
        """A batch of so many cells took so long."""
        if cells:
            before = self._s_per_cell.get(engine, seconds / cells)
            self._s_per_cell[engine] = (before + seconds / cells) / 2

    def latents_within(self, engine: str, cells: int, seconds: float) -> int:
        """How many latents of so many cells it decodes in that time, at least 1; 1 also while nothing is known."""
        known = self._s_per_cell.get(engine, 0.0)
        return max(1, int(seconds / (known * cells))) if known else 1

    def is_over(self, engine: str, cells: int, budget_s: float) -> bool:
        """Whether a frame of so many cells would take longer; 0 is no budget. What is spared is slowly forgotten."""
        known = self._s_per_cell.get(engine, 0.0)
        if not budget_s or known * cells <= budget_s:
            return False
        self._s_per_cell[engine] = known * FORGET
        return True
