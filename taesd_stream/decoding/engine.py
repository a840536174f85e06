"""Latents in, pictures out: one network on its device, for one latent format."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from taesd_stream.decoding.acceleration import accelerated
from taesd_stream.decoding.colour import stretched_planes, video_planes
from taesd_stream.decoding.cpu_choice import cpu_choice
from taesd_stream.decoding.few_threads import few_threads
from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.decoding.nano_tiles import decode_in_strips
from taesd_stream.decoding.payloads import check_finite
from taesd_stream.decoding.slicing import Most, bytes_per_latent_px, cut, slices
from taesd_stream.decoding.tiling import BudgetError, decode_tiled, is_tileable
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.linear import FactorProjection, ShuffleProjection
from taesd_stream.models.nano import NanoDecoder

# Of a memory budget, what tensors may take: the rest is for cuDNN's workspaces, and for what is rounded up.
_GPU_TENSOR_SHARE: Final = 0.75
# Latents are about [-3, 3]. Larger ones mean nothing, and squared up they would overflow half precision.
_LARGEST_LATENT: Final = 1e4


# What a processor decodes at once: more leaves its caches (16 of 512x512 take 1.4 to 1.7 times as long each).
_CACHED_PX: Final = 1 << 18


class Engine:
    """A network on its device, for one latent format. Used by one thread at a time.

    device: where it decodes. reason: why it is this decoder, and how to get the full one if this is not it.
    temporal_factor: frames of a video that one latent stands for; None of pictures.
    is_full: whether it is the format's own tiny decoder. dtype: what it computes in: on a processor
    float32, or with `is_fast` what is fastest there. history: latents that a frame needs before it; 0 for pictures.
    is_float8: whether our own GPU kernels, where they run, compute their largest layers in float8.
    bytes_per_latent_px: memory that decoding one latent cell takes, at its worst moment.
    """

    def __init__(
        self,
        latent_format: LatentFormat,
        network: nn.Module,
        *,
        decoder: str,
        reason: str,
        is_full: bool,
        device: str,
        is_fast: bool = False,
        is_float8: bool = False,
    ) -> None:
        self.latent_format = latent_format.name
        self.temporal_factor = latent_format.temporal_factor
        self.decoder = decoder
        self.reason = reason
        self.is_full = is_full
        self.history = 0
        self.is_float8 = is_float8
        self._format = latent_format
        self._scale = latent_format.decoder_scale if is_full else None
        self.device = torch.device(device)
        is_nano = isinstance(network, NanoDecoder)
        self.dtype, self._memory_format = _arithmetic(self.device, is_full=is_full, is_nano=is_nano, is_fast=is_fast)
        if self.device.type == "cpu" and isinstance(network, nn.Sequential):
            network = fold_upsampling(network)  # a tenth less to compute
        network = network.to(device=self.device, dtype=self.dtype).eval().requires_grad_(False)
        self._network: nn.Module = network.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self.bytes_per_latent_px = bytes_per_latent_px(network, latent_format.channels, self.dtype)
        self._fast, self._plain_reason = accelerated(self._network, self.device, is_float8=is_float8)

    @property
    def speed_reason(self) -> str:
        """What runs the network on its device now, and why; kernels take over some seconds after the start."""
        return self._plain_reason if self._fast is None else self._fast.reason

    def decode(
        self, latents: NDArray[Any] | Tensor, *, budget_bytes: int, most: Most | None = None, are_finite: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Decode a batch, slice by slice, in order; each slice is decoded when it is asked for.

        latents: (N, C, h, w), floating point, any device; z as the scheduler holds it, FLUX.2 also patchified.
        budget_bytes: memory for one slice; a frame that alone needs more is decoded in tiles (`tiling`), and one that
        even so needs more in the smallest. A network without exact tiles (linear, RGBA) decodes it whole.
        most: how many frames the next slice may hold, however much memory there is.
        are_finite: the caller knows that they hold no NaN; to find out, a GPU would have to be waited for.
        Returns: (which of the N, (n, 3, H, W) float32 in [0, 1] on the engine's device, NCHW contiguous).
        Raises: ValueError, before anything is decoded, for a wrong shape, dtype or budget, or NaN (`check_finite`).
        """
        return self._decode(latents, budget_bytes, most, self._rgb, _plain, are_finite=are_finite)

    def decode_planes(
        self, latents: NDArray[Any] | Tensor, *, budget_bytes: int, most: Most | None = None, are_finite: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """As `decode`, but I420 planes for video, (n, H*3//2, W) uint8 as `colour.video_planes`; no RGB on a GPU."""
        return self._decode(latents, budget_bytes, most, self._planes, video_planes, are_finite=are_finite)

    def picture_size(self, latents: Tensor) -> tuple[int, int]:
        """Height and width, pixels, of the pictures that latents (..., C, h, w) in the spatial form give."""
        return self._format.picture_size(*latents.shape[-2:])

    def forget(self, run: str) -> None:
        """Drop what is remembered of a live run: of pictures nothing. Any thread."""

    def _check(self, latents: Tensor, *, are_finite: bool = False) -> None:
        if latents.ndim != 4 or not latents.is_floating_point():
            given = f"{tuple(latents.shape)} {latents.dtype}"
            raise ValueError(f"{self.latent_format}: expected latents (N, C, h, w) in floating point, got {given}")
        bad = [] if are_finite else check_finite(latents)
        if bad:
            raise ValueError(f"{self.latent_format}: latents hold NaN or infinity in frames {bad}")

    def _decode(
        self,
        latents: NDArray[Any] | Tensor,
        budget_bytes: int,
        most: Most | None,
        whole: Callable[[Tensor], Tensor],
        of_tiles: Callable[[Tensor], Tensor],
        *,
        are_finite: bool,
    ) -> Iterator[tuple[slice, Tensor]]:
        """whole: how a slice becomes what is wanted; of_tiles: how RGB does, which is all that tiles give."""
        tensor = self._format.unfold(torch.as_tensor(latents))
        self._check(tensor, are_finite=are_finite)
        budget_bytes = self._for_tensors(budget_bytes)
        count, _, height, width = self._format.check_shape("steps", tensor.shape)
        frame_bytes = self.bytes_per_latent_px * height * width
        pieces = list(slices(count, frame_bytes, budget_bytes, is_graphed=self._fast is not None))
        if frame_bytes > budget_bytes and (isinstance(self._network, NanoDecoder) or is_tileable(self._network)):
            return self._decode_tiled(tensor, budget_bytes, of_tiles)
        return self._decode_slices(tensor, cut(pieces, self._quickest(most, height, width)), whole)

    def _quickest(self, most: Most | None, height: int, width: int) -> Most | None:
        """How many frames a slice may hold so that a processor does not wait for memory; of a GPU, as `most` says."""
        if self.device.type != "cpu":
            return most
        picture_height, picture_width = self._format.picture_size(height, width)
        frames = max(1, _CACHED_PX // (picture_height * picture_width))
        return lambda: frames if most is None else min(frames, most())

    @torch.inference_mode()
    def _decode_slices(
        self, latents: Tensor, pieces: Iterable[slice], finish: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[slice, Tensor]]:
        for piece in pieces:
            part = self._prepared(latents[piece])
            with self._threads(part):
                finished = finish(part)
            yield piece, finished

    def _threads(self, latents: Tensor) -> AbstractContextManager[None]:
        """A projection computes little; networks take all threads."""
        if not isinstance(self._network, (FactorProjection, ShuffleProjection)):
            return nullcontext()
        height, width = self.picture_size(latents)
        return few_threads(self.device, len(latents) * height * width)

    def _rgb(self, latents: Tensor) -> Tensor:
        rgb = self._network(latents) if self._fast is None else self._fast.rgb(latents)
        return rgb.float().clamp_(0, 1).contiguous()

    def _planes(self, latents: Tensor) -> Tensor:
        if self._fast is not None:
            return self._fast.planes(latents)
        factor = self._format.spatial_factor
        if self.device.type == "cpu" and isinstance(self._network, FactorProjection) and factor % 4 == 0:
            return stretched_planes(self._network.cells(latents), int(factor))
        return video_planes(self._network(latents))

    @torch.inference_mode()
    def _decode_tiled(
        self, latents: Tensor, budget_bytes: int, finish: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[slice, Tensor]]:
        for index in range(len(latents)):
            piece = slice(index, index + 1)
            yield piece, finish(self._tiled(self._prepared(latents[piece]), budget_bytes))

    def _tiled(self, frame: Tensor, budget_bytes: int) -> Tensor:
        if isinstance(self._network, NanoDecoder):
            cell = self.bytes_per_latent_px
            return decode_in_strips(self._network, frame, bytes_per_cell=cell, budget_bytes=budget_bytes).clamp_(0, 1)
        try:
            rgb = decode_tiled(self._network, frame, budget_bytes=budget_bytes, dtype=torch.float32)
        except BudgetError as error:
            # A frame that is kept must be shown all the same: no other way takes less.
            rgb = decode_tiled(self._network, frame, budget_bytes=error.least_bytes, dtype=torch.float32)
        return rgb.clamp_(0, 1)

    def _for_tensors(self, budget_bytes: int) -> int:
        return int(budget_bytes * _GPU_TENSOR_SHARE) if self.device.type == "cuda" else budget_bytes

    def _prepared(self, latents: Tensor) -> Tensor:
        """As the network wants them."""
        part = self._scaled(latents.to(self.device).float()).clamp(-_LARGEST_LATENT, _LARGEST_LATENT)
        return part.to(dtype=self.dtype, memory_format=self._memory_format)

    def _scaled(self, latents: Tensor) -> Tensor:
        """z as the format's own decoder wants it: CogVideoX's alone wants the full VAE's scale taken off."""
        return latents if self._scale is None else latents / self._scale


def _plain(rgb: Tensor) -> Tensor:
    return rgb


_measured = functools.cache(cpu_choice)  # a processor does not change under a process


def _arithmetic(
    device: torch.device, *, is_full: bool, is_nano: bool, is_fast: bool
) -> tuple[torch.dtype, torch.memory_format]:
    """Dtype and memory format of a decoder on its device."""
    if device.type == "cpu" and is_full:
        choice = _measured() if is_fast else _measured().exact
        return choice.dtype, choice.memory_format
    # The published weights are half precision, and a GPU is twice as fast in it, in channels_last. The projection is
    # quick in any form, and nano on a processor quick enough to do without a measurement before its first picture.
    is_half = device.type == "cuda" and (is_full or is_nano)
    return torch.float16 if is_half else torch.float32, torch.channels_last
