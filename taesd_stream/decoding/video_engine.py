"""Latents of video in, pictures out: clips cut in time, and live streams stepped together with their memories."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.live_bytes import LiveBytes
from taesd_stream.decoding.slicing import Most, cut, slices
from taesd_stream.decoding.stream_memories import StreamMemories, StreamMemory
from taesd_stream.decoding.video_acceleration import AcceleratedVideo, accelerated_video
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.tiny_video import Memory, VideoDecoder

# Latents are about [-3, 3], and beyond 30 the networks' own soft limit gives the same to the last bit; the super
# decoders have none, and larger values would overflow them in half precision.
_LARGEST_LATENT: Final = 30.0
_PROBE_CELLS: Final = 16  # side of the latent that is measured; the bytes grow with its area
_MEMORY_BYTES: Final = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePart:
    """The next latents of a live run.

    latents: (t, C, h, w); index: place in the run of the first. history: those just before it, (k, C, h, w), as many
    as are at hand up to the engine's `history`; needed where the run's memory is not here.
    """

    run: str
    index: int
    latents: Tensor
    history: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LiveFrames:
    """What one part, or a slice of it, shows. place: which of the parts; frames: (t', 3, H, W) float32 in [0, 1], on
    the engine's device; first: which frame of the part comes first; latents: how many were decoded for them.

    is_approximate: the stream's memory was lost and too little history was there: colours are not yet right.
    """

    place: int
    frames: Tensor
    is_approximate: bool
    first: int = 0
    latents: int = 1


class VideoEngine(Engine):
    """An Engine of a video family; its `decode` gives one picture a latent, for image samplers on video latents.

    history: latents that a frame depends on before its own. memories: of the live runs that it has decoded.
    bytes_per_step_px: memory that one latent cell takes for all frames of one latent, at its worst moment.
    """

    def __init__(
        self,
        latent_format: LatentFormat,
        network: VideoDecoder,
        *,
        decoder: str,
        reason: str,
        is_full: bool,
        device: str,
        is_fast: bool = False,
        memory_budget_bytes: int = _MEMORY_BYTES,
    ) -> None:
        super().__init__(
            latent_format, network, decoder=decoder, reason=reason, is_full=is_full, device=device, is_fast=is_fast
        )
        self._video = network  # moved to its device by now
        self._fast_video, self._plain_reason = accelerated_video(network, self.device)
        self.history = network.history
        self.memories = StreamMemories(memory_budget_bytes)
        self.bytes_per_step_px = _bytes_per_step_px(network)

    @property
    def speed_reason(self) -> str:
        """As Engine's, of live streams; clips and pictures take the network as it is."""
        return self._plain_reason if self._fast_video is None else self._fast_video.reason

    def frames_of_clip(self, length: int) -> int:
        """How many frames a clip of so many latents gives."""
        return self._video.clip_frames(length)

    def frames_before(self, index: int) -> int:
        """How many frames the latents of a live run show before its latent `index`."""
        return self._video.family.frames_of_stream(index, self._video.frames_per_latent)

    def decode_clip(
        self, latents: Tensor, *, budget_bytes: int, most: Most | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """Decode a clip, cut in time by the budget, and by `most` as `decode`: exact, for the memories go along.

        latents: (T, C, h, w), floating point, any device; each slice is decoded when it is asked for.
        Returns: (which of the T, their frames (t', 3, H, W) float32 in [0, 1]), in order.
        Raises: ValueError, before anything is decoded, for a wrong shape, dtype or budget, or NaN.
        """
        self._check(latents)
        length, _, height, width = self._format.check_shape("clip", latents.shape)
        shown = self._video.family.shown_latents(length)
        pieces = list(slices(shown, self.bytes_per_step_px * height * width, self._for_tensors(budget_bytes)))
        return self._decode_pieces(latents, cut(pieces, most))

    def decode_live(
        self, parts: Sequence[LivePart], *, budget_bytes: int, most: Most | None = None
    ) -> Iterator[list[LiveFrames]]:
        """Decode the next latents of live runs together, as many streams at once as the budget allows.

        parts: all of one shape; of one run several, in order, if they follow each other. most: as `decode_clip`.
        Returns: what each slice gave; those of a part, and of a run, in order.
        Raises: ValueError, before anything is decoded, for a wrong shape, dtype or budget, or NaN.
        """
        for part in parts:
            self._check(part.latents)
            if part.latents.shape != parts[0].latents.shape:
                given = f"{tuple(parts[0].latents.shape)} and {tuple(part.latents.shape)}"
                raise ValueError(f"{self.latent_format}: live latents of one job have one shape, got {given}")
            if part.history is not None and len(part.history):
                self._check(part.history)
        if not parts:
            return iter(())
        count, _, height, width = self._format.check_shape("live", parts[0].latents.shape)
        cost, budget_bytes = self.bytes_per_step_px * height * width, self._for_tensors(budget_bytes)
        rounds = [
            [places[piece] for piece in slices(len(places), count * cost, budget_bytes)]
            for places in _rounds([part.run for part in parts])
        ]
        steps = list(slices(count, cost, budget_bytes))  # of a stream that is too much even alone
        return self._decode_rounds(parts, [places for each in rounds for places in each], steps, most)

    def forget(self, run: str) -> None:
        """Drop the memory of a run. Any thread."""
        self.memories.forget(run)

    def holds(self, run: str, index: int, size: tuple[int, ...]) -> bool:
        """Whether the memory of a run is here, just before its latent `index`, for latents of that (h, w)."""
        kept = self.memories.get(run)
        return kept is not None and kept.next_index == index and kept.size == size

    @torch.inference_mode()
    def _decode_pieces(self, latents: Tensor, pieces: Iterable[slice]) -> Iterator[tuple[slice, Tensor]]:
        memory: Memory | None = None
        for piece in pieces:
            frames, memory = self._video.step(self._ready(latents[None, piece]), memory, clip_length=len(latents))
            yield piece, frames[0].float().contiguous()

    @torch.inference_mode()
    def _decode_rounds(
        self, parts: Sequence[LivePart], rounds: Sequence[list[int]], steps: Sequence[slice], most: Most | None
    ) -> Iterator[list[LiveFrames]]:
        for places in rounds:
            streams = [self._stream_before(parts[place]) for place in places]
            latents = torch.stack([parts[place].latents for place in places])
            if self._fast_video is not None and latents.shape[1] == 1:
                yield self._step_fast(self._fast_video, parts, places, streams, latents)
                continue
            memory = _stack([stream.memory for stream in streams])
            first = 0
            for step in cut(steps if len(places) == 1 else [slice(0, latents.shape[1])], _each(most, len(places))):
                frames, memory = self._video.step(self._ready(latents[:, step]), memory)
                if step.stop == latents.shape[1]:
                    for row, (place, stream) in enumerate(zip(places, streams, strict=True)):
                        after = memory if len(places) == 1 else tuple(one[row : row + 1].clone() for one in memory)
                        next_index = parts[place].index + step.stop
                        self._keep(parts[place], StreamMemory(after, next_index, stream.exact_from, stream.size))
                yield [
                    LiveFrames(
                        place,
                        mine.float().contiguous(),
                        is_approximate=parts[place].index < stream.exact_from,
                        first=first,
                        latents=step.stop - step.start,
                    )
                    for place, stream, mine in zip(places, streams, frames, strict=True)
                ]
                first += len(frames[0])

    def _step_fast(
        self,
        video: AcceleratedVideo,
        parts: Sequence[LivePart],
        places: Sequence[int],
        streams: Sequence[StreamMemory],
        latents: Tensor,
    ) -> list[LiveFrames]:
        """One latent of each of the streams."""
        frames, after = video.step(self._ready(latents[:, 0]), [stream.memory[1:] for stream in streams])
        results = []
        for place, stream, mine, memory in zip(places, streams, frames.float(), after, strict=True):
            part = parts[place]
            position = stream.memory[0]
            kept = StreamMemory((position + 1, *memory), part.index + 1, stream.exact_from, stream.size)
            self._keep(part, kept)
            hidden = self._video.family.hidden_frames(int(position), len(mine))
            is_approximate = part.index < stream.exact_from
            results.append(LiveFrames(place, mine[hidden:], is_approximate=is_approximate))
        return results

    def _keep(self, part: LivePart, stream: StreamMemory) -> None:
        """Keep what a part leaves behind, unless it was an old one, shown again, and the run is as far already."""
        before = self.memories.get(part.run)
        if before is None or before.next_index < stream.next_index or before.size != stream.size:
            self.memories.put(part.run, stream)

    def _stream_before(self, part: LivePart) -> StreamMemory:
        """The stream as it is before the part: kept, rebuilt from history, or begun in the middle."""
        height, width = part.latents.shape[-2:]
        kept = self.memories.get(part.run)
        if kept is not None and kept.next_index == part.index and kept.size == (height, width):
            return kept
        history = part.latents[:0] if part.history is None else part.history[-min(part.index, self.history) :]
        if part.index == 0 or len(history) == 0:
            memory = self._video.start(1, height, width)
        else:
            memory = self._video.rebuild(self._ready(history[None]))
        first_known = part.index - (len(history) if part.index else 0)
        exact_from = part.index if first_known == 0 or len(history) == self.history else first_known + self.history
        position = torch.full_like(memory[0], part.index)
        return StreamMemory((position, *memory[1:]), part.index, exact_from, (height, width))

    def _ready(self, latents: Tensor) -> Tensor:
        limited = self._scaled(latents.float()).clamp(-_LARGEST_LATENT, _LARGEST_LATENT)
        return limited.to(device=self.device, dtype=self.dtype)


def _stack(memories: Sequence[Memory]) -> Memory:
    if len(memories) == 1:
        return memories[0]
    return tuple(torch.cat(parts) for parts in zip(*memories, strict=True))


def _each(most: Most | None, streams: int) -> Most | None:
    """How many latents of each stream a slice may hold, where all of them are stepped together."""
    return most if most is None else lambda: most() // streams


def _rounds(runs: Sequence[str]) -> list[list[int]]:
    """Places of the parts in rounds with each run once at most: its second part needs what the first one left."""
    rounds: list[list[int]] = []
    seen: dict[str, int] = {}
    for place, run in enumerate(runs):
        turn = seen.get(run, 0)
        seen[run] = turn + 1
        if turn == len(rounds):
            rounds.append([])
        rounds[turn].append(place)
    return rounds


def _bytes_per_step_px(network: VideoDecoder) -> int:
    """The most bytes that one latent cell costs in a step past the stream's start, frames and new memory included."""
    shapes_only = copy.deepcopy(network).to(device="meta")
    position, *blocks = shapes_only.start(1, _PROBE_CELLS, _PROBE_CELLS)
    like = next(shapes_only.parameters())
    latents = like.new_empty(1, network.family.latent_channels, _PROBE_CELLS, _PROBE_CELLS)
    live = LiveBytes()
    with torch.inference_mode(), live:
        shapes_only.step(latents, (position + 1, *blocks))
    return -(-live.peak // _PROBE_CELLS**2)
