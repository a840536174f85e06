"""Recordings made into other kinds of files, and what `info` reads out of one: real encoders, real files."""

from __future__ import annotations

import json
import signal
import subprocess
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from taesd_stream import LatentPublisher, __version__
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_log import RunLog
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream.media.export import CODECS, ExportError, ExportFile, codec_for, pictures_of_file
from taesd_stream.media.recording import Recording
from taesd_stream.models import build_decoder
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.pictures import PATCHES, decode_file, sd1_latents_of, to_rgb
from tests.test_recording import META, RUN, packet, start

TIMES_S = (0.0, 0.1, 0.15, 2.5, 2.6, 9.0)  # as previews come
COLOURS = [(120, 115, 110), *list(PATCHES.values())[2:7]]
SUMMARY = {"stream": "a", "run": RUN, "started": 1_700_000_000.0, "meta": META}


def planes_of(rgb: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """A flat picture as a decode worker makes it."""
    frame = av.VideoFrame.from_ndarray(np.full((64, 96, 3), rgb, np.uint8), "rgb24")
    return np.ascontiguousarray(frame.reformat(format="yuv420p", dst_colorspace="ITU709").to_ndarray())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished recording of six flat pictures at uneven times."""
    recording, encoder = start(tmp_path_factory.mktemp("recorded")), VideoEncoder("record")
    for seq, (rgb, time_s) in enumerate(zip(COLOURS, TIMES_S, strict=True)):
        one = encoder.encode(planes_of(rgb), round(time_s * 90000))
        recording.write(packet(seq, one.payload, is_keyframe=one.is_keyframe, pts=round(time_s * 90000)))
    return recording.finish()[0]


def run(*words: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command to its end."""
    return run_command(*words, environment=clean_environment(folder))


CASES = [
    ("out.mp4", None), ("out.mov", None), ("out.mp4", "h265"), ("out.mp4", "av1"), ("out.mkv", None),
    ("out.webm", None), ("out.webm", "av1"), ("out.gif", None),
]  # fmt: skip


@pytest.mark.parametrize(("name", "codec"), CASES)
def test_every_kind_has_all_pictures_at_their_times_in_their_colours(
    name: str, codec: str | None, recorded: Path, tmp_path: Path
) -> None:
    """Each kind of file has every picture, at its time to the kind's own clock, with the recording's colours."""
    output = tmp_path / name
    with ExportFile(output, codec_for(output, codec), SUMMARY) as target:
        for frame, pts in pictures_of_file(recorded):
            target.add(frame, pts)
    with av.open(output) as container:
        frames = list(container.decode(video=0))
    tick_s = 0.011 if name.endswith(".gif") else 0.0011 if name.endswith((".mkv", ".webm")) else 2e-5
    times = [frame.time for frame in frames]
    assert times == pytest.approx(TIMES_S, abs=tick_s)
    for frame, rgb in zip(frames, COLOURS, strict=True):
        shown = np.asarray(frame.to_ndarray(format="rgb24")) if name.endswith((".gif", ".mkv")) else to_rgb(frame)
        assert np.abs(shown[8:-8, 8:-8].astype(int) - rgb).max() <= 8, (name, rgb, shown[32, 48])
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("count", [1, 2])
def test_hevc_of_few_pictures(count: int, tmp_path: Path) -> None:
    """libx265 made up the times of one picture and of two, not each time: the file was refused or torn."""
    for number in range(6):
        path = tmp_path / f"{number}.mp4"
        with ExportFile(path, codec_for(path, "h265"), SUMMARY) as file:
            for place in range(count):
                file.add(av.VideoFrame.from_ndarray(planes_of(COLOURS[place]), "yuv420p"), place * 9000)
        assert [pts for _, pts in pictures_of_file(path)] == [9000 * place for place in range(count)]


def test_webp_has_all_pictures_at_their_times(recorded: Path, tmp_path: Path) -> None:
    """An animated WebP, read by Pillow, has every picture, its colour, and the waits between them, and loops."""
    output = tmp_path / "out.webp"
    with ExportFile(output, codec_for(output, None), SUMMARY) as target:
        for frame, pts in pictures_of_file(recorded):
            target.add(frame, pts)
    with Image.open(output) as image:
        assert image.info["loop"] == 0
        waits_ms = []
        for number, rgb in enumerate(COLOURS):
            image.seek(number)  # EOFError past the last one
            assert np.abs(np.asarray(image.convert("RGB"))[32, 48].astype(int) - rgb).max() <= 8
            waits_ms.append(image.info["duration"])
        with pytest.raises(EOFError):
            image.seek(6)
    assert waits_ms[:5] == pytest.approx([(b - a) * 1000 for a, b in pairwise(TIMES_S)], abs=1.1)


def test_lossless_is_without_loss(recorded: Path, tmp_path: Path) -> None:
    """The lossless kind gives back the recording's pictures as an RGB converter shows them, bit by bit."""
    output = tmp_path / "out.mkv"
    done = run("export", recorded, "-o", output, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    with av.open(output) as container:
        kept = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(recorded) as container:
        made = [
            frame.to_ndarray(format="rgb24", src_colorspace="ITU709", src_color_range="MPEG", dst_color_range="JPEG")
            for frame in container.decode(video=0)
        ]
    assert all(np.array_equal(one, other) for one, other in zip(kept, made, strict=True))


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "out.webm"])
def test_evenly_spaced(name: str, recorded: Path, tmp_path: Path) -> None:
    """`--fps` gives each picture its place instead of its time, and the file says that rate of itself."""
    output = tmp_path / name
    assert run("export", recorded, "-o", output, "--fps", "10", folder=tmp_path).returncode == 0
    with av.open(output) as container:
        assert container.streams.video[0].average_rate == 10
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(
            [0, 0.1, 0.2, 0.3, 0.4, 0.5], abs=1e-4
        )


