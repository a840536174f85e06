"""The encoders' threads: each chain in order whoever encodes it, and one that fails takes no other with it."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from taesd_stream.decoding.host_copies import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, Planes
from taesd_stream_workers.encode_pool import MANY_LIVE, MAX_WAITING, EncodePool, EncodeTask
from tests.daemon import wait_for

THREADS = 4


class Gate(HostCopy):
    """A copy whose device is not done before `open` is set."""

    def __init__(self, array: Planes) -> None:
        super().__init__(array)
        self.open = threading.Event()

    def wait(self) -> int:
        """As HostCopy's."""
        assert self.open.wait(20)
        return super().wait()


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


def test_a_film_holds_up_nobody() -> None:
    """While a film's picture waits for the device, the pool takes no more films, and live pictures come out."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    gate = Gate(np.full((48, 32), 128, np.uint8))
    pool.submit([replace(results.task("film", pts, rendition="film"), copy=gate) for pts in (0, 90)])
    assert not pool.takes_films
    pool.submit([results.task("live", 0)])
    wait_for(lambda: results.by_run["live"], of="the live picture")
    assert not results.by_run["film"]
    gate.open.set()
    pool.close()
    assert [pts for pts, _ in results.by_run["film"]] == [0, 90]
    assert pool.takes_films


def test_films_of_long_clips_hold_up_nobody() -> None:
    """However many pictures wait for films, there is room for live ones."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    gate = Gate(np.full((48, 32), 128, np.uint8))
    pool.submit([replace(results.task("film", pts, rendition="film"), copy=gate) for pts in range(MAX_WAITING + 1)])
    submitter = threading.Thread(target=pool.submit, args=([results.task("live", 0)],))
    submitter.start()
    try:
        wait_for(lambda: results.by_run["live"], of="the live picture")
    finally:
        gate.open.set()
        submitter.join()
        pool.close()
    assert len(results.by_run["film"]) == MAX_WAITING + 1


def test_of_many_live_streams_new_ones_are_made_quickly() -> None:
    """The first live encoders spare bytes; those that open beside many others spare work, and so say other options."""
    results, pool = Results(), EncodePool(THREADS)
    pool.start()
    for number in range(MANY_LIVE + 1):
        pool.submit([results.task(f"run {number}", 0)])
    pool.close()
    (_, first), (_, last) = results.by_run["run 0"][0], results.by_run[f"run {MANY_LIVE}"][0]
    assert first is not None
    assert last is not None
    assert b"cabac=1" in first.payload
    assert b"cabac=0" in last.payload  # x264 tells its options in the first packet; ultrafast leaves CABAC out


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
