"""The command line as people and scripts use it, each command a real process against a real daemon."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taesd_stream import LatentPublisher
from taesd_stream.demo_sampler import load_clip
from taesd_stream.frames import Kind
from taesd_stream.models import build_decoder
from taesd_stream_workers.commands.files import pictures_of
from taesd_stream_workers.offline.latent_files import Row, format_of
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.page_socket import await_wishes
from tests.pictures import decode_file, psnr_db
from tests.test_latent_files import Trap, write_log

COMMANDS = (
    "up",
    "demo",
    "bench",
    "health",
    "streams",
    "record",
    "publish",
    "decode",
    "weights",
    "fit",
    "distill",
    "broker",
    "worker",
    "streamer",
)


def run(*words: str, folder: Path, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    environment = clean_environment(folder) | {"http_proxy": "http://127.0.0.1:9", "COLUMNS": "200"}
    return run_command(*words, environment=environment, timeout_s=timeout_s)


def refusal(*words: str, folder: Path) -> tuple[int, str]:
    """Exit code and the one line of a command that fails."""
    done = run(*words, folder=folder)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("taesd-stream: ")
    return done.returncode, lines[0]


def moving_latents(frames: int, channels: int = 4) -> Tensor:
    """(frames, channels, 8, 8), each frame another plain colour."""
    ramp = torch.linspace(-1, 1, frames).reshape(-1, 1, 1, 1)
    return (ramp * torch.ones(frames, channels, 8, 8)).contiguous()


def direct_pictures(latents: Tensor, latent_format: str) -> list[np.ndarray]:
    """What the packaged decoder makes of latents, in this process, in float32."""
    decoder = build_decoder("nano" if latent_format == "flux2" else "linear", latent_format=latent_format)
    with torch.inference_mode():
        pictures = torch.cat([decoder(latent.unsqueeze(0)) for latent in latents]).clamp(0, 1)
    return [picture.permute(1, 2, 0).numpy() * 255 for picture in pictures]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_that_is_understood(command: str, tmp_path: Path) -> None:
    """--help of each command exits 0, with an example whose every option the same help explains."""
    done = run(command, "--help", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    example = re.search(rf"Example: taesd-stream {command}(( \S+)*)", done.stdout)
    assert example is not None, done.stdout
    options = done.stdout.partition("Options")[2]
    for word in example[1].split():
        if word.startswith("-"):
            assert re.search(rf"(?<!\S){re.escape(word)}(?!\S)", options), f"{word} is in no option of {command}"


def test_usage(tmp_path: Path) -> None:
    """The version goes to stdout; an unknown command and an unknown option exit with 2 and say so."""
    assert re.fullmatch(r"taesd-stream \d+\.\d+\.\d+\n", run("--version", folder=tmp_path).stdout)
    for words in (["nothing"], ["up", "--nothing"], ["publish"], ["decode", "a", "--fps", "x"]):
        done = run(*words, folder=tmp_path)
        assert done.returncode == 2, words
        assert "Traceback" not in done.stderr
        assert "Usage: taesd-stream" in done.stderr


def test_streams_once_and_as_json(daemon: Daemon, tmp_path: Path) -> None:
    """Both name each stream, its state and step; the JSON is what the HTTP interface says."""
    with LatentPublisher(daemon.broker, stream="cli/listed", latent_format="sd1") as publisher:
        publisher.publish(np.zeros((4, 8, 8), np.float32), step=2, total_steps=9)
        wait_for(lambda: daemon.streams().get("cli/listed", {}).get("step") == 2, of="step 3 in the list")
        as_json = run("streams", "--json", "--connect", daemon.web, folder=tmp_path)
        once = run("streams", "--once", "--connect", daemon.web.removeprefix("http://"), folder=tmp_path)
    row = next(row for row in json.loads(as_json.stdout)["streams"] if row["name"] == "cli/listed")
    assert (row["state"], row["step"], row["total_steps"]) == ("live", 2, 9)
    assert re.search(r"cli/listed +live.* 3/9 ", once.stdout), once.stdout
    assert (as_json.returncode, once.returncode) == (0, 0)


def ended(daemon: Daemon, stream: str) -> dict[str, Any]:
    """The row of a stream whose run is over: a command that ends is quicker than the word of it."""
    return wait_for(
        lambda: (row := daemon.streams().get(stream)) and row["state"] == "done" and row, of=f"the end of {stream}"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pth", ".latents"])
def test_publish_a_file_and_record_it(suffix: str, daemon: Daemon, tmp_path: Path) -> None:
    """Each kind of file is published row by row; the recording has them all, in order, as decoded directly."""
    latents = moving_latents(6)
    path = tmp_path / f"latents{suffix}"
    if suffix == ".safetensors":
        save_file({"latents": latents}, path)
    elif suffix == ".npy":
        np.save(path, latents.numpy())
    elif suffix == ".pth":
        torch.save(latents, path)
    else:
        write_log(tmp_path, list(latents)).rename(path)
    stream = f"cli/file{suffix}"
    words = ["--latent-format", "sd1", "--stream", stream, "--record", "all"]
    done = run("publish", str(path), *words, "--connect", daemon.broker, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"{stream}: 6 frames published\n")
    recording = daemon.recording(ended(daemon, stream)["run"])
    pictures = decode_file(daemon.file(recording["id"]))
    assert len(pictures) == 6
    for picture, direct in zip(pictures, direct_pictures(latents, "sd1"), strict=True):
        assert psnr_db(picture, direct) > 32


def test_publish_a_log_that_says_all_by_itself(daemon: Daemon, tmp_path: Path) -> None:
    """What a publisher left in a log, of several files, is one run under its own name, with its own steps and meta."""
    path = write_log(tmp_path, list(moving_latents(3)), segment_bytes=500)
    assert len([*tmp_path.glob("*.latents")]) > 1
    done = run("publish", str(path), "--connect", daemon.broker, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    row = ended(daemon, "mine")
    assert (row["step"], row["total_steps"], row["meta"]["seed"], row["meta"]["file"]) == (4, 9, 5, path.name)
    assert daemon.recording(row["run"])["frames"] == 3


def test_a_log_that_was_cut_short_says_so(tmp_path: Path) -> None:
    """What is whole of it is decoded; what is not is told in bytes, and `info` has it too."""
    path = write_log(tmp_path, list(moving_latents(3)))
    path.write_bytes(path.read_bytes()[:-100])
    for command, name in (("decode", "out.mp4"), ("export", "out.webm")):
        done = run(command, str(path), "-o", str(tmp_path / name), folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert re.search(r"\.latents: [\d,]+ bytes are damaged or cut short, and left out", done.stderr), done.stderr
        assert "2 pictures" in done.stderr
    assert json.loads(run("info", str(path), "--json", folder=tmp_path).stdout)["damaged_bytes"] > 1000


@pytest.mark.parametrize(
    ("words", "expected_size", "expected_kind"),
    [
        (["--kind", "steps"], (64, 64), "steps"),
        (["--batch"], (192, 64), "steps"),
        (["--kind", "live"], (64, 64), "live"),
    ],
)
def test_kinds_and_grids(
    words: list[str], expected_size: tuple[int, int], expected_kind: Kind, daemon: Daemon, tmp_path: Path
) -> None:
    """--kind and --batch say what the first axis is."""
    stream = f"cli/kind{'-'.join(words)}".replace("--", ".")
    np.save(tmp_path / "three.npy", moving_latents(3).numpy())
    common = ["--latent-format", "sd1", "--stream", stream, "--record", "all", "--fps", "50"]
    done = run("publish", str(tmp_path / "three.npy"), *words, *common, "--connect", daemon.broker, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    row = ended(daemon, stream)
    picture = decode_file(daemon.file(daemon.recording(row["run"])["id"]))[0]
    assert row["kind"] == expected_kind
    assert picture.shape[0] * picture.shape[1] >= expected_size[0] * expected_size[1]
    assert (picture.shape == (64, 64, 3)) == ("--batch" not in words)


@pytest.mark.parametrize(
    ("name", "kind", "shape", "pictures"),
    [
        ("sd1", "steps", (4, 8, 8), 1),
        ("sd1", "clip", (21, 4, 8, 8), 21),
        ("wan2_1", "steps", (16, 8, 8), 1),
        ("wan2_1", "live", (16, 8, 8), 4),
        ("wan2_1", "live", (3, 16, 8, 8), 12),
        ("wan2_1", "clip", (21, 16, 8, 8), 84),
    ],
)
def test_fps_is_of_pictures(name: str, kind: Kind, shape: tuple[int, ...], pictures: int) -> None:
    """Of video a row is published when its pictures have been shown: a latent is several."""
    assert pictures_of(Row(torch.zeros(shape), 0, None), kind, format_of(name)) == pictures


def test_loop_goes_on_until_ctrl_c(daemon: Daemon, tmp_path: Path) -> None:
    """--loop begins again at the end, at --fps; Ctrl-C ends the run as stopped, with exit code 0."""
    np.save(tmp_path / "loop.npy", moving_latents(3).numpy())
    words = ["--latent-format", "sd1", "--stream", "cli/loop", "--loop", "--fps", "40", "--record", "all"]
    with started("publish", str(tmp_path / "loop.npy"), *words, "--connect", daemon.broker, folder=tmp_path) as process:
        wait_for(lambda: (daemon.streams().get("cli/loop", {}).get("step") or 0) > 7, of="the third round")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=40)
    assert process.returncode == 0, errors
    wait_for(lambda: daemon.streams()["cli/loop"]["state"] == "stopped", of="the run's end")


@contextlib.contextmanager
def started(*words: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that runs on, killed at the latest at the end."""
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(folder)
    )
    with process:
        yield process
        process.kill()


