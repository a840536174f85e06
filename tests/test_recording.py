"""A recording holds every frame that was written, at its time, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taesd_stream.frames import Packet, Stamps
from taesd_stream.media.clock import PROVISIONAL_TICKS
from taesd_stream.media.encoder import TIME_BASE, VideoEncoder
from taesd_stream.media.finished import copy_pictures, read_summary
from taesd_stream.media.fragments import init_segment, parameter_sets
from taesd_stream.media.recording import Recording, find_unfinished

RUN = "00000000000000ab"
META = {"prompt": "a café, at night", "seed": 7, "sampler": "euler"}
BITS = 10


def planes_of(number: int, height: int = 64, width: int = 96) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A picture that tells its number in black and white columns."""
    planes = np.full((height * 3 // 2, width), 128, np.uint8)
    for bit in range(BITS):
        planes[:height, bit * 8 : bit * 8 + 8] = 220 if number >> bit & 1 else 30
    return planes


def number_in(frame: av.VideoFrame) -> int:
    """The number that a decoded picture tells."""
    luma = frame.to_ndarray(format="yuv420p")
    return sum((luma[10, bit * 8 + 4] > 128) << bit for bit in range(BITS))


def packet(seq: int, payload: bytes, *, is_keyframe: bool, pts: int, attempt: int = 1, **changes: int) -> Packet:
    """A packet of the recording's rendition."""
    size: dict[str, Any] = {"width": changes.pop("width", 96), "height": changes.pop("height", 64)}
    place: dict[str, Any] = {"index": changes.pop("index", 0), "count": changes.pop("count", 1)}
    assert not changes
    return Packet(
        stream="demo/a", run=RUN, seq=seq, rendition="record", attempt=attempt, is_keyframe=is_keyframe, pts=pts,
        decoder="linear", step=seq, total_steps=None, sigma=None, stamps=Stamps(), payload=payload, **size, **place,
    )  # fmt: skip


@cache
def chain(first: int, last: int, attempt: int = 1, step: int = 9000) -> tuple[Packet, ...]:
    """Packets of frames first..last as one encoder makes them: number seq, time seq * step."""
    encoder = VideoEncoder("record")
    made = []
    for seq in range(first, last + 1):
        picture = encoder.encode(planes_of(seq), seq * step)
        made.append(packet(seq, picture.payload, is_keyframe=picture.is_keyframe, pts=seq * step, attempt=attempt))
    return tuple(made)


def clip(seq: int, count: int, attempt: int = 1) -> list[Packet]:
    """One clip: pictures numbered 10 seq + i, times from 0 at 24 pictures a second, one closed GOP."""
    encoder = VideoEncoder("record")
    pictures = [encoder.encode(planes_of(10 * seq + i), i * 3750) for i in range(count)]
    return [
        packet(seq, p.payload, is_keyframe=p.is_keyframe, pts=i * 3750, attempt=attempt, index=i, count=count)
        for i, p in enumerate(pictures)
    ]


def start(folder: Path, kept_from: int | None = None) -> Recording:
    """Open the run's recording."""
    return Recording.open(folder, stream="demo/a", run=RUN, meta=META, kept_from=kept_from, name="{run}")


def read(path: Path) -> list[tuple[int, int]]:
    """Number and pts of every picture of a file."""
    with av.open(path) as container:
        return [(number_in(frame), frame.pts or 0) for frame in container.decode(video=0)]


def ffprobe_frames(path: Path) -> int:
    """How many pictures ffprobe decodes; a single complaint is a failure."""
    command = ["ffprobe", "-v", "warning", "-count_frames", "-show_streams", "-of", "json", str(path)]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    assert result.stderr == ""
    return int(json.loads(result.stdout)["streams"][0]["nb_read_frames"])


def expect(first: int, last: int, step: int = 9000) -> list[tuple[int, int]]:
    """Numbers and times of frames first..last."""
    return [(seq, seq * step) for seq in range(first, last + 1)]


def test_each_frame_is_playable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    """After every write, the growing file holds all frames so far: order, seq and times exact."""
    recording = start(tmp_path)
    assert recording.written == -1
    for one in chain(0, 7):
        assert recording.write(one)
        assert recording.written == one.seq
        assert read(recording.paths[0]) == expect(0, one.seq)
    assert ffprobe_frames(recording.paths[0]) == 8


def test_a_finished_file_is_an_ordinary_mp4_with_the_same_frames(tmp_path: Path) -> None:
    """Finish gives NAME.mp4: index in front, no fragments, frames and times exact, and what was painted in its tags."""
    recording = start(tmp_path)
    assert all(recording.write(one) for one in chain(0, 40))
    (path,) = recording.finish()
    assert list(tmp_path.iterdir()) == [path]
    assert path.suffix == ".mp4"
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert b"moof" not in data
    assert read(path) == expect(0, 40)
    assert ffprobe_frames(path) == 41
    with av.open(path) as container:
        tags = container.metadata
        assert (container.streams.video[0].frames, container.streams.video[0].time_base) == (41, TIME_BASE)
    assert {key: tags[key] for key in ("stream", "run", "prompt", "seed", "sampler")} == {
        "stream": "demo/a", "run": RUN, "prompt": "a café, at night", "seed": "7", "sampler": "euler",
    }  # fmt: skip
    summary = read_summary(path)
    assert summary
    assert summary["meta"] == META
    assert [summary[key] for key in ("run", "frames", "first_seq", "last_seq", "missing")] == [RUN, 41, 0, 40, []]


def test_uneven_times_stay_exact(tmp_path: Path) -> None:
    """Gaps of one tick to an hour survive the growing and the finished file."""
    times = [0, 1, 2, 3000, 90_000, 90_001, 324_090_001, 324_090_010]
    encoder = VideoEncoder("record")
    recording = start(tmp_path)
    for seq, pts in enumerate(times):
        picture = encoder.encode(planes_of(seq), pts)
        assert recording.write(packet(seq, picture.payload, is_keyframe=picture.is_keyframe, pts=pts))
    wanted = list(enumerate(times))
    assert read(recording.paths[0]) == wanted
    assert read(recording.finish()[0]) == wanted


def test_a_night_of_waiting_does_not_ruin_the_times_after_it(tmp_path: Path) -> None:
    """A gap too wide for an ordinary MP4 is told as 6 hours there; all other times stay exact."""
    day, limit = 24 * 3600 * 90_000, 6 * 3600 * 90_000
    recording = start(tmp_path)
    for one, pts in zip(chain(0, 3), (0, 9000, day, day + 1), strict=True):
        recording.write(replace(one, pts=pts))
    assert [pts for _, pts in read(recording.paths[0])] == [0, 9000, day, day + 1]
    assert [pts for _, pts in read(recording.finish()[0])] == [0, 9000, 9000 + limit, 9000 + limit + 1]


def test_a_recording_from_the_middle_of_a_run_plays_from_0(tmp_path: Path) -> None:
    """Kept from frame 17 on: only that frame may begin it, and the finished file does not begin with a wait."""
    recording = start(tmp_path, kept_from=17)
    assert not any(recording.write(one) for one in chain(18, 20))
    assert [recording.write(one) for one in chain(17, 20, 2)] == [True] * 4
    assert (recording.first_seq, recording.written, recording.frames) == (17, 20, 4)
    assert read(recording.paths[0]) == expect(17, 20)
    assert read(recording.finish()[0]) == [(17 + i, i * 9000) for i in range(4)]


def test_holes_repeats_and_reordered_packets_are_dropped(tmp_path: Path) -> None:
    """Only the next frame in turn is written; what comes too early or twice changes nothing."""
    recording = start(tmp_path)
    a = chain(0, 40)
    order = [1, 0, 0, 2, 1, 3, 30, 2, 3]
    assert [seq for seq in order if recording.write(a[seq])] == [0, 1, 2, 3]
    assert [seq for seq in (4, 6, 4, 5) if recording.write(a[seq])] == [4, 5]
    assert read(recording.paths[0]) == expect(0, 5)


def test_a_new_attempt_cuts_back_and_goes_on(tmp_path: Path) -> None:
    """Attempt 2 begins at 5 when 9 frames are there: the file ends with its frames, each one once."""
    recording = start(tmp_path)
    for one in chain(0, 8):
        recording.write(one)
    recording.sync()
    assert recording.synced == 8
    for one in chain(5, 6, 2):
        assert recording.write(one)
    assert (recording.written, recording.synced, recording.attempt) == (6, 4, 2)
    assert read(recording.paths[0]) == expect(0, 6)
    recording.sync()
    assert recording.synced == 6


def test_late_packets_of_an_old_attempt_do_no_harm(tmp_path: Path) -> None:
    """A worker that wakes from the dead sends on: nothing of it is taken, be it a keyframe or next in turn."""
    recording = start(tmp_path)
    old, new = chain(0, 60), chain(5, 12, 2)
    for one in old[:10]:
        recording.write(one)
    for one, late in zip(new, [*old[5:12], old[30]], strict=True):
        assert recording.write(one)
        assert not recording.write(late)
        assert not recording.write(old[one.seq + 1])
    assert read(recording.paths[0]) == expect(0, 12)


def test_a_new_attempt_needs_a_keyframe_and_no_hole(tmp_path: Path) -> None:
    """Packets of a newer attempt whose first picture was missed, or that begins too far on, are dropped."""
    recording = start(tmp_path)
    for one in chain(0, 4):
        recording.write(one)
    assert not recording.write(chain(4, 6, 2)[1])
    assert not recording.write(chain(6, 6, 2)[0])
    assert recording.written == 4
    assert recording.write(chain(0, 5)[5])  # the old attempt is not ended by them
    assert recording.write(chain(6, 6, 3)[0])


def test_a_new_attempt_may_begin_again_from_the_first_frame(tmp_path: Path) -> None:
    """Cut back to nothing, the recording begins at that frame and at no later keyframe."""
    recording = start(tmp_path)
    for one in chain(0, 4):
        recording.write(one)
    again = chain(0, 40, 2)
    assert recording.write(again[0])
    assert not recording.write(again[30])
    assert all(recording.write(one) for one in again[1:])
    assert read(recording.finish()[0]) == expect(0, 40)


def test_gaps_let_the_cursor_pass_and_are_listed(tmp_path: Path) -> None:
    """Frames that will never come: the cursor passes them, also over a restart, and the finished file lists them."""
    recording = start(tmp_path, kept_from=2)
    recording.skip(2, 1)
    assert recording.written == 2
    for one in chain(3, 5, 2):
        assert recording.write(one)
    recording.skip(9, 3)  # out of turn
    recording.skip(6, 3)
    recording.skip(7, 3)
    recording.skip(8, 2)  # of an old attempt
    assert recording.written == 7
    recording.close()
    recording = start(tmp_path, kept_from=2)
    assert (recording.written, recording.missing, recording.attempt) == (7, [2, 6, 7], 3)
    assert not recording.write(chain(0, 8, 3)[8])  # after a gap of attempt 3 only its keyframe may come
    assert recording.write(chain(8, 9, 3)[0])
    assert ffprobe_frames(recording.paths[0]) == 4
    (path,) = recording.finish()
    summary = read_summary(path)
    assert summary
    assert [summary[key] for key in ("missing", "frames", "first_seq", "last_seq")] == [[2, 6, 7], 4, 3, 8]
    assert [number for number, _ in read(path)] == [3, 4, 5, 8]


def test_clips_are_written_whole_one_after_the_other(tmp_path: Path) -> None:
    """A clip goes into the file when all its pictures are there, and starts where the last one ended."""
    recording = start(tmp_path)
    for seq in range(3):
        *most, last = clip(seq, 5)
        assert not any(recording.write(one) for one in most)
        assert recording.written == seq - 1
        assert recording.write(last)
    assert recording.written == 2
    wanted = [(10 * seq + i, (5 * seq + i) * 3750) for seq in range(3) for i in range(5)]
    assert read(recording.paths[0]) == wanted
    assert recording.frames == 3
    assert read(recording.finish()[0]) == wanted


def test_a_clip_that_lost_a_picture_is_not_written(tmp_path: Path) -> None:
    """Pictures missing, mixed with another attempt's or doubled give no half clip; the next attempt gives it whole."""
    recording = start(tmp_path)
    first, again = clip(0, 4), clip(0, 4, attempt=2)
    assert not any(recording.write(one) for one in (first[0], first[1], first[3], first[1], again[3], again[2]))
    assert recording.written == -1
    assert [recording.write(one) for one in (again[0], again[1], first[2], again[2], again[3])][-1]
    assert read(recording.paths[0]) == [(i, i * 3750) for i in range(4)]


def test_a_new_size_goes_into_a_file_of_its_own(tmp_path: Path) -> None:
    """Each size is a segment; the cursor, a restart, a cut back and the finish see one recording."""
    recording = start(tmp_path)
    for one in chain(0, 3):
        recording.write(one)
    encoder = VideoEncoder("record")
    for seq in range(4, 7):
        picture = encoder.encode(planes_of(seq, 48, 80), seq * 9000)
        big = packet(seq, picture.payload, is_keyframe=picture.is_keyframe, pts=seq * 9000, width=80, height=48)
        assert recording.write(big)
    assert [path.name.endswith("-2.mp4.part") for path in recording.paths] == [False, True]
    recording.close()
    recording = start(tmp_path)
    assert (recording.written, len(recording.paths)) == (6, 2)
    assert recording.write(chain(5, 6, 2)[0])  # the first size again: a third file
    assert len(recording.paths) == 3
    paths = recording.finish()
    assert [read(path) for path in paths] == [expect(0, 3), [(4, 0)], [(5, 0)]]
    assert [(summary or {})["segment"] for summary in map(read_summary, paths)] == [1, 2, 3]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_sizes_that_alternate_hold_no_descriptors(tmp_path: Path) -> None:
    """A file a change, and two of them open: a restart, a cut back to the first ones and the finish have them all."""

    def is_open() -> int:
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        return sum(link.startswith(str(tmp_path)) for link in links)

    recording = start(tmp_path)
    for seq in range(12):
        height, width = ((64, 96), (48, 80))[seq % 2]
        planes = VideoEncoder("record").encode(planes_of(seq, height, width), seq * 9000).payload
        assert recording.write(packet(seq, planes, is_keyframe=True, pts=seq * 9000, width=width, height=height))
        recording.sync()
        assert recording.synced == seq
    assert (len(recording.paths), recording.lost_path, is_open()) == (12, None, 2)
    recording.close()
    recording = start(tmp_path)
    assert (len(recording.paths), recording.lost_path, is_open()) == (12, None, 1)
    assert recording.write(chain(4, 4, 2)[0])
    recording.sync()
    assert (len(recording.paths), recording.synced, is_open()) == (5, 4, 1)
    assert [read(path) for path in recording.finish()] == [expect(0, 0), *([(seq, 0)] for seq in range(1, 5))]


def test_cutting_back_over_a_segment_removes_it(tmp_path: Path) -> None:
    """An attempt that begins in the first file takes the second one away."""
    recording = start(tmp_path)
    for one in chain(0, 3):
        recording.write(one)
    picture = VideoEncoder("record").encode(planes_of(4, 48, 80), 36_000)
    recording.write(packet(4, picture.payload, is_keyframe=True, pts=36_000, width=80, height=48))
    assert recording.write(chain(2, 2, 2)[0])
    assert list(tmp_path.iterdir()) == recording.paths
    assert read(recording.paths[0]) == expect(0, 2)


def test_a_restart_goes_on_in_the_same_file(tmp_path: Path) -> None:
    """Closed and opened again, also with a torn tail, the recording tells its cursor and takes the next frame."""
    recording = start(tmp_path)
    for one in chain(0, 4):
        recording.write(one)
    path = recording.paths[0]
    recording.close()
    with path.open("ab") as file:
        file.write(b"\0\0\1\0moof\0\0\0")
    (left,) = find_unfinished(tmp_path)
    assert (left.stream, left.run, left.meta, left.paths) == ("demo/a", RUN, META, (path,))
    recording = start(tmp_path)
    assert (recording.written, recording.attempt, recording.paths) == (4, 1, [path])
    assert not recording.write(chain(0, 6)[6])
    assert recording.write(chain(0, 6)[5])  # the same attempt simply goes on
    assert recording.write(chain(6, 6, 2)[0])
    assert read(path) == expect(0, 6)
    assert read(recording.finish()[0]) == expect(0, 6)
    assert find_unfinished(tmp_path) == []


@settings(max_examples=40)
@given(st.integers(0, 1000))
def test_a_file_torn_anywhere_goes_on(tmp_path_factory: pytest.TempPathFactory, thousandths: int) -> None:
    """Cut at any byte, the reopened recording ends at its last whole frame and a new attempt completes it."""
    folder = tmp_path_factory.mktemp("torn")
    recording = start(folder)
    ends = []
    for one in chain(0, 5):
        recording.write(one)
        ends.append(recording.nbytes)
    path = recording.paths[0]
    recording.close()
    length = ends[-1] * thousandths // 1000
    os.truncate(path, length)
    recording = start(folder)
    assert recording.written == sum(end <= length for end in ends) - 1
    assert all(recording.write(one) for one in chain(recording.written + 1, 5, 2))
    assert read(recording.finish()[0]) == expect(0, 5)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.test_recording import chain, start
recording = start(Path({folder!r}))
for one in chain(recording.written + 1, {last}, recording.attempt + 1, 7):
    recording.write(one)
    print(recording.written, flush=True)
"""


def kill_a_writer(folder: Path, rng: random.Random, last: int = 400) -> int:
    """Start a process that records, kill it at a random moment; returns the last frame it said it had written."""
    script = WRITER.format(root=str(Path(__file__).parents[1]), folder=str(folder), last=last)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = -1
    for _ in range(rng.randint(1, 60)):
        line = process.stdout.readline()
        said = int(line) if line else said
    process.send_signal(signal.SIGKILL)
    lines = process.stdout.read().splitlines()
    process.wait()
    process.stdout.close()
    return int(lines[-1]) if lines else said


def whole_frames(path: Path) -> list[int]:
    """The numbers in a file's pictures; one that was torn while it was written is none."""
    found = []
    with av.open(path) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.InvalidDataError):
                found += [number_in(frame) for frame in packet.decode() if isinstance(frame, av.VideoFrame)]
    return found


@pytest.mark.parametrize("seed", [1, 2, pytest.param(range(3, 23), marks=pytest.mark.slow, id="20 more")])
def test_a_killed_writer_loses_no_written_frame(seed: int | range, tmp_path: Path) -> None:
    """SIGKILL at random points, again and again in one file: every frame that was said to be written is there."""
    for number in [seed] if isinstance(seed, int) else seed:
        folder = tmp_path / str(number)
        rng = random.Random(number)  # noqa: S311  places to kill at, no secret
        for _ in range(2):
            said = kill_a_writer(folder, rng)
            (left,) = find_unfinished(folder)
            numbers = whole_frames(left.paths[0])
            assert numbers == list(range(len(numbers)))
            assert len(numbers) > said
        recording = start(folder)
        written = recording.written
        assert read(recording.finish()[0]) == expect(0, written, 7)
        assert written >= said


def in_a_small_process(code: str, folder: Path) -> str:
    """Run code where no file may grow over 12,000 bytes: write(2) is short, then fails, as on a full disk."""
    limits = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limits += "resource.setrlimit(resource.RLIMIT_FSIZE, (12000, resource.RLIM_INFINITY))\n"
    more = "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
    root = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
    imports = "from pathlib import Path\nfrom taesd_stream.media.recording import RecordingError\n"
    imports += "from tests.test_recording import *\nfolder = Path(sys.argv[1])\n"
    script = root + imports + limits + code.replace("MORE_SPACE", more.strip())
    result = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_full_disk_leaves_whole_frames_and_a_retry_goes_on(tmp_path: Path) -> None:
    """When the disk takes no more: a RecordingError that says what is safe, a file of whole frames, and on it goes."""
    code = """
recording, packets = start(folder), chain(0, 200)
done = 0
try:
    for one in packets:
        recording.write(one)
        done += 1
except RecordingError as error:
    assert error.written == recording.written == done - 1 and str(recording.paths[0]) in str(error)
assert 10 < done < 200
for _ in range(2):
    try:
        recording.write(packets[done])
        raise SystemExit("no error")
    except RecordingError:
        pass
assert ffprobe_frames(recording.paths[0]) == done and read(recording.paths[0]) == expect(0, done - 1)
assert not recording.write(packets[done + 1])
MORE_SPACE
assert all(recording.write(one) for one in packets[done:])
assert read(recording.finish()[0]) == expect(0, 200)
"""
    in_a_small_process(code, tmp_path)


def test_a_full_disk_at_the_finish_keeps_the_growing_file(tmp_path: Path) -> None:
    """No room for the finished file: the growing one stays, nothing half-made is left, and a later try finishes it."""
    code = """
recording, packets = start(folder), chain(0, 200)
written = -1
MORE_SPACE
for one in packets:
    recording.write(one)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
try:
    recording.finish()
    raise SystemExit("no error")
except RecordingError as error:
    assert error.written == 200
assert [path.name.endswith(".mp4.part") for path in folder.iterdir()] == [True]
MORE_SPACE
assert read(start(folder).finish()[0]) == expect(0, 200)
"""
    in_a_small_process(code, tmp_path)


def test_a_disk_that_is_full_from_the_start_leaves_no_file(tmp_path: Path) -> None:
    """When not even the first frame fits, there is no file, and the same packet begins it later."""
    code = """
resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
recording = start(folder)
for _ in range(2):
    try:
        recording.write(chain(0, 0)[0])
        raise SystemExit("no error")
    except RecordingError as error:
        assert error.written == -1
assert not list(folder.iterdir())
MORE_SPACE
assert recording.write(chain(0, 0)[0]) and recording.written == 0
"""
    in_a_small_process(code, tmp_path)


def test_a_finished_file_is_never_overwritten(tmp_path: Path) -> None:
    """Runs of one name in one second get names of their own, and a stranger's file stays as it is."""
    names = []
    for number in range(3):
        recording = Recording.open(
            tmp_path, stream="demo/a", run=f"{number:016x}", meta={}, name="{stream}-{started:%Y%m%d-%H%M%S}"
        )
        recording.started = 1_700_000_000.0
        picture = VideoEncoder("record").encode(planes_of(number), 0)
        one = packet(0, picture.payload, is_keyframe=True, pts=0)
        recording.write(replace(one, run=f"{number:016x}"))
        if number == 2:
            recording.paths[0].with_suffix("").write_text("a stranger's")
        names.append(str(recording.finish()[0].relative_to(tmp_path)))
    stem = names[0].removesuffix(".mp4")
    assert stem.startswith("demo/a-2023111")
    assert names == [f"{stem}.mp4", f"{stem}-2.mp4", f"{stem}-3-2.mp4"]
    assert (tmp_path / f"{stem}-3.mp4").read_text() == "a stranger's"
    assert [read(tmp_path / name)[0][0] for name in names] == [0, 1, 2]


def test_a_death_between_finish_and_tidying_up_makes_no_second_file(tmp_path: Path) -> None:
    """Finished file and growing file of the same frames: the next finish only takes the growing one away."""
    recording = start(tmp_path)
    for one in chain(0, 3):
        recording.write(one)
    part = recording.paths[0]
    data = part.read_bytes()
    (path,) = recording.finish()
    part.write_bytes(data)
    assert start(tmp_path).finish() == [path]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stream", ["../x", "/etc/x", "a//b", "", "a\0b", "a b", ".hidden"])
def test_names_from_outside_never_become_paths(stream: str, tmp_path: Path) -> None:
    """What is no stream's name is refused before any file is touched."""
    with pytest.raises(ValueError, match="stream"):
        Recording.open(tmp_path, stream=stream, run=RUN, meta={})
    with pytest.raises(ValueError, match="run"):
        Recording.open(tmp_path, stream="a", run="../../x", meta={})


def test_the_longest_stream_name_fits(tmp_path: Path) -> None:
    """A stream's name may be longer than a file's can be; the file lies in the folder, and the head has it whole."""
    stream = "/".join(["a" * 64] * 4)
    recording = Recording.open(tmp_path, stream=stream, run=RUN, meta={})
    assert recording.write(chain(0, 0)[0])
    (path,) = recording.finish()
    assert path.is_relative_to(tmp_path)
    assert (read_summary(path) or {})["stream"] == stream


def test_meta_of_any_kind_survives(tmp_path: Path) -> None:
    """Nested, non-finite, binary and zero-holding values neither break a file nor get lost as text."""
    meta = {"a": {"b": [1, 2.5, None]}, "n": float("nan"), "z": "x\0y", "raw": b"\xff", "run": "mine", "": "?"}
    recording = Recording.open(tmp_path, stream="a", run=RUN, meta=meta)
    recording.write(chain(0, 0)[0])
    (path,) = recording.finish()
    with av.open(path) as container:
        assert json.loads(container.metadata["a"]) == meta["a"]
        assert container.metadata["z"] == "x y"
        assert container.metadata["run"] == RUN
    assert (read_summary(path) or {})["meta"]["z"] == "x\0y"


def test_packets_of_others_are_a_callers_bug(tmp_path: Path) -> None:
    """A packet of another run or rendition is a ValueError, never a frame in the wrong file."""
    recording = Recording.open(tmp_path, stream="a", run="00000000000000ff", meta={})
    with pytest.raises(ValueError, match="record of"):
        recording.write(chain(0, 0)[0])
    with pytest.raises(ValueError, match="record"):
        start(tmp_path).write(replace(chain(0, 0)[0], rendition="live"))


def test_strange_files_are_left_alone(tmp_path: Path) -> None:
    """Another program's downloads, empty files and heads of another make are neither taken over nor removed."""
    sets = parameter_sets(chain(0, 0)[0].payload)
    assert sets
    for name, head in (("a", {}), ("b", {"run": 1}), ("c", {"stream": "../x", "run": RUN})):
        data = init_segment(head, width=96, height=64, sps=sets[0], pps=sets[1])
        (tmp_path / f"{name}.mp4.part").write_bytes(data)
    (tmp_path / "d.mp4.part").write_bytes(b"")
    (tmp_path / "e.mp4.part").write_bytes(b"half a download")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert find_unfinished(tmp_path) == []
    recording = start(tmp_path)
    recording.write(chain(0, 0)[0])
    recording.finish()
    assert {path: path.read_bytes() for path in before} == before
    assert read_summary(tmp_path / "e.mp4.part") is None


def test_an_empty_recording_leaves_nothing(tmp_path: Path) -> None:
    """A run without a frame has no file, synced or finished."""
    recording = start(tmp_path / "new")
    recording.sync()
    assert recording.finish() == []
    assert (recording.synced, find_unfinished(tmp_path / "new")) == (-1, [])


def test_the_first_pictures_can_be_copied_out(tmp_path: Path) -> None:
    """A copy of the first N pictures of a finished or a growing file is an ordinary file of its own."""
    recording = start(tmp_path)
    for one in chain(0, 9):
        recording.write(one)
    summary = {"stream": "demo/a", "run": RUN, "started": 0.0, "meta": {}}
    copy_pictures(recording.paths[0], tmp_path / "a.mp4", summary, until=4 * 9000)
    copy_pictures(recording.finish()[0], tmp_path / "b.mp4", summary, until=3 * 9000)
    assert [read(tmp_path / name) for name in ("a.mp4", "b.mp4")] == [expect(0, 3), expect(0, 2)]


@settings(max_examples=150)
@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 6)), max_size=40),
)
def test_whatever_comes_the_file_has_no_hole(
    tmp_path_factory: pytest.TempPathFactory, starts: list[int], order: list[tuple[int, int]]
) -> None:
    """Any mix of three attempts' packets, late and repeated, leaves frames without a hole, each one readable."""
    recording = start(tmp_path_factory.mktemp("mix"))
    for attempt, place in order:
        first = starts[attempt - 1]
        recording.write(chain(first, first + 6, attempt)[place])
    entries = [entry.seq for file in recording._files for entry in file.index.entries]
    assert all(after == before + 1 for before, after in pairwise(entries))
    if recording.paths:
        assert [number for number, _ in read(recording.paths[0])] == entries
    recording.close()


def test_a_lone_last_picture_ends_provisionally(tmp_path: Path) -> None:
    """The last picture lasts a thirtieth of a second, for nobody knows when the next one would have come."""
    recording = start(tmp_path)
    recording.write(chain(0, 0)[0])
    with av.open(recording.finish()[0]) as container:
        assert container.streams.video[0].duration == PROVISIONAL_TICKS


def test_syncing_beside_the_writer_never_meets_a_closed_file(tmp_path: Path) -> None:
    """A second thread syncs while attempts cut the file away and back: no error, and synced never passes written."""
    recording, stop = start(tmp_path), Event()

    def sync() -> int:
        rounds = 0
        while not stop.is_set():
            recording.sync()
            rounds += 1
        return rounds

    with ThreadPoolExecutor(1) as pool:
        syncing = pool.submit(sync)
        for attempt in range(1, 60):
            for one in chain(0, 3):
                recording.write(replace(one, attempt=attempt))
        stop.set()
        assert syncing.result() > 0
    recording.sync()
    assert recording.synced == recording.written == 3
