"""Encoders in threads and in processes: each chain in order, one that fails takes no other with it, films wait."""

from __future__ import annotations

import contextlib
import io
import itertools
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image

from taesd_stream.config import load_config
from taesd_stream.decoding.host_copy import HostCopy
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, Planes
from taesd_stream.messages import Job
from taesd_stream_workers.worker import encoding_child
from taesd_stream_workers.worker.chain_encoder import Order
from taesd_stream_workers.worker.encode_pieces import pieces
from taesd_stream_workers.worker.encode_pool import FILM_S, MANY_LIVE, MAX_WAITING, Chain, EncodePool, EncodeTask, Lanes
from taesd_stream_workers.worker.encode_processes import MAX_DEATHS, EncodeProcesses, shares
from taesd_stream_workers.worker.encode_threads import EncodeThreads
from taesd_stream_workers.worker.job_decoder import JobDecoder
from taesd_stream_workers.worker.job_run import JobRun
from tests.daemon import wait_for
from tests.golden_messages import JOB_ITEM
from tests.processes import lives

LANES = 4
in_processes = pytest.mark.skipif(
    not EncodeProcesses.are_possible(), reason="this system shares no memory without a name"
)
LANES_OF_ALL_KINDS = [EncodeThreads, pytest.param(EncodeProcesses, marks=in_processes)]
NewPool: TypeAlias = Callable[..., EncodePool]


@pytest.fixture(params=LANES_OF_ALL_KINDS)
def new_pool(request: pytest.FixtureRequest) -> NewPool:
    """Makes pools that encode in threads, or in processes."""
    return lambda *clock: EncodePool(request.param(LANES, 1), *clock)


class Gate(HostCopy):
    """A copy whose device is not done before `open` is set."""

    def __init__(self, array: Planes) -> None:
        super().__init__(array)
        self.open = threading.Event()

    def wait(self) -> int:
        """As HostCopy's."""
        assert self.open.wait(20)
        return super().wait()


class Late(HostCopy):
    """A copy whose bytes are right once it was waited for, and not before."""

    def __init__(self, array: Planes) -> None:
        super().__init__(np.zeros_like(array))
        self._right = array

    def wait(self) -> int:
        """As HostCopy's."""
        self.array[:] = self._right
        return super().wait()


class Failed(HostCopy):
    """A copy whose device has failed."""

    def wait(self) -> int:
        """As HostCopy's."""
        raise RuntimeError("the device is gone")


@contextlib.contextmanager
def held_up(pool: EncodePool, *, films: bool) -> Iterator[HostCopy]:
    """A copy whose pictures are not encoded within this `with`: of films, or of all else."""
    grey, lanes = np.full((48, 32), 128, np.uint8), pool._lanes
    if not isinstance(lanes, EncodeProcesses):
        gate = Gate(grey)
        try:
            yield gate
        finally:
            gate.open.set()
        return
    processes = [child.process for child in (lanes._films if films else lanes._live)._children]
    try:
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        yield HostCopy(grey)
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)


class Results:
    """What came out, by run, in the order in which it came: (pts, picture)."""

    def __init__(self) -> None:
        self.by_run: defaultdict[str, list[tuple[int, EncodedPicture | None]]] = defaultdict(list)
        self._lock = threading.Lock()

    def task(
        self,
        run: str,
        pts: int,
        planes: Planes | None = None,
        *,
        rendition: Rendition = "live",
        attempt: int = 0,
        copy: HostCopy | None = None,
    ) -> EncodeTask:
        """A picture to encode, grey unless it is given, or what a copy brings."""
        picture = np.full((48, 32), 128, np.uint8) if planes is None else planes
        copy = copy or HostCopy(picture)

        def on_done(encoded: EncodedPicture | None) -> None:
            with self._lock:
                self.by_run[run].append((pts, encoded))

        return EncodeTask(
            run=run,
            rendition=rendition,
            # is_clip: no keyframes of an encoder's own accord: they tell when one is new
            order=Order(attempt, False, pts, 32, 32, track=0, tracks=1, is_clip=True),
            planes=copy.array,
            copy=copy,
            on_done=on_done,
        )

    def keyframes(self, run: str) -> list[int]:
        """The pts of a run's keyframes."""
        return [pts for pts, picture in self.by_run[run] if picture is not None and picture.is_keyframe]


