"""Our own kernels, as soon as they are compiled: until then, and where they are refused, a decoder runs without."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final, TypeVar

import torch

from taesd_stream.decoding.kernels.cubins import TINY_DECODER, KernelsUnavailableError, Program, forget, kernel_cubin
from taesd_stream.decoding.kernels.launching import Kernels

logger = logging.getLogger(__name__)

T = TypeVar("T")

WITHOUT: Final = "cuDNN's fused calls"
_COMPILING: Final = threading.Lock()  # the next decoder's finds on disk what this one's has kept


class KernelsLater:
    """Compiles in a thread behind the caller, and hands the kernels over in the caller's own. Used by one thread.

    reason: what runs, and why.
    """

    def __init__(self, device: torch.device, cache: Path | None, use: Callable[[Kernels], str]) -> None:
        """use: takes the kernels into use, having checked them, and returns what runs then, in words.

        Whatever it raises is the reason why the kernels are not used.
        """
        self._device = device
        self._cache = cache
        self._use = use
        self._cubin: Future[bytes] | None = None
        lacks = lacks_for_kernels(torch.cuda.get_device_capability(device))
        if lacks is None:
            self._cubin = compile_behind(TINY_DECODER, cache)
            self.reason = f"{WITHOUT} until our own kernels are compiled"
        else:
            self.reason = f"{WITHOUT}: {lacks}"

    def take_over(self, *, wait: bool = False) -> None:
        """Use the kernels if they are compiled by now; wait: until they are, or are refused."""
        if self._cubin is None or not (wait or self._cubin.done()):
            return
        cubin, self._cubin = self._cubin, None
        try:
            with torch.inference_mode(), torch.cuda.device(self._device):
                kernels = loaded(cubin, TINY_DECODER, self._cache, lambda code: Kernels(code, self._device))
                self.reason = self._use(kernels)
        except torch.OutOfMemoryError:
            self._cubin = cubin  # the sampler had it all just now: with a later picture
        except Exception as error:  # noqa: BLE001 pictures are worth more than kernels
            self.reason = f"{WITHOUT}: {error}"
            logger.warning("kernels_not_used reason=%s", error)
        else:
            logger.info("kernels_used device=%s", torch.cuda.get_device_name(self._device))


def compile_behind(program: Program, cache: Path | None) -> Future[bytes]:
    """Compile in a thread that a process which ends does not wait for: a compilation cannot be broken off."""
    future: Future[bytes] = Future()

    def compile_kernels() -> None:
        try:
            with _COMPILING:
                cubin = kernel_cubin(program, cache)
        except Exception as error:  # noqa: BLE001 whatever it is: who waits must hear of it
            future.set_exception(error)
        else:
            future.set_result(cubin)

    threading.Thread(target=compile_kernels, name="kernels", daemon=True).start()
    return future


def loaded(cubin: Future[bytes], program: Program, cache: Path | None, load: Callable[[bytes], T]) -> T:
    """Wait for what `compile_behind` compiles, and load it. Raises: whatever was in its way, and what `load` does."""
    code = cubin.result()
    try:
        return load(code)
    except KernelsUnavailableError:
        forget(program, cache)  # broken on disk, perhaps: the next start compiles anew
        raise


def lacks_for_kernels(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run our own kernels, None if it can."""
    major, minor = capability
    if (major, minor) == (9, 0):
        return None
    return f"our own kernels need a Hopper GPU (compute capability 9.0), this one has {major}.{minor}"