@pytest.mark.parametrize("words", [["out.mkv", "--codec", "av1"], ["out.webm"], ["out.mp4", "--codec", "av1"]])
def test_any_rate_can_be_asked_for(words: list[str], recorded: Path, tmp_path: Path) -> None:
    """A rate that an encoder knows nothing of is no reason to refuse: the times are what counts."""
    output = tmp_path / words[0]
    done = run("export", recorded, "-o", output, *words[1:], "--fps", "500", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    with av.open(output) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([place / 500 for place in range(6)], abs=1e-4)


def test_a_file_says_the_rate_that_its_pictures_came_at(recorded: Path, tmp_path: Path) -> None:
    """Without `--fps` a Matroska file says the mean rate, not some rate of ours."""
    output = tmp_path / "out.mkv"
    assert run("export", recorded, "-o", output, folder=tmp_path).returncode == 0
    with av.open(output) as container:
        rate = container.streams.video[0].average_rate
        assert rate is not None
        assert float(rate) == pytest.approx(5 / (TIMES_S[-1] - TIMES_S[0]), rel=0.01)


def test_info_tells_what_a_file_was_painted_from(recorded: Path, tmp_path: Path) -> None:
    """`info --json` of a finished file, of an export of it, and of a growing one gives prompt, seed, sampler back."""
    assert run("export", recorded, "-o", tmp_path / "out.mp4", folder=tmp_path).returncode == 0
    growing = start(tmp_path)
    one = VideoEncoder("record").encode(planes_of(COLOURS[0]), 0)
    growing.write(packet(0, one.payload, is_keyframe=True, pts=0))
    for path, frames in ((recorded, 6), (tmp_path / "out.mp4", 6), (growing.paths[0], 1)):
        done = run("info", path, "--json", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["meta"] == META
        assert (facts["stream"], facts["run"], facts["frames"], facts["pictures"]) == ("demo/a", RUN, frames, frames)
        assert (facts["decoder"], facts["made_by"]) == ("linear", f"taesd-stream {__version__}")
        assert (facts["width"], facts["height"]) == (96, 64)
    shown = run("info", recorded, folder=tmp_path).stdout
    assert "a café, at night" in shown
    assert "sampler" in shown


def test_meta_called_like_our_own_facts_hides_none_of_them(tmp_path: Path) -> None:
    """FFmpeg's tags tell no case: the file says what it is, whatever a sampler calls its facts."""
    meta = {"TAESD_STREAM": "x", "taesd_stream": "y", "Title": "z", "RUN": "0", "prompt": "a fox"}
    recording = Recording.open(tmp_path, stream="demo/a", run=RUN, meta=meta, name="{run}")
    one = VideoEncoder("record").encode(planes_of(COLOURS[0]), 0)
    recording.write(packet(0, one.payload, is_keyframe=True, pts=0))
    done = run("info", recording.finish()[0], "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["stream"], facts["run"], facts["meta"]) == ("demo/a", RUN, meta)


def test_what_a_sampler_said_comes_back_from_a_daemons_file(daemon: Daemon, tmp_path: Path) -> None:
    """Prompt, seed, sampler, model and steps of a publisher's meta are in the tags of the file that was recorded."""
    meta = {"prompt": "a red fox", "seed": 5, "sampler": "euler", "model": "sd1.5", "steps": 2}
    with LatentPublisher(daemon.broker, stream="told", latent_format="sd1", record="all", meta=meta) as publisher:
        for step in range(2):
            publisher.publish(sd1_latents_of((200, 60, 60)), step=step, total_steps=2)
        assert publisher.wait_until_acked(20)
    file = daemon.file(daemon.recording(publisher.run)["id"])
    facts = json.loads(run("info", file, "--json", folder=tmp_path).stdout)
    assert facts["meta"].items() >= meta.items()
    probed = subprocess.run(
        ["ffprobe", "-v", "error", "-show_format", "-of", "json", str(file)], capture_output=True, check=True
    )
    tags = json.loads(probed.stdout)["format"]["tags"]
    assert (tags["prompt"], tags["seed"], tags["sampler"]) == ("a red fox", "5", "euler")


def latent_log(folder: Path) -> Path:
    """The log of a run that was kept: COLOURS at TIMES_S."""
    info = StreamInfo(stream="a", run=RUN, kind="steps", latent_format="sd1", meta={"seed": 3}, opened_ns=10**9)
    log = RunLog(folder, info)
    for seq, (rgb, time_s) in enumerate(zip(COLOURS, TIMES_S, strict=True)):
        latents = sd1_latents_of(rgb).astype(np.float16)
        log.append(
            LatentFrame(
                run=RUN, seq=seq, index=seq, step=seq, total_steps=6, sigma=None, dtype="float16",
                shape=(4, 8, 8), kept=True, sent_ns=2 * 10**9 + round(time_s * 1e9), payload=latents.tobytes(),
            )
        )  # fmt: skip
    (path,) = folder.glob("*.latents")
    return path


def test_a_better_decoder_shows_what_the_log_kept(tmp_path: Path) -> None:
    """With the format's own weights at hand the pictures of a log are that network's, not the projection's."""
    torch.manual_seed(0)
    network = build_decoder("taesd")
    torch.save(network.state_dict(), tmp_path / "taesd_decoder.pth")
    path, output = latent_log(tmp_path), tmp_path / "better.mp4"
    done = run("export", path, "-o", output, "--set", f"weights.folder={tmp_path}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for picture, rgb in zip(decode_file(output), COLOURS, strict=True):
        with torch.inference_mode():
            shown = network(torch.from_numpy(sd1_latents_of(rgb).astype(np.float16)).float()[None]).clamp(0, 1)[0]
        expected = 255 * shown.mean(dim=(1, 2)).numpy()
        assert np.abs(picture.mean(axis=(0, 1)) - expected).max() <= 4
        assert np.abs(picture.mean(axis=(0, 1)) - rgb).max() > 20  # no projection


def test_a_latent_log_is_decoded_anew(tmp_path: Path) -> None:
    """A .latents file becomes a video of its pictures at the times they were published, with its meta in the tags."""
    path, output = latent_log(tmp_path), tmp_path / "out.mp4"
    done = run("export", path, "-o", output, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    with av.open(output) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(TIMES_S, abs=2e-5)
    for picture, rgb in zip(decode_file(output), COLOURS, strict=True):
        assert np.abs(picture[8:-8, 8:-8].astype(int) - rgb).max() <= 8
    facts = json.loads(run("info", output, "--json", folder=tmp_path).stdout)
    assert facts["meta"] == {"seed": 3, "latent_format": "sd1", "kind": "steps"}
    told = json.loads(run("info", path, "--json", folder=tmp_path).stdout)
    assert (told["frames"], told["last_seq"], told["meta"]) == (6, 5, facts["meta"])


def test_ctrl_c_leaves_no_half_file(tmp_path: Path) -> None:
    """An export that is interrupted exits with 130 and leaves neither the file nor its part."""
    encoder, recording = VideoEncoder("record"), start(tmp_path)
    noise = np.random.default_rng(1).integers(16, 235, (768, 512), np.uint8)
    for seq in range(120):
        one = encoder.encode(np.roll(noise, seq), seq * 3000)
        recording.write(packet(seq, one.payload, is_keyframe=one.is_keyframe, pts=seq * 3000, width=512, height=512))
    (source,) = recording.finish()
    output = tmp_path / "out.webm"
    process = subprocess.Popen(
        [*COMMAND, "export", str(source), "-o", str(output)], env=clean_environment(tmp_path), stderr=subprocess.DEVNULL
    )
    wait_for(lambda: output.with_name("out.webm.making").exists(), 60, of="the part")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["export", "{file}", "-o", "{}/out.avi"], "expected a name that ends in .mp4"),
        (["export", "{file}", "-o", "{}/out.mp4", "--codec", "vp9"], "vp9 goes into .webm or .mkv"),
        (["export", "{file}", "-o", "{}/out.mp4", "--codec", "mpeg"], "codec mpeg: expected one of h264"),
        (["export", "{file}", "-o", "{}/out.gif", "--quality", "5"], "gif has no quality to choose"),
        (["export", "{file}", "-o", "{}/out.webm", "--quality", "100"], "--quality 100: libvpx-vp9 takes crf from 0 "),
        (
            ["export", "{file}", "-o", "{}/out.mp4", "--quality", "52"],
            "--quality 52: libx264 takes crf from 0 (best) to 51",
        ),
        (
            ["export", "{file}", "-o", "{}/out.webp", "--quality", "101"],
            "libwebp_anim takes quality from 100 (best) to 0",
        ),
        (["export", "{file}", "-o", "{}/no/out.mp4"], "there is no folder"),
        (["export", "{file}", "-o", "{file}"], "is the file that is read"),
        (["export", "{}/text.mp4", "-o", "{}/out.mp4"], "text.mp4: cannot be read as a recording"),
        (["info", "{}/text.mp4"], "text.mp4: cannot be read as a recording"),
        (["info", "{}/none.mp4"], "there is no such file"),
    ],
)
def test_what_cannot_be_done_is_one_line(words: list[str], text: str, recorded: Path, tmp_path: Path) -> None:
    """A wrong name, codec or file is one line that says what is expected, exit code 2, and no file."""
    (tmp_path / "text.mp4").write_text("hello")
    before = recorded.read_bytes()
    done = run(*[word.replace("{file}", str(recorded)).replace("{}", str(tmp_path)) for word in words], folder=tmp_path)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))
    assert recorded.read_bytes() == before


