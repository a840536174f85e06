"""A batch recorded picture by picture: one growing file with a track for each, a file for each at the end."""

from __future__ import annotations

import io
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.decoding.sheet import GRID_GAP_PX
from taesd_stream.frames import Packet
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream.media.finished import finish_file, read_summary
from taesd_stream.media.fragments import read_index
from taesd_stream.media.recording import Recording
from taesd_stream.media.steps import pictures_around, steps_of
from taesd_stream.messages import Job
from taesd_stream_workers.streamer.library import first_frames
from taesd_stream_workers.worker.encode_threads import EncodeThreads
from taesd_stream_workers.worker.job_decoder import JobDecoder
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.job_slices import MAX_TRACKS
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.golden_messages import JOB_ITEM
from tests.page_socket import PageSocket
from tests.pictures import PATCHES, decode_file, decode_h264, decode_jpeg, sd1_latents_of, to_rgb
from tests.test_fragments import ffprobe
from tests.test_recording import number_in, packet, planes_of, start

PARTS = 3
NAMES = ("red", "green", "blue")
GREYS = 30


@cache
def frames(first: int, last: int, attempt: int = 1, parts: int = PARTS) -> tuple[Packet, ...]:
    """Packets of frames first..last, in order: picture `part` of frame seq tells the number 100 part + seq."""
    encoders = [VideoEncoder("record") for _ in range(parts)]
    made = []
    for seq in range(first, last + 1):
        for part, encoder in enumerate(encoders):
            coded = encoder.encode(planes_of(100 * part + seq), seq * 9000)
            made.append(
                replace(
                    packet(seq, coded.payload, is_keyframe=coded.is_keyframe, pts=seq * 9000, attempt=attempt),
                    index=part,
                    count=parts,
                    tracks=parts,
                )
            )
    return tuple(made)


def read(source: Path | io.BytesIO, part: int = 1) -> list[tuple[int, int]]:
    """Number and pts of every picture of a track."""
    with av.open(source, "r") as container:
        return [(number_in(frame), frame.pts or 0) for frame in container.decode(video=part - 1)]


def expect(part: int, first: int, last: int) -> list[tuple[int, int]]:
    """Numbers and times of a part's frames first..last."""
    return [(100 * (part - 1) + seq, seq * 9000) for seq in range(first, last + 1)]


def write_all(recording: Recording, packets: tuple[Packet, ...]) -> int:
    """Write these. Returns how many frames became whole."""
    return sum(recording.write(one) for one in packets)


def recorded(latent_format: str, shape: tuple[int, ...], *sets: str) -> tuple[list[Packet], JobRun]:
    """A frame of zeros through a worker's decoder: its packets of `record`, and the job as it ended."""
    said: list[Any] = []
    config = load_config(sets=["decoder.choice=linear", *sets])
    decoder = JobDecoder(config, torch.device("cpu"), time.monotonic_ns, said.append, lanes=EncodeThreads(2, 1))
    item = replace(JOB_ITEM, shape=shape, renditions=("record",))
    payloads = (bytes(2 * math.prod(shape)),)
    job = Job(job=1, latent_format=latent_format, items=(item,), packets_to="tcp://127.0.0.1:9", payloads=payloads)
    run = JobRun(job)
    decoder.start()
    decoder.submit(run)
    wait_for(lambda: run in said, 60, of="the job")
    decoder.close()
    return [one[1] for one in said if isinstance(one, tuple)], run


@pytest.mark.parametrize("count", [MAX_TRACKS, MAX_TRACKS + 1])
def test_a_large_batch_is_recorded_as_one_picture(count: int) -> None:
    """One picture more than get a file each: all are in one, and the worker says so with its answer."""
    packets, run = recorded("sd1", (count, 4, 2, 2), "recording.batch=each")
    is_single = count <= MAX_TRACKS
    assert [one.tracks for one in packets] == [count if is_single else 1] * (count if is_single else 1)
    assert [one.code for one in run.degraded.values()] == ([] if is_single else ["one_sheet"])


