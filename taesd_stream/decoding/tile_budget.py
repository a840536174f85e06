"""The fastest tile whose memory stays within a budget, by the bytes that its layers hold at their worst moment."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from taesd_stream.decoding.row_layers import Strip
from taesd_stream.decoding.tiles import Segment, TileSize, columns_across, segments_of, unsettled

# Pixels of a strip. For a processor more are no faster; a GPU wants work for all of itself.
_CPU_STRIP_PX: Final = 1 << 16
_GPU_STRIP_PX: Final = 1 << 22
_LOW_ROWS: Final = 16  # before strips get lower than this, tiles side by side are cheaper
_NARROW_PX: Final = 256  # before tiles get narrower than this, lower strips are cheaper


class BudgetError(ValueError):
    """No tile is small enough for a memory budget; `least_bytes` would do."""

    def __init__(self, budget_bytes: int, least_bytes: int) -> None:
        super().__init__(f"budget_bytes: expected at least {least_bytes} for this size, got {budget_bytes}")
        self.least_bytes = least_bytes


def fitting_tile(network: nn.Sequential, frame: Tensor, *, budget_bytes: int, beside_bytes: int) -> TileSize:
    """The fastest tile within a budget.

    frame: (1, C, H, W), looked at for its shape, dtype and device. beside_bytes: what the caller holds meanwhile.
    Raises: BudgetError if even the smallest tile needs more.
    """
    segments = segments_of(network)
    sizes = tile_sizes(segments, frame)

    def needs(tile: TileSize) -> int:
        return beside_bytes + tile_bytes(segments, frame, tile)

    found = bisect.bisect_left(sizes, True, key=lambda tile: needs(tile) <= budget_bytes)  # each needs less
    if found == len(sizes):
        raise BudgetError(budget_bytes, needs(sizes[-1]))
    return sizes[found]


def tile_sizes(segments: Sequence[Segment], frame: Tensor) -> list[TileSize]:
    """Tiles to choose from, the fastest first and the smallest last."""
    width = width_after = frame.shape[3]
    for segment in segments:
        width_after = segment.stream(1, unsettled).size_after(width_after)
    widest, most_across = max(width, width_after), min(width, width_after)
    strip_px = _CPU_STRIP_PX if frame.device.type == "cpu" else _GPU_STRIP_PX
    most_rows = max(_LOW_ROWS, 1 << max(1, strip_px // widest).bit_length() - 1)
    sizes = [TileSize(most_rows, 1)]
    while sizes[-1] != TileSize(1, most_across):
        rows, across = sizes[-1].most_rows, sizes[-1].across
        is_narrow = across == most_across or widest // across < 2 * _NARROW_PX
        if rows > _LOW_ROWS or (rows > 1 and is_narrow):
            sizes.append(TileSize(rows // 2, across))
        else:
            sizes.append(TileSize(rows, min(2 * across, most_across)))
    return sizes


def tile_bytes(segments: Sequence[Segment], frame: Tensor, tile: TileSize) -> int:
    """The most bytes at once while `run_tiles` works off a frame; neither the frame nor weights are counted.

    What a library takes beside tensors (cuDNN's workspaces) is not in it.
    """
    most, source_values = 0, 0
    channels, height, width = frame.shape[1:]
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        stream = segment.stream(1, unsettled)
        size_after = (segment.channels_after(channels), stream.size_after(height), stream.size_after(width))
        whole_values = 0 if following is None else size_after[0] * size_after[1] * size_after[2]
        strip = Strip(channels, min(tile.most_rows, height))
        values = _strip_values(segment, following, strip, width, tile) + source_values + whole_values
        most = max(most, values * frame.element_size() + _pool_bytes(segment) + _pool_bytes(following))
        (channels, height, width), source_values = size_after, whole_values
    return most


def _strip_values(segment: Segment, following: Segment | None, strip: Strip, width: int, tile: TileSize) -> int:
    """The most numbers that a segment holds beside the maps before and after it."""
    stream = segment.stream(tile.most_rows, unsettled)
    most = 0
    for columns in columns_across(width, stream.size_after(width), tile.across):
        cost = stream.cost(strip, columns, width)
        part = cost.after.values(columns)  # which whoever takes it holds until the next
        # Statistics: four times as wide, and in half precision once more in full.
        taking = 0 if following is None else 12 * part
        most = max(most, cost.held + part + max(cost.working, taking))
    return most


def _pool_bytes(segment: Segment | None) -> int:
    """What settling a pool takes: statistics and scaled weights, in double precision."""
    if segment is None or segment.pool is None:
        return 0
    weight = next(segment.pool.parameters())
    return weight.numel() * (2 * torch.float64.itemsize + weight.itemsize) + 64 * weight.shape[0] * 8