def test_pictures_of_a_run_come_in_order_from_whatever_thread(new_pool: NewPool) -> None:
    """Many runs' pictures go through a few threads: each run's come out in order, and all once."""
    results, pool = Results(), new_pool()
    pool.start()
    for pts in range(0, 900, 90):
        pool.submit([results.task(f"run {number}", pts) for number in range(12)])
    pool.close()
    assert set(results.by_run) == {f"run {number}" for number in range(12)}
    for run, came in results.by_run.items():
        assert [pts for pts, _ in came] == list(range(0, 900, 90))
        assert results.keyframes(run) == [0]  # one encoder made them all


def test_a_forgotten_run_begins_anew_behind_what_is_queued_of_it(new_pool: NewPool) -> None:
    """Forgetting closes a run's encoder once its pictures are made; one that comes later starts with a keyframe."""
    results, pool = Results(), new_pool()
    pool.start()
    pool.submit([results.task("a", 0), results.task("a", 90)])
    pool.forget("a")
    pool.close()
    again = new_pool()
    again.start()
    again.submit([results.task("a", 180)])
    again.close()
    assert [pts for pts, _ in results.by_run["a"]] == [0, 90, 180]
    assert results.keyframes("a") == [0, 180]


def test_a_new_attempt_is_a_new_chain(new_pool: NewPool) -> None:
    """A recording's next attempt begins with a keyframe, in the same pool."""
    results, pool = Results(), new_pool()
    pool.start()
    pool.submit([results.task("a", pts, rendition="record", attempt=attempt) for pts, attempt in [(0, 1), (90, 1)]])
    pool.submit([results.task("a", pts, rendition="record", attempt=2) for pts in (90, 180)])
    pool.close()
    assert results.keyframes("a") == [0, 90]


def test_a_film_holds_up_nobody(new_pool: NewPool) -> None:
    """While a film's picture waits, the pool takes no more films, and live pictures come out."""
    results, pool = Results(), new_pool()
    pool.start()
    with held_up(pool, films=True) as copy:
        pool.submit([results.task("film", pts, rendition="film", copy=copy) for pts in (0, 90)])
        assert not pool.takes_film("film")
        pool.submit([results.task("live", 0)])
        wait_for(lambda: results.by_run["live"], of="the live picture")
        assert not results.by_run["film"]
    pool.close()
    assert [pts for pts, _ in results.by_run["film"]] == [0, 90]
    assert pool.takes_film("film")


def test_a_film_takes_only_time_that_nobody_else_wants(new_pool: NewPool) -> None:
    """While more live pictures wait than lanes can take, a run's film gets one a second, and no two at once."""
    now_s = 0.0
    results, pool = Results(), new_pool(lambda: now_s)
    pool.start()
    with held_up(pool, films=False) as copy:
        pool.submit([results.task(f"run {number}", 0, copy=copy) for number in range(LANES + 1)])
        assert pool.takes_film("a")  # the first picture of its film
        assert not pool.takes_film("a")
        assert not pool.takes_film("b", granted=1)
        assert pool.takes_film("b")
        now_s = FILM_S
        assert pool.takes_film("a")
        assert not pool.takes_film("a")
    pool.close()
    assert pool.takes_film("a")


def test_films_of_long_clips_hold_up_nobody(new_pool: NewPool) -> None:
    """However many pictures wait for films, there is room for live ones."""
    results, pool = Results(), new_pool()
    pool.start()
    with held_up(pool, films=True) as copy:
        pool.submit([results.task("film", pts, rendition="film", copy=copy) for pts in range(MAX_WAITING + 1)])
        submitter = threading.Thread(target=pool.submit, args=([results.task("live", 0)],))
        submitter.start()
        wait_for(lambda: results.by_run["live"], of="the live picture")
    submitter.join()
    pool.close()
    assert len(results.by_run["film"]) == MAX_WAITING + 1


