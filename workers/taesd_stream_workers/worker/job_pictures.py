"""What each item of a job shows: one picture, a grid, all frames of a clip, or the next ones of a live video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.sheet import grid, grid_columns
from taesd_stream.decoding.slicing import Most
from taesd_stream.decoding.video_engine import LivePart, VideoEngine
from taesd_stream.frames import Rendition
from taesd_stream.media.clock import picture_pts
from taesd_stream.messages import JobItem


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of a frame. place: which item of the job; index of count; pts: 1/90000 s.

    tracks: over 1 it is one of a batch, for a recording's track of its own alone. is_recorded: False of the sheet then.
    columns: of a sheet, how many pictures of the batch stand in a row.
    is_approximate: of a `live` run whose memory was lost, and its history too: the colours are not yet right.
    """

    place: int
    index: int
    count: int
    pts: int
    is_approximate: bool = False
    tracks: int = 1
    is_recorded: bool = True
    columns: int = 1

    def is_for(self, rendition: Rendition) -> bool:
        """Whether it is shown in a rendition that is wanted of its item."""
        return self.is_recorded if rendition == "record" else self.tracks == 1


@dataclass(frozen=True, slots=True)
class Shown:
    """What one slice shows: RGB, (3,H,W) in [0, 1] a picture; or, all of one size, their planes for video at once.

    planes: (n, H*3//2, W) uint8 I420 on the engine's device; size: width and height as shown.
    latents: how many the slice decoded.
    """

    pictures: Sequence[Picture]
    latents: int
    rgb: Sequence[Tensor] = ()
    planes: Tensor | None = None
    size: tuple[int, int] = (0, 0)


@dataclass(frozen=True, slots=True)
class Rows:
    """The latents of one item: `count` rows of its job's batch, (N,C,h,w), from `first` on.

    Not cut out before they are needed: each call into torch lets go of the GIL, and dozens of encoders want it.
    is_each: of a batch that is recorded picture by picture (`recording.batch`).
    """

    batch: Tensor
    first: int
    count: int
    is_each: bool = False

    def __len__(self) -> int:
        return self.count

    @property
    def latents(self) -> Tensor:
        """(count,C,h,w), a view."""
        return self.batch[self.first : self.first + self.count]


def joined(parts: Sequence[Rows]) -> Tensor:
    """The latents of several items of one job; a view where they lie side by side."""
    ends = [part.first + part.count for part in parts]
    if all(end == part.first for end, part in zip(ends, parts[1:], strict=False)):
        return parts[0].batch[parts[0].first : ends[-1]]
    return torch.cat([part.latents for part in parts])


NO_HISTORIES: Final[Mapping[int, Tensor]] = {}
Entry: TypeAlias = tuple[int, JobItem, Rows]  # place in the job, item, its latents, without NaN


def can_be_planes(engine: Engine, item: JobItem, rows: Rows, wanted: tuple[Rendition, ...]) -> bool:
    """Whether each latent of an item is a picture by itself, which `planes_of` can decode, in all that is wanted."""
    is_sheet = item.kind == "steps" and len(rows) > 1 and not (rows.is_each and wanted == ("record",))
    return not is_sheet and (item.kind == "steps" or not isinstance(engine, VideoEngine))


def planes_of(engine: Engine, entries: Sequence[Entry], budget_bytes: int, most: Most | None = None) -> Iterator[Shown]:
    """Decode entries that `can_be_planes`, all of one shape, straight to planes for video in full size.

    most: how many latents the next slice may hold; None: whatever the budget allows.
    """
    pictures = [picture for entry in entries for picture in _pictures_of_stills(engine, entry)]
    latents = joined([rows for _, _, rows in entries])
    height, width = engine.picture_size(latents)
    for part, planes in engine.decode_planes(latents, budget_bytes=budget_bytes, most=most, are_finite=True):
        yield Shown(pictures[part], part.stop - part.start, planes=planes, size=(width, height))


