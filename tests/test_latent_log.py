"""The latent log: what was appended comes back, through torn tails, full disks, restarts and retention."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from taesd_stream import wire
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_log import LogError, RunLog, bytes_by_run, read_messages, runs_in, segment_paths
from taesd_stream.log_records import pack_record
from taesd_stream.messages import End
from tests.golden_messages import FRAME, OPEN, RUN

END = End(run=RUN, last_seq=9, reason="done")


def frame(seq: int, floats: int = 48) -> LatentFrame:
    """Frame `seq`, its payload told by its seq."""
    payload = random.Random(seq).randbytes(2 * floats)  # noqa: S311 no secret
    return dataclasses.replace(FRAME, seq=seq, index=seq, shape=(1, 1, floats), payload=payload)


def filled(folder: Path, count: int = 10, *, segment_bytes: int = 1 << 20, first: int = 0) -> RunLog:
    """A log with `count` frames."""
    log = RunLog(folder, OPEN, segment_bytes=segment_bytes)
    for seq in range(first, first + count):
        log.append(frame(seq))
    return log


def frames_in(path: Path) -> list[int]:
    """The seqs in one file."""
    return [message.seq for message in read_messages(path) if isinstance(message, LatentFrame)]


@contextmanager
def disk_full_at(file_bytes: int) -> Iterator[None]:
    """No file of this process may grow past so many bytes: writes behind it fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_first_frame_is_not_passed_over(tmp_path: Path) -> None:
    """Where the disk did not take the frame that a log begins with, a later one is none for it: it would be lost."""
    log = RunLog(tmp_path, OPEN, first_seq=4)
    with disk_full_at(0), pytest.raises(LogError):
        log.append(frame(4))
    with pytest.raises(ValueError, match="expected seq 4, got 5"):
        log.append(frame(5))
    log.append(frame(4))
    log.append(frame(5))
    assert (log.first_seq, log.next_seq) == (4, 6)


def test_an_empty_log_makes_no_file(tmp_path: Path) -> None:
    """Before the first append there is nothing on the disk, and nothing to read."""
    log = RunLog(tmp_path, OPEN)
    assert (list(tmp_path.iterdir()), log.first_seq, log.next_seq, log.nbytes, log.read(0)) == ([], None, None, 0, None)


def test_frames_come_back_as_they_were(tmp_path: Path) -> None:
    """read() gives each appended frame whole, and None for those that are not there."""
    log = filled(tmp_path, 5, first=3)
    assert [log.read(seq) for seq in range(3, 8)] == [frame(seq) for seq in range(3, 8)]
    assert (log.read(2), log.read(8), log.first_seq, log.next_seq) == (None, None, 3, 8)


def test_a_file_tells_its_whole_story(tmp_path: Path) -> None:
    """Each segment is a chain of wire messages: OPEN, frames, END."""
    log = filled(tmp_path, 2)
    log.end(END)
    assert list(read_messages(log.paths[0])) == [OPEN, frame(0), frame(1), END]


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    """Latents and prompts are the user's own: the file is closed to others."""
    assert filled(tmp_path).paths[0].stat().st_mode & 0o077 == 0


def test_holes_are_a_bug_of_the_caller(tmp_path: Path) -> None:
    """A frame that is not the next one is refused, and the log stays as it was."""
    log = filled(tmp_path, 3)
    for seq in (2, 4):
        with pytest.raises(ValueError, match=f"expected seq 3, got {seq}"):
            log.append(frame(seq))
    assert (log.next_seq, frames_in(log.paths[0])) == (3, [0, 1, 2])


