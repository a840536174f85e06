"""Layers that run down a picture strip by strip and keep the few rows that the next strip needs.

A strip is (1, C, rows, columns) of a feature map; strips come in order, without gaps, in any heights. Every layer pulls
strips from the one before it, so a layer never holds more than a strip and its kept rows, however high the picture is,
and nothing is computed twice. Zeros are added where the map ends and nowhere else: the result is the whole map's.

Strips are handed on by `map`, not by loops: a loop's variable would keep a strip alive while all others work on it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.models.networks import Block, Clamp

Strips: TypeAlias = Iterator[Tensor]
Pool: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns `start` to `stop`, without the last, of a feature map."""

    start: int
    stop: int

    def of(self, strip: Tensor, held: Columns) -> Tensor:
        """These columns of a strip that holds the columns `held`; a view."""
        return strip[..., self.start - held.start : self.stop - held.start]


@dataclass(frozen=True, slots=True)
class Strip:
    """The largest strip of a stream, but for its columns."""

    channels: int
    rows: int

    def values(self, columns: Columns) -> int:
        """Numbers in it."""
        return self.channels * self.rows * (columns.stop - columns.start)


@dataclass(frozen=True, slots=True)
class Cost:
    """The most numbers that a layer keeps while others work, `held`, and beside them while it works itself, `working`.

    after: the strips that it makes.
    """

    held: int
    working: int
    after: Strip


class RowLayer(Protocol):
    """One layer, or several, as a stream of strips; it keeps no state from one stream to the next."""

    def size_after(self, size: int) -> int:
        """Rows, or columns, of the whole map after the layer."""

    def before(self, after: Columns, width: int) -> Columns:
        """What the columns `after` depend on, of a map that is `width` wide."""

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:
        """Strips of the columns `before(after, width)` -> strips of the columns `after`, in other heights."""

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:
        """What `flow` costs, if no strip that comes is larger than `strip`; never less than it really is."""


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


def before_rows(layer: RowLayer) -> int:
    """Rows that a row in the middle of the result depends on, beside its own."""
    seen = layer.before(Columns(1 << 20, (1 << 20) + 1), 1 << 40)
    return seen.stop - seen.start - 1


def _is_zero_padded_by_half(conv: nn.Conv2d) -> bool:
    (size, across), half = conv.kernel_size, conv.kernel_size[0] // 2
    is_square = size == across and size % 2 == 1 and conv.stride[0] == conv.stride[1]
    return is_square and conv.padding == (half, half) and conv.padding_mode == "zeros" and conv.dilation == (1, 1)


def _is_folded_upsampling(conv: nn.ConvTranspose2d) -> bool:
    is_plain = conv.dilation == (1, 1) and conv.groups == 1 and conv.output_padding == (0, 0)
    return is_plain and (conv.kernel_size, conv.stride, conv.padding) == ((4, 4), (2, 2), (1, 1))


@dataclass(frozen=True, slots=True)
class PointwiseRows:
    """A layer that looks at one point at a time."""

    function: Callable[[Tensor], Tensor]

    def size_after(self, size: int) -> int:
        """As before."""
        return size

    def before(self, after: Columns, width: int) -> Columns:  # noqa: ARG002  # part of the protocol
        """The same columns."""
        return after

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:  # noqa: ARG002
        """Strips of the same heights."""
        return map(self.function, strips)

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:  # noqa: ARG002
        """In place its input alone; else up to three steps beside it, as a Clamp has."""
        maps = 1 if getattr(self.function, "inplace", False) else 4
        return Cost(0, maps * strip.values(after), strip)


