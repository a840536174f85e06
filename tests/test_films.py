"""Films: what somebody saw of a run that nobody recorded is there afterwards, step by step."""

from __future__ import annotations

import json
import os
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from taesd_stream import LatentPublisher
from taesd_stream.config import RecordingConfig, load_config
from taesd_stream.frames import Packet
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream.media.finished import read_summary
from taesd_stream.media.recording import Recording, RecordingError
from taesd_stream.media.steps import StepPicture, pictures_around, steps_of
from taesd_stream.messages import State
from taesd_stream_workers.streamer.films import Films
from taesd_stream_workers.streamer.library import first_frames, picture_of_step
from taesd_stream_workers.streamer.recorder import FILM_BYTES, ITEM_BYTES, Recorder
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket
from tests.pictures import PATCHES, decode_h264, decode_jpeg, psnr_db, sd1_latents_of
from tests.test_recording import META, RUN, chain, clip, number_in, read
from tests.test_recording import packet as made

COLOURS = list(PATCHES.values())


def film(packet: Packet, **changes: Any) -> Packet:
    return replace(packet, rendition="film", **changes)


def numbers(pictures: list[StepPicture]) -> list[int]:
    """What the pictures show, decoded one after the other as a page does."""
    decoder = av.CodecContext.create("h264", "r")
    frames = [frame for one in pictures for frame in decoder.decode(av.Packet(one.payload))]
    return [number_in(frame) for frame in [*frames, *decoder.decode(None)]]


def shot(folder: Path) -> Recording:
    return Recording.open(folder, stream="demo/a", run=RUN, meta=META, is_film=True, name="{run}")


ROW = {"stream": "demo/a", "state": "live", "meta": META, "latent_format": "sd1", "kind": "steps"}


def showing(*runs: str) -> State:
    """A STATE with these runs as streams, and nothing kept."""
    streams = [{**ROW, "run": run} for run in runs]
    return State(streams=streams, runs={}, workers=[], stats={}, desired_workers=1, now_ns=1)


def recorded(*, kept_from: int, ended: bool) -> dict[str, dict[str, Any]]:
    """RUN as the broker tells what it keeps."""
    more = {"started": 1.0, "takes_film": True, "ended": ended, "last_seq": 0, "kept_from": kept_from, "attempt": 1}
    return {RUN: {**ROW, **more, "blocked": None}}


# --- the files ---


def test_a_film_may_leave_frames_out(tmp_path: Path) -> None:
    """A chain of frames 0, 1, 4, 9 is in the film; a delta of another attempt is not, its next keyframe is."""
    one = shot(tmp_path)
    first = chain(0, 3)
    for packet, seq in zip(first, (0, 1, 4, 9), strict=True):
        assert one.write(film(packet, seq=seq))
    key, delta = chain(12, 13, 2)
    assert not one.write(film(delta))
    assert one.write(film(key))
    assert one.write(film(delta))
    (path,) = one.paths
    one.close()
    assert [step.seq for step in steps_of(path)] == [0, 1, 4, 9, 12, 13]
    assert numbers(pictures_around(path, 4)) == [0, 1, 2, 3]
    assert numbers(pictures_around(path, 13)) == [12, 13]
    assert pictures_around(path, 5) == []


def test_a_kept_film_goes_on_without_holes(tmp_path: Path) -> None:
    """A film with holes moves to the recordings; from kept_from on every frame is there, in the same file."""
    one = shot(tmp_path / ".films")
    for packet in chain(0, 5)[::5]:
        one.write(film(packet, is_keyframe=True) if packet.seq == 0 else film(packet))
    one.keep(tmp_path, "{run}")
    one.begin_at(9)
    assert not one.write(chain(10, 12)[0])
    for packet in chain(9, 12):
        assert one.write(packet)
    (path,) = one.paths
    assert path.parent == tmp_path
    assert list((tmp_path / ".films").iterdir()) == []
    (finished,) = one.finish()
    assert [step.seq for step in steps_of(finished)] == [0, 5, 9, 10, 11, 12]
    assert numbers(pictures_around(finished, 11)) == [9, 10, 11, 12]


