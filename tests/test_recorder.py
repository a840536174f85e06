"""The streamer's writing thread: what comes again, after the broker's death, makes no second file."""

from __future__ import annotations

import contextlib
import gc
import math
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taesd_stream.config import load_config
from taesd_stream.frames import Packet
from taesd_stream.media.recording import Recording
from taesd_stream.messages import Cursor, Gap, State
from taesd_stream_workers.streamer.recorder import EARLY_BYTES, Recorder
from tests.daemon import once_in_three, wait_for
from tests.test_films import film, shot
from tests.test_recording import META, RUN, chain, read, start


def state(*, ended: bool, last_seq: int = -1, kept_from: int = 0, attempt: int = 1) -> State:
    """A STATE that keeps RUN."""
    row = {
        "stream": "demo/a",
        "meta": META,
        "kind": "steps",
        "latent_format": "sd1",
        "started": 1.0,
        "takes_film": True,
        "blocked": None,
        "ended": ended,
        "last_seq": last_seq,
        "kept_from": kept_from,
        "attempt": attempt,
    }
    return State(streams=[], runs={RUN: row}, workers=[], stats={}, desired_workers=1, now_ns=0)


NOTHING = State(streams=[], runs={}, workers=[], stats={}, desired_workers=1, now_ns=0)


@pytest.fixture
def told() -> list[Any]:
    """What the broker is told."""
    return []


def finished(told: list[Any]) -> Callable[[], bool]:
    """Whether the file is finished, as far as the broker has been told since it was last asked."""

    def ask() -> bool:
        found = any(isinstance(one, Cursor) and one.finished for one in told)
        if found:
            told.clear()
        return found

    return ask


