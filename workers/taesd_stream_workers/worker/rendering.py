"""Decoded pictures of a job -> planes for each rendition that is wanted of them, and those on their way to the host."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import torch
from torch import Tensor

from taesd_stream.decoding.colour import fit_within, jpeg_planes, video_planes
from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import VIDEO_RENDITIONS, Planes

LARGEST_PX: Final = 16384  # a side that H.264's encoder takes: what is larger is recorded at that size
BATCH_PX: Final = 1 << 22  # of pictures that are converted together: a GPU's calls cost more than their work

# Pictures that become planes in one go: their shape, the long side of what comes out (0: as it is), and which planes.
_Group: TypeAlias = tuple[torch.Size, int, bool]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Longest sides of the renditions that are scaled down, pixels."""

    live_max_px: int
    thumb_max_px: int

    def limit(self, rendition: Rendition, height: int, width: int) -> int:
        """The long side that a picture of that size is shrunk to for a rendition, 0 where it stays as it is."""
        limits = {"record": LARGEST_PX, "film": LARGEST_PX, "thumb": self.thumb_max_px}
        limit = limits.get(rendition, self.live_max_px)
        return limit if max(height, width) > limit else 0


@dataclass(frozen=True, slots=True)
class Member:
    """What a row of planes is. number: which of the pictures that were given."""

    row: int
    number: int
    rendition: Rendition


@dataclass(frozen=True, slots=True)
class Converted:
    """Planes of pictures of one size, where they were decoded.

    planes: (n, H'*3//2, W') uint8 I420; size: width and height as shown.
    """

    planes: Tensor
    size: tuple[int, int]
    members: Sequence[Member]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Planes of one picture. number: which of those given; size: width and height as shown.

    planes: (H'*3//2, W') uint8 I420 within copy's memory: right once `copy.wait()` has returned.
    """

    number: int
    rendition: Rendition
    planes: Planes
    size: tuple[int, int]
    copy: HostCopy


def render(
    pictures: Sequence[Tensor], renditions: Sequence[tuple[Rendition, ...]], sizes: Sizes, copies: HostCopies
) -> Iterator[Rendered]:
    """`convert`, and all of it on its way to the host."""
    for group in convert(pictures, renditions, sizes):
        yield from bring(group, group.members, copies)


def convert(
    pictures: Sequence[Tensor], renditions: Sequence[tuple[Rendition, ...]], sizes: Sizes
) -> Iterator[Converted]:
    """Planes of pictures for each of their renditions; those of one rendition and shape in the order of the pictures.

    pictures: (3,H,W) float in [0, 1] each. renditions: what is wanted of each.
    """
    groups: defaultdict[_Group, list[int]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        for rendition in renditions[number]:
            members = groups[_group(picture, rendition, sizes)]
            if not members or members[-1] != number:
                members.append(number)
    for group, members in groups.items():
        _, height, width = group[0]
        step = max(1, BATCH_PX // (height * width))
        for first in range(0, len(members), step):
            part = members[first : first + step]
            batch = torch.stack([pictures[number] for number in part]) if len(part) > 1 else pictures[part[0]][None]
            yield _convert(batch, group, part, renditions, sizes)


def _group(picture: Tensor, rendition: Rendition, sizes: Sizes) -> _Group:
    height, width = picture.shape[-2:]
    return picture.shape, sizes.limit(rendition, height, width), rendition in VIDEO_RENDITIONS


def _convert(
    batch: Tensor,
    group: _Group,
    numbers: Sequence[int],
    renditions: Sequence[tuple[Rendition, ...]],
    sizes: Sizes,
) -> Converted:
    _, limit, is_video = group
    small = fit_within(batch, limit) if limit else batch
    members = [
        Member(row, number, rendition)
        for row, number in enumerate(numbers)
        for rendition in renditions[number]
        if _group(batch[row], rendition, sizes) == group
    ]
    planes = (video_planes if is_video else jpeg_planes)(small)
    return Converted(planes, (int(small.shape[-1]), int(small.shape[-2])), members)


def bring(converted: Converted, members: Sequence[Member], copies: HostCopies) -> Iterator[Rendered]:
    """Some of what was converted, on its way to the host; no other row is copied."""
    rows = sorted({member.row for member in members})
    places = {row: place for place, row in enumerate(rows)}
    planes = converted.planes
    # stacked: an index would be a tensor that goes to the device, and waits for what is launched there
    copy = copies.download(planes if len(rows) == len(planes) else torch.stack([planes[row] for row in rows]))
    for member in members:
        yield Rendered(member.number, member.rendition, copy.array[places[member.row]], converted.size, copy)


def as_pictures(latents: Tensor) -> Tensor:
    """Latents of one frame as a batch: (C,h,w) -> (1,C,h,w); (N,C,h,w) stays."""
    return latents if latents.ndim == 4 else latents.unsqueeze(0)
