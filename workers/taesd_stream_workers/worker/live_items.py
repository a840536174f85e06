"""`live` items of a job and their temporal memories: which find theirs here, which begin anew."""

from __future__ import annotations

from collections.abc import Sequence

from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.messages import JobItem


def lacks_memory(engine: Engine, items: Sequence[JobItem]) -> list[int]:
    """Which of the items are `live` ones that should find their run's memory here, and do not.

    A run goes on from the item before it in the job; what follows one that cannot be decoded cannot be either.
    """
    if not isinstance(engine, VideoEngine):
        return []
    lacking: list[int] = []
    goes_on: dict[str, bool] = {}
    for place, item in enumerate(items):
        if item.kind != "live":
            continue
        if item.run not in goes_on:
            size = (item.shape[-2], item.shape[-1])
            goes_on[item.run] = not item.expects_memory or engine.holds(item.run, item.index, size)
        if not goes_on[item.run]:
            lacking.append(place)
    return lacking


def begin_anew(engine: Engine, items: Sequence[JobItem]) -> None:
    """Drop the memory of every `live` run that begins in these items, or goes back: it would be of later latents."""
    begun: set[str] = set()
    for item in items:
        if item.kind == "live" and item.run not in begun and not item.expects_memory and not item.is_repeat:
            engine.forget(item.run)
        begun.add(item.run)
