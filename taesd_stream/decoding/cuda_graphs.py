"""Decode by replaying CUDA graphs: one launch for a whole network, where fifty small ones cost more than the work."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

MAX_BATCH: Final = 16  # above it a batch gains nothing: a few pictures fill any card
MAX_GRAPHS: Final = 8  # each holds its input, its output, and a share of one pool
# Of one batch: 64 channels of them are 2**30 values, and cuDNN counts them in 32 bits. 16 pictures of 1024x1024.
MAX_PIXELS: Final = 1 << 24

Body: TypeAlias = Callable[[Tensor], Tensor]
_Key: TypeAlias = tuple[int, ...]  # shape of the latents


def batches(count: int, picture_px: int) -> Iterator[slice]:
    """Cut `count` frames into powers of two, the largest first: few sizes to capture, and no frame that is padding.

    picture_px: pixels of one frame's picture; one that is too large for any batch goes alone.
    """
    largest = max(1, min(MAX_BATCH, MAX_PIXELS // picture_px))
    first = 0
    while first < count:
        size = 1 << (min(largest, count - first).bit_length() - 1)
        yield slice(first, first + size)
        first += size


class _Graph:
    """A captured run of the body at one shape: its memory is its own until it is dropped."""

    def __init__(self, body: Body, latents: Tensor, pool: Any) -> None:
        self._input = latents.clone(memory_format=torch.channels_last)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: other threads of the process may use CUDA meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = body(self._input)

    def replay(self, latents: Tensor) -> Tensor:
        """The body's output, in memory that the next replay overwrites."""
        self._input.copy_(latents)
        self._graph.replay()
        return self._output


class GraphedBody:
    """A body with fixed launches, run eagerly the first time that it sees a shape, and by a graph from then on.

    A shape that comes once pays for no capture, and a first picture does not wait for one. The graphs share one memory
    pool, so they must not run at the same time: one thread, one stream. The graph not used for longest goes first.
    """

    def __init__(self, body: Body, spatial_factor: int) -> None:
        self._body = body
        self._cell_px = spatial_factor**2
        self._graphs: OrderedDict[_Key, _Graph | None] = OrderedDict()
        self._pool: Any = None  # an opaque handle

    def __call__(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) float16 on the device -> the body's output for all N, in memory of the caller's."""
        count, _, height, width = latents.shape
        parts = [self._run(latents[part]) for part in batches(count, height * width * self._cell_px)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run(self, latents: Tensor) -> Tensor:
        key = tuple(latents.shape)
        is_known = key in self._graphs
        graph = self._graphs.get(key)
        if is_known and graph is None:
            graph = self._capture(latents)
        self._graphs[key] = graph
        self._graphs.move_to_end(key)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        if graph is None:
            # Measured choice of cuDNN's kernels: once a shape, and kept for the capture.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True):
                return self._body(latents.contiguous(memory_format=torch.channels_last))
        return graph.replay(latents).clone()

    def _capture(self, latents: Tensor) -> _Graph:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return _Graph(self._body, latents, self._pool)
