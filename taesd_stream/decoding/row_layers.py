"""Layers that run down a picture strip by strip and keep the few rows that the next strip needs.

A strip is (1, C, rows, columns) of a feature map; strips come in order, without gaps, in any heights. Every layer pulls
strips from the one before it, so a layer never holds more than a strip and its kept rows, however high the picture is,
and nothing is computed twice. Zeros are added where the map ends and nowhere else: the result is the whole map's.

Strips are handed on by `map`, not by loops: a loop's variable would keep a strip alive while all others work on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Strips: TypeAlias = Iterator[Tensor]


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
