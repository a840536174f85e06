"""What a job says of each frame: the items that a worker is sent, and their payloads."""

from __future__ import annotations

from typing import Final

from taesd_stream.frames import LatentFrame
from taesd_stream.media.clock import steps_pts
from taesd_stream.messages import History, JobItem, Part
from taesd_stream.scheduling import Candidate, history_due
from taesd_stream_workers.broker.runs import Run

NO_HISTORY: Final = History(count=0, payload=b"")


def job_items_of(
    taken: list[tuple[Candidate, Run, LatentFrame]], worker: bytes
) -> tuple[tuple[JobItem, ...], tuple[Part, ...]]:
    """The items of a job for this worker, and their payloads."""
    items: list[JobItem] = []
    payloads: list[Part] = []
    begun: set[str] = set()  # runs that have an item in it already
    with_history = history_due([candidate for candidate, _, _ in taken], worker)
    for (candidate, run, frame), is_new_here in zip(taken, with_history, strict=True):
        history = run.history_of(frame) if is_new_here else NO_HISTORY
        is_first = candidate.run not in begun
        begun.add(candidate.run)
        items.append(_job_item(candidate, run, frame, history.count, is_first=is_first, is_new_here=is_new_here))
        payloads.append(frame.payload)
        if history.count:
            payloads.append(history.payload)
    return tuple(items), tuple(payloads)


def _job_item(
    item: Candidate, run: Run, frame: LatentFrame, history: int, *, is_first: bool, is_new_here: bool
) -> JobItem:
    return JobItem(
        stream=run.info.stream,
        run=item.run,
        seq=frame.seq,
        index=frame.index,
        kind=run.info.kind,
        shape=frame.shape,
        dtype=frame.dtype,
        renditions=item.renditions,
        attempt=run.kept.attempt if run.kept and item.is_record else run.attempts,
        keyframe=is_first and bool(run.forced),
        pts=steps_pts(frame.sent_ns, run.info.opened_ns),
        fps=run.info.fps,
        step=frame.step,
        total_steps=frame.total_steps,
        sigma=frame.sigma,
        sent_ns=frame.sent_ns + run.offset_ns,
        received_ns=run.received_ns(frame),
        history=history,
        expects_memory=run.live is not None and frame.index > 0 and not is_new_here,
        is_repeat=item.is_repeat,
        placed_ns=run.placed_ns,
    )
