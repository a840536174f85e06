"""One picture through a network in tiles: strips down the picture, tiles side by side, whole maps where a norm asks.

A GroupNorm needs its whole map: the network is cut before each, into segments. The map between two segments is kept
whole; it is at latent resolution, and so is small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from taesd_stream.decoding.group_statistics import GroupStatistics
from taesd_stream.decoding.row_layers import Columns
from taesd_stream.decoding.row_networks import ChainRows, Pool, row_layer
from taesd_stream.models.networks import Block

Part: TypeAlias = tuple[slice, slice, Tensor]  # rows, columns, and what is there: (1, C, rows, columns)


@dataclass(frozen=True, slots=True)
class TileSize:
    """Strips of at most `most_rows` rows at any resolution, 2 where the picture grows; `across` tiles side by side."""

    most_rows: int
    across: int


class Segment:
    """Layers that strips run through in one go; only the first may be a Block with GroupNorm."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers

    @property
    def pool(self) -> nn.Sequential | None:
        """What it begins with, if that needs its whole map."""
        return pooled(self.layers[0]) if self.layers else None

    def channels_after(self, channels: int) -> int:
        """Channels of its result, if it is given so many."""
        convolutions = convolutions_of(nn.Sequential(*self.layers))
        return convolutions[-1].out_channels if convolutions else channels

    def stream(self, most_rows: int, pool: Pool | None) -> ChainRows:
        """Its layers as a stream of strips; `pool` stands for its own."""
        return ChainRows([row_layer(layer, most_rows, pool if n == 0 else None) for n, layer in enumerate(self.layers)])

    def parts(self, source: Tensor, tile: TileSize, pool: Pool | None) -> Iterator[Part]:
        """Its result, all of it once: tile by tile, and each from top to bottom."""
        stream = self.stream(tile.most_rows, pool)
        width = source.shape[3]
        for columns in columns_across(width, stream.size_after(width), tile.across):
            yield from column_parts(stream, source, columns, tile.most_rows)


def convolutions_of(network: nn.Module) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    """All convolutions, in the order in which they are defined."""
    return [layer for layer in network.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))]


def pooled(layer: nn.Module) -> nn.Sequential | None:
    """The part of a layer that needs its whole map, if it has one."""
    return layer.pool if isinstance(layer, Block) else None


def segments_of(network: nn.Sequential) -> list[Segment]:
    """The network, cut before each Block with GroupNorm."""
    runs: list[list[nn.Module]] = [[]]
    for layer in network:
        if pooled(layer) is not None:
            runs.append([])
        runs[-1].append(layer)
    return [Segment(run) for run in runs]


def columns_across(before: int, after: int, across: int) -> list[Columns]:
    """The width after a segment in parts as equal as can be, each of whole columns also where the map is smallest.

    Raises: ValueError for more parts than that map has columns.
    """
    unit = max(1, after // before)
    cells = after // unit
    if not 1 <= across <= cells:
        raise ValueError(f"across: expected 1 to {cells}, got {across}")
    edges = [cells * n // across * unit for n in range(across + 1)]
    return [Columns(start, stop) for start, stop in itertools.pairwise(edges)]


def column_parts(stream: ChainRows, source: Tensor, columns: Columns, most_rows: int) -> Iterator[Part]:
    """One tile, from top to bottom."""
    before = stream.before(columns, source.shape[3])
    views = torch.split(source[..., before.start : before.stop], most_rows, dim=2)
    strips = (view.contiguous(memory_format=torch.channels_last) for view in views)  # what oneDNN and cuDNN like
    top = 0
    for strip in stream.flow(strips, columns, source.shape[3]):
        bottom = top + strip.shape[2]
        yield slice(top, bottom), slice(columns.start, columns.stop), strip
        top = bottom


def run_tiles(segments: Sequence[Segment], frame: Tensor, tile: TileSize) -> Iterator[Part]:
    """The parts of the network's result for a frame (1, C, H, W), each made when it is asked for."""
    source, pool = frame, None
    for segment, following in itertools.pairwise(segments):
        stream = segment.stream(tile.most_rows, pool)
        whole = whole_map(segment, stream, source)
        pool = collect(segment.parts(source, tile, pool), whole, following.pool)
        source = whole
    yield from segments[-1].parts(source, tile, pool)


def result_shape(network: nn.Sequential, batch: Tensor) -> tuple[int, int, int, int]:
    """The shape of the network's result for a batch (N, C, H, W).

    Raises: ValueError for a batch that it cannot take; TypeError for a layer that cannot be tiled.
    """
    given, channels = tuple(batch.shape), convolutions_of(network)[0].in_channels
    if len(given) != 4 or given[1] != channels or given[2] * given[3] == 0:
        raise ValueError(f"expected a batch (N, {channels}, H, W), got {given}")
    count, channels, height, width = given
    for segment in segments_of(network):
        stream = segment.stream(1, unsettled)
        height, width, channels = stream.size_after(height), stream.size_after(width), segment.channels_after(channels)
    return count, channels, height, width


def unsettled(rows: Tensor) -> Tensor:
    """Stands for a settled pool where only sizes are asked for."""
    raise AssertionError(f"no pool was given for {tuple(rows.shape)}")


def whole_map(segment: Segment, stream: ChainRows, source: Tensor) -> Tensor:
    """Room for a segment's whole result."""
    height, width = stream.size_after(source.shape[2]), stream.size_after(source.shape[3])
    shape = (1, segment.channels_after(source.shape[1]), height, width)
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=torch.channels_last)


def collect(parts: Iterator[Part], whole: Tensor, pool: nn.Sequential | None) -> Pool:
    """Put the parts of a map together, and settle the norm that follows."""
    assert pool is not None  # segments are cut before a norm
    statistics = GroupStatistics(pool)
    for rows, columns, strip in parts:
        whole[..., rows, columns] = strip
        statistics.add(strip)
    return statistics.settled()
