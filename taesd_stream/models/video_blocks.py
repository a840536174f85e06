"""Layers of the video autoencoders: blocks that see the step before, growth and pooling in time.

All take frames as a batch, (N*T, C, H, W) with a stream's frames side by side. Layouts as in madebyollin/taehv@1f14a56.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from taesd_stream.models.networks import conv3x3


class MemoryLayer(nn.Module):
    """A block on [x, x of the step before]; what it was given last is its memory. channels: of x."""

    channels: int

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Two of (n, channels, H, W) -> the same shape."""
        raise NotImplementedError


class MemoryBlock(MemoryLayer):
    """Three 3x3 convolutions on [x, x before], beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Sequential(
            conv3x3(2 * channels, channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
            nn.ReLU(inplace=True),
            conv3x3(channels, channels),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Two of (n, channels, H, W) -> the same shape."""
        result: Tensor = self.act(self.conv(torch.cat([x, before], 1)) + x)
        return result


class SuperMemoryBlock(MemoryLayer):
    """A 7x7 convolution of each channel of [x, x before] alone and a bottleneck, beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, 2 * channels, 7, padding=3, groups=2 * channels, bias=False),
            nn.Conv2d(2 * channels, 4 * channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(4 * channels, channels, 1, bias=False),
        )

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """Two of (n, channels, H, W) -> the same shape."""
        result: Tensor = self.conv(torch.cat([x, before], 1)) + x
        return result


class TimeGrow(nn.Module):
    """One frame becomes `factor`, by a 1x1 convolution to as many channels more."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels, channels * factor, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, channels, H, W) -> (n*factor, channels, H, W)."""
        grown: Tensor = self.conv(x)
        if self.factor == 1:
            return grown
        frames = grown.view(len(x), self.factor, *x.shape[1:])
        if grown.is_contiguous(memory_format=torch.channels_last):  # a plain reshape would lose the layout
            return frames.permute(0, 1, 3, 4, 2).flatten(0, 1).permute(0, 3, 1, 2)
        return frames.flatten(0, 1)


class TimePool(nn.Module):
    """`factor` frames become one, by a 1x1 convolution of their channels side by side."""

    def __init__(self, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(channels * factor, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n*factor, channels, H, W) -> (n, channels, H, W)."""
        pooled: Tensor = self.conv(x.view(-1, self.factor, *x.shape[1:]).flatten(1, 2))
        return pooled


def run_layers(
    layers: Iterable[nn.Module],
    x: Tensor,
    streams: int,
    past: Iterator[Tensor] | None = None,
    memory: list[Tensor] | None = None,
) -> Tensor:
    """Run frames of several streams through layers, all steps of a layer at once.

    x: (streams*T, C, H, W). past: of each MemoryLayer in turn, (streams, C, H, W), what it was given before; None:
    zeros, as at a stream's start. memory: takes what each was given last.
    Raises: ValueError for a past of another shape or dtype.
    """
    for layer in layers:
        if not isinstance(layer, MemoryLayer):
            x = layer(x)
            continue
        if memory is not None:
            memory.append(last_steps(x, streams))
        x = layer(x, steps_before(x, streams, None if past is None else next(past)))
    return x


def steps_before(x: Tensor, streams: int, past: Tensor | None) -> Tensor:
    """x one step later: each frame of x (streams*T, C, H, W) finds the one before it, the first one `past`."""
    expected = (streams, *x.shape[1:])
    if past is not None and (past.shape != expected or past.dtype != x.dtype):
        given = f"{tuple(past.shape)} {past.dtype}"
        raise ValueError(f"memory: expected {expected} {x.dtype} of these latents' streams, got {given}")
    if len(x) == streams:
        return torch.zeros_like(x) if past is None else past
    before = torch.empty_like(x)  # keeps the layout of x, which torch.cat of five axes would not
    steps, steps_of_before = (one.view(streams, -1, *x.shape[1:]) for one in (x, before))
    steps_of_before[:, 1:] = steps[:, :-1]
    steps_of_before[:, 0] = 0 if past is None else past
    return before


def last_steps(x: Tensor, streams: int) -> Tensor:
    """The last frame of each stream: (streams*T, C, H, W) -> (streams, C, H, W), memory of its own."""
    return x if len(x) == streams else x.view(streams, -1, *x.shape[1:])[:, -1].clone()
