"""The encoders' threads: each chain in order whoever encodes it, and one that fails takes no other with it."""

from __future__ import annotations

import threading
from collections import defaultdict

import numpy as np
import pytest

from taesd_stream.decoding.host_copies import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, Planes
from taesd_stream_workers.encode_pool import EncodePool, EncodeTask

THREADS = 4


class Results:
    """What came out, by run, in the order in which it came: (pts, picture)."""

    def __init__(self) -> None:
        self.by_run: defaultdict[str, list[tuple[int, EncodedPicture | None]]] = defaultdict(list)
        self._lock = threading.Lock()

    def task(
        self, run: str, pts: int, planes: Planes | None = None, *, rendition: Rendition = "live", attempt: int = 0
    ) -> EncodeTask:
        """A picture to encode, grey unless it is given."""
        picture = np.full((48, 32), 128, np.uint8) if planes is None else planes

        def on_done(encoded: EncodedPicture | None) -> None:
            with self._lock:
                self.by_run[run].append((pts, encoded))

        return EncodeTask(
            run=run,
            rendition=rendition,
            attempt=attempt,
            keyframe=False,
            pts=pts,
            planes=picture,
            size=(32, 32),
            copy=HostCopy(picture),
            on_done=on_done,
        )

    def keyframes(self, run: str) -> list[int]:
        """The pts of a run's keyframes."""
        return [pts for pts, picture in self.by_run[run] if picture is not None and picture.is_keyframe]


def test_pictures_of_a_run_come_in_order_from_whatever_thread() -> None:
    """Many runs' pictures go through a few threads: each run's come out in order, and all once."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    for pts in range(0, 900, 90):
        pool.submit([results.task(f"run {number}", pts) for number in range(12)])
    pool.close()
    assert set(results.by_run) == {f"run {number}" for number in range(12)}
    for run, came in results.by_run.items():
        assert [pts for pts, _ in came] == list(range(0, 900, 90))
        assert results.keyframes(run) == [0]  # one encoder made them all


def test_a_forgotten_run_begins_anew_behind_what_is_queued_of_it() -> None:
    """Forgetting closes a run's encoder once its pictures are made; one that comes later starts with a keyframe."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    pool.submit([results.task("a", 0), results.task("a", 90)])
    pool.forget("a")
    pool.close()
    again = EncodePool(THREADS)
    again.start()
    again.submit([results.task("a", 180)])
    again.close()
    assert [pts for pts, _ in results.by_run["a"]] == [0, 90, 180]
    assert results.keyframes("a") == [0, 180]


def test_a_new_attempt_is_a_new_chain() -> None:
    """A recording's next attempt begins with a keyframe, in the same pool."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    pool.submit([results.task("a", pts, rendition="record", attempt=attempt) for pts, attempt in [(0, 1), (90, 1)]])
    pool.submit([results.task("a", pts, rendition="record", attempt=2) for pts in (90, 180)])
    pool.close()
    assert results.keyframes("a") == [0, 90]


def test_planes_that_are_no_picture_harm_only_themselves(caplog: pytest.LogCaptureFixture) -> None:
    """A picture that cannot be encoded is answered with None; its run goes on with a keyframe, others just go on."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    pool.submit([results.task("a", 0), results.task("b", 0)])
    pool.submit([results.task("a", 90, np.zeros((7, 32), np.uint8)), results.task("b", 90)])
    pool.submit([results.task("a", 180), results.task("b", 180)])
    pool.close()
    assert [picture is None for _, picture in results.by_run["a"]] == [False, True, False]
    assert results.keyframes("a") == [0, 180]
    assert results.keyframes("b") == [0]
    assert "encode_failed run=a" in caplog.text