@contextlib.contextmanager
def after_a_file(folder: Path, told: list[Any], last_seq: int) -> Iterator[Recorder]:
    """A recorder that has finished a file of RUN, 0 to `last_seq`; it is closed behind the `with`."""
    recorder = Recorder(load_config(sets=[f"recording.folder={folder}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        recorder.put(state(ended=False))
        for packet in chain(0, last_seq):
            recorder.put(packet)
        recorder.put(state(ended=True, last_seq=last_seq))
        wait_for(finished(told), of="the file")
        yield recorder
    finally:
        recorder.close()


def test_frames_of_a_finished_file_that_come_again_make_no_second_one(tmp_path: Path, told: list[Any]) -> None:
    """The broker dies with the last ACK: it knows nothing, and is sent frames that a file has. They are not recorded
    twice; the broker hears how far the file is, and that it is finished."""
    with after_a_file(tmp_path, told, 5) as recorder:
        recorder.put(NOTHING)
        recorder.put(state(ended=False, last_seq=3, kept_from=4))
        for packet in chain(4, 5):
            recorder.put(packet)
        wait_for(lambda: any(one.written == 5 and one.attempt == 1 for one in told), of="the cursor")
        recorder.put(state(ended=True, last_seq=5, kept_from=4))
        wait_for(finished(told), of="the word that it is finished")
    (path,) = (path for path in tmp_path.rglob("*") if path.is_file() and ".films" not in path.parts)
    assert [number for number, _ in read(path)] == [0, 1, 2, 3, 4, 5]


def test_what_follows_a_finished_file_is_another_one(tmp_path: Path, told: list[Any]) -> None:
    """Frames behind the last one of a finished file are recorded, in a file of their own."""
    with after_a_file(tmp_path, told, 2) as recorder:
        recorder.put(state(ended=False, kept_from=7, attempt=2))
        for packet in chain(7, 8, attempt=2):
            recorder.put(packet)
        recorder.put(state(ended=True, last_seq=8, kept_from=7, attempt=2))
        wait_for(finished(told), of="the second file")
    files = list(tmp_path.rglob("*.mp4"))
    assert sorted([number for number, _ in read(path)] for path in files) == [[0, 1, 2], [7, 8]]


def test_a_file_waits_for_what_its_run_says_of_itself(tmp_path: Path, told: list[Any]) -> None:
    """Packets of a run whose meta the broker has not told wait for a STATE that does: it goes into the file's head."""
    known = state(ended=False)
    unknown = replace(known, runs={RUN: {**known.runs[RUN], "meta": None}})
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        recorder.put(unknown)
        for packet in chain(0, 2):
            recorder.put(packet)
        recorder.put(known)
        wait_for(lambda: any(one.written == 2 for one in told), of="the frames")
        about = recorder.files.about(RUN)
    finally:
        recorder.close()
    assert about is not None
    assert META.items() <= about["meta"].items()


def test_what_the_disk_did_not_take_is_written_once_it_does(tmp_path: Path, told: list[Any]) -> None:
    """A folder that cannot be made, then can: all frames that came meanwhile are in the file, sent once each."""
    (tmp_path / "demo").write_text("in the way")
    failed: list[None] = []
    recorder = Recorder(
        load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None, lambda: failed.append(None)
    )
    recorder.start()
    try:
        recorder.put(state(ended=False))
        for packet in chain(0, 5):
            recorder.put(packet)
        recorder.put(state(ended=True, last_seq=5))
        wait_for(lambda: failed, of="the error")
        (tmp_path / "demo").unlink()
        wait_for(lambda: any(one.written == 5 for one in told), of="the cursor")
        recorder.put(state(ended=True, last_seq=5))
        wait_for(finished(told), of="the file")
    finally:
        recorder.close()
    (path,) = tmp_path.rglob("*.mp4")
    assert [number for number, _ in read(path)] == list(range(6))


FILMED = [f"{number:016x}" for number in range(5000, 5080)]


def many_films(folder: Path, count: int) -> None:
    """So many films of other runs, copies of one."""
    one = start(folder / "one")
    one.write(chain(0, 0)[0])
    data = one.paths[0].read_bytes()
    one.close()
    for number in range(count):
        run = f"{number:016x}"
        (folder / f"{run}.mp4.part").write_bytes(data.replace(RUN.encode(), run.encode()))


def film_packets(rounds: int) -> Iterator[Packet]:
    """Pictures of 80 films, one of each in turn."""
    for packet in chain(0, rounds - 1):
        for run in FILMED:
            yield replace(packet, run=run, rendition="film")


def test_films_of_many_runs_do_not_hold_up_a_recording(tmp_path: Path, told: list[Any]) -> None:
    """Among 2,000 old films 80 runs grow in turn, faster than the disk: a kept run's frame is written within 1 s.

    Only a try after which films still wait counts.
    """
    many_films(tmp_path / ".films", 2000)
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    filmed = [{"run": run, "state": "live", "meta": META, "latent_format": "sd1", "kind": "steps"} for run in FILMED]
    over = threading.Event()

    def shoot() -> None:
        for packet in film_packets(200):
            if over.is_set():
                return
            recorder.put(packet)

    def taken_s(number: int) -> float:
        packet = chain(0, 2)[number]
        put_s = time.monotonic()
        recorder.put(packet)
        wait_for(lambda: any(isinstance(one, Cursor) and one.written == packet.seq for one in told), of="the cursor")
        return time.monotonic() - put_s if len(recorder._film_queue) else math.inf

    shooting = threading.Thread(target=shoot)
    recorder.start()
    try:
        recorder.put(replace(state(ended=False), streams=filmed))
        shooting.start()
        wait_for(lambda: len(recorder.films.films) > 2000, 60, of="films that grow")
        once_in_three(taken_s, lambda taken_s: taken_s < 1.0)
    finally:
        over.set()
        shooting.join()
        recorder.close()


def large(packet: Packet) -> Packet:
    """The same picture with 4 MiB of filler behind it (H.264's NAL 12), which every copy must carry."""
    return replace(packet, payload=bytes(packet.payload) + b"\0\0\0\1\x0c" + b"\xff" * (4 << 20) + b"\x80")


def test_a_large_file_that_is_finished_holds_up_nobody(
    tmp_path: Path, told: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While 80 MiB of one run become an ordinary file, a frame of another is written and told; then both are whole."""
    other = "00000000000000cd"
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        first = state(ended=False)
        recorder.put(replace(first, runs={**first.runs, other: first.runs[RUN]}))
        for packet in chain(0, 19):
            recorder.put(large(packet))
            wait_for(lambda seq=packet.seq: any(one.written == seq for one in told), of="a large frame")  # type: ignore[misc]
        is_other_told = threading.Event()

        def on_a_slow_disk(one: Recording, finish: Callable[[Recording], Any] = Recording.finish) -> Any:
            files = finish(one)
            is_other_told.wait(30)
            return files

        monkeypatch.setattr(Recording, "finish", on_a_slow_disk)
        over = state(ended=True, last_seq=19)
        recorder.put(replace(over, runs={**over.runs, other: first.runs[RUN]}))
        recorder.put(replace(chain(0, 0)[0], run=other))
        try:
            wait_for(lambda: any(one.run == other for one in told), of="the other's frame")
        finally:
            is_other_told.set()
        wait_for(lambda: any(one.finished for one in told), 60, of="the file")
        order = [(one.run, one.finished) for one in told if one.finished or one.run == other]
        assert order[0] == (other, False)
        assert (RUN, True) in order
    finally:
        recorder.close()
    (finished_file,) = tmp_path.rglob("*.mp4")
    assert [number for number, _ in read(finished_file)] == list(range(20))
    (growing,) = (path for path in tmp_path.rglob("*.mp4.part"))
    assert [number for number, _ in read(growing)] == [0]


def test_a_writer_that_hangs_holds_few_states(tmp_path: Path, told: list[Any]) -> None:
    """While a write hangs 10,000 STATEs come: two of them wait, the last one among them, and it is acted on then."""
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        goes_on.wait(60)

    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, hang)
    recorder.start()
    try:
        assert hangs.wait(20)
        for packet in chain(0, 5):
            recorder.put(packet)
        gc.collect()
        before = sum(type(one) is State for one in gc.get_objects())
        for _ in range(10_000):
            recorder.put(state(ended=False))
        recorder.put(state(ended=True, last_seq=5))
        assert sum(type(one) is State for one in gc.get_objects()) <= before + 2
        goes_on.set()
        wait_for(finished(told), of="the file")
    finally:
        goes_on.set()
        recorder.close()


def test_packets_that_no_state_names_are_bounded_in_bytes(tmp_path: Path, told: list[Any]) -> None:
    """Large packets of a run that nobody knows wait for a STATE, as many as fit; the others are let go."""
    first = chain(0, 0)[0]
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        sent: list[weakref.ref[memoryview]] = []
        while len(sent) < 40:
            packet = replace(first, seq=len(sent), payload=memoryview(bytes(EARLY_BYTES // 8)))
            if recorder.put(packet):  # else there is room in a moment
                assert isinstance(packet.payload, memoryview)
                sent.append(weakref.ref(packet.payload))
        del packet
        wait_for(lambda: sum(one() is not None for one in sent) <= 8, of="what does not fit to go")
    finally:
        recorder.close()


def test_a_film_is_kept_beside_the_last_picture_of_its_run(tmp_path: Path, told: list[Any]) -> None:
    """Keep comes while the one frame of the same run is still to be finished: both become files."""
    one = shot(tmp_path / ".films")
    for packet in chain(0, 2):
        one.write(film(packet))
    one.close()
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        last = state(ended=False, kept_from=3)
        last.runs[RUN]["takes_film"] = False
        recorder.put(last)
        recorder.put(chain(3, 3)[0])
        wait_for(lambda: any(one.written == 3 for one in told), of="the last picture")
        wish = recorder.keep_film(RUN)
        recorder.put(replace(last, runs={RUN: {**last.runs[RUN], "ended": True, "last_seq": 3}}))
        path = recorder.library.path_of(wish.result(timeout=30))
    finally:
        recorder.close()
    assert path is not None
    assert [number for number, _ in read(path)] == [0, 1, 2]
    assert sorted(len(read(path)) for path in tmp_path.rglob("*.mp4")) == [1, 3]
    assert not list(tmp_path.rglob("*.part"))


def test_a_film_that_is_being_kept_is_finishing(tmp_path: Path) -> None:
    """While a large film becomes an ordinary file it is told as finishing, at no time as recording."""
    one = shot(tmp_path / ".films")
    for packet in chain(0, 19):
        one.write(film(large(packet)))
    one.close()
    seen: set[str] = set()
    recorder = Recorder(
        load_config(sets=[f"recording.folder={tmp_path}"]),
        lambda _: None,
        lambda rows, _films: seen.update(row["state"] for row in rows),
    )
    recorder.start()
    try:
        recorder.keep_film(RUN).result(timeout=30)
        wait_for(lambda: "finished" in seen, of="the row")
    finally:
        recorder.close()
    assert seen == {"finishing", "finished"}


def test_a_failure_that_comes_again_and_again_is_said_once(
    tmp_path: Path, told: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A run of which the broker tells nothing, then all: its traceback is no flood, and what follows is recorded."""
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        recorder.put(replace(NOTHING, runs={RUN: {}}))
        for seq in range(100):
            recorder.put(Gap(run=RUN, seq=seq, attempt=1, code="poison"))
        wait_for(lambda: len(caplog.records) >= 2, of="both failures")
        recorder.put(state(ended=False))
        for packet in chain(0, 2):
            recorder.put(packet)
        wait_for(lambda: any(one.written == 2 for one in told), of="the frames")
    finally:
        recorder.close()
    texts = [record.message for record in caplog.records if "recorder_failed" in record.message]
    assert len(texts) == len(set(texts)) == 2


def test_a_file_that_is_removed_before_it_is_finished_begins_anew(tmp_path: Path, told: list[Any]) -> None:
    """The broker hears that nothing is written of a run whose file somebody took; what comes again is a file."""
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.start()
    try:
        recorder.put(state(ended=False))
        for packet in chain(0, 2):
            recorder.put(packet)
        wait_for(lambda: any(one.synced == 2 for one in told), of="the frames")
        (growing,) = tmp_path.rglob("*.mp4.part")
        growing.unlink()
        recorder.put(state(ended=True, last_seq=2))
        wait_for(lambda: told[-1].written == -1, of="the word that nothing is there")
        for packet in chain(0, 2, attempt=2):
            recorder.put(packet)
        recorder.put(state(ended=True, last_seq=2, attempt=2))
        wait_for(finished(told), of="the file")
    finally:
        recorder.close()
    (path,) = tmp_path.rglob("*.mp4")
    assert [number for number, _ in read(path)] == [0, 1, 2]