def test_of_many_live_streams_new_ones_are_made_quickly(new_pool: NewPool) -> None:
    """The first live encoders spare bytes; those that open beside many others spare work, and so say other options."""
    results, pool = Results(), new_pool()
    pool.start()
    for number in range(MANY_LIVE + 1):
        pool.submit([results.task(f"run {number}", 0)])
    pool.close()
    (_, first), (_, last) = results.by_run["run 0"][0], results.by_run[f"run {MANY_LIVE}"][0]
    assert first is not None
    assert last is not None
    assert b"cabac=1" in first.payload
    assert b"cabac=0" in last.payload  # x264 tells its options in the first packet; ultrafast leaves CABAC out


def test_planes_that_are_no_picture_harm_only_themselves(
    new_pool: NewPool, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A picture that cannot be encoded is answered with None; its run goes on with a keyframe, others just go on."""
    results, pool = Results(), new_pool()
    pool.start()
    pool.submit([results.task("a", 0), results.task("b", 0)])
    pool.submit([results.task("a", 90, np.zeros((7, 32), np.uint8)), results.task("b", 90)])
    pool.submit([results.task("a", 180), results.task("b", 180)])
    pool.close()
    assert [picture is None for _, picture in results.by_run["a"]] == [False, True, False]
    assert results.keyframes("a") == [0, 180]
    assert results.keyframes("b") == [0]
    assert "encode_failed run=a" in caplog.text + capfd.readouterr().err  # a process says it itself


@pytest.mark.parametrize("is_last_failed", [False, True])
def test_every_picture_is_made_of_its_own_bytes(new_pool: NewPool, is_last_failed: bool) -> None:
    """Pictures of many greys, in one copy that comes late, are those greys; of a device that failed there are none."""
    greys = list(range(20, 220, 10))
    whole = np.full((len(greys), 48, 32), 128, np.uint8)
    whole[:, :32] = np.array(greys)[:, None, None]
    results, pool = Results(), new_pool()
    pool.start()
    for copy in (Late(whole), Late(whole[::-1].copy()), Failed(whole) if is_last_failed else Late(whole)):
        pool.submit(
            [
                replace(results.task(f"run {number}", 0, rendition="jpeg", copy=copy), planes=copy.array[number])
                for number in range(len(greys))
            ]
        )
    pool.close()
    for number, grey in enumerate(greys):
        made = [picture and round(luma(picture)) for _, picture in results.by_run[f"run {number}"]]
        assert made == [grey, greys[-1 - number], None if is_last_failed else grey]


def luma(picture: EncodedPicture) -> float:
    """The mean of a JPEG, 0 to 255."""
    with Image.open(io.BytesIO(picture.payload)) as image:
        return float(np.asarray(image.convert("L")).mean())


@in_processes
def test_more_pictures_at_once_than_memory_holds_are_made(caplog: pytest.LogCaptureFixture) -> None:
    """Those that wait for room get what others give back; one that would never fit is refused."""
    results, pool = Results(), EncodePool(EncodeProcesses(1, 1, planes_bytes=4 << 10))
    pool.start()
    pool.submit([results.task("a", pts) for pts in range(50)])
    pool.submit([results.task("b", 0, np.zeros((96, 64), np.uint8)), results.task("a", 50)])
    pool.close()
    assert [picture is None for _, picture in results.by_run["a"]] == [False] * 51
    assert [picture is None for _, picture in results.by_run["b"]] == [True]
    assert "6144 bytes, over the 4096" in caplog.text


@in_processes
def test_films_that_fill_their_memory_hold_up_nobody() -> None:
    """Live pictures have memory of their own."""
    results, pool = Results(), EncodePool(EncodeProcesses(1, 1, planes_bytes=4 << 10))
    pool.start()
    with held_up(pool, films=True):
        pool.submit([results.task("film", pts, rendition="film") for pts in range(20)])
        pool.submit([results.task("live", 0)])
        wait_for(lambda: results.by_run["live"], of="the live picture")
    pool.close()
    assert len(results.by_run["film"]) == 20


@in_processes
def test_chains_of_each_kind_are_spread_over_the_processes() -> None:
    """Of runs that are shown and recorded, no process has all the recordings, which take longest."""
    results, lanes = Results(), EncodeProcesses(2, 1, threads=1)
    pool = EncodePool(lanes)
    pool.start()
    for run in "abcd":
        pool.submit([results.task(run, 0), results.task(run, 0, rendition="record")])
    wait_for(lambda: sum(map(len, results.by_run.values())) == 8, of="the pictures")
    assert [dict(child.chains) for child in lanes._live._children] == [{"live": 2, "record": 2}] * 2
    pool.close()


def test_a_chain_that_waits_holds_up_no_other() -> None:
    """Chains are encoded beside each other, in a worker's threads and in those of a process of its own alike."""
    results, pool = Results(), EncodePool(EncodeThreads(2, 1))
    pool.start()
    with held_up(pool, films=False) as copy:
        pool.submit([replace(results.task("late", 0), copy=copy)])
        pool.submit([results.task("early", 0)])
        wait_for(lambda: results.by_run["early"], of="the picture that waits for nothing")
        assert not results.by_run["late"]
    pool.close()
    assert [picture is None for run in ("late", "early") for _, picture in results.by_run[run]] == [False, False]


@in_processes
def test_processes_share_the_lanes() -> None:
    """Six live pictures at once and one for films: two processes of three threads, and one of one."""
    lanes = EncodeProcesses(6, 1)
    lanes.start(lambda *_: None)
    children = [*lanes._live._children, *lanes._films._children]
    lanes.close()
    assert [child.process.args[-2:] for child in children] == [["3", "0"], ["3", "0"], ["0", "1"]]  # type: ignore[index]


@contextlib.contextmanager
def lone_child(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """An encoding process without a worker, two threads and grey planes of 32x32, and the socket that it hears."""
    ours, theirs = socket.socketpair()
    with (folder / "planes").open("w+b") as planes, ours:
        planes.write(bytes([128]) * 4096)
        planes.flush()
        fds = (theirs.fileno(), planes.fileno())
        words = map(str, (*fds, 4096, 2, 1))
        child = subprocess.Popen(
            [sys.executable, "-m", encoding_child.__name__, *words], pass_fds=fds, stderr=subprocess.PIPE
        )
        theirs.close()
        with child:
            yield child, ours


@in_processes
def test_an_encoder_that_is_told_nonsense_ends(tmp_path: Path) -> None:
    """It says why: none waits for a process that hears nothing any more."""
    with lone_child(tmp_path) as (child, link):
        link.sendall(msgpack.packb([1, 2, 3]))
        _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert b"encoder_failed" in said


@in_processes
def test_an_encoder_ends_with_the_first_picture_that_nobody_takes(tmp_path: Path) -> None:
    """Its worker was killed: whatever else it was given, it makes no more of it."""
    order = Order(attempt=0, keyframe=False, pts=0, width=32, height=32, track=0, tracks=1, is_clip=False)
    with lone_child(tmp_path) as (child, link):
        link.shutdown(socket.SHUT_RD)  # and not closed: its end would be reason enough to go
        link.sendall(msgpack.packb(encoding_child.Wanted(1, 0, "a", "jpeg", False, 0, 48, 32, order)))
        assert child.wait(60) == 0


@pytest.mark.parametrize(("lanes", "each"), [(8, [4, 4]), (5, [2, 3]), (2, [2]), (1, [1])])
def test_lanes_are_shared_out_evenly(lanes: int, each: list[int]) -> None:
    """Over as few processes as may be."""
    assert shares(lanes, 4) == each


def two_processes() -> tuple[Results, EncodeProcesses, EncodePool]:
    """A pool of two, each with a run, `a` or `b`, whose first picture is made."""
    results, lanes = Results(), EncodeProcesses(2, 1, threads=1)
    pool = EncodePool(lanes)
    pool.start()
    pool.submit([results.task(run, 0) for run in "ab"])
    wait_for(lambda: len(results.by_run) == 2, of="the first pictures")
    return results, lanes, pool


@in_processes
def test_an_encoder_that_dies_takes_only_its_own_pictures_with_it(caplog: pytest.LogCaptureFixture) -> None:
    """What it had is answered with None; its runs go on with a keyframe in another process, others just go on."""
    results, lanes, pool = two_processes()
    of_a = pool._chains["a", "live"].place.child
    of_a.process.send_signal(signal.SIGSTOP)
    pool.submit([results.task(run, 90) for run in "ab"])
    wait_for(lambda: of_a.waiting, of="a picture that is lost")
    of_a.process.kill()
    wait_for(lambda: len(results.by_run["a"]) == 2, of="the word that it is lost")
    pool.submit([results.task(run, 180) for run in "ab"])
    pool.close()
    assert [(pts, picture is None) for pts, picture in results.by_run["a"]] == [(0, False), (90, True), (180, False)]
    assert results.keyframes("a") == [0, 180]
    assert [(pts, picture is None) for pts, picture in results.by_run["b"]] == [(0, False), (90, False), (180, False)]
    assert results.keyframes("b") == [0]
    assert "encoder_died exit_code=-9 pictures=1" in caplog.text
    planes = lanes._live._planes
    assert planes._free == [(0, planes.nbytes)]


@in_processes
def test_where_no_other_can_be_started_the_living_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A system that has no room for another process costs speed, not pictures."""
    results, _, pool = two_processes()
    of_a = pool._chains["a", "live"].place.child

    def no_room(*_: Any, **__: Any) -> None:
        raise BlockingIOError("no room for another process")

    monkeypatch.setattr(subprocess, "Popen", no_room)
    of_a.process.kill()
    wait_for(lambda: of_a.is_lost, of="its end")
    pool.submit([results.task(run, 90) for run in "ab"])
    pool.close()
    assert [results.keyframes(run) for run in "ab"] == [[0, 90], [0]]
    assert [len(results.by_run[run]) for run in "ab"] == [2, 2]
    assert "encoder_not_started" in caplog.text


def test_a_thread_that_cannot_hand_on_a_picture_is_an_error() -> None:
    """What takes the pictures fails: the pool says so, for its worker to end with, and can be closed."""
    results, pool = Results(), EncodePool(EncodeThreads(1, 1))

    def fails(_: EncodedPicture | None) -> None:
        raise MemoryError("full (test)")

    pool.start()
    pool.submit([replace(results.task("a", 0), on_done=fails)])
    wait_for(lambda: pool.error is not None, of="the error")
    pool.close()
    assert "full (test)" in str(pool.error)


@in_processes
def test_where_no_encoder_can_live_the_pool_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that die one after the other are an error that the worker ends with, not a storm of new ones."""
    (tmp_path / "av.py").write_text("raise SystemExit(7)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results, pool = Results(), EncodePool(EncodeProcesses(1, 1))
    pool.start()

    def is_answered() -> bool:
        return pool.error is not None or len(results.by_run["a"]) > pts

    for pts in range(10 * MAX_DEATHS):
        pool.submit([results.task("a", pts)])
        wait_for(is_answered, of="an answer")
        if pool.error:
            break
    pool.close()
    assert "have died one after the other" in str(pool.error)
    assert len(results.by_run["a"]) <= MAX_DEATHS


@in_processes
def test_encoders_end_when_their_worker_is_killed() -> None:
    """A worker that had no time to say anything leaves no process behind."""
    words = """
import sys
from taesd_stream_workers.worker.encode_processes import EncodeProcesses
lanes = EncodeProcesses(2, 1, threads=1)
lanes.start(lambda *_: None)
print(*(child.process.pid for child in (*lanes._live._children, *lanes._films._children)), flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        processes = [int(pid) for pid in worker.stdout.readline().split()]
        assert len(processes) == 3
        assert all(map(lives, processes))
        worker.kill()
    wait_for(lambda: not any(map(lives, processes)), of="their end")


def test_planes_go_there_in_pieces_of_one_copy() -> None:
    """Pictures that lie near each other go in one, the order kept; of another copy, far away, or bad, in the next."""
    results, one, two = Results(), *(HostCopy(np.empty((4, 3072, 2048), np.uint8)) for _ in range(2))
    planes = [one.array[1], one.array[0], one.array[3], one.array[2], one.array[0][:, ::2], one.array[3], two.array[3]]
    copies = [one, one, one, one, one, one, two]
    tasks = [
        replace(results.task("a", pts, copy=copy), planes=each)
        for pts, (copy, each) in enumerate(zip(copies, planes, strict=True))
    ]
    chain = Chain(run="a", rendition="live", is_one_of_many=False)
    cut = [[task.order.pts for _, task, _ in part] for part in pieces([(chain, task) for task in tasks])]
    assert cut == [[0, 1], [2, 3], [4], [5], [6]]


GREY = np.zeros((8, 48, 32), np.uint8)


@in_processes
@pytest.mark.parametrize(
    "planes",
    [GREY[0], GREY[0, 0], GREY[0].view(np.int8), GREY[0][:, ::2], GREY[0][:0]],
    ids=["of no copy", "one row", "no bytes", "not side by side", "empty"],
)
def test_planes_that_are_none_of_their_copy_are_refused(planes: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Never a picture of other bytes than those that were given; its neighbours come out."""
    results, pool = Results(), EncodePool(EncodeProcesses(1, 1))
    is_elsewhere = planes.shape == GREY[0].shape and planes.dtype == np.uint8
    copy = HostCopy(np.zeros_like(GREY) if is_elsewhere else GREY)
    pool.start()
    good = replace(results.task("b", 0), planes=copy.array[1], copy=copy)
    pool.submit([replace(results.task("a", 0), planes=planes, copy=copy), good])
    pool.submit([results.task("a", 90)])
    pool.close()
    assert [picture is None for _, picture in results.by_run["a"]] == [True, False]
    assert [picture is None for _, picture in results.by_run["b"]] == [False]
    assert "encode_failed run=a" in caplog.text


class Decoder:
    """A worker's decoder on the processor, and what it says and sends."""

    def __init__(self, lanes: Lanes) -> None:
        self._said: list[Any] = []
        config = load_config(sets=["decoder.choice=linear"])
        self._decoder = JobDecoder(config, torch.device("cpu"), time.monotonic_ns, self._said.append, lanes=lanes)
        self.start, self.close = self._decoder.start, self._decoder.close

    def submit(self, *jobs: Job) -> None:
        """Queue jobs."""
        for one in jobs:
            self._decoder.submit(JobRun(one))

    def wait_for(self, jobs: int) -> None:
        """Until so many are done."""
        wait_for(lambda: sum(isinstance(one, JobRun) for one in self._said) == jobs, 60, of="the jobs")

    def seqs(self, rendition: Rendition) -> list[int]:
        """Those whose pictures came, in a rendition."""
        packets = [one[1] for one in self._said if isinstance(one, tuple)]
        return [packet.seq for packet in packets if packet.rendition == rendition]


def job_of(number: int, runs: int) -> Job:
    """Pictures of so many runs, for tiles and films."""
    latents = np.zeros((4, 4, 4), np.float16)
    known = replace(JOB_ITEM, seq=number, shape=latents.shape, renditions=("thumb", "film"), pts=number * 90)
    items = tuple(replace(known, run=f"{run:016x}") for run in range(runs))
    payloads = (latents.tobytes(),) * runs
    return Job(job=number, latent_format="sd1", items=items, packets_to="tcp://127.0.0.1:9", payloads=payloads)


@pytest.mark.parametrize("lanes", LANES_OF_ALL_KINDS)
def test_a_job_of_many_runs_lets_in_few_films(lanes: Callable[[int, int], Lanes]) -> None:
    """Sixteen tiles in one job: no more of their pictures go into films than may wait for the thread."""
    decoder, jobs = Decoder(lanes(2, 1)), itertools.count(1)
    decoder.start()

    def is_warm() -> bool:
        number = next(jobs)
        decoder.submit(job_of(number, 1))
        decoder.wait_for(number)
        return bool(decoder.seqs("film"))

    wait_for(is_warm, 60, of="a film's first picture")
    last = next(jobs)
    decoder.submit(job_of(last, 16))
    decoder.wait_for(last)
    decoder.close()
    assert decoder.seqs("thumb").count(last) == 16
    assert 1 <= decoder.seqs("film").count(last) <= 2


def test_while_another_job_waits_one_film_at_most_gets_a_picture() -> None:
    """A job that has one behind it lets a single picture into a film; viewers get all of both."""
    decoder = Decoder(EncodeThreads(2, 1))
    decoder.submit(job_of(1, 16), job_of(2, 16))
    decoder.start()
    decoder.wait_for(2)
    decoder.close()
    assert decoder.seqs("film").count(1) <= 1
    assert sorted(decoder.seqs("thumb")) == [1] * 16 + [2] * 16