def test_a_skip_that_is_meant_begins_a_segment(tmp_path: Path) -> None:
    """Keeping that was off for a while goes on in a new segment of the same run; going back stays a bug."""
    log = filled(tmp_path, 3)
    log.append(frame(7), may_skip=True)
    log.append(frame(8), may_skip=True)
    assert [frames_in(path) for path in log.paths] == [[0, 1, 2], [7, 8]]
    assert [log.read(seq) is not None for seq in (2, 3, 7, 8)] == [True, False, True, True]
    with pytest.raises(ValueError, match="expected seq 9, got 4"):
        log.append(frame(4), may_skip=True)
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    assert (again.first_seq, again.next_seq, again.read(7)) == (0, 9, frame(7))


def test_segments_roll_by_size_and_each_stands_alone(tmp_path: Path) -> None:
    """A full segment is followed by a next one, which begins with OPEN again."""
    log = filled(tmp_path, 10, segment_bytes=1000)
    assert len(log.paths) > 2
    assert [next(iter(read_messages(path))) for path in log.paths] == [OPEN] * len(log.paths)
    assert [seq for path in log.paths for seq in frames_in(path)] == list(range(10))
    assert log.nbytes == sum(path.stat().st_size for path in log.paths)


def test_sizes_add_up(tmp_path: Path) -> None:
    """size_of() is a record's bytes on disk, in the middle and at the end of a segment."""
    log = filled(tmp_path, 10, segment_bytes=1000)
    last = [frames_in(path)[-1] for path in log.paths]
    for path, seq in zip(log.paths, last, strict=True):
        begun = path.stat().st_size - sum(log.size_of(one) for one in frames_in(path))
        assert 0 < begun < 400  # the OPEN
        assert log.size_of(seq) > frame(seq).nbytes
    assert (log.size_of(-1), log.size_of(10)) == (0, 0)


def test_release_frees_whole_segments_behind_the_cursor(tmp_path: Path) -> None:
    """Segments whose frames are all older go; a frame that is not older, and the last segment, stay."""
    log = filled(tmp_path, 10, segment_bytes=1000)
    paths = log.paths
    first_of_second = frames_in(paths[1])[0]
    log.release(first_of_second - 1)
    assert log.paths == paths
    log.release(first_of_second)
    assert (log.paths, log.first_seq, paths[0].exists()) == (paths[1:], first_of_second, False)
    log.release(10_000)
    assert log.paths == paths[-1:]
    assert log.read(9) == frame(9)


def test_delete_leaves_nothing(tmp_path: Path) -> None:
    """delete() removes every segment."""
    filled(tmp_path, 10, segment_bytes=1000).delete()
    assert list(tmp_path.iterdir()) == []


def test_reopening_goes_on_where_it_ended(tmp_path: Path) -> None:
    """A later process reads the former one's frames and END, and appends behind them."""
    log = filled(tmp_path, 10, segment_bytes=1000)
    log.end(END)
    again = RunLog.reopen(tmp_path, RUN, segment_bytes=1000)
    assert again is not None
    assert (again.info, again.ended, again.next_seq) == (OPEN, END, 10)
    again.append(frame(10))
    assert [again.read(seq) for seq in range(11)] == [frame(seq) for seq in range(11)]


def test_nothing_is_reopened_where_nothing_is(tmp_path: Path) -> None:
    """A run without segments has no log."""
    assert RunLog.reopen(tmp_path, RUN) is None


def test_bytes_by_run_adds_up_the_segments_of_each(tmp_path: Path) -> None:
    """One look at the folder tells what each run has; of other files, and of no folder, nothing."""
    assert bytes_by_run(tmp_path / "absent") == {}
    log = filled(tmp_path, segment_bytes=600)
    (tmp_path / "note.latents").write_text("a stranger's")
    assert len(segment_paths(tmp_path, RUN)) > 1
    assert bytes_by_run(tmp_path) == {RUN: sum(path.stat().st_size for path in segment_paths(tmp_path, RUN))}
    log.delete()
    assert bytes_by_run(tmp_path) == {}


