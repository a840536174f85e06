"""Which device decodes: a GPU is taken only where its sampler has left enough of it."""

from __future__ import annotations

import torch

from taesd_stream.errors import ConfigError


def choose_device(wanted: str, min_free_bytes: int) -> tuple[torch.device, str]:
    """The device to decode on, and why: `auto` takes a GPU only where the sampler has left it enough memory.

    Raises: ConfigError when a named device is not there.
    """
    if wanted != "auto":
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
            reason = next(iter(str(error).splitlines()), "torch sees no such device")
            raise ConfigError(f"decoder.device = {wanted}: {reason[:200]}; auto takes what is here") from error
        return device, "as decoder.device says"
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device"
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < min_free_bytes:
        return torch.device("cpu"), f"the GPU has {free_bytes >> 20} MiB free, under decoder.min_free_bytes"
    return torch.device("cuda"), f"the GPU has {free_bytes >> 20} MiB free"