def pictures_of(
    engine: Engine,
    entries: Sequence[Entry],
    budget_bytes: int,
    histories: Mapping[int, Tensor] = NO_HISTORIES,
    most: Most | None = None,
) -> Iterator[Shown]:
    """Decode entries, all of one latent format and shape; one answer a slice, the pictures of an item in order.

    most: as `planes_of`. histories: by place, the latents (k,C,h,w) before those of a `live` item, where they came
    along.
    """
    if not isinstance(engine, VideoEngine):
        yield from _stills(engine, entries, budget_bytes, most)
        return
    stills = [entry for entry in entries if entry[1].kind == "steps"]
    if stills:
        yield from _stills(engine, stills, budget_bytes, most)
    for entry in entries:
        if entry[1].kind == "clip":
            yield from _clip(engine, entry, budget_bytes, most)
    yield from _live(engine, [entry for entry in entries if entry[1].kind == "live"], budget_bytes, histories, most)


def _pictures_of_stills(engine: Engine, entry: Entry) -> list[Picture]:
    """One picture a latent."""
    place, item, rows = entry
    if rows.is_each:
        return [Picture(place, part, len(rows), item.pts, tracks=len(rows)) for part in range(len(rows))]
    if item.kind == "steps":
        return [Picture(place, 0, 1, item.pts)] * len(rows)
    # a picture of a video format stands for all frames of its latent
    frames, first = engine.temporal_factor or 1, item.index * (item.kind == "live")
    times = [picture_pts((first + index) * frames, item.fps) for index in range(len(rows))]
    return [Picture(place, index, len(rows), pts) for index, pts in enumerate(times)]


def _stills(engine: Engine, entries: Sequence[Entry], budget_bytes: int, most: Most | None) -> Iterator[Shown]:
    """One picture a latent; of `steps` those of a batch become one sheet, behind the ones that are recorded singly."""
    owners = [
        (number, picture) for number, entry in enumerate(entries) for picture in _pictures_of_stills(engine, entry)
    ]
    latents = joined([rows for _, _, rows in entries])
    sheets: dict[int, list[tuple[Picture, Tensor]]] = {}
    for part, rgb in engine.decode(latents, budget_bytes=budget_bytes, most=most, are_finite=True):
        shown: list[tuple[Picture, Tensor]] = []
        for (number, picture), one in zip(owners[part], rgb, strict=True):
            place, item, mine = entries[number]
            if item.kind != "steps" or len(mine) == 1:
                shown.append((picture, one))
                continue
            parts = sheets.setdefault(number, [])
            parts.append((picture, one))
            if len(parts) == len(mine):
                shown += parts if mine.is_each else []
                whole = torch.stack([one for _, one in sheets.pop(number)])
                columns = grid_columns(len(whole), *whole.shape[-2:])
                sheet = Picture(place, 0, 1, item.pts, is_recorded=not mine.is_each, columns=columns)
                shown.append((sheet, grid(whole)))
        yield Shown([picture for picture, _ in shown], part.stop - part.start, rgb=[one for _, one in shown])


def _clip(engine: VideoEngine, entry: Entry, budget_bytes: int, most: Most | None) -> Iterator[Shown]:
    place, item, rows = entry
    count, index = engine.frames_of_clip(len(rows)), 0
    for part, frames in engine.decode_clip(rows.latents, budget_bytes=budget_bytes, most=most):
        pictures = [Picture(place, one, count, picture_pts(one, item.fps)) for one in range(index, index + len(frames))]
        yield Shown(pictures, part.stop - part.start, rgb=list(frames))
        index += len(frames)


def _live(
    engine: VideoEngine,
    entries: Sequence[Entry],
    budget_bytes: int,
    histories: Mapping[int, Tensor],
    most: Most | None,
) -> Iterator[Shown]:
    parts = [
        LivePart(run=item.run, index=item.index, latents=rows.latents, history=histories.get(place))
        for place, item, rows in entries
    ]
    for results in engine.decode_live(parts, budget_bytes=budget_bytes, most=most):
        pictures: list[Picture] = []
        for result in results:
            place, item, rows = entries[result.place]
            before = engine.frames_before(item.index)
            count = engine.frames_before(item.index + len(rows)) - before
            approximate = result.is_approximate
            pictures += [
                Picture(place, index, count, picture_pts(before + index, item.fps), is_approximate=approximate)
                for index in range(result.first, result.first + len(result.frames))
            ]
        latents = sum(result.latents for result in results)
        yield Shown(pictures, latents, rgb=[frame for result in results for frame in result.frames])