@dataclass(frozen=True, slots=True)
class UpsampleRows:
    """Every row and column several times."""

    factor: int
    most_rows: int

    def size_after(self, size: int) -> int:
        """So many times."""
        return size * self.factor

    def before(self, after: Columns, width: int) -> Columns:  # noqa: ARG002
        """The columns that are repeated, also those of which a part is wanted."""
        return Columns(after.start // self.factor, -(-after.stop // self.factor))

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:
        """Strips that are cut first, to be no higher than `most_rows` afterwards."""
        before = self.before(after, width)
        grown = Columns(before.start * self.factor, before.stop * self.factor)
        for strip in strips:
            for part in torch.split(strip, max(1, self.most_rows // self.factor), dim=2):
                yield after.of(F.interpolate(part, scale_factor=self.factor), grown)

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:
        """The strip that is cut, and one part of it that has grown."""
        before = self.before(after, width)
        grown = Columns(before.start * self.factor, before.stop * self.factor)
        rows = min(strip.rows, max(1, self.most_rows // self.factor)) * self.factor
        made = Strip(strip.channels, rows)
        return Cost(strip.values(before), made.values(grown), made)


@dataclass(frozen=True, slots=True)
class ConvolutionRows:
    """A convolution that is zero-padded by half its kernel; with a stride it shrinks the map."""

    conv: nn.Conv2d

    @property
    def _half(self) -> int:
        return self.conv.kernel_size[0] // 2

    @property
    def _stride(self) -> int:
        return self.conv.stride[0]

    def size_after(self, size: int) -> int:
        """One for every stride, also one that the map's end cuts short."""
        return -(-size // self._stride)

    def before(self, after: Columns, width: int) -> Columns:
        """Half a kernel more on both sides; begun at a whole stride, so that the kernel's steps meet."""
        start = (after.start * self._stride - self._half) // self._stride * self._stride
        stop = (after.stop - 1) * self._stride + self._half + 1
        return Columns(max(0, start), min(width, stop))

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:
        """Strips that lag by half a kernel until the map ends."""
        first = self.before(after, width).start // self._stride

        def convolve(rows: Tensor) -> Tensor:
            if rows.shape[2] < self.conv.kernel_size[0]:
                return rows[:, :, :0]
            padding = (0, self._half)  # beside another tile it is wrong, and so are the columns that are cut away
            made = F.conv2d(rows, self.conv.weight, self.conv.bias, self._stride, padding, groups=self.conv.groups)
            return after.of(made, Columns(first, first + made.shape[3]))

        return filter(_has_rows, map(convolve, _windows(strips, self.conv.kernel_size[0], self._stride)))

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:
        """Rows that are kept; a window, and beside it what it is made of or what is made of it."""
        before = self.before(after, width)
        kept = Strip(strip.channels, self.conv.kernel_size[0] - 1).values(before)
        window = kept + strip.values(before)
        made = Strip(self.conv.out_channels, (strip.rows - 1) // self._stride + 1)
        made_columns = Columns(0, self.size_after(before.stop - before.start))
        return Cost(kept, window + max(strip.values(before) + kept, made.values(made_columns)), made)


@dataclass(frozen=True, slots=True)
class DoublingRows:
    """A transposed convolution that doubles the map: `folding.py` makes it of an upsampling and a 3x3 convolution."""

    conv: nn.ConvTranspose2d
    most_rows: int

    def size_after(self, size: int) -> int:
        """Twice."""
        return size * 2

    def before(self, after: Columns, width: int) -> Columns:
        """The columns that are doubled and one more on both sides."""
        return Columns(max(0, after.start // 2 - 1), min(width, (after.stop + 1) // 2 + 1))

    def flow(self, strips: Strips, after: Columns, width: int) -> Strips:
        """Strips that lag by a row before doubling; cut first, to be no higher than `most_rows` afterwards."""
        first = self.before(after, width).start * 2

        def convolve(rows: Tensor) -> Tensor:
            if rows.shape[2] < 3:
                return rows[:, :, :0]
            padding = (3, 1)  # which cuts as many rows off the result: those of the first and the last row
            made = F.conv_transpose2d(rows, self.conv.weight, self.conv.bias, stride=2, padding=padding)
            return after.of(made, Columns(first, first + made.shape[3]))

        low = (part for strip in strips for part in torch.split(strip, max(1, self.most_rows // 2), dim=2))
        return filter(_has_rows, map(convolve, _windows(low, 3, 1)))

    def cost(self, strip: Strip, after: Columns, width: int) -> Cost:
        """The strip that is cut and rows that are kept; a window, and beside it rows to keep or what is made of it."""
        before = self.before(after, width)
        part = Strip(strip.channels, min(strip.rows, max(1, self.most_rows // 2)))
        kept = Strip(strip.channels, 2).values(before)
        made = Strip(self.conv.out_channels, 2 * part.rows)
        made_columns = Columns(0, 2 * (before.stop - before.start))
        window = kept + part.values(before)
        return Cost(strip.values(before) + kept, window + max(kept, made.values(made_columns)), made)


def _windows(strips: Strips, size: int, stride: int) -> Strips:
    """The rows that a kernel of `size` sees at a time, also outside of the map; maybe too few for one step."""
    return map(_Window(size, stride).move, itertools.chain(strips, (None,)))


class _Window:
    """Rows that a kernel is not done with, and a new strip."""

    def __init__(self, size: int, stride: int) -> None:
        self._size, self._stride = size, stride
        self._kept: Tensor | None = None

    def move(self, strip: Tensor | None) -> Tensor:
        """The next rows to convolve; None is the end of the map."""
        kept = self._zeros(strip) if self._kept is None else self._kept
        window = torch.cat([kept, self._zeros(kept) if strip is None else strip], dim=2)
        steps = max(0, (window.shape[2] - self._size) // self._stride + 1)
        self._kept = window[:, :, steps * self._stride :].clone()
        return window

    def _zeros(self, like: Tensor | None) -> Tensor:
        """The rows outside of the map."""
        assert like is not None  # a map has at least one strip
        count, channels, _, width = like.shape
        zeros = like.new_zeros(count, channels, self._size // 2, width)
        return zeros.contiguous(memory_format=torch.channels_last)  # as the strips, or the window would not be


def _has_rows(strip: Tensor) -> bool:
    return strip.shape[2] > 0


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
        lag = Strip(strip.channels, before_rows(self.convolutions) // 2).values(before)
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