def test_a_kept_film_is_taken_up_again_after_a_death(tmp_path: Path) -> None:
    """Kept, and then the process dies before the first kept frame: the next one goes on in the file, at kept_from."""
    one = shot(tmp_path / ".films")
    one.write(film(chain(0, 0)[0], attempt=7))
    one.keep(tmp_path, "{run}")
    one.close()
    again = Recording.open(tmp_path, stream="demo/a", run=RUN, meta={})
    assert (again.written, again.attempt) == (0, 7)
    again.begin_at(5)
    for packet in chain(5, 6, 8):
        assert again.write(packet)
    assert [step.seq for step in steps_of(again.paths[0])] == [0, 5, 6]
    again.close()


def test_a_film_that_could_not_be_kept_can_be_kept_later(tmp_path: Path) -> None:
    """Where its place in the recordings cannot be made, a film stays a film; once it can, the same wish keeps it."""
    one = shot(tmp_path / ".films")
    for packet in chain(0, 2):
        one.write(film(packet))
    one.close()
    (tmp_path / "taken").write_text("a file where the template wants a folder")
    config = load_config(sets=[f"recording.folder={tmp_path}", "recording.name=taken/{run}"])
    recorder = Recorder(config, tell_broker=lambda _: None, on_change=lambda _rows, _films: None)
    recorder.start()
    try:
        with pytest.raises(RecordingError, match="taken"):
            recorder.keep_film(RUN).result(timeout=30)
        assert [path.parent.name for path in recorder.files.paths_of(RUN)] == [".films"]
        (tmp_path / "taken").unlink()
        assert recorder.keep_film(RUN).result(timeout=30) == f"taken/{RUN}"
        with pytest.raises(KeyError):
            recorder.keep_film(RUN).result(timeout=30)
    finally:
        recorder.close()
    assert [step.seq for step in steps_of(tmp_path / "taken" / f"{RUN}.mp4")] == [0, 1, 2]


def test_a_film_is_kept_without_a_file_that_somebody_removed(tmp_path: Path) -> None:
    """Of a film in two files, one a size of picture, the first is gone: the second becomes a recording."""
    one = shot(tmp_path / ".films")
    one.write(film(chain(0, 0)[0]))
    picture = VideoEncoder("film").encode(np.zeros((72, 80), np.uint8), 9000)
    one.write(film(made(1, picture.payload, is_keyframe=True, pts=9000, width=80, height=48)))
    paths = one.paths
    one.close()
    config = load_config(sets=[f"recording.folder={tmp_path}", "recording.name={run}"])
    recorder = Recorder(config, tell_broker=lambda _: None, on_change=lambda _rows, _films: None)
    recorder.start()
    try:
        paths[0].unlink()
        assert recorder.keep_film(RUN).result(timeout=30) == f"{RUN}"
    finally:
        recorder.close()
    assert len(paths) == 2
    assert [step.seq for step in steps_of(tmp_path / f"{RUN}.mp4")] == [1]


def test_steps_tell_what_the_sampler_said(tmp_path: Path) -> None:
    """Step, total and sigma of each frame come back from a growing and from a finished file."""
    one = Recording.open(tmp_path, stream="demo/a", run=RUN, meta=META)
    for packet in chain(0, 2):
        one.write(replace(packet, step=packet.seq * 2, total_steps=9, sigma=14.5 - packet.seq))
    expected = [(0, 0, 9, 14.5, 0), (1, 2, 9, 13.5, 9000), (2, 4, 9, 12.5, 18000)]
    growing = [(s.seq, s.step, s.of, s.sigma, s.pts) for s in steps_of(one.paths[0])]
    (path,) = one.finish()
    finished = [(s.seq, s.step, s.of, s.sigma, s.pts) for s in steps_of(path)]
    assert growing == finished == expected
    assert [step.seq for step in steps_of(path, after=0)] == [1, 2]


