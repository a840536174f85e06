"""Cut a batch into slices that fit a memory budget, by the bytes that a network really holds at its worst moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from taesd_stream.decoding.live_bytes import LiveBytes

if TYPE_CHECKING:
    from taesd_stream.config import DecoderConfig

Most: TypeAlias = Callable[[], int]  # how many items the next slice may hold, asked before each

_PROBE_CELLS = 16  # side of the latent that is measured; the bytes grow with its area


def decode_budget(settings: DecoderConfig, device: torch.device) -> int:
    """Most bytes that decoding may take at once on a device: `decoder.memory_bytes`, or by what a GPU has free now."""
    # by its index: torch 2.4 takes no device without one, where None is the current one
    return settings.budget_bytes(torch.cuda.mem_get_info(device.index)[0] if device.type == "cuda" else 0)


def bytes_per_latent_px(network: nn.Module, latent_channels: int, dtype: torch.dtype = torch.float32) -> int:
    """The most bytes that one latent cell costs while `network` decodes it in `dtype`, its output included.

    Measured on shapes alone (torch's meta device): no memory, no time, the same on every machine. What a library
    takes beside tensors (cuDNN's workspaces) is not in it.
    """
    shapes_only = copy.deepcopy(network).to(device="meta", dtype=dtype)
    live = LiveBytes()
    with torch.inference_mode(), live:
        shapes_only(torch.empty(1, latent_channels, _PROBE_CELLS, _PROBE_CELLS, device="meta", dtype=dtype))
    return -(-live.peak // _PROBE_CELLS**2)


def slices(count: int, bytes_per_item: int, budget_bytes: int, *, is_graphed: bool = False) -> Iterator[slice]:
    """Cut `count` items, in order, into slices within the budget: as few as can be, all of about one length.

    An item over the budget is a slice of its own. is_graphed: all but the last as long as the largest power of two that
    fits, for CUDA graphs are captured of those: slices of 5, 5 and 6 items would be six launches, put together again.
    Raises: ValueError if the budget is not positive.
    """
    if budget_bytes <= 0:
        raise ValueError(f"budget_bytes: expected above 0, got {budget_bytes}")
    most = max(1, budget_bytes // bytes_per_item)
    if is_graphed and count > most:
        yield from cut([slice(0, count)], lambda: 1 << (most.bit_length() - 1))
        return
    parts = -(-count // most)
    for part in range(parts):
        yield slice(count * part // parts, count * (part + 1) // parts)


def cut(pieces: Iterable[slice], most: Most | None) -> Iterator[slice]:
    """Cut slices further, each only when it is asked for: none holds more than `most()` says then; None is no limit."""
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = piece.stop if most is None else min(piece.stop, start + max(1, most()))
            yield slice(start, stop)
            start = stop