@pytest.mark.parametrize("name", [name for name, codec in CODECS.items() if codec.quality is not None])
def test_each_quality_of_a_codec_is_another(name: str, recorded: Path, tmp_path: Path) -> None:
    """Both ends of its scale are taken as they are, one step past them is refused with the scale, and no size is."""
    codec = CODECS[name]
    assert codec.quality is not None
    best, worst = codec.quality.best, codec.quality.worst
    noise = np.random.default_rng(1).integers(0, 255, (64, 96, 3), np.uint8)
    nbytes = []
    for quality in (best, worst):
        output = tmp_path / f"{quality}{codec.suffixes[0]}"
        with ExportFile(output, codec, SUMMARY, quality) as target:
            for place in range(3):
                target.add(av.VideoFrame.from_ndarray(np.roll(noise, place), "rgb24"), place * 9000)
        nbytes.append(output.stat().st_size)
    assert nbytes[0] > 2 * nbytes[1]
    step = 1 if worst > best else -1
    for quality in (best - step, worst + step):
        with pytest.raises(ExportError, match=rf"--quality {quality}: .* from {best} \(best\) to {worst} \(smallest"):
            ExportFile(tmp_path / f"out{codec.suffixes[0]}", codec, SUMMARY, quality)


def test_a_growing_recording_is_not_harmed_by_its_copy(tmp_path: Path) -> None:
    """NAME.mp4 made of NAME.mp4.part while it grows: the copy has its pictures, and the recording goes on."""
    recording, encoder = start(tmp_path), VideoEncoder("record")
    pictures = [encoder.encode(planes_of(rgb), seq * 9000) for seq, rgb in enumerate(COLOURS)]
    for seq in range(3):
        one = pictures[seq]
        recording.write(packet(seq, one.payload, is_keyframe=one.is_keyframe, pts=seq * 9000))
    (growing,) = recording.paths
    copy = growing.with_suffix("")
    with ExportFile(copy, codec_for(copy, None), SUMMARY) as target:
        for frame, pts in pictures_of_file(growing):
            target.add(frame, pts)
    assert len(decode_file(copy)) == 3
    assert recording.lost_path is None
    assert recording.write(packet(3, pictures[3].payload, is_keyframe=pictures[3].is_keyframe, pts=3 * 9000))
    assert len(decode_file(recording.finish()[0])) == 4


def test_pictures_of_two_sizes_are_refused(tmp_path: Path) -> None:
    """A file has pictures of one size; another one is refused."""
    output = tmp_path / "out.mp4"
    with ExportFile(output, CODECS["h264"], SUMMARY) as target:
        target.add(av.VideoFrame(64, 64, "yuv420p"), 0)
        with pytest.raises(ExportError, match="of one size"):
            target.add(av.VideoFrame(96, 64, "yuv420p"), 9000)