def test_the_newest_steps_are_read_without_the_others(tmp_path: Path) -> None:
    """What is behind a seq, of a file that grows between two looks, by several who look at once."""
    one = Recording.open(tmp_path, stream="demo/a", run=RUN, meta=META)
    for last in (3, 5, 9):
        for packet in chain(0, 9)[one.written + 1 : last + 1]:
            one.write(packet)
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda after: [s.seq for s in steps_of(one.paths[0], after)], range(-1, 4)))
        assert found == [list(range(after + 1, last + 1)) for after in range(-1, 4)]


def test_a_long_run_has_all_its_steps(tmp_path: Path) -> None:
    """A finished file with more frames than one note can list tells each of them, and shows the last."""
    one, (first,) = Recording.open(tmp_path, stream="demo/a", run=RUN, meta=META), chain(0, 0)
    count, large = 14_000, 10**14
    for seq in range(count):
        one.write(replace(first, seq=seq, pts=seq * 9000, step=large + seq, total_steps=large, sigma=0.1 + seq / 7))
    growing = steps_of(one.paths[0])
    (path,) = one.finish()
    assert steps_of(path) == growing
    assert [step.seq for step in growing] == list(range(count))
    assert [picture.seq for picture in pictures_around(path, count - 1)] == [count - 1]


def test_all_pictures_of_a_clip_are_around_its_step(tmp_path: Path) -> None:
    """A step of a clip gives all its pictures, from a growing and from a finished file."""
    one = Recording.open(tmp_path, stream="demo/a", run=RUN, meta=META)
    for seq in range(3):
        for packet in clip(seq, 4):
            one.write(packet)
    assert numbers(pictures_around(one.paths[0], 1)) == [10, 11, 12, 13]
    (path,) = one.finish()
    found = pictures_around(path, 1)
    assert numbers(found) == [10, 11, 12, 13]
    assert [(picture.seq, picture.index) for picture in found] == [(1, 0), (1, 1), (1, 2), (1, 3)]


def textured(seq: int) -> NDArray[np.uint8]:
    """A picture of 512x512 with edges and grain, (H*3//2, W) I420."""
    rng = np.random.default_rng(seq)
    luma = np.indices((512, 512)).sum(axis=0) * 3 % 180 + rng.normal(0, 4, (512, 512)) + 40
    return np.concatenate([luma.clip(16, 235).astype(np.uint8), np.full((256, 512), 110, np.uint8)])


def test_a_step_as_jpeg_is_as_good_as_the_film(tmp_path: Path) -> None:
    """The JPEG of a textured step is within 36 dB of the H.264 picture that it is made of."""
    encoder, one = VideoEncoder("film"), Recording.open(tmp_path, stream="demo/a", run=RUN, meta=META)
    for seq in range(3):
        picture = encoder.encode(textured(seq), seq * 9000)
        one.write(made(seq, picture.payload, is_keyframe=picture.is_keyframe, pts=seq * 9000, width=512, height=512))
    pictures = pictures_around(one.paths[0], 2)
    film = decode_h264([picture.payload for picture in pictures])[-1]
    assert psnr_db(decode_jpeg(picture_of_step(pictures, 2)), film) >= 36
    one.close()


@pytest.mark.parametrize("is_finished", [False, True])
def test_the_first_frames_of_clips_are_all_their_pictures(tmp_path: Path, is_finished: bool) -> None:
    """Two frames of a recording of clips of four are eight pictures, and the copy says that it has two frames."""
    one = Recording.open(tmp_path, stream="demo/a", run=RUN, meta=META)
    for packet in [packet for seq in range(3) for packet in clip(seq, 4)]:
        one.write(packet)
    copy = first_frames(one.finish()[0] if is_finished else one.paths[0], 2)
    try:
        assert [number for number, _ in read(copy)] == [0, 1, 2, 3, 10, 11, 12, 13]
        summary = read_summary(copy)
        assert summary is not None
        assert (summary["frames"], summary["last_seq"]) == (2, 1)
    finally:
        copy.unlink()
        one.close()


