"""Pictures of any size within a given memory, value for value as the whole network gives them.

A tile runs down the picture in strips that carry over the rows they share (`row_layers`), so there is no seam and next
to nothing is computed twice. `tile_budget` chooses its size: the fastest that fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.decoding.tile_budget import BudgetError, fitting_tile
from taesd_stream.decoding.tiles import TileSize, result_shape, run_tiles, segments_of, unsettled

__all__ = ["BudgetError", "decode_parts", "decode_tiled", "decode_uint8", "encode_tiled", "is_tileable"]

Where: TypeAlias = tuple[slice, slice, slice, slice]  # which of a (N, C, H, W) result


def decode_tiled(decoder: nn.Module, latents: Tensor, *, budget_bytes: int, dtype: torch.dtype | None = None) -> Tensor:
    """What `decoder(latents)` gives, without gradients, with all tensors at a time within a budget.

    decoder: nn.Sequential of the TAESD family's layers, as build_decoder makes it. latents: (N, C, h, w).
    budget_bytes: for the result and all that is made on the way; the weights and `latents` are not in it.
    dtype: of the result; None is the decoder's own.
    Returns: (N, 3, H, W), contiguous. Raises: BudgetError, which names the least; TypeError for another network.
    """
    return _whole(decoder, latents, budget_bytes, dtype or latents.dtype)


def encode_tiled(encoder: nn.Module, pixels: Tensor, *, budget_bytes: int) -> Tensor:
    """What `encoder(pixels)` gives; all else as in `decode_tiled`.

    pixels: (N, 3, H, W) in [0, 1]. Returns: (N, C, h, w).
    """
    return _whole(encoder, pixels, budget_bytes, pixels.dtype)


def decode_uint8(decoder: nn.Module, latents: Tensor, *, budget_bytes: int) -> Tensor:
    """The pictures in 8 bits, clamped and rounded; the float pictures are never in memory. Else as `decode_tiled`.

    Returns: (N, 3, H, W) uint8, contiguous.
    """
    shape = result_shape(_sequential(decoder), latents)
    parts = _parts(decoder, latents, budget_bytes, beside_bytes=math.prod(shape))
    result = torch.empty(shape, dtype=torch.uint8, device=latents.device)
    for where, part in parts:
        result[where] = part.clamp_(0, 1).mul_(255).round_()
    return result


def decode_parts(decoder: nn.Module, latents: Tensor, *, budget_bytes: int) -> Iterator[tuple[Where, Tensor]]:
    """The pictures part by part, each decoded when it is asked for: strips of the whole width, where they fit.

    budget_bytes: as for `decode_tiled`, without the result: of that only the part that was handed out last.
    Returns: (where, part), all parts of the result once, those of a frame together; `result[where] = part` is the
    picture, in the decoder's dtype. A part is the caller's to change.
    Raises: as `decode_tiled`, before anything is decoded.
    """
    return _parts(decoder, latents, budget_bytes, beside_bytes=0)


def is_tileable(network: nn.Module) -> bool:
    """Whether this can run the network: exact strips are known for each of its layers."""
    if not isinstance(network, nn.Sequential):
        return False
    try:
        for segment in segments_of(network):
            segment.stream(1, unsettled)
    except TypeError:
        return False
    return True


def _whole(network: nn.Module, batch: Tensor, budget_bytes: int, dtype: torch.dtype) -> Tensor:
    shape = result_shape(_sequential(network), batch)
    parts = _parts(network, batch, budget_bytes, beside_bytes=math.prod(shape) * dtype.itemsize)
    result = torch.empty(shape, dtype=dtype, device=batch.device)
    for where, part in parts:
        result[where] = part
    return result


def _parts(
    network: nn.Module, batch: Tensor, budget_bytes: int, *, beside_bytes: int
) -> Iterator[tuple[Where, Tensor]]:
    layers = _sequential(network)
    result_shape(layers, batch)  # refuses what the network cannot take
    if batch.device.type == "cpu":
        own = {id(parameter) for parameter in layers.parameters()}
        layers = fold_upsampling(layers)
        beside_bytes += sum(parameter.nbytes for parameter in layers.parameters() if id(parameter) not in own)
    tile = fitting_tile(layers, batch[:1], budget_bytes=budget_bytes, beside_bytes=beside_bytes)
    return _run(layers, batch, tile)


@torch.no_grad()
def _run(network: nn.Sequential, batch: Tensor, tile: TileSize) -> Iterator[tuple[Where, Tensor]]:
    segments = segments_of(network)
    for n in range(len(batch)):
        for rows, columns, part in run_tiles(segments, batch[n : n + 1], tile):
            yield (slice(n, n + 1), slice(None), rows, columns), part


def _sequential(network: nn.Module) -> nn.Sequential:
    if not isinstance(network, nn.Sequential):
        raise TypeError(f"network: expected nn.Sequential, as build_decoder makes it, got {type(network).__name__}")
    return network
