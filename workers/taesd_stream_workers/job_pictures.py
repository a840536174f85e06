"""What each item of a job shows: one picture, a grid, all frames of a clip, or the next ones of a live video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.video_engine import LivePart, VideoEngine
from taesd_stream.messages import JobItem
from taesd_stream_workers.rendering import grid


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a frame. place: which item of the job; rgb: (3,H,W) in [0, 1]; index of count; pts: 1/90000 s.

    is_approximate: of a `live` run whose memory was lost, and its history too: the colours are not yet right.
    """

    place: int
    rgb: Tensor
    index: int
    count: int
    pts: int
    is_approximate: bool = False


NO_HISTORIES: Final[Mapping[int, Tensor]] = {}
Entry: TypeAlias = tuple[int, JobItem, Tensor]  # place in the job, item, latents (n,C,h,w)


def pictures_of(
    engine: Engine, entries: Sequence[Entry], budget_bytes: int, histories: Mapping[int, Tensor] = NO_HISTORIES
) -> Iterator[list[Picture]]:
    """Decode entries, all of one latent format and shape; a list for each slice, the pictures of an item in order.

    histories: by place, the latents (k,C,h,w) before those of a `live` item, where they came along.
    """
    if not isinstance(engine, VideoEngine):
        yield from _stills(engine, entries, budget_bytes)
        return
    stills = [entry for entry in entries if entry[1].kind == "steps"]
    if stills:
        yield from _stills(engine, stills, budget_bytes)
    for entry in entries:
        if entry[1].kind == "clip":
            yield from _clip(engine, entry, budget_bytes)
    yield from _live(engine, [entry for entry in entries if entry[1].kind == "live"], budget_bytes, histories)


def _stills(engine: Engine, entries: Sequence[Entry], budget_bytes: int) -> Iterator[list[Picture]]:
    """One picture a latent; of `steps` those of a batch become one sheet."""
    owners = [(number, index) for number, (_, _, latents) in enumerate(entries) for index in range(len(latents))]
    # a picture of a video format stands for all frames of its latent
    stretch = engine.temporal_factor or 1
    sheets: dict[int, list[Tensor]] = {}
    for part, rgb in engine.decode(torch.cat([latents for _, _, latents in entries]), budget_bytes=budget_bytes):
        shown: list[Picture] = []
        for (number, index), picture in zip(owners[part], rgb, strict=True):
            place, item, latents = entries[number]
            if item.kind != "steps":
                pts = (item.index * (item.kind == "live") + index) * item.picture_ticks * stretch
                shown.append(Picture(place, picture, index, len(latents), pts))
            elif len(latents) == 1:
                shown.append(Picture(place, picture, 0, 1, item.pts))
            else:
                sheet = sheets.setdefault(number, [])
                sheet.append(picture)
                if len(sheet) == len(latents):
                    shown.append(Picture(place, grid(torch.stack(sheets.pop(number))), 0, 1, item.pts))
        yield shown


def _clip(engine: VideoEngine, entry: Entry, budget_bytes: int) -> Iterator[list[Picture]]:
    place, item, latents = entry
    count, index = engine.frames_of_clip(len(latents)), 0
    for frames in engine.decode_clip(latents, budget_bytes=budget_bytes):
        yield [
            Picture(place, frame, index + number, count, (index + number) * item.picture_ticks)
            for number, frame in enumerate(frames)
        ]
        index += len(frames)


def _live(
    engine: VideoEngine, entries: Sequence[Entry], budget_bytes: int, histories: Mapping[int, Tensor]
) -> Iterator[list[Picture]]:
    parts = [
        LivePart(run=item.run, index=item.index, latents=latents, history=histories.get(place))
        for place, item, latents in entries
    ]
    for results in engine.decode_live(parts, budget_bytes=budget_bytes):
        shown: list[Picture] = []
        for result in results:
            place, item, _ = entries[result.place]
            first = engine.frames_of_clip(item.index) if item.index else 0
            shown += [
                Picture(
                    place,
                    frame,
                    index,
                    len(result.frames),
                    (first + index) * item.picture_ticks,
                    is_approximate=result.is_approximate,
                )
                for index, frame in enumerate(result.frames)
            ]
        yield shown