def test_a_lost_packet_ends_the_film_until_the_next_keyframe(tmp_path: Path) -> None:
    """What leans on a packet that found no room is left out, though a keyframe is queued before it: no rubbish is ever
    in a film."""
    first, second, third = chain(0, 2)
    filler = film(first, run="00000000000000cd", payload=bytes(FILM_BYTES - 2 * ITEM_BYTES - len(first.payload)))
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), lambda _: None, lambda *_: None)
    assert recorder.put(film(first))
    assert recorder.put(filler)
    assert not recorder.put(film(second))
    recorder.put(showing(RUN))
    recorder.start()
    try:
        wait_for(lambda: recorder.put(film(first, run="00000000000000ef")), of="room")
        recorder.put(film(third))
        keyframe = film(chain(5, 5)[0])
        wait_for(lambda: recorder.put(keyframe), of="room for it, for the filler may still have its place")
        wait_for(lambda: (one := recorder.films.films.get(RUN)) and one.last_seq == 5, of="the keyframe")
    finally:
        recorder.close()
    assert [step.seq for step in steps_of(recorder.films.films[RUN].paths[0])] == [0, 5]


def test_a_film_whose_name_is_taken_by_another_run_is_whole(tmp_path: Path) -> None:
    """The last packet of a run comes behind a STATE in which another run has its name: it is in its film."""
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), lambda _: None, lambda *_: None)
    recorder.start()
    try:
        recorder.put(showing(RUN))
        for packet in chain(0, 1):
            recorder.put(film(packet))
        wait_for(lambda: (one := recorder.films.films.get(RUN)) and one.last_seq == 1, of="the film")
        recorder.put(showing("00000000000000cd"))
        recorder.put(film(chain(0, 0)[0], run="00000000000000cd"))
        wait_for(lambda: "00000000000000cd" in recorder.films.films, of="the other run's film")
        recorder.put(film(chain(0, 2)[2]))
        wait_for(lambda: recorder.films.films[RUN].last_seq == 2, of="the last packet")
    finally:
        recorder.close()


def test_a_recording_goes_on_in_what_its_film_had_queued(tmp_path: Path) -> None:
    """Record begins while packets of the film still wait behind it: they are written first, and nothing is missing."""
    told: list[Any] = []
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    recorder.put(replace(showing(RUN), runs=recorded(kept_from=3, ended=False)))
    for packet in chain(0, 2):
        recorder.put(film(packet))
    for packet in chain(3, 5):
        recorder.put(packet)
    recorder.start()
    try:
        wait_for(lambda: any(one.written == 5 for one in told), of="the frames")
    finally:
        recorder.close()
    (path,) = tmp_path.rglob("*.part")
    assert [number for number, _ in read(path)] == [0, 1, 2, 3, 4, 5]


def test_what_is_left_of_a_film_that_was_recorded_is_no_new_one(tmp_path: Path) -> None:
    """A packet of a film that comes when the recording of its run is finished makes no film."""
    told: list[Any] = []
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), told.append, lambda *_: None)
    other = "00000000000000cd"
    recorder.start()
    try:
        recorder.put(replace(showing(RUN, other), runs=recorded(kept_from=0, ended=False)))
        recorder.put(chain(0, 0)[0])
        recorder.put(replace(showing(RUN, other), runs=recorded(kept_from=0, ended=True)))
        wait_for(lambda: any(one.finished for one in told), of="the file")
        recorder.put(film(chain(0, 0)[0]))
        recorder.put(film(chain(0, 0)[0], run=other))
        wait_for(lambda: other in recorder.films.films, of="the packet behind it")
        assert RUN not in recorder.films.films
    finally:
        recorder.close()


def test_films_leave_room_for_recordings(tmp_path: Path) -> None:
    """Behind a disk that is slow films fill half of what may wait, and no more: a recording's packet is still taken."""
    recorder = Recorder(load_config(sets=[f"recording.folder={tmp_path}"]), lambda _: None, lambda *_: None)
    large = replace(chain(0, 0)[0], payload=bytes(1 << 20))
    while recorder.put(film(large)):
        pass
    assert recorder.put(large)
    assert not recorder.put(film(large))


def test_a_disk_that_takes_no_film_is_counted(tmp_path: Path) -> None:
    """Where the films' folder cannot be made, each frame that is lost is counted."""
    (tmp_path / ".films").write_text("a file where the folder should be")
    lost: list[int] = []
    films = Films(tmp_path / ".films", RecordingConfig(), lambda: lost.append(1))
    for attempt in (1, 2, 3):
        assert not films.write(film(chain(0, 0, attempt)[0]), {})
        assert len(lost) == attempt
    films.close()


