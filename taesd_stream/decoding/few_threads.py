"""Processor threads for work that waits for memory more than it computes.

Each of torch's operations waits for the slowest of its threads: where other programs hold a core that is many times the
work itself, and alone a second thread saves a quarter at twice the processor time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

import torch

_PX_A_THREAD: Final = 1 << 18  # 512x512
_own = threading.local()


def be_guest() -> None:
    """What the calling thread decodes from now on it decodes in a sampler's process, and sets no number of threads.

    torch keeps that number for the whole process too: a thread that begins meanwhile would have it for good.
    """
    _own.is_guest = True


def is_guest() -> bool:
    """Whether the calling thread is one."""
    return getattr(_own, "is_guest", False)


@contextlib.contextmanager
def few_threads(device: torch.device, pixels: int) -> Iterator[None]:
    """Use a thread for each so many pixels of the pictures at hand, in what the calling thread asks of torch.

    device: where they are; on a GPU nothing changes, nor in a guest's thread. pixels: height * width of all of them.
    """
    threads = torch.get_num_threads()
    few = max(1, pixels // _PX_A_THREAD)
    if device.type != "cpu" or few >= threads or is_guest():
        yield
        return
    torch.set_num_threads(few)  # 0.1 us
    try:
        yield
    finally:
        torch.set_num_threads(threads)
