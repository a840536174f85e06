"""The TAEHV family: latents to video and back, a whole clip at once or step by step with a memory that the caller owns.

Layer numbers and keys follow madebyollin/taehv@1f14a56 (MIT), taem1 and taesdv, so that the original files load
strictly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from taesd_stream.models.video_blocks import MemoryLayer, TimeGrow, TimePool, last_steps, run_layers
from taesd_stream.models.video_families import CHUNK_FRAMES, CHUNK_LATENTS, VideoFamily
from taesd_stream.models.video_networks import (
    decoder_layers,
    encoder_layers,
    in_running_order,
    last_memory,
    memory_scales,
)

# (positions, block 1, block 2, ...), all with the streams as first axis. positions: (N,) int64 on the CPU, latents that
# each stream has had; the others: what each block was given last. Stack with torch.cat, take out with slices.
Memory: TypeAlias = tuple[Tensor, ...]
# (N, T', 3, H, W); streams that show different numbers of frames: one (t', 3, H, W) each. frames[n] is stream n's.
Frames: TypeAlias = Tensor | tuple[Tensor, ...]


class VideoDecoder(nn.Module):
    """Latents (N, T, C, h, w) -> frames (N, T', 3, H, W) in [0, 1]; causal: a later latent changes no earlier frame.

    frames_per_latent: before the first ones of a stream are hidden.
    """

    def __init__(
        self,
        family: VideoFamily,
        *,
        decoder_time_upscale: Sequence[bool] | None = None,
        decoder_space_upscale: Sequence[bool] | None = None,
    ) -> None:
        """decoder_time_upscale, decoder_space_upscale: the stages that grow; fewer make a cheap preview."""
        super().__init__()
        self.family = family
        growth = family.growth_of(decoder_time_upscale)
        space_upscale = (True, True, True) if decoder_space_upscale is None else decoder_space_upscale
        if len(space_upscale) != 3:
            raise ValueError(f"decoder_space_upscale: expected 3 flags, one a stage, got {len(space_upscale)}")
        first, second, third = (2 if flag else 1 for flag in space_upscale)
        self.frames_per_latent = growth[0] * growth[1] * growth[2]
        self.decoder = decoder_layers(family, growth, (first, second, third))

    @property
    def history(self) -> int:
        """Latents before a frame's own that it depends on: from as many, `rebuild` gives the exact memory."""
        layers = in_running_order(self.decoder)
        reach = 0  # steps before the last one, at the rate of the layer at hand
        for layer in reversed(layers[: last_memory(layers)]):
            if isinstance(layer, MemoryLayer):
                reach += 1
            elif isinstance(layer, TimeGrow):
                reach //= layer.factor  # the last of a latent's frames is the furthest from the latent before
        return reach + 1

    def forward(self, latents: Tensor) -> Tensor:
        """Latents of pictures, (N, C, h, w) -> (N, 3, H, W) in [0, 1]: each the clip of one latent, its last frame."""
        shown = [[self.frames_per_latent - 1]] * len(latents)
        return self._frames(latents, len(latents), shown)

    def decode_clip(self, latents: Tensor) -> Tensor:
        """A whole clip at once: (N, T, C, h, w) -> (N, T', 3, H, W) in [0, 1], the start hidden as the family does.

        Raises: ValueError for a wrong shape, dtype or NaN.
        """
        self._check(latents)
        length = latents.shape[1]
        latents = latents[:, : self.family.shown_latents(length)]
        streams, count = latents.shape[:2]
        shown = [self._shown(0, count, length)] * streams
        return _of_streams(self._frames(latents.flatten(0, 1), streams, shown), streams)

    def clip_frames(self, length: int) -> int:
        """How many frames a clip of so many latents shows."""
        return len(self._shown(0, self.family.shown_latents(length), length))

    def step(
        self, latents: Tensor, memory: Memory | None = None, *, clip_length: int | None = None
    ) -> tuple[Frames, Memory]:
        """The next latents of N streams, each at its own moment: each gets the frames that it would get alone.

        latents: (N, C, h, w), or (N, T, C, h, w) for T steps at once. memory: what the last step gave, None at the
        start; it is not changed. clip_length: latents in all, where that is known: CogVideoX hides its first frames by
        it, and none of a stream, as in the original.
        Raises: ValueError for a wrong shape, dtype or NaN, and for a memory of other streams.
        """
        latents = latents.unsqueeze(1) if latents.ndim == 4 else latents
        self._check(latents)
        streams, count = latents.shape[:2]
        if memory is None:
            memory = self.start(streams, *latents.shape[3:])
        positions, past = self._opened(memory, streams)
        shown = [self._shown(position, count, clip_length) for position in positions.tolist()]
        kept: list[Tensor] = []
        frames = self._frames(latents.flatten(0, 1), streams, shown, iter(past), kept)
        counts = [len(one) for one in shown]
        result: Frames = _of_streams(frames, streams) if len(set(counts)) == 1 else torch.split(frames, counts)
        return result, (positions + count, *kept)

    def start(self, streams: int, height: int, width: int) -> Memory:
        """The memory of streams that had no latent yet, of height x width cells: to be stacked with others."""
        like = next(self.parameters())
        blocks = (
            like.new_zeros(streams, channels, height * scale, width * scale)
            for channels, scale in memory_scales(self.decoder)
        )
        return torch.zeros(streams, dtype=torch.int64, device="cpu"), *blocks

    def rebuild(self, last_latents: Tensor, position: int | None = None) -> Memory:
        """The exact memory of streams from their last latents, (N, T, C, h, w): `history` of them, or all so far.

        position: latents that the streams have had in all; None: as many as are given. It decides which frames are
        hidden, so beyond the start it matters to H3's chunks alone.
        Raises: ValueError for a wrong shape, dtype or NaN, and for fewer latents than are needed.
        """
        self._check(last_latents)
        streams, given = last_latents.shape[:2]
        position = given if position is None else position
        if position < given or given < min(position, self.history):
            needed = f"the last {min(position, self.history)} of {position}"
            raise ValueError(f"{self.family.name}: a memory is rebuilt from {needed} latents, got {given}")
        layers = in_running_order(self.decoder)
        kept: list[Tensor] = []
        latents = last_latents[:, -self.history :].flatten(0, 1)
        x = run_layers(layers[: last_memory(layers)], latents, streams, memory=kept)
        return torch.full((streams,), position, device="cpu"), *kept, last_steps(x, streams)

    def cut_growth(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights that fit where growth in time is off: of each growth only what makes its last frame."""
        weights = dict(state_dict)
        for index, layer in enumerate(self.decoder):
            key = f"decoder.{index}.conv.weight"
            if isinstance(layer, TimeGrow) and key in weights:
                weights[key] = weights[key][-layer.conv.out_channels :]
        return weights

    def _shown(self, position: int, count: int, clip_length: int | None = None) -> list[int]:
        """Which of the frames of `count` latents from `position` on are shown."""
        shown: list[int] = []
        for index in range(count):
            first = self.family.hidden_frames(position + index, self.frames_per_latent, clip_length)
            shown += (index * self.frames_per_latent + frame for frame in range(first, self.frames_per_latent))
        return shown

    def _frames(
        self,
        latents: Tensor,
        streams: int,
        shown: Sequence[Sequence[int]],
        past: Iterator[Tensor] | None = None,
        memory: list[Tensor] | None = None,
    ) -> Tensor:
        """(N*T, C, h, w) -> the shown frames of all streams in turn, (sum, 3, H, W) in [0, 1]."""
        layers = in_running_order(self.decoder)
        split = 1 + max(place for place, layer in enumerate(layers) if isinstance(layer, MemoryLayer | TimeGrow))
        x = run_layers(layers[:split], latents, streams, past, memory)
        each = len(x) // streams
        wanted = [stream * each + frame for stream, frames in enumerate(shown) for frame in frames]
        if len(wanted) < len(x):  # what is hidden needs no full resolution
            x = x[wanted[0] :] if streams == 1 and len(wanted) == len(x) - wanted[0] else x[wanted]
        for layer in layers[split:]:
            x = layer(x)
        return functional.pixel_shuffle(x, self.family.patch_size).clamp_(0, 1)

    def _opened(self, memory: Memory, streams: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A memory's positions and blocks. Raises: ValueError if it is not of so many streams of this decoder."""
        blocks = sum(isinstance(layer, MemoryLayer) for layer in self.decoder)
        if len(memory) != 1 + blocks:
            raise ValueError(f"memory: {self.family.name} expects {1 + blocks} tensors, got {len(memory)}")
        positions, *past = memory
        if positions.shape != (streams,) or positions.dtype != torch.int64:
            given = f"{tuple(positions.shape)} {positions.dtype}"
            raise ValueError(f"memory: expected positions ({streams},) torch.int64 first, got {given}")
        return positions, tuple(past)

    def _check(self, latents: Tensor) -> None:
        check_frames(latents, self.family.latent_channels, next(self.parameters()).dtype, f"{self.family.name} latents")


class VideoEncoder(nn.Module):
    """Frames (N, T, 3, H, W) in [0, 1] -> latents (N, T', C, h, w)."""

    def __init__(self, family: VideoFamily) -> None:
        super().__init__()
        self.family = family
        self.encoder = encoder_layers(family)

    @property
    def frames_per_latent(self) -> int:
        """Frames that become one latent."""
        return math.prod(layer.factor for layer in self.encoder if isinstance(layer, TimePool))

    def encode_clip(self, pixels: Tensor) -> Tensor:
        """A whole clip at once; the last frame is repeated until the latents come out even, for Mochi too.

        pixels: height and width are multiples of the family's patch size; the convolutions round up what is left.
        Raises: ValueError for a wrong shape, dtype or NaN.
        """
        check_frames(pixels, 3, next(self.parameters()).dtype, f"{self.family.name} pixels")
        patch = self.family.patch_size
        if pixels.shape[3] % patch or pixels.shape[4] % patch:
            given = f"{pixels.shape[3]}x{pixels.shape[4]}"
            raise ValueError(f"{self.family.name} pixels: expected multiples of {patch} a side, got {given}")
        pixels = functional.pixel_unshuffle(pixels, patch)
        if self.family.hides == "chunk":
            return self._encode_chunks(pixels)
        return self._encode(_padded(pixels, self.frames_per_latent))

    def _encode_chunks(self, pixels: Tensor) -> Tensor:
        """H3: each 17 frames alone, behind three black ones; the last chunk's last three latents are dropped."""
        chunks = _padded(pixels, CHUNK_FRAMES).reshape(-1, CHUNK_FRAMES, *pixels.shape[2:])
        black = CHUNK_LATENTS * self.frames_per_latent - CHUNK_FRAMES
        chunks = functional.pad(chunks, (0, 0, 0, 0, 0, 0, black, 0))
        latents = _of_streams(self._encode(chunks).flatten(0, 1), len(pixels))
        return latents[:, : self.family.shown_latents(latents.shape[1])]

    def _encode(self, pixels: Tensor) -> Tensor:
        return _of_streams(run_layers(self.encoder, pixels.flatten(0, 1), len(pixels)), len(pixels))


def _of_streams(frames: Tensor, streams: int) -> Tensor:
    """(N*T, C, H, W) -> (N, T, C, H, W)."""
    return frames.reshape(streams, -1, *frames.shape[1:])


def _padded(frames: Tensor, multiple: int) -> Tensor:
    """(N, T, ...) with the last frame repeated until T is a multiple."""
    missing = -frames.shape[1] % multiple
    return torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], 1) if missing else frames


def check_frames(frames: Tensor, channels: int, dtype: torch.dtype, name: str) -> None:
    """Raise ValueError unless frames are (N, T, channels, h, w) of that dtype, not empty, finite."""
    if frames.ndim != 5 or 0 in frames.shape:
        raise ValueError(f"{name}: expected (N, T, {channels}, h, w), none of them 0, got {tuple(frames.shape)}")
    if frames.shape[2] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {frames.shape[2]} in {tuple(frames.shape)}")
    if frames.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {frames.dtype}")
    if not frames.is_meta and not frames.isfinite().all():
        raise ValueError(f"{name}: hold NaN or infinity")
