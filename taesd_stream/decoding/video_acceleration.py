"""The fastest way to step video streams on a GPU: fused calls in CUDA graphs, and our own kernels once compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from taesd_stream.decoding.acceleration import LARGEST_ERROR
from taesd_stream.decoding.decoder_plan import UnsupportedNetworkError
from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError
from taesd_stream.decoding.kernels.later import KernelsLater
from taesd_stream.decoding.kernels.launching import Kernels
from taesd_stream.decoding.video_plan import VideoPlan
from taesd_stream.models.tiny_video import VideoDecoder

MAX_GRAPHS: Final = 3  # each holds memories of all its streams
_CHECK_SIZE: Final = (2, 5, 9)  # streams, h, w: odd, and every tile has an edge in it
Step: TypeAlias = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, list[Tensor]]]


class AcceleratedVideo:
    """Steps streams together, one latent of each. Used by one thread."""

    def __init__(self, network: VideoDecoder, device: torch.device, *, cache: Path | None = None) -> None:
        """network: float16, on the device. Raises: UnsupportedNetworkError if it is not laid out as TAEHV."""
        self._network = network
        self._device = device
        self._stock = VideoPlan(network)
        self._step = _GraphedStep(self._stock.rgb)
        self._kernels = KernelsLater(device, cache, self._use)

    @property
    def reason(self) -> str:
        """What runs, and why."""
        return self._kernels.reason

    def step(self, latents: Tensor, memories: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        """The next latents of N streams, (N, C, h, w) float16 on the device.

        memories: of each stream, of each block (1, C', h', w'). Returns: frames (N, frames a latent, 3, H, W) float16
        in [0, 1], also those that a family hides, and each stream's next memory; all of it the caller's own.
        """
        with torch.cuda.device(self._device):
            self._kernels.take_over()
            return self._step(latents, memories)

    def wait(self) -> None:
        """Wait until the kernels are compiled, checked and in use, or refused: for benchmarks and tests."""
        self._kernels.take_over(wait=True)

    def _use(self, kernels: Kernels) -> str:
        """Use them if they give the fused calls' frames. Raises: KernelsUnavailableError if not."""
        plan = VideoPlan(self._network, kernels)
        self._check(plan)
        self._step = _GraphedStep(plan.rgb)
        return "our own kernels"

    def _check(self, plan: VideoPlan) -> None:
        """Raises: KernelsUnavailableError if frames or memories differ from the fused calls' by more than rounding."""
        streams, height, width = _CHECK_SIZE
        seeded = torch.Generator().manual_seed(0)
        noise = torch.randn((streams, self._network.family.latent_channels, height, width), generator=seeded)
        latents = noise.to(self._device, torch.float16).contiguous(memory_format=torch.channels_last)
        memory = [_channels_last(part) for part in self._network.start(streams, height, width)[1:]]
        _, memory = self._stock.rgb(latents, memory)
        (expected, after), (given, given_after) = self._stock.rgb(latents, memory), plan.rgb(latents, memory)
        for one, other in zip([given, *given_after], [expected, *after], strict=True):
            error = float((one.float() - other.float()).norm() / other.float().norm())
            if not error <= LARGEST_ERROR:  # also if it is NaN
                raise KernelsUnavailableError(f"our own kernels differ from cuDNN by {error:.1e} of a video's maps")


def accelerated_video(network: VideoDecoder, device: torch.device) -> tuple[AcceleratedVideo | None, str]:
    """A faster way to step live streams, or None; and the reason, in words."""
    if device.type != "cuda" or torch.version.cuda is None:
        return None, f"the plain network: {device.type} has no fused calls"
    if next(network.parameters()).dtype != torch.float16:
        return None, "the plain network: the fused calls are for float16"
    target = device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
    try:
        video = AcceleratedVideo(network, target)
    except UnsupportedNetworkError as error:
        return None, f"the plain network: {error}"
    return video, video.reason


class _GraphedStep:
    """A step with fixed launches: eagerly the first time that it sees a number of streams and a size, then by a graph.

    Memories are gathered into the graph's own, and what it leaves is copied out to each stream. The graphs share the
    memory of their maps, so they must not run at the same time: one thread, one stream.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], _StepGraph] = {}  # the one used last is the last
        self._pool: Any = None  # an opaque handle

    def __call__(self, latents: Tensor, memories: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        key = tuple(latents.shape)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):  # measured once a shape, kept for the capture
            if key not in self._seen:
                self._seen.add(key)
                gathered = [_channels_last(torch.cat(parts)) for parts in zip(*memories, strict=True)]
                frames, after = self._step(_channels_last(latents), gathered)
                return frames, [[part[row : row + 1].clone() for part in after] for row in range(len(latents))]
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = self._graphs.pop(key, None) or _StepGraph(self._step, latents, memories, self._pool)
        self._graphs[key] = graph
        while len(self._graphs) > MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return graph.replay(latents, memories)


class _StepGraph:
    def __init__(self, step: Step, latents: Tensor, memories: Sequence[Sequence[Tensor]], pool: Any) -> None:
        self._latents = latents.clone(memory_format=torch.channels_last)
        self._memory = [_channels_last(torch.cat(parts)) for parts in zip(*memories, strict=True)]
        self._graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._frames, self._after = step(self._latents, self._memory)

    def replay(self, latents: Tensor, memories: Sequence[Sequence[Tensor]]) -> tuple[Tensor, list[list[Tensor]]]:
        rows = range(len(latents))
        self._latents.copy_(latents)
        _copy(
            [part[row : row + 1] for row in rows for part in self._memory], [part for one in memories for part in one]
        )
        self._graph.replay()
        after = [[torch.empty_like(part[row : row + 1]) for part in self._after] for row in rows]
        _copy([part for one in after for part in one], [part[row : row + 1] for row in rows for part in self._after])
        return self._frames.clone(), after


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """All at once: a launch for many."""
    torch._foreach_copy_(targets, sources)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
