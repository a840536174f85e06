"""Networks of the TAESD family as streams of strips: their blocks, their layers one after the other."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from taesd_stream.decoding.row_layers import (
    Columns,
    ConvolutionRows,
    Cost,
    DoublingRows,
    PointwiseRows,
    RowLayer,
    Strip,
    Strips,
    UpsampleRows,
)
from taesd_stream.models.networks import Block, Clamp

Pool: TypeAlias = Callable[[Tensor], Tensor]


def row_layer(module: nn.Module, most_rows: int, pool: Pool | None = None) -> RowLayer:
    """A module as a stream.

    most_rows: where the picture grows, strips are cut to this height, or to one row before growth.
    pool: stands for a Block's own, whose GroupNorm no strip can know. Raises: TypeError for a layer unknown here.
    """
    match module:
        case nn.Sequential():
            return ChainRows([row_layer(layer, most_rows) for layer in module])
        case Block():
            if module.pool is not None and pool is None:
                raise TypeError("a Block with GroupNorm needs the statistics of the whole map")
            return BlockRows(row_layer(module.conv, most_rows), module.fuse, pool)
        case nn.Conv2d() if _is_zero_padded_by_half(module):
            return ConvolutionRows(module)
        case nn.ConvTranspose2d() if _is_folded_upsampling(module):
            return DoublingRows(module, most_rows)
        case nn.Upsample(mode="nearest" | "nearest-exact", scale_factor=float(factor)) if factor.is_integer():
            return UpsampleRows(int(factor), most_rows)
        case nn.ReLU() | nn.SiLU() | nn.Mish() | nn.GELU() | Clamp():
            return PointwiseRows(module)
    raise TypeError(f"no exact strips are known for the layer {module}")


def _is_zero_padded_by_half(conv: nn.Conv2d) -> bool:
    (size, across), half = conv.kernel_size, conv.kernel_size[0] // 2
    is_square = size == across and size % 2 == 1 and conv.stride[0] == conv.stride[1]
    return is_square and conv.padding == (half, half) and conv.padding_mode == "zeros" and conv.dilation == (1, 1)


def _is_folded_upsampling(conv: nn.ConvTranspose2d) -> bool:
    is_plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.output_padding == (0, 0)
    return is_plain and (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Convolutions beside an identity; `pool`, if there is one, is added before them."""

    convolutions: RowLayer
    fuse: Callable[[Tensor], Tensor]
    pool: Pool | None

    def size_after(self, size: int) -> int:
        """As before."""
        return self.convolutions.size_after(size)

    def before(self, after: Columns, width: int) -> Columns:
        """What the convolutions see."""
        return self.convolutions.before(after, width)

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:
        """Strips that lag as the convolutions do."""
        strips = strips if self.pool is None else map(self._add_pool, strips)
        identity = _Identity(self.before(after, width), after)
        return map(self.fuse, map(identity.add, self.convolutions.flow(map(identity.keep, strips), after, width)))

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:
        """Rows on the way past the convolutions, twice while they are cut; and the strip itself while these work."""
        before = self.before(after, width)
        inner = self.convolutions.cost(strip, after, width)
        lag = Strip(strip.channels, _rows_beside(self.convolutions) // 2).values(before)
        # A pool is four times as wide inside; its input and two results are there beside it.
        pooling = 0 if self.pool is None else 7 * strip.values(before)
        working = max(inner.working + strip.values(before), pooling)
        return Cost(inner.held + 2 * lag, working, inner.after)

    def _add_pool(self, strip: Tensor) -> Tensor:
        assert self.pool is not None
        return strip + self.pool(strip)


class _Identity:
    """The way past a block's convolutions: rows wait for what is made of them."""

    def __init__(self, before: Columns, after: Columns) -> None:
        self._before, self._after = before, after
        self._waiting: deque[Tensor] = deque()

    def keep(self, strip: Tensor) -> Tensor:
        """Remember the strip, and hand it on."""
        self._waiting.append(self._after.of(strip, self._before))
        return strip

    def add(self, strip: Tensor) -> Tensor:
        """Add to the next rows, in place, those that were before the convolutions."""
        top = 0
        while top < strip.shape[2]:
            oldest = self._waiting.popleft()
            count = min(oldest.shape[2], strip.shape[2] - top)
            strip[:, :, top : top + count] += oldest[:, :, :count]
            if count < oldest.shape[2]:
                self._waiting.appendleft(oldest[:, :, count:].clone())  # so that the rows that are used are freed
            top += count
        return strip


def _rows_beside(layer: RowLayer) -> int:
    """Rows that a row in the middle of the result depends on, beside its own."""
    seen = layer.before(Columns(1 << 20, (1 << 20) + 1), 1 << 40)
    return seen.stop - seen.start - 1


@dataclass(frozen=True, slots=True)
class ChainRows:
    """Layers one after the other."""

    layers: Sequence[RowLayer]

    def size_after(self, size: int) -> int:
        """After the last."""
        for layer in self.layers:
            size = layer.size_after(size)
        return size

    def before(self, after: Columns, width: int) -> Columns:
        """Before the first."""
        return self.columns(after, width)[0]

    def columns(self, after: Columns, width: int) -> list[Columns]:
        """What the columns `after` depend on, before each layer; and they themselves at the end."""
        wanted = [after]
        for layer, width_before in zip(reversed(self.layers), reversed(self._widths(width)), strict=True):
            wanted.append(layer.before(wanted[-1], width_before))
        return wanted[::-1]

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:
        """Each layer pulls from the one before it."""
        steps = zip(self.layers, self.columns(after, width)[1:], self._widths(width), strict=True)
        for layer, wanted, width_before in steps:
            strips = layer.flow(strips, wanted, width_before)
        return strips

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:
        """All that is held, and the most that one works with."""
        held, working = 0, 0
        for layer, wanted, width_before in zip(
            self.layers, self.columns(after, width)[1:], self._widths(width), strict=True
        ):
            cost = layer.cost(strip, wanted, width_before)
            held, working, strip = held + cost.held, max(working, cost.working), cost.after
        return Cost(held, working, strip)

    def _widths(self, width: int) -> list[int]:
        """The map's width before each layer."""
        sizes = itertools.accumulate(self.layers, lambda size, layer: layer.size_after(size), initial=width)
        return list(sizes)[:-1]