@contextlib.contextmanager
def recorder(daemon: Daemon, name: str, output: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`record`, once it has said that it waits."""
    asked = ["record", name, "-o", str(output), "--connect", daemon.web, *words]
    with started(*asked, folder=output.parent) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"waiting for {name}\n"
        yield process


def test_record_waits_and_downloads(daemon: Daemon, tmp_path: Path) -> None:
    """`record` asked for before the stream is there: it says so, keeps the next run to its end, writes its file."""
    output = tmp_path / "out.mp4"
    with recorder(daemon, "cli/later", output) as process:
        await_wishes(daemon)
        with LatentPublisher(daemon.broker, stream="cli/later", latent_format="sd1") as publisher:
            for step, latents in enumerate(moving_latents(4)):
                publisher.publish(latents, step=step)
            assert publisher.wait_until_acked(30), publisher.error
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.endswith(f"{output}: 4 frames\n")
    assert len(decode_file(output)) == 4
    assert [path.name for path in tmp_path.glob("out*")] == ["out.mp4"]


def test_record_keeps_the_last_frame_alone_and_no_more(daemon: Daemon, tmp_path: Path) -> None:
    """--mode last writes a file of the run's last frame; --mode off ends what is kept, and writes no file."""
    output = tmp_path / "last.mp4"
    with recorder(daemon, "cli/last", output, "--mode", "last") as process:
        with LatentPublisher(daemon.broker, stream="cli/last", latent_format="sd1") as publisher:
            for step, latents in enumerate(moving_latents(4)):
                publisher.publish(latents, step=step)
            wait_for(lambda: daemon.streams().get("cli/last", {}).get("record") == "last", of="the word")
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert daemon.recording(publisher.run)["first_seq"] == 3
    assert len(decode_file(output)) == 1

    with LatentPublisher(daemon.broker, stream="cli/off", latent_format="sd1", record="all") as publisher:
        publisher.publish(moving_latents(1)[0], step=0)
        wait_for(lambda: daemon.streams().get("cli/off", {}).get("record") == "all", of="the word")
        done = run("record", "cli/off", "--mode", "off", "--connect", daemon.web, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == "cli/off is recorded no more\n"
        assert daemon.recording(publisher.run)["frames"] == 1
        assert daemon.streams()["cli/off"]["record"] == "off"


def test_record_off_says_what_it_did(daemon: Daemon, tmp_path: Path) -> None:
    """Of a name that is no stream it says so; with a file or a count of frames it is refused, for it writes none."""
    words = ["record", "cli/nobody", "--mode", "off", "--connect", daemon.web]
    done = run(*words, folder=tmp_path)
    assert (done.returncode, "there is no stream" in done.stderr) == (0, True)
    for more in (["-o", "out.mp4"], ["--frames", "3"]):
        done = run(*words, *more, folder=tmp_path)
        assert (done.returncode, "neither -o nor --frames" in done.stderr) == (2, True)


def test_record_of_a_name_that_has_ended_means_its_next_run(daemon: Daemon, tmp_path: Path) -> None:
    """What an earlier run recorded is not taken for the answer."""
    output = tmp_path / "out.mp4"
    publish_run(daemon, "cli/again", frames=2)
    with recorder(daemon, "cli/again", output) as process:
        publish_run(daemon, "cli/again", frames=5)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(decode_file(output)) == 5


def test_record_of_a_run_that_was_recorded_before(daemon: Daemon, tmp_path: Path) -> None:
    """A run whose first recording was ended is recorded anew: what comes is the second file, not the first."""
    output = tmp_path / "out.mp4"
    latents = moving_latents(6)
    with LatentPublisher(daemon.broker, stream="cli/twice", latent_format="sd1", record="all") as publisher:
        for step in range(2):
            publisher.publish(latents[step], step=step)
        assert publisher.wait_until_acked(30), publisher.error
        run("record", "cli/twice", "--mode", "off", "--connect", daemon.web, folder=tmp_path)
        assert daemon.recording(publisher.run)["frames"] == 2
        with recorder(daemon, "cli/twice", output) as process:
            wait_for(lambda: publisher._outbox.mode == "all", of="the sampler's hearing of it")
            for step in range(2, 6):
                publisher.publish(latents[step], step=step)
            assert publisher.wait_until_acked(30), publisher.error
            publisher.close()
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(decode_file(output)) == 4


def publish_run(daemon: Daemon, stream: str, frames: int) -> None:
    """A whole run, kept, and its recording finished."""
    with LatentPublisher(daemon.broker, stream=stream, latent_format="sd1", record="all") as publisher:
        for step, latents in enumerate(moving_latents(frames)):
            publisher.publish(latents, step=step)
        assert publisher.wait_until_acked(30), publisher.error
    daemon.recording(publisher.run)


def test_record_the_first_frames_only(daemon: Daemon, tmp_path: Path) -> None:
    """--frames N downloads the first N while the stream lives, and the daemon goes on recording."""
    output = tmp_path / "first.mp4"
    with LatentPublisher(daemon.broker, stream="cli/first", latent_format="sd1", record="all") as publisher:
        latents = moving_latents(8)
        for step in range(5):
            publisher.publish(latents[step], step=step)
        done = run("record", "cli/first", "-o", str(output), "--frames", "3", "--connect", daemon.web, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith(f"{output}: 3 frames\n")
        assert len(decode_file(output)) == 3
        for step in range(5, 8):
            publisher.publish(latents[step], step=step)
        assert publisher.wait_until_acked(30), publisher.error
    assert daemon.recording(publisher.run)["frames"] == 8
    # it may end between the list and the download: its run's id still finds it
    status, body = daemon.get(f"/api/v1/recordings/{publisher.run}/file?frames=8")
    assert status == 200
    output.write_bytes(body)
    assert len(decode_file(output)) == 8


def test_record_of_frames_whose_size_changes_says_what_the_file_has(daemon: Daemon, tmp_path: Path) -> None:
    """While it grows there is the part of one size: how many frames that are is told, and why not all."""
    output = tmp_path / "part.mp4"
    with LatentPublisher(daemon.broker, stream="cli/sizes", latent_format="sd1", record="all") as publisher:
        for step, side in enumerate((8, 8, 8, 16, 16)):
            publisher.publish(np.zeros((4, side, side), np.float32), step=step)
        done = run("record", "cli/sizes", "-o", str(output), "--frames", "5", "--connect", daemon.web, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"{output}: 3 frames\n" in done.stderr
        assert "the size of its pictures has changed" in done.stderr
        assert len(decode_file(output)) == 3


def test_record_passes_over_an_older_run_that_nobody_can_decode(daemon: Daemon, tmp_path: Path) -> None:
    """It waits for ever; what is recorded now is the one that was asked for."""
    with LatentPublisher(daemon.broker, stream="cli/stuck", latent_format="unheard", record="all") as stuck:
        stuck.publish(np.zeros((4, 8, 8), np.float32), step=0)
        assert stuck.wait_until_acked(30), stuck.error

    def waits() -> bool:
        rows = daemon.json("/api/v1/recordings")["recordings"]
        return any(row["run"] == stuck.run for row in rows)

    wait_for(waits, of="the one that waits")
    output = tmp_path / "now.mp4"
    with recorder(daemon, "cli/stuck", output) as process:
        await_wishes(daemon)
        with LatentPublisher(daemon.broker, stream="cli/stuck", latent_format="sd1") as publisher:
            publisher.publish(moving_latents(1)[0], step=0)
            assert publisher.wait_until_acked(30), publisher.error
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.endswith(f"{output}: 1 frames\n")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_decode_equals_the_direct_decode(suffix: str, tmp_path: Path) -> None:
    """Without a daemon, latents become a video of the same pictures at the asked rate; stdout stays empty."""
    latents = torch.from_numpy(load_clip().latents[:5])
    path, output = tmp_path / f"clip{suffix}", tmp_path / "clip.mp4"
    if suffix == ".pth":
        torch.save({"latents": latents}, path)
    else:
        save_file({"latents": latents.contiguous()}, path)
    done = run("decode", str(path), "--latent-format", "flux2", "-o", str(output), "--fps", "10", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert f"{output}: 5 pictures, decoder nano\n" in done.stderr
    assert "weights.folder=DIR" in done.stderr  # how to get the full decoder
    pictures = decode_file(output)
    for picture, direct in zip(pictures, direct_pictures(latents, "flux2"), strict=True):
        assert psnr_db(picture, direct) > 32
    with av.open(output) as container:
        times = [float(frame.time or 0) for frame in container.decode(video=0)]
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=1e-3)


@pytest.mark.parametrize(("decoder", "ticks"), [("linear", 4), ("taew2_1", 1)])
def test_decode_of_a_video_goes_at_its_pace_whatever_decodes(decoder: str, ticks: int, tmp_path: Path) -> None:
    """Latents of a video give all its frames where its decoder is; else one a latent, which stands as long as they."""
    path, output, weights = tmp_path / "video.npy", tmp_path / "video.mp4", tmp_path / "weights"
    np.save(path, np.random.default_rng(0).standard_normal((3, 16, 4, 6)).astype(np.float32))
    weights.mkdir()
    if decoder == "taew2_1":
        save_file(build_decoder(decoder).state_dict(), weights / f"{decoder}.safetensors")
    words = ["--latent-format", "wan2_1", "-o", str(output), "--set", f"weights.folder={weights}"]
    done = run("decode", str(path), *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    count = 8 // ticks + 1
    assert f"{output}: {count} pictures, decoder {decoder}\n" in done.stderr
    with av.open(output) as container:
        times = [float(frame.time or 0) for frame in container.decode(video=0)]
    assert times == pytest.approx([place * ticks / 16 for place in range(count)], abs=1e-3)


def test_decode_of_a_log_of_clips_begins_each_anew(tmp_path: Path) -> None:
    """A log of two clips is two videos: each has as many frames as alone."""
    weights, output = tmp_path / "weights", tmp_path / "clips.mp4"
    weights.mkdir()
    save_file(build_decoder("taew2_1").state_dict(), weights / "taew2_1.safetensors")
    path = write_log(tmp_path, list(torch.randn(2, 3, 16, 4, 6)), kind="clip")
    words = ["--latent-format", "wan2_1", "-o", str(output), "--set", f"weights.folder={weights}"]
    done = run("decode", str(path), *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{output}: 18 pictures, decoder taew2_1\n" in done.stderr


def test_decode_of_a_log_that_says_all_by_itself(tmp_path: Path) -> None:
    """A log knows its format; a frame of it that holds NaN is named, and the others are as decoded directly."""
    latents = moving_latents(4)
    broken = latents.clone()
    broken[1, 0, 0, 0] = float("nan")
    path, output = write_log(tmp_path, list(broken)), tmp_path / "log.mp4"
    done = run("decode", str(path), "-o", str(output), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{path}: frame 1 holds NaN or infinity: no picture of it" in done.stderr
    pictures = decode_file(output)
    for picture, direct in zip(pictures, direct_pictures(latents[[0, 2, 3]], "sd1"), strict=True):
        assert psnr_db(picture, direct) > 32
    code, line = refusal("decode", str(path), "--latent-format", "flux1", "-o", str(output), folder=tmp_path)
    assert (code, "flux1" in line, str(path) in line) == (2, True, True), line


@pytest.mark.parametrize(("count", "fps"), [(1, 0.5), (3, 0.5), (25, 1000)])
def test_the_last_picture_stands_as_long_as_the_others(count: int, fps: float, tmp_path: Path) -> None:
    """A video of so many pictures is as long as they are; of the last one FFmpeg would guess 1/24 s."""
    path, output = tmp_path / "clip.npy", tmp_path / "clip.mp4"
    np.save(path, moving_latents(count).numpy())
    done = run("decode", str(path), "--latent-format", "sd1", "--fps", f"{fps}", "-o", str(output), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    with av.open(output) as container:
        assert container.duration == pytest.approx(1e6 * count / fps, abs=1000)  # microseconds; its clock has 1 ms


def test_decode_with_the_real_weights(shared: Path, tmp_path: Path) -> None:
    """--set weights.folder gives the full decoder."""
    path, output = tmp_path / "clip.npy", tmp_path / "clip.mp4"
    np.save(path, load_clip().latents[:2])
    words = ["--latent-format", "flux2", "-o", str(output), "--set", f"weights.folder={shared / 'weights'}"]
    done = run("decode", str(path), *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("clip.mp4: 2 pictures, decoder taef2\n")
    assert len(decode_file(output)) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["publish", "{}/absent.pth", "--latent-format", "sd1"], "{}/absent.pth: there is no such file"),
        (["publish", "{}/good.npy"], "say what its latents are, as in --latent-format flux2"),
        (["publish", "{}/good.npy", "--latent-format", "sdx"], "unknown latent format 'sdx'; nearest: sdxl"),
        (["publish", "{}/good.npy", "--latent-format", "flux1"], "flux1 has 16 channels, the file has (3, 4, 8, 8)"),
        (
            ["publish", "{}/good.npy", "--latent-format", "sd1", "--stream", "a b"],
            "--stream 'a b': expected up to 4 parts",
        ),
        (["publish", "{}/good.npy", "--latent-format", "sd1", "--connect", "nowhere"], "nowhere"),
        (["publish", "{}/nan.npy", "--latent-format", "sd1"], "1 of 3 frames hold NaN or infinity, the first is 1"),
        (["publish", "{}/good.txt", "--latent-format", "sd1"], "expected a name that ends in .safetensors"),
        (["publish", "{}/trap.pth", "--latent-format", "sd1"], "{}/trap.pth: not a file of plain tensors"),
        (["publish", "{}/torn.latents"], "{}/torn.latents: no whole record is in it"),
        (["decode", "{}/trap.npy", "--latent-format", "sd1", "-o", "{}/out.mp4"], "{}/trap.npy: cannot be read"),
        (["decode", "{}/nan.npy", "--latent-format", "sd1", "-o", "{}/out.mp4"], "hold NaN or infinity"),
        (["decode", "{}/good.npy", "--latent-format", "sd1", "-o", "{}/out.gif"], "a name that ends in .mp4"),
        (["decode", "{}/good.npy", "--latent-format", "sd1", "-o", "{}/no/out.mp4"], "there is no folder {}/no"),
        (
            ["decode", "{}/good.npy", "--latent-format", "sd1", "-o", "{}/out.mp4", "--set", "weights.folder={}/no"],
            "weights.folder = {}/no: there is no such folder",
        ),
        (["record", "a b", "-o", "{}/out.mp4"], "NAME 'a b': expected up to 4 parts"),
        (["record", "a", "-o", "{}"], "{}: is a folder"),
        (["streams", "--connect", "ftp://here"], "--connect ftp://here: expected the web address"),
        (["streams", "--connect", "http://[bad"], "--connect http://[bad: expected the web address"),
        (["health", "--role", "king"], "--role king: expected broker, worker, streamer or all"),
    ],
)
def test_bad_input_is_one_line(words: list[str], expected: str, tmp_path: Path) -> None:
    """What a person got wrong is told in one line with exit code 2, before any daemon is asked; nothing is run."""
    good = moving_latents(3).numpy()
    np.save(tmp_path / "good.npy", good)
    (tmp_path / "good.txt").touch()
    (tmp_path / "torn.latents").write_bytes(b"\0\0\1")
    good[1, 0, 0, 0] = np.nan
    np.save(tmp_path / "nan.npy", good)
    torch.save({"latents": Trap(tmp_path / "sprung")}, tmp_path / "trap.pth")
    np.save(tmp_path / "trap.npy", np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    code, line = refusal(*[word.format(tmp_path) for word in words], folder=tmp_path)
    assert code == 2, line
    assert expected.format(tmp_path) in line
    assert not (tmp_path / "sprung").exists()
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("words", [["streams", "--once"], ["record", "a", "-o", "{}/a.mp4"], ["health"]])
def test_nobody_at_the_web_address(words: list[str], tmp_path: Path) -> None:
    """Where nothing listens, and where another server does, each command says so and exits with 69."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with other_server() as other:
        for address in (f"127.0.0.1:{free}", other):
            code, line = refusal(*[word.format(tmp_path) for word in words], "--connect", address, folder=tmp_path)
            assert code == 69, line
            assert address.removeprefix("http://") in line


@contextlib.contextmanager
def other_server() -> Iterator[str]:
    """A web server that is no daemon of ours and says 200 to all."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.faults
def test_publish_without_a_broker(tmp_path: Path) -> None:
    """It says where it looked and what to start, with exit code 69, whatever it was to keep."""
    np.save(tmp_path / "good.npy", moving_latents(2).numpy())
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        words = ["publish", str(tmp_path / "good.npy"), "--latent-format", "sd1", "--record", "off"]
        code, line = refusal(*words, "--connect", address, folder=tmp_path)
    assert code == 69
    assert f"no broker answers at {address}: start a daemon with `taesd-stream up`" in line


def test_health(daemon: Daemon, tmp_path: Path) -> None:
    """Of a daemon that is ready every role is healthy, asked by HTTP or, for the broker's side, by STATS."""
    wait_for(lambda: daemon.get("/readyz")[0] == 200, of="the daemon ready")
    for role in ("all", "broker", "worker", "streamer"):
        assert run("health", "--role", role, "--connect", daemon.web, folder=tmp_path).returncode == 0, role
    asked = ["--set", f"broker.workers_bind={daemon.facts['workers']}", "--connect", "127.0.0.1:9"]
    for role, code in (("broker", 0), ("worker", 0), ("all", 69)):
        assert run("health", "--role", role, *asked, folder=tmp_path).returncode == code, role


def test_ctrl_c_of_record_says_that_the_daemon_goes_on(daemon: Daemon, tmp_path: Path) -> None:
    """Leaving `record` exits with 130 and leaves no file."""
    output = tmp_path / "left.mp4"
    with recorder(daemon, "cli/left", output) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "left; the daemon goes on recording cli/left\n"
    assert not list(tmp_path.glob("left*"))
