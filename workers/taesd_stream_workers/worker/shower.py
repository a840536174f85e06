"""Decoded pictures of a job on their way: into renditions, through the encoders, out as packets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.decoding.kernels.h264_coder import Due
from taesd_stream.frames import RENDITIONS, Packet, Rendition, Stamps
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream.messages import JobItem
from taesd_stream_workers.worker.chain_encoder import Order
from taesd_stream_workers.worker.device_coding import CodingTask, DeviceCoding
from taesd_stream_workers.worker.encode_pool import EncodePool, EncodeTask
from taesd_stream_workers.worker.job_pictures import Picture, Shown
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.rendering import Converted, Member, Rendered, Sizes, bring, convert


@dataclass(frozen=True, slots=True)
class Last:
    """The last picture of a `live` run in one rendition, for late viewers."""

    seq: int
    decoder: str
    rendered: Rendered
    pts: int


@dataclass(frozen=True, slots=True)
class Outlet:
    """What all pictures of a worker go through.

    last: of each `live` run and rendition. now_ns: this moment on the broker's clock. pass_on: called in any thread
    with (endpoint, packet), and with a JobRun that is over.
    """

    sizes: Sizes
    copies: HostCopies
    pool: EncodePool
    coding: DeviceCoding
    now_ns: Callable[[], int]
    pass_on: Callable[[Any], None]
    last: dict[tuple[str, Rendition], Last] = field(default_factory=dict)

    def part_done(self, run: JobRun) -> None:
        """A picture of the job, or its decoding, is over."""
        if run.is_last():
            self.pass_on(run)

    def forget(self, run: str) -> None:
        """Close the encoders of a run, and drop what is kept for late viewers."""
        self.pool.forget(run)
        self.coding.forget(run)
        for rendition in RENDITIONS:
            self.last.pop((run, rendition), None)


class Shower:
    """Of one job and decoder; used by the thread that owns the device.

    items: those of the job, with the renditions that are wanted of each.
    """

    def __init__(
        self, outlet: Outlet, run: JobRun, decoder: str, items: Sequence[tuple[JobItem, tuple[Rendition, ...]]]
    ) -> None:
        self._outlet = outlet
        self._run = run
        self._decoder = decoder
        self._items = items
        self._started_ns = outlet.now_ns()

    def show(self, shown: Shown) -> None:
        """Queue the pictures of a slice for every rendition that is wanted of them."""
        outlet = self._outlet
        wanted = [
            tuple(rendition for rendition in self._items[picture.place][1] if picture.is_for(rendition))
            for picture in shown.pictures
        ]
        if shown.planes is None:
            converted = convert(shown.rgb, wanted, outlet.sizes)
        else:
            each = [Member(row, row, rendition) for row, renditions in enumerate(wanted) for rendition in renditions]
            converted = iter([Converted(shown.planes, shown.size, each)])
        for group in converted:
            coded, encoded = self._shared_out(group, shown)
            if coded and not self._code(group, coded, shown):
                encoded = group.members
            if encoded:
                self._encode(group, encoded, shown)

    def _shared_out(self, group: Converted, shown: Shown) -> tuple[list[Member], Sequence[Member]]:
        """Which pictures the device is to code, and which the encoders.

        The device: what is seen at each step, of more streams than encoders serve well.
        """
        if not self._outlet.coding.takes(group.planes):
            return [], group.members
        coded: list[Member] = []
        encoded: list[Member] = []
        opened: set[str] = set()
        for member in group.members:
            item = self._items[shown.pictures[member.number].place][0]
            if member.rendition != "live" or item.kind != "steps":
                encoded.append(member)
            # as before: pictures of a run that came from both would not come in order
            elif not self._outlet.coding.has(item.run) and self._outlet.pool.takes_live(item.run, granted=opened):
                opened.add(item.run)
                encoded.append(member)
            else:
                coded.append(member)
        return coded, encoded

    def _code(self, group: Converted, members: Sequence[Member], shown: Shown) -> bool:
        """Have the device code them. Returns: whether it does."""
        tasks = []
        for member in members:
            picture = shown.pictures[member.number]
            item = self._items[picture.place][0]
            task = CodingTask(
                due=Due(member.row, item.run, picture.pts, _begins(item, member.rendition, picture)),
                size=group.size,
                on_done=partial(self._send, item, member.rendition, picture),
            )
            tasks.append(task)
        batch = self._outlet.coding.code(group.planes, tasks)
        if batch is None:
            return False
        self._run.add(len(tasks))
        self._outlet.coding.hand_on(batch, tasks)
        return True

    def _encode(self, group: Converted, members: Sequence[Member], shown: Shown) -> None:
        outlet = self._outlet
        rendered = list(bring(group, members, outlet.copies))
        for one in rendered:
            item, picture = self._items[shown.pictures[one.number].place][0], shown.pictures[one.number]
            if item.kind == "live" and picture.index == picture.count - 1:
                outlet.last[item.run, one.rendition] = Last(item.seq, self._decoder, one, picture.pts)
        self._run.add(sum(one.rendition != "film" for one in rendered))  # films hold nobody's credit
        outlet.pool.submit([self._task(one, shown.pictures[one.number]) for one in rendered])

    def show_again(self, last: Last) -> None:
        """Queue planes of an earlier job once more, as a keyframe of the first of our items."""
        self._run.add(int(last.rendered.rendition != "film"))
        task = self._task(last.rendered, Picture(0, 0, 1, last.pts))
        self._outlet.pool.submit([replace(task, order=task.order._replace(keyframe=True))])

    def _task(self, one: Rendered, picture: Picture) -> EncodeTask:
        item = self._items[picture.place][0]
        return EncodeTask(
            run=item.run,
            rendition=one.rendition,
            order=Order(
                attempt=_attempt(item, one.rendition),
                keyframe=_begins(item, one.rendition, picture),
                pts=picture.pts,
                width=one.size[0],
                height=one.size[1],
                track=picture.index % picture.tracks,
                tracks=picture.tracks,
                is_clip=item.kind == "clip",
            ),
            planes=one.planes,
            copy=one.copy,
            on_done=lambda encoded: self._send(item, one.rendition, picture, encoded, one.copy),
        )

    def _send(
        self, item: JobItem, rendition: Rendition, picture: Picture, encoded: EncodedPicture | None, copy: HostCopy
    ) -> None:
        """In a thread of the pool, perhaps the one that all runs share: it must not wait."""
        if encoded is not None:
            packet = self._packet(item, rendition, picture, encoded, copy)
            self._outlet.pass_on((self._run.job.packets_to, packet))
        elif rendition == "record":
            text = "A picture could not be encoded for the recording: after a few tries it is left out."
            self._run.lose(item, "not_encoded", text)
        if rendition != "film":
            self._outlet.part_done(self._run)

    def _packet(
        self, item: JobItem, rendition: Rendition, picture: Picture, encoded: EncodedPicture, copy: HostCopy
    ) -> Packet:
        now_ns = self._outlet.now_ns()
        is_sheet = item.kind == "steps" and len(item.shape) == 4 and picture.tracks == 1
        parts = item.shape[0] if is_sheet else 1
        return Packet(
            stream=item.stream,
            run=item.run,
            seq=item.seq,
            index=picture.index,
            count=picture.count,
            rendition=rendition,
            attempt=_attempt(item, rendition),
            is_keyframe=encoded.is_keyframe,
            pts=picture.pts,
            width=encoded.width,
            height=encoded.height,
            decoder=self._decoder,
            step=item.step,
            total_steps=item.total_steps,
            sigma=item.sigma,
            stamps=Stamps(
                sent_ns=item.sent_ns,
                received_ns=item.received_ns,
                started_ns=self._started_ns,
                decoded_ns=now_ns - (time.monotonic_ns() - copy.wait()),
                encoded_ns=now_ns,
            ),
            kind=item.kind,
            parts=parts,
            columns=picture.columns,
            tracks=picture.tracks,
            placed_ns=item.placed_ns,
            payload=encoded.payload,
        )


def _begins(item: JobItem, rendition: Rendition, picture: Picture) -> bool:
    """Whether a viewer must be able to begin with a picture."""
    return rendition == "live" and picture.index == 0 and (item.keyframe or item.kind == "clip")


def _attempt(item: JobItem, rendition: Rendition) -> int:
    return item.attempt if rendition in ("record", "film") else 0