def test_runs_in_lists_runs_only(tmp_path: Path) -> None:
    """Files of other names in the folder are no runs, and reopening does not touch them."""
    filled(tmp_path, 1)
    for name in ("notes.latents", f"{RUN}.old.latents", f"{RUN}.0000.latents.part", "x.0000.latents"):
        (tmp_path / name).write_bytes(b"mine")
    assert runs_in(tmp_path) == [RUN]
    log = RunLog.reopen(tmp_path, RUN)
    assert log is not None
    assert (len(log.paths), (tmp_path / f"{RUN}.old.latents").read_bytes()) == (1, b"mine")


@pytest.mark.parametrize("cut", [1, 11, 12, 13, 100, 200])
def test_a_torn_tail_is_cut(tmp_path: Path, cut: int) -> None:
    """Wherever a crash tore the last record, the log goes on behind the last whole one."""
    log = filled(tmp_path, 3)
    path, whole = log.paths[0], log.nbytes - log.size_of(2)
    os.truncate(path, whole + cut)
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    assert (again.next_seq, again.nbytes, path.stat().st_size) == (2, whole, whole)
    again.append(frame(2))
    assert frames_in(path) == [0, 1, 2]


@given(at=st.integers(0, 10_000), value=st.integers(0, 255))
@example(at=280, value=1)  # the seq of a segment's first frame
@settings(max_examples=200)
def test_any_damaged_byte_costs_no_more_than_its_record(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    """One wrong byte anywhere: the frame that it is in is lost, none comes back wrong, all others are there."""
    folder = tmp_path_factory.mktemp("damaged")
    log = filled(folder, 5, segment_bytes=600)
    path, count = log.paths[0], len(log.paths)
    starts = [sum(log.size_of(seq) for seq in range(first)) for first in range(3)]
    opening = path.stat().st_size - sum(log.size_of(seq) for seq in frames_in(path))
    inside = frames_in(path)
    assert count > 1
    data = bytearray(path.read_bytes())
    at %= len(data)
    is_same, data[at] = data[at] == value, value
    path.write_bytes(data)
    hit = next((seq for seq in reversed(inside) if opening + starts[seq] <= at), None)
    again = RunLog.reopen(folder, RUN)
    assert again is not None
    assert again.info == OPEN
    for seq in range(5):
        is_lost = not is_same and seq == hit
        assert again.read(seq) == (None if is_lost else frame(seq)), (seq, at, hit)
    again.append(frame(5))
    assert again.read(5) == frame(5)


@pytest.mark.parametrize("damage", [0, 4, 8, 14, 200])
def test_records_behind_a_damaged_one_stay(tmp_path: Path, damage: int) -> None:
    """Whatever byte of a record is wrong, its length too, the log reads all others, also as a file alone."""
    log = filled(tmp_path, 5)
    path = log.paths[0]
    at = log.nbytes - sum(log.size_of(seq) for seq in (2, 3, 4)) + damage
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    assert [again.read(seq) is not None for seq in range(5)] == [True, True, False, True, True]
    assert again.next_seq == 5
    assert frames_in(path) == [0, 1, 3, 4]


def test_a_very_large_log_is_known_without_reading_it(tmp_path: Path) -> None:
    """Two GiB of frames, in a sparse file, are indexed by their headers: under a hundredth of the bytes is read."""
    log = RunLog(tmp_path, OPEN)
    log.append(frame(0))
    path = log.paths[0]
    floats = 1 << 20
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        for seq in range(1, 1025):
            header, _ = wire.pack(dataclasses.replace(FRAME, seq=seq, index=seq, shape=(1, 1, floats)))
            file.write(struct.pack(">III", len(header) + 2 * floats, 0, len(header)))
            file.write(header)
            file.truncate(file.tell() + 2 * floats)
            file.seek(0, os.SEEK_END)
        file.write(b"".join(pack_record(frame(1025))))
    assert path.stat().st_size > 2 << 30
    before = bytes_read()
    again = RunLog.reopen(tmp_path, RUN)
    assert bytes_read() - before < 20 << 20
    assert again is not None
    assert (again.next_seq, again.read(0), again.read(1025)) == (1026, frame(0), frame(1025))
    assert again.read(7) is None  # its bytes are holes: damaged
    again.delete()


def bytes_read() -> int:
    """By this process so far, from wherever (Linux)."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_large_segment_with_a_damaged_head_is_set_aside(tmp_path: Path) -> None:
    """Where the OPEN itself is damaged, but frames may lie behind it, the file is renamed and not deleted."""
    log = RunLog(tmp_path, OPEN)
    log.append(frame(0, floats=100_000))
    path = log.paths[0]
    data = bytearray(path.read_bytes())
    data[20] ^= 0xFF
    path.write_bytes(data)
    assert RunLog.reopen(tmp_path, RUN) is None
    assert path.with_suffix(".damaged").read_bytes() == data
    assert runs_in(tmp_path) == []


def test_a_segment_torn_in_its_head_goes(tmp_path: Path) -> None:
    """A segment that a crash left without even its OPEN holds nothing, and the one before it goes on."""
    filled(tmp_path, 3)
    torn = tmp_path / f"{RUN}.0001.latents"
    torn.write_bytes(b"\0\0")
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    assert (torn.exists(), again.next_seq) == (False, 3)


@pytest.mark.parametrize("room", [1, 100, 250])
def test_a_full_disk_cuts_back_to_the_last_whole_record(tmp_path: Path, room: int) -> None:
    """When a record does not fit, LogError names the file; the file ends whole; with space back it goes on."""
    log = filled(tmp_path, 3)
    path, before = log.paths[0], log.nbytes
    with disk_full_at(before + room), pytest.raises(LogError, match=path.name):
        log.append(frame(3, floats=2000))
    assert (path.stat().st_size, log.next_seq, log.nbytes) == (before, 3, before)
    log.append(frame(3))
    assert frames_in(path) == [0, 1, 2, 3]


def test_a_disk_full_at_a_new_segment_leaves_no_stump(tmp_path: Path) -> None:
    """A segment whose OPEN does not fit is removed; the next try makes it."""
    log = RunLog(tmp_path, OPEN)
    with disk_full_at(10), pytest.raises(LogError):
        log.append(frame(0))
    assert list(tmp_path.iterdir()) == []
    log.append(frame(0))
    assert log.read(0) == frame(0)


def test_a_segment_without_frames_keeps_its_place_when_those_before_it_are_freed(tmp_path: Path) -> None:
    """The disk took a segment's OPEN and not its frame; with all before it recorded and freed, that frame is next."""
    log = filled(tmp_path, 3, segment_bytes=100)  # each frame has its own
    opened = len(b"".join(pack_record(OPEN)))
    with disk_full_at(opened), pytest.raises(LogError):
        log.append(frame(3))
    log.release(3)
    assert (len(log.paths), frames_in(log.paths[0]), log.next_seq) == (1, [], 3)
    log.append(frame(3))
    assert log.read(3) == frame(3)


def test_a_folder_that_is_gone_is_a_log_error(tmp_path: Path) -> None:
    """No folder, no file: LogError names the path."""
    with pytest.raises(LogError, match=r"gone.*No such file"):
        RunLog(tmp_path / "gone", OPEN).append(frame(0))


def test_no_file_is_open_but_while_it_is_used(tmp_path: Path) -> None:
    """Logs of many segments, new and reopened, hold no descriptor: hundreds of runs may wait for their recording."""
    open_files = Path("/proc/self/fd")
    before = len([*open_files.iterdir()])
    log = filled(tmp_path, 20, segment_bytes=600)
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    assert (log.read(7), again.read(7), len(log.paths) > 4) == (frame(7), frame(7), True)
    log.sync()
    assert len([*open_files.iterdir()]) == before


def test_a_file_that_somebody_removed_is_followed_by_another(tmp_path: Path) -> None:
    """The append that finds it gone is an error, the next goes to a new segment; what was in it is lost."""
    log = filled(tmp_path, 3)
    log.paths[0].unlink()
    with pytest.raises(LogError, match="No such file"):
        log.append(frame(3))
    log.append(frame(3))
    assert [log.read(seq) is not None for seq in range(4)] == [False, False, False, True]
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    assert (again.first_seq, again.read(3)) == (3, frame(3))


def test_what_cannot_be_read_now_is_no_missing_frame(tmp_path: Path) -> None:
    """A folder that is none for a while is an error of the disk, for reading and writing; then all is there again."""
    folder = tmp_path / "log"
    folder.mkdir()
    log = filled(folder, 3)
    folder.rename(tmp_path / "away")
    folder.write_text("no folder")
    with pytest.raises(LogError, match="Not a directory"):
        log.read(0)
    with pytest.raises(LogError, match="Not a directory"):
        log.append(frame(3))
    folder.unlink()
    (tmp_path / "away").rename(folder)
    log.append(frame(3))
    assert [log.read(seq) for seq in range(4)] == [frame(seq) for seq in range(4)]


def test_a_killed_writer_loses_only_what_it_was_writing(tmp_path: Path) -> None:
    """After SIGKILL in the midst of appending, the log holds frames 0..n without a hole, each whole."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.test_latent_log import OPEN, RunLog, frame\n"
        "log = RunLog(Path(sys.argv[1]), OPEN)\n"
        "for seq in range(1 << 40):\n"
        "    log.append(frame(seq, floats=5000))\n"
        "    print(seq, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    last = [int(child.stdout.readline()) for _ in range(50)][-1]
    child.kill()
    child.wait()
    child.stdout.close()
    log = RunLog.reopen(tmp_path, RUN)
    assert log is not None
    assert log.next_seq is not None
    assert log.next_seq > last
    assert all(log.read(seq) == frame(seq, floats=5000) for seq in range(0, log.next_seq, 7))


def test_a_frame_of_the_largest_size_passes(tmp_path: Path) -> None:
    """The log takes whatever the wire takes: 64 MiB in one frame."""
    log = RunLog(tmp_path, OPEN)
    big = dataclasses.replace(FRAME, seq=0, shape=(4, 4096, 2048), payload=bytes(64 << 20))
    log.append(big)
    log.append(frame(1))
    again = RunLog.reopen(tmp_path, RUN)
    assert again is not None
    found = again.read(0)
    assert found is not None
    assert (len(found.payload), again.read(1), len(again.paths)) == (64 << 20, frame(1), 2)


def test_a_reader_thread_sees_only_whole_frames(tmp_path: Path) -> None:
    """While one thread appends, another reads: a frame is there whole, or not at all."""
    log = RunLog(tmp_path, OPEN, segment_bytes=20_000)
    done = threading.Event()

    def append() -> None:
        for seq in range(300):
            log.append(frame(seq, floats=500))
        done.set()

    writer = threading.Thread(target=append)
    writer.start()
    wrong: list[int] = []
    seq = 0
    while seq < 300:
        found = log.read(seq)
        if found is None:
            assert not done.is_set() or log.read(seq) is not None
            continue
        wrong += [seq] if found != frame(seq, floats=500) else []
        seq += 1
    writer.join()
    assert wrong == []


def test_streams_of_other_runs_do_not_mix(tmp_path: Path) -> None:
    """Two runs in one folder are two logs."""
    other = StreamInfo(stream="b", run="f" * 16, kind="steps", latent_format="sd1")
    filled(tmp_path, 2)
    RunLog(tmp_path, other).append(dataclasses.replace(frame(9), run=other.run))
    assert runs_in(tmp_path) == [RUN, other.run]
    again = RunLog.reopen(tmp_path, other.run)
    assert again is not None
    assert (again.info, again.first_seq) == (other, 9)
