"""Frames' payloads as latents, and whether a picture can be made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

from taesd_stream.frames import WireDtype

_TORCH_DTYPES: Final[dict[WireDtype, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
# Infinity's bits: those of NaN are higher, of finite values lower, as long as the sign is left out.
_INFINITY: Final = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}


def check_finite(latents: Tensor) -> list[int]:
    """Which of the N frames of latents (N, ...) hold NaN or infinity: those have no picture."""
    finite = torch.isfinite(latents).flatten(1).all(dim=1)
    return [index for index, is_finite in enumerate(finite.tolist()) if not is_finite]


def rows_not_finite(words: Tensor) -> list[int]:
    """As `check_finite`, of words (N, ...) as they travel, on the host: by numpy, in one thread.

    torch would share the work with its threads, and beside encoders waiting for them costs more than the work.
    """
    infinity = _INFINITY.get(words.dtype)
    if infinity is None:
        return []
    bits = words.view(torch.int32 if words.itemsize == 4 else torch.int16).numpy().reshape(len(words), -1)
    unsigned = bits.view(np.uint32 if words.itemsize == 4 else np.uint16)
    sign = 1 << (8 * words.itemsize - 1)
    # Two maxima, without a copy in between: negative values are the largest unsigned ones, and negative signed ones.
    is_bad = (bits.max(axis=1) >= infinity) | (unsigned.max(axis=1) >= sign + infinity)
    return [int(row) for row in np.flatnonzero(is_bad)]


def latents_from_payload(
    payload: bytes | memoryview, dtype: WireDtype, shape: Sequence[int], magnitude: float
) -> Tensor:
    """A frame's payload as float32 latents of `shape`; a copy.

    payload: C order, little-endian; bfloat16 is its raw 2-byte words; uint8 is clamp(z / (2 magnitude) + 0.5) * 255.
    Raises: ValueError if the bytes are not as many as the shape and dtype say.
    """
    words = torch.empty((1, *shape), dtype=torch_dtype(dtype))
    copy_payloads([payload], words)
    return latents_from_words(words[0], magnitude).float()


def torch_dtype(dtype: WireDtype) -> torch.dtype:
    """What a payload's words are in memory."""
    return _TORCH_DTYPES[dtype]


def copy_payloads(payloads: Sequence[bytes | memoryview], words: Tensor) -> None:
    """Copy frames' bytes into words (N, ...), contiguous on the host. Raises: ValueError if they are not as many."""
    memory: memoryview = words.view(torch.uint8).flatten().numpy().data
    nbytes = words.nbytes // len(payloads)
    for place, payload in enumerate(payloads):
        given = memoryview(payload).nbytes
        if given != nbytes or given == 0:
            dtype = str(words.dtype).removeprefix("torch.")
            raise ValueError(f"payload: expected {nbytes} bytes for {tuple(words.shape[1:])} {dtype}, got {given}")
        memory[place * nbytes : (place + 1) * nbytes] = memoryview(payload).cast("B")  # keeps the GIL: it is short


def latents_from_words(words: Tensor, magnitude: float) -> Tensor:
    """Words as they travel -> latents: float32 of uint8, else as they are. magnitude: see `latents_from_payload`."""
    return (words.float() / 255 - 0.5) * (2 * magnitude) if words.dtype == torch.uint8 else words
