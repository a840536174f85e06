"""The largest tiles whose memory stays within a budget, by the bytes that they really hold at their worst moment."""

from __future__ import annotations

import bisect
import copy
import itertools
import operator
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor, nn

from taesd_stream.decoding.group_statistics import GroupStatistics
from taesd_stream.decoding.live_bytes import LiveBytes
from taesd_stream.decoding.row_layers import ChainRows, Columns, Pool
from taesd_stream.decoding.tiles import (
    Segment,
    TileSize,
    collect,
    column_parts,
    columns_across,
    segments_of,
    unsettled,
    whole_map,
)

# Pixels of a strip. For a processor more are no faster; a GPU wants work for all of itself.
_CPU_STRIP_PX: Final = 1 << 16
_GPU_STRIP_PX: Final = 1 << 22
_LOW_ROWS: Final = 8  # before strips get lower than this, tiles side by side are cheaper
_NARROW_PX: Final = 256  # before tiles get narrower than this, lower strips are cheaper


class BudgetError(ValueError):
    """No tile is small enough for a memory budget; `least_bytes` would do."""

    def __init__(self, budget_bytes: int, least_bytes: int) -> None:
        super().__init__(f"budget_bytes: expected at least {least_bytes} for this size, got {budget_bytes}")
        self.least_bytes = least_bytes


def fitting_tile(network: nn.Sequential, frame: Tensor, *, budget_bytes: int, beside_bytes: int) -> TileSize:
    """The fastest tile within a budget.

    frame: (1, C, H, W), only looked at for its shape, dtype and device. beside_bytes: what the caller holds meanwhile.
    Raises: BudgetError if even the smallest tile needs more.
    """
    segments = segments_of(copy.deepcopy(network).to(device="meta"))
    shape_only = torch.empty_like(frame, device="meta")
    sizes = tile_sizes(segments, frame)
    needs: dict[TileSize, int] = {}

    def fits(tile: TileSize) -> bool:
        needs[tile] = beside_bytes + tile_bytes(segments, shape_only, tile)
        return needs[tile] <= budget_bytes

    found = bisect.bisect_left(sizes, True, key=fits)  # each needs less than those before it
    if found == len(sizes):
        raise BudgetError(budget_bytes, min(needs.values()))
    return sizes[found]


def tile_sizes(segments: Sequence[Segment], frame: Tensor) -> list[TileSize]:
    """Tiles to choose from, the fastest first and the smallest last."""
    width = frame.shape[3]
    width_after = _sizes_after(segments, width)[-1]
    widest, most_across = max(width, width_after), min(width, width_after)
    strip_px = _CPU_STRIP_PX if frame.device.type == "cpu" else _GPU_STRIP_PX
    most_rows = max(_LOW_ROWS, 1 << (strip_px // widest).bit_length() - 1)
    sizes = [TileSize(most_rows, 1)]
    while sizes[-1] != TileSize(1, most_across):
        rows, across = sizes[-1].most_rows, sizes[-1].across
        is_narrow = across == most_across or widest // across < 2 * _NARROW_PX
        if rows > _LOW_ROWS or (rows > 1 and is_narrow):
            sizes.append(TileSize(rows // 2, across))
        else:
            sizes.append(TileSize(rows, min(2 * across, most_across)))
    return sizes


def _sizes_after(segments: Sequence[Segment], size: int) -> list[int]:
    """Rows or columns before the first segment and after each."""
    streams = [segment.stream(1, unsettled) for segment in segments]
    return list(itertools.accumulate(streams, lambda before, stream: stream.size_after(before), initial=size))


def tile_bytes(segments: Sequence[Segment], frame: Tensor, tile: TileSize) -> int:
    """The most bytes at once while `run_tiles` works off a frame; the frame itself is not counted, nor are weights.

    Measured on shapes alone: `frame` and `segments` are on the meta device. What a library takes beside tensors is not
    in it.
    """
    most, source, source_bytes = 0, frame, 0
    for segment, following in zip(segments, [*segments[1:], None], strict=True):
        whole = whole_map(segment, segment.stream(1, unsettled), source)
        whole_bytes = 0 if following is None else whole.nbytes
        most = max(most, source_bytes + whole_bytes + _strip_bytes(segment, following, source, tile))
        source, source_bytes = whole, whole_bytes
    return most


def _strip_bytes(segment: Segment, following: Segment | None, source: Tensor, tile: TileSize) -> int:
    """The most bytes that a segment holds beside the maps before and after it."""
    stream = segment.stream(1, unsettled)
    source = source[:, :, : _settling_rows(stream, tile)]
    whole = whole_map(segment, stream, source)
    most = 0
    for columns in _largest(stream, columns_across(source.shape[3], whole.shape[3], tile.across), source.shape[3]):
        live = LiveBytes(beside=(source, whole))
        with torch.no_grad(), live:
            stream = segment.stream(tile.most_rows, _any_pool(segment, source))
            parts = column_parts(stream, source, columns, tile.most_rows)
            if following is not None:
                collect(parts, whole, following.pool)
            else:
                for _, _, _part in parts:  # held until the next one, as by whoever copies it
                    pass
        most = max(most, live.peak)
    return most


def _largest(stream: ChainRows, tiles: Sequence[Columns], width: int) -> list[Columns]:
    """The tiles of which no other is at least as wide in every layer: one of them needs most."""
    shapes = {tuple(part.stop - part.start for part in stream.columns(tile, width)): tile for tile in tiles}

    def is_covered(shape: tuple[int, ...]) -> bool:
        return any(other != shape and all(map(operator.ge, other, shape)) for other in shapes)

    return [tile for shape, tile in shapes.items() if not is_covered(shape)]


def _settling_rows(stream: ChainRows, tile: TileSize) -> int:
    """Rows until every layer holds all that it ever holds: the last one's lag, and twice what makes it a strip."""
    endless = 1 << 40
    seen = stream.before(Columns(endless // 64, endless // 64 + 1), endless)
    rows_per_row = -(-endless // stream.size_after(endless))
    return (seen.stop - seen.start) // 2 + 2 * (tile.most_rows + rows_per_row)


def _any_pool(segment: Segment, source: Tensor) -> Pool | None:
    """A pool like the one of that segment, whatever its numbers."""
    if segment.pool is None:
        return None
    statistics = GroupStatistics(segment.pool)
    statistics.add(source[:, :, :1, :1])
    return statistics.settled()
