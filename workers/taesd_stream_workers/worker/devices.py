"""Which device decodes: a GPU is taken only where its sampler has left enough of it, and then a share of that alone.

What is decoded on a GPU runs on streams of the lowest priority that CUDA has, torch's own 0, so a sampler's work goes
first where it asks for more.
"""

from __future__ import annotations

from typing import Final

import torch

from taesd_stream.errors import ConfigError
from taesd_stream_workers.role.gpus import visible_gpus

SHARE: Final = 0.5  # of what a GPU has free at the start: the sampler, which comes and goes, keeps the rest


def choose_device(wanted: str, min_free_bytes: int) -> tuple[torch.device, str]:
    """The device to decode on, and why: `auto` takes a GPU only where the sampler has left it enough memory.

    A GPU's memory is capped for this process: past the cap our own allocations fail, and a picture is degraded, not the
    sampler killed. Raises: ConfigError when a named device is not there.
    """
    if wanted != "auto":
        device = _named(wanted)
        return device, _capped(device, "as decoder.device says")
    if not torch.cuda.is_available():
        return torch.device("cpu"), no_gpu_reason()
    told_bytes = next((gpu.free_bytes for gpu in visible_gpus() if gpu.index == 0), None)
    if told_bytes is not None and told_bytes < min_free_bytes:  # without a context: a full GPU has no room for one
        return torch.device("cpu"), busy_reason(told_bytes, min_free_bytes)
    try:
        free_bytes, _ = torch.cuda.mem_get_info()
    except RuntimeError as error:
        return torch.device("cpu"), f"the GPU takes no other program: {_first_line(error)}"
    if free_bytes < min_free_bytes:
        return torch.device("cpu"), busy_reason(free_bytes, min_free_bytes)
    device = torch.device("cuda")
    return device, _capped(device, f"the GPU has {free_bytes >> 20} MiB free")


def no_gpu_reason() -> str:
    """Why there is no GPU to decode on, as far as torch knows."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "this torch is built without CUDA"
    return "no CUDA device"


def busy_reason(free_bytes: int, min_free_bytes: int) -> str:
    """Why a GPU is left to its sampler."""
    return f"the GPU has {free_bytes >> 20} MiB free, under decoder.min_free_bytes = {min_free_bytes >> 20} MiB"


def share_of(free_bytes: int, total_bytes: int) -> float:
    """The part of a GPU's memory that this process may take."""
    return min(1.0, max(0.0, SHARE * free_bytes / total_bytes))


def _capped(device: torch.device, reason: str) -> str:
    """Cap this process's memory on a GPU. Returns: the reason, and the cap."""
    if device.type != "cuda":
        return reason
    free_bytes, total_bytes = torch.cuda.mem_get_info(device.index)  # torch 2.4 takes no device without one
    share = share_of(free_bytes, total_bytes)
    torch.cuda.set_per_process_memory_fraction(share, device.index or 0)
    return f"{reason}, at most {int(share * total_bytes) >> 20} MiB of it is used"


def _named(wanted: str) -> torch.device:
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        raise ConfigError(f"decoder.device = {wanted}: {_first_line(error)}; auto takes what is here") from error
    return device


def _first_line(error: BaseException) -> str:
    """What torch says before its advice to programmers."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