@pytest.mark.parametrize("shape", [(2, 16, 16, 32), (5, 16, 16, 20), (4, 16, 24, 24)])
def test_a_sheet_says_how_many_pictures_stand_in_its_rows(shape: tuple[int, ...]) -> None:
    """Of a format with 42.67 pixels a cell, too, where a picture's sides are not as its latents' are."""
    (sheet,), _ = recorded("stable_cascade_prior", shape)
    _, width = LATENT_FORMATS["stable_cascade_prior"].picture_size(*shape[-2:])
    assert (sheet.parts, sheet.columns) == (shape[0], (sheet.width + GRID_GAP_PX) // (width + GRID_GAP_PX))


def test_a_frame_is_written_when_all_its_pictures_are_there(tmp_path: Path) -> None:
    """The cursor passes a frame with its last picture; every track of the growing file then plays up to it."""
    recording = start(tmp_path)
    for one in frames(0, 4):
        assert recording.write(one) == (one.index == PARTS - 1)
        assert recording.written == (one.seq if one.index == PARTS - 1 else one.seq - 1)
    assert recording.parts == PARTS
    (path,) = recording.paths
    for part in range(1, PARTS + 1):
        assert read(path, part) == expect(part, 0, 4)
    streams = ffprobe(path, "-count_frames", "-show_streams")["streams"]
    assert [stream["nb_read_frames"] for stream in streams] == ["5"] * PARTS
    recording.close()


def test_the_end_makes_a_file_of_each_picture(tmp_path: Path) -> None:
    """NAME.1.mp4 to NAME.3.mp4: each has its own pictures at their times, its tags and steps; nothing else is left."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 40))
    name = recording.paths[0].name.removesuffix(".mp4.part")
    files = recording.finish()
    assert [path.name for path in files] == [f"{name}.{part}.mp4" for part in range(1, PARTS + 1)]
    assert sorted(tmp_path.iterdir()) == files
    for part, path in enumerate(files, 1):
        assert read(path) == expect(part, 0, 40)
        summary = read_summary(path)
        assert summary is not None
        assert (summary["part"], summary["parts"], summary["frames"]) == (part, PARTS, 41)
        assert [step.seq for step in steps_of(path)] == list(range(41))
        assert len(ffprobe(path, "-show_streams")["streams"]) == 1


def test_steps_of_each_picture_are_found(tmp_path: Path) -> None:
    """The pictures around a step are those of the part that is asked for, growing and finished."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 33))
    (growing,) = recording.paths
    around = [pictures_around(growing, 31, part) for part in (1, 3)]
    finished = recording.finish()
    around += [pictures_around(finished[part - 1], 31, part) for part in (1, 3)]
    for found, part in zip(around, (1, 3, 1, 3), strict=True):
        assert [one.seq for one in found] == [30, 31, 32, 33]
        shown = decode_h264([one.payload for one in found])
        assert len(shown) == 4
        bits = shown[1][10, [bit * 8 + 4 for bit in range(10)], 1] > 128
        assert int(sum(1 << bit for bit in np.flatnonzero(bits))) == 100 * (part - 1) + 31


def test_a_new_attempt_cuts_all_tracks_back(tmp_path: Path) -> None:
    """Attempt 2 from frame 3 on, after attempt 1 up to 5 and a frame that lacks pictures: each track is whole, once."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 6)[:-1])
    assert recording.written == 5
    assert write_all(recording, frames(3, 8, attempt=2)) == 6
    for part, path in enumerate(recording.finish(), 1):
        assert read(path) == expect(part, 0, 8)


def test_a_batch_of_another_number_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Three pictures a frame, then two, then one: three growing files, six finished ones."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 1))
    write_all(recording, frames(2, 3, parts=2))
    write_all(recording, frames(4, 5, parts=1))
    assert len(recording.paths) == 3
    files = recording.finish()
    assert [path.name.partition(".")[2] for path in files] == ["1.mp4", "2.mp4", "3.mp4", "1.mp4", "2.mp4", "mp4"]
    assert [[number for number, _ in read(path)] for path in files] == [
        [0, 1], [100, 101], [200, 201], [2, 3], [102, 103], [4, 5],
    ]  # fmt: skip


@settings(max_examples=25)
@given(thousandths=st.integers(1, 999))
def test_a_file_torn_anywhere_goes_on(tmp_path_factory: pytest.TempPathFactory, thousandths: int) -> None:
    """Cut at any byte, the file keeps whole frames in every track; the next process goes on with a new attempt."""
    folder = tmp_path_factory.mktemp("torn")
    recording = start(folder)
    write_all(recording, frames(0, 5))
    (path,) = recording.paths
    recording.close()
    entries = read_index(path).entries
    size = path.stat().st_size * thousandths // 1000
    os.truncate(path, size)
    again = start(folder)
    assert again.written == max((entry.seq for entry in entries if entry.end <= size), default=-1)
    if again.written < 0:
        return
    write_all(again, frames(again.written + 1, 7, attempt=2))
    for part, file in enumerate(again.finish(), 1):
        assert read(file) == expect(part, 0, 7)


def test_a_death_between_two_finished_files_makes_the_others(tmp_path: Path) -> None:
    """Killed after the first file of three: finished again, each part is there once."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 3))
    (growing,) = recording.paths
    kept = growing.read_bytes()
    first, *others = recording.finish()
    done = first.stat().st_mtime_ns
    growing.write_bytes(kept)
    for path in others:
        path.unlink()
    assert finish_file(growing) == [first, *others]
    assert sorted(tmp_path.iterdir()) == sorted([first, *others])
    assert first.stat().st_mtime_ns == done
    for part, path in enumerate([first, *others], 1):
        assert read(path) == expect(part, 0, 3)


def test_a_growing_part_can_be_copied_out(tmp_path: Path) -> None:
    """The first pictures of one part while the recording grows; a part that there is not is an IndexError."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 5))
    copy = first_frames(recording.paths[0], 2, 3)
    try:
        assert read(copy) == expect(3, 0, 1)
    finally:
        copy.unlink()
    with pytest.raises(IndexError):
        first_frames(recording.paths[0], 2, 4)
    recording.close()


def test_a_growing_part_can_be_exported(tmp_path: Path) -> None:
    """`export --part 2` of the growing file has the second picture's frames; a part that there is not is said."""
    recording = start(tmp_path)
    write_all(recording, frames(0, 5))
    output, (growing,) = tmp_path / "out.mkv", recording.paths
    environment = clean_environment(tmp_path)
    done = run_command("export", growing, "-o", output, "--part", "2", environment=environment)
    assert done.returncode == 0, done.stderr
    assert [number for number, _ in read(output)] == [number for number, _ in expect(2, 0, 5)]
    refused = run_command("export", growing, "-o", output, "--part", "4", environment=environment)
    assert refused.returncode == 2
    assert "--part 4" in refused.stderr
    recording.close()


def test_a_count_that_tracks_do_not_share_is_a_callers_bug(tmp_path: Path) -> None:
    """Four pictures in three tracks: ValueError, and nothing is written."""
    recording = start(tmp_path)
    with pytest.raises(ValueError, match="3 tracks"):
        recording.write(replace(frames(0, 0)[0], count=4))
    assert recording.paths == []


def test_a_rule_says_how_batches_are_recorded(tmp_path: Path) -> None:
    """[[rules]] batch holds for the streams whose names fit, recording.batch for the others."""
    file = tmp_path / "config.toml"
    file.write_text('[recording]\nbatch = "each"\n[[rules]]\nstream = "sheet/*"\nbatch = "grid"\n')
    config = load_config(file)
    assert (config.recording.batch, config.rule_of("sheet/a").batch, config.rule_of("a").batch) == (
        "each",
        "grid",
        None,
    )


# --- over real processes ---


@pytest.fixture(scope="module")
def each_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that records batches picture by picture, but those of `sheet/`."""
    rule = '[{"stream": "sheet/*", "batch": "grid"}]'
    with Daemon(
        tmp_path_factory.mktemp("each"), "recording.batch=each", environment={"TAESD_STREAM_RULES": rule}
    ) as one:
        yield one


def batch_of(step: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Three pictures: a colour of PATCHES that stays, one that changes with the step, and another that stays."""
    grey = 60 + 4 * (step % GREYS)
    return np.stack([sd1_latents_of(colour) for colour in (PATCHES["red"], (grey, grey, grey), PATCHES["blue"])])


def assert_parts(files: list[Path], count: int) -> None:
    """Each file has `count` frames in the colours of its part."""
    assert len(files) == 3
    red, grey, blue = (decode_file(path) for path in files)
    assert [len(red), len(grey), len(blue)] == [count] * 3
    for pictures, name in ((red, "red"), (blue, "blue")):
        assert all(np.abs(one.astype(int) - PATCHES[name]).max() <= 8 for one in pictures)
    assert [one.mean() for one in grey] == pytest.approx([60 + 4 * (step % GREYS) for step in range(count)], abs=2)


def files_of(daemon: Daemon, run: str, parts: int) -> list[Path]:
    """The finished files of a run, downloaded, in the order of the list."""

    def rows() -> list[dict[str, object]] | None:
        found = [row for row in daemon.json("/api/v1/recordings")["recordings"] if row["run"] == run]
        return found if len(found) == parts and all(row["state"] == "finished" for row in found) else None

    found = wait_for(rows, 60.0, of=f"{parts} finished files")
    assert [row["part"] for row in found] == list(range(1, parts + 1))
    assert {row["parts"] for row in found} == {parts}
    return [daemon.file(str(row["id"])) for row in found]


def test_each_picture_has_its_file_and_the_view_its_grid(each_daemon: Daemon) -> None:
    """While a page sees the grid, each picture of the batch gets a file of its own: all frames, its own colours."""
    with (
        PageSocket(each_daemon) as page,
        LatentPublisher(each_daemon.broker, stream="each/watched", latent_format="sd1", record="all") as publisher,
    ):
        page.watch({"each/watched": "jpeg"})
        for step in range(8):
            publisher.publish(batch_of(step), step=step, total_steps=8)
            header, payload = page.picture()
            while header["seq"] < step:
                header, payload = page.picture()
        assert publisher.wait_until_acked(20), publisher.error
    assert (header["parts"], header["columns"]) == (3, 2)
    assert decode_jpeg(payload).shape == (132, 132, 3)
    assert_parts(files_of(each_daemon, publisher.run, 3), 8)
    status, picture = each_daemon.get(f"/api/v1/runs/{publisher.run}/film/5.jpg?part=3")
    assert status == 200
    assert np.abs(decode_jpeg(picture).astype(int) - PATCHES["blue"]).max() <= 8


def test_a_stream_that_a_rule_names_stays_a_grid(each_daemon: Daemon) -> None:
    """[[rules]] batch = "grid" beats recording.batch: one file, one sheet."""
    with LatentPublisher(each_daemon.broker, stream="sheet/a", latent_format="sd1", record="all") as publisher:
        publisher.publish(batch_of(0), step=0, total_steps=1)
        assert publisher.wait_until_acked(20), publisher.error
    row = each_daemon.recording(publisher.run)
    assert (row["part"], row["parts"]) == (None, 1)
    (picture,) = decode_file(each_daemon.file(row["id"]))
    assert picture.shape == (132, 132, 3)


@pytest.mark.faults
def test_a_killed_streamer_goes_on_in_every_part(each_daemon: Daemon) -> None:
    """SIGKILL of the streamer in the midst of a run: every file has every frame once, in its colours."""
    over, step = threading.Event(), 0
    with LatentPublisher(each_daemon.broker, stream="each/killed", latent_format="sd1", record="all") as publisher:

        def row() -> dict[str, object]:
            rows = each_daemon.json("/api/v1/recordings")["recordings"]
            return next((one for one in rows if one["run"] == publisher.run), {"frames": 0})

        def more(frames: int) -> bool:
            nonlocal step
            publisher.publish(batch_of(step), step=step)
            step += 1
            over.wait(0.02)
            return each_daemon.is_ready() and int(str(row()["frames"])) >= frames

        wait_for(lambda: more(6), 60, of="6 frames")
        growing = row()
        assert (growing["part"], growing["parts"], growing["state"]) == (None, 3, "recording")
        status, body = each_daemon.get(f"/api/v1/recordings/{publisher.run}/file?frames=3&part=2")
        assert status == 200
        with av.open(io.BytesIO(body), "r") as container:
            greys = [to_rgb(frame).mean() for frame in container.decode(video=0)]
        assert greys == pytest.approx([60, 64, 68], abs=2)
        assert each_daemon.get(f"/api/v1/recordings/{publisher.run}/file?part=9")[0] == 404
        os.kill(each_daemon.pid_of("streamer"), signal.SIGKILL)
        enough = step + 4
        wait_for(lambda: more(enough), 60, of="frames behind the death")
        assert publisher.wait_until_acked(30), publisher.error
    assert_parts(files_of(each_daemon, publisher.run, 3), step)


def test_the_record_command_downloads_every_part(each_daemon: Daemon, tmp_path: Path) -> None:
    """`taesd-stream record NAME -o out.mp4` of such a run writes out.1.mp4, out.2.mp4 and out.3.mp4.

    Also where the streamer is killed while it waits, and answers nothing until it is there again.
    """
    command = [*COMMAND, "record", "each/command", "-o", str(tmp_path / "out.mp4"), "--connect", each_daemon.web]
    recorder = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert recorder.stderr is not None
    assert "waiting for each/command" in recorder.stderr.readline()
    os.kill(each_daemon.pid_of("streamer"), signal.SIGKILL)
    with LatentPublisher(each_daemon.broker, stream="each/command", latent_format="sd1") as publisher:
        for step in range(5):
            publisher.publish(batch_of(step), step=step, total_steps=5)
        assert publisher.wait_until_acked(20), publisher.error
    assert recorder.wait(60) == 0, recorder.stderr.read()
    recorder.stderr.close()
    assert not (tmp_path / "out.mp4").exists()
    assert_parts([tmp_path / f"out.{part}.mp4" for part in (1, 2, 3)], 5)