def test_the_oldest_films_go(tmp_path: Path) -> None:
    """Over its bytes or its age a film goes, the one that has not grown for longest first; also after a restart."""
    films = Films(tmp_path, RecordingConfig(film_max_age_s=1000.0))
    runs = [f"{number:016x}" for number in range(3)]
    for run in runs:
        films.write(film(chain(0, 0)[0], run=run), META)
    films.close()
    paths = [films.films[run].paths[0] for run in runs]
    nbytes = paths[0].stat().st_size
    for path, age_s in zip(paths, (2000, 300, 0), strict=True):
        os.utime(path, (time.time() - age_s,) * 2)
    aged = Films(tmp_path, RecordingConfig(film_max_age_s=1000.0))
    aged.load()
    assert set(aged.films) == set(runs)
    assert {one.last_seq for one in aged.films.values()} == {0}  # a page asks for what is there
    aged.tick([])
    assert [path.exists() for path in paths] == [False, True, True]
    config = RecordingConfig().model_copy(update={"film_max_bytes": nbytes + nbytes // 2})
    crowded = Films(tmp_path, config)
    crowded.load()
    crowded.tick([])
    assert [path.exists() for path in paths] == [False, False, True]


# --- through a daemon ---


def watched_run(
    daemon: Daemon, stream: str, colours: list[Any], record: Any = "off", shape: tuple[int, int] = (8, 8)
) -> str:
    """A run of one step a colour, each seen by a page before the next. shape: of latents. Returns the run."""
    with (
        PageSocket(daemon) as page,
        LatentPublisher(daemon.broker, stream=stream, latent_format="sd1", record=record) as publisher,
    ):
        page.watch({stream: "thumb"})
        for step, colour in enumerate(colours):
            publisher.publish(sd1_latents_of(colour, *shape), step=step, total_steps=len(colours), sigma=9.0 - step)
            while page.picture()[0]["seq"] != step:
                pass
        return str(publisher.run)


def steps(daemon: Daemon, run: str) -> list[list[Any]]:
    status, body = daemon.get(f"/api/v1/runs/{run}/film")
    return json.loads(body)["steps"] if status == 200 else []


def colour_of_step(daemon: Daemon, run: str, seq: int) -> tuple[int, ...]:
    status, body = daemon.get(f"/api/v1/runs/{run}/film/{seq}.jpg")
    assert status == 200, body
    path = daemon.folder / "step.jpg"
    path.write_bytes(body)
    picture = np.asarray(Image.open(path).convert("RGB"))
    return tuple(int(value) for value in picture[picture.shape[0] // 2, picture.shape[1] // 2])


def near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 12


def test_a_watched_run_leaves_a_film(daemon: Daemon) -> None:
    """What a page saw of an unrecorded run can be walked through step by step, in its colours, and is no recording."""
    run = watched_run(daemon, "film/one", COLOURS[:4])
    wait_for(lambda: len(steps(daemon, run)) == 4, of="4 steps")
    assert [row[:4] for row in steps(daemon, run)] == [[n, n, 4, 9.0 - n] for n in range(4)]
    assert [near(colour_of_step(daemon, run, n), COLOURS[n]) for n in range(4)] == [True] * 4
    status, body = daemon.get(f"/api/v1/runs/{run}/film/2")
    assert status == 200
    (length,) = struct.unpack_from(">I", body)
    rows = json.loads(body[4 : 4 + length])["pictures"]
    assert [(row["seq"], row["keyframe"]) for row in rows] == [(0, True), (1, False), (2, False), (3, False)]
    assert len(body) == 4 + length + sum(row["bytes"] for row in rows)
    assert all(row["run"] != run for row in daemon.json("/api/v1/recordings")["recordings"])
    assert any(row["run"] == run for row in daemon.json("/api/v1/films")["films"])
    wait_for(lambda: daemon.streams()["film/one"]["film"] == 3, of="the stream's last filmed frame")


def test_a_film_is_kept_on_request(daemon: Daemon) -> None:
    """Keep makes a recording of the film of a run that is over: its steps are there still, the film is not."""
    run = watched_run(daemon, "film/kept", COLOURS[:3])
    wait_for(lambda: len(steps(daemon, run)) == 3 and daemon.streams()["film/kept"]["ended"], of="3 steps, ended")
    answer = daemon.json(f"/api/v1/runs/{run}/keep", method="POST")
    assert daemon.recording(run)["id"] == answer["id"]
    assert [row[0] for row in steps(daemon, run)] == [0, 1, 2]
    assert near(colour_of_step(daemon, run, 1), COLOURS[1])
    assert all(row["run"] != run for row in daemon.json("/api/v1/films")["films"])
    status, _ = daemon.get(f"/api/v1/runs/{run}/keep", method="POST")
    assert status == 404


def test_record_goes_on_in_the_film(daemon: Daemon) -> None:
    """Record in the middle of a watched run: one file has the steps seen before, and every one after."""
    stream = "film/recorded"
    with (
        PageSocket(daemon) as page,
        LatentPublisher(daemon.broker, stream=stream, latent_format="sd1", record="off") as publisher,
    ):
        page.watch({stream: "thumb"})
        for step in range(3):
            publisher.publish(sd1_latents_of(COLOURS[step]), step=step, total_steps=12)
            while page.picture()[0]["seq"] != step:
                pass
        wait_for(lambda: len(steps(daemon, publisher.run)) == 3, of="3 steps")
        daemon.json(f"/api/v1/streams/{stream}/record", method="POST", body={"mode": "all"})
        wait_for(lambda: daemon.streams()[stream]["record"] == "all", of="the word")

        last = 2

        def recorded() -> bool:
            nonlocal last
            last += 1
            publisher.publish(sd1_latents_of(COLOURS[4]), step=last, total_steps=12)
            return any(row["run"] == publisher.run for row in daemon.json("/api/v1/recordings")["recordings"])

        wait_for(recorded, of="a recording")
    row = daemon.recording(publisher.run)
    seqs = [step[0] for step in steps(daemon, publisher.run)]
    assert seqs[:3] == [0, 1, 2]
    assert seqs[-1] == row["last_seq"] == last
    kept = [seq for seq in seqs if seq > 2]
    assert kept == list(range(kept[0], last + 1))
    assert near(colour_of_step(daemon, publisher.run, 1), COLOURS[1])
    assert near(colour_of_step(daemon, publisher.run, last), COLOURS[4])
    assert all(film["run"] != publisher.run for film in daemon.json("/api/v1/films")["films"])


@pytest.mark.parametrize("path", ["runs/0123456789abcdef/film", "runs/0123456789abcdef/film/0.jpg"])
def test_an_unknown_run_has_no_film(daemon: Daemon, path: str) -> None:
    """A run that nobody saw is 404; what is no run at all is 422."""
    assert daemon.get(f"/api/v1/{path}")[0] == 404
    assert daemon.get(f"/api/v1/{path.replace('0123456789abcdef', '..%2Fsecret')}")[0] in (404, 422)


@pytest.mark.slow
def test_films_outlive_the_daemon_and_can_be_off(tmp_path: Path) -> None:
    """After a restart a film is there, and a late viewer sees its last step; with film "off" none is made."""
    with Daemon(tmp_path) as daemon:
        run = watched_run(daemon, "film/old", COLOURS[:3])
        wait_for(lambda: len(steps(daemon, run)) == 3, of="3 steps")
    with Daemon(tmp_path, "recording.film=off") as daemon:
        assert near(colour_of_step(daemon, run, 2), COLOURS[2])
        status, picture = daemon.get("/streams/film/old/latest.jpg")  # nothing is in memory any more
        assert status == 200
        assert np.abs(decode_jpeg(picture).astype(int) - COLOURS[2]).max() <= 12
        dark = watched_run(daemon, "film/dark", COLOURS[:2])
        wait_for(lambda: "film/dark" in daemon.streams(), of="the stream")
        assert daemon.streams()["film/dark"]["film"] is None
        assert steps(daemon, dark) == []
