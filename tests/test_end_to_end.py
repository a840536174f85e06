"""The main job over real processes and sockets: published latents come out as recordings and live pictures."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from taesd_stream import LatentPublisher
from taesd_stream.demo_sampler import load_scenes
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.checkpoints import load_state_dict
from taesd_stream_workers.streamer.latency import STAGES
from tests.daemon import COMMAND, Daemon, clean_environment, once_in_three, wait_for
from tests.page_socket import PageSocket, await_wishes
from tests.pictures import PATCHES, decode_file, decode_h264, decode_jpeg, psnr_db, sd1_latents_of

FRAMES = 8
STAMPS = ("sent", "received", "started", "decoded", "encoded", "streamed")
# Latents that are published and gone: the program exits as soon as they are acked.
PUBLISH = """
import sys
from safetensors.torch import load_file
from taesd_stream import LatentPublisher
latents = load_file(sys.argv[2])["latents"]
publisher = LatentPublisher(sys.argv[1], stream=sys.argv[3], latent_format="flux2", record="all")
for step, row in enumerate(latents):
    publisher.publish(row, step=step, total_steps=len(latents), sigma=1 - step / len(latents))
assert publisher.wait_until_acked(30), publisher.error
publisher.close()
print(publisher.run)
"""


@pytest.fixture(scope="module")
def real_daemon(tmp_path_factory: pytest.TempPathFactory, shared_or_none: Path | None):  # type: ignore[no-untyped-def]
    """A daemon with the real weights where they are, else with what the package has."""
    folder = tmp_path_factory.mktemp("real")
    sets = [f"weights.folder={shared_or_none / 'weights'}"] if shared_or_none else []
    with Daemon(folder, *sets) as daemon:
        yield daemon


def real_latents(shared: Path | None) -> tuple[torch.Tensor, torch.nn.Module]:
    """Latents of a real clip and the decoder that reads them; without the shared data, what the package has."""
    if shared is None:
        decoder = build_decoder("nano", latent_format="flux2")
        latents = load_scenes()[0].latents.astype(np.float32)
        return torch.from_numpy(np.stack([latents * (1 - number / 40) for number in range(FRAMES)])), decoder
    encoder = build_encoder("taef2", load_state_dict(shared / "weights" / "taef2_encoder.pth", part="encoder"))
    decoder = build_decoder("taef2", load_state_dict(shared / "weights" / "taef2_decoder.pth"))
    with av.open(shared / "samples" / "decoded_taew2_1.mp4") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][:FRAMES]
    pictures = torch.from_numpy(np.stack(frames)[:, :320, :416].copy()).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        return torch.cat([encoder.float()(picture.unsqueeze(0)) for picture in pictures]), decoder.float()


def test_recording_holds_every_published_frame(
    real_daemon: Daemon, shared_or_none: Path | None, tmp_path: Path
) -> None:
    """A publisher that exits at its ack leaves a file of exactly its frames, in order, each at least 32 dB true."""
    latents, decoder = real_latents(shared_or_none)
    save_file({"latents": latents.contiguous()}, tmp_path / "latents.safetensors")
    arguments = [real_daemon.broker, str(tmp_path / "latents.safetensors"), "clip/main"]
    done = subprocess.run(
        [sys.executable, "-c", PUBLISH, *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(tmp_path),
        timeout=60,
        check=True,
    )
    recording = real_daemon.recording(done.stdout.strip())
    assert (recording["frames"], recording["first_seq"], recording["last_seq"]) == (FRAMES, 0, FRAMES - 1)
    pictures = decode_file(real_daemon.file(recording["id"]))
    assert len(pictures) == FRAMES
    for latent, picture in zip(latents, pictures, strict=True):
        with torch.inference_mode():
            direct = decoder(latent.unsqueeze(0))[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255
        assert psnr_db(direct, picture) >= 32.0
    expected = "taef2" if shared_or_none else "nano"
    # a recording alone shows no picture whose decoder would be told with it: a worker's next HELLO does
    assert wait_for(lambda: real_daemon.streams()["clip/main"]["decoder"], of="the decoder's name") == expected


def test_colours_come_back_right_from_every_sink(daemon: Daemon) -> None:
    """White, black and six patches read back as themselves from live H.264, thumb, jpeg and the recorded file."""
    with PageSocket(daemon) as page:
        for name, rgb in PATCHES.items():
            stream = f"colour/{name}"
            with LatentPublisher(daemon.broker, stream=stream, latent_format="sd1", record="all") as publisher:
                latents = sd1_latents_of(rgb)
                publisher.publish(latents, step=0, total_steps=2)
                for rendition in ("thumb", "jpeg", "live"):
                    page.watch({stream: rendition})
                    header, payload = page.picture()
                    assert header["rendition"] == rendition
                    shown = decode_h264([payload])[0] if rendition == "live" else decode_jpeg(payload)
                    assert np.abs(shown.astype(int) - rgb).max() <= 6, f"{name} as {rendition}: {shown[20, 20]}"
                publisher.publish(latents, step=1, total_steps=2)
                assert publisher.wait_until_acked(20), publisher.error
            recorded = decode_file(daemon.file(daemon.recording(publisher.run)["id"]))
            assert len(recorded) == 2
            assert np.abs(recorded[-1].astype(int) - rgb).max() <= 6, f"{name} in the file: {recorded[-1][20, 20]}"


def test_many_streams_get_their_own_pictures(daemon: Daemon) -> None:
    """32 streams of mixed sizes at once: every picture has its own stream's colour and size, up to the newest step."""
    sizes = [(8, 8), (16, 8), (8, 16), (12, 20)]
    rng = np.random.default_rng(1)
    shades = rng.integers(60, 200, (32, 3)).tolist()
    colours = {f"many/{number:02d}": (red, green, blue) for number, (red, green, blue) in enumerate(shades)}
    publishers = {
        name: LatentPublisher(daemon.broker, stream=name, latent_format="sd1", record="off") for name in colours
    }
    with PageSocket(daemon) as page:
        page.watch(dict.fromkeys(colours, "jpeg"))
        seen: dict[str, int] = {}
        for step in range(6):
            for number, (name, rgb) in enumerate(colours.items()):
                height, width = sizes[number % 4]
                publishers[name].publish(sd1_latents_of(rgb, height, width), step=step, total_steps=6)
        while len([step for step in seen.values() if step == 5]) < 32:
            header, payload = page.picture(30)
            shown = decode_jpeg(payload).astype(int)
            number = list(colours).index(header["stream"])
            assert shown.shape[:2] == tuple(8 * side for side in sizes[number % 4])
            assert np.abs(shown.mean(axis=(0, 1)) - colours[header["stream"]]).max() <= 8
            assert header["step"] >= seen.get(header["stream"], 0)
            seen[header["stream"]] = header["step"]
    for publisher in publishers.values():
        publisher.close()


def test_late_viewer_sees_the_newest_picture_at_once(daemon: Daemon) -> None:
    """A viewer that comes between two slow steps has the newest picture within 1 s, without a new publish."""
    with LatentPublisher(daemon.broker, stream="late", latent_format="sd1") as publisher:
        seq = -1

        def publish() -> None:
            nonlocal seq
            seq += 1
            publisher.publish(sd1_latents_of((200, 60, 60)), step=seq, total_steps=9)
            wait_for(lambda: daemon.streams().get("late", {}).get("seq") == seq, of="the frame")

        def taken_s(rendition: str, tries: int) -> float:
            if tries:  # a step that nobody has seen yet
                publish()
            with PageSocket(daemon) as page:
                asked_s = time.monotonic()
                page.watch({"late": rendition})
                header, payload = page.picture()
                taken_s = time.monotonic() - asked_s
            assert (header["seq"], header["keyframe"]) == (seq, True)
            shown = decode_h264([payload])[0] if rendition == "live" else decode_jpeg(payload)
            assert np.abs(shown.mean(axis=(0, 1)) - (200, 60, 60)).max() <= 8
            return taken_s

        publish()
        for rendition in ("thumb", "live", "jpeg", "live"):
            once_in_three(partial(taken_s, rendition), lambda taken_s: taken_s < 1.0)


def test_many_viewers_cost_one_decode_and_one_encode(daemon: Daemon) -> None:
    """Fifty pages that watch a stream, half of them in either rendition: a frame is decoded once, and encoded twice."""

    def made() -> dict[str, float]:
        text = daemon.get("/metrics")[1].decode()
        lines = {name: f'\ntaesd_stream_packets_total{{rendition="{name}"}} ' for name in ("thumb", "jpeg", "live")}
        packets = {name: float(text.partition(line)[2].partition("\n")[0] or 0) for name, line in lines.items()}
        return packets | {"frames": sum(row["frames"] for row in daemon.json("/api/v1/workers")["workers"])}

    with (
        LatentPublisher(daemon.broker, stream="shared", latent_format="sd1", record="off") as publisher,
        ExitStack() as stack,
    ):
        pages = [stack.enter_context(PageSocket(daemon)) for _ in range(50)]
        for number, page in enumerate(pages):
            page.watch({"shared": "thumb" if number % 2 else "jpeg"})
        wait_for(lambda: daemon.streams().get("shared", {}).get("viewers") == 25, of="all pages")
        before = made()
        for step in range(5):
            publisher.publish(sd1_latents_of((60, 30 * step, 60)), step=step)
            assert {page.picture()[0]["step"] for page in pages} == {step}
        wait_for(lambda: made()["frames"] >= before["frames"] + 5, of="the worker's count")
        assert {key: value - before[key] for key, value in made().items()} == {
            "thumb": 5, "jpeg": 5, "live": 0, "frames": 5,
        }  # fmt: skip


def test_late_viewer_gets_nothing_of_a_former_run(daemon: Daemon) -> None:
    """A viewer that comes after a stream ran again, unwatched, gets the new run's picture first."""
    for colour in ((200, 60, 60), (60, 70, 180)):
        with LatentPublisher(daemon.broker, stream="former", latent_format="sd1") as publisher:
            publisher.publish(sd1_latents_of(colour), step=0, total_steps=9)
            wait_for(lambda run=publisher.run: daemon.streams().get("former", {}).get("run") == run, of="the run")  # type: ignore[misc]
            with PageSocket(daemon) as page:
                page.watch({"former": "thumb"})
                assert page.picture()[0]["run"] == publisher.run
            wait_for(lambda: not daemon.streams()["former"]["viewers"], of="no viewer")


def test_every_picture_tells_its_latency_by_stage(daemon: Daemon) -> None:
    """A picture's stamps are in the order of its way, and every stage, up to the screen, is counted in /metrics."""
    with LatentPublisher(daemon.broker, stream="stamps", latent_format="sd1") as publisher, PageSocket(daemon) as page:
        page.watch({"stamps": "live"})
        publisher.publish(sd1_latents_of((90, 160, 90)), step=0)
        header, _ = page.picture()
        stamps = list(header["stamps"].values())
        assert list(header["stamps"]) == [f"{stage}_us" for stage in STAMPS]
        assert stamps == sorted(stamps)
        assert stamps[0] > 0
        page.say("shown", stream="stamps", run=header["run"], seq=0, shown_us=stamps[-1] + 5000)

        def counted() -> bool:
            lines = daemon.get("/metrics")[1].decode().splitlines()
            counts = {line.split()[0]: float(line.split()[1]) for line in lines if "_count" in line}
            stages = [f'taesd_stream_stage_seconds_count{{stage="{stage}"}}' for stage in STAGES]
            return all(counts.get(name, 0) > 0 for name in [*stages, "taesd_stream_shown_seconds_count"])

        wait_for(counted, of="every stage in /metrics")


def test_a_stream_that_runs_again_shows_and_records_its_new_run(daemon: Daemon) -> None:
    """A second run under the same name gets the name, its own picture and its own file."""
    runs = []
    with PageSocket(daemon) as page:
        for colour in ((200, 60, 60), (60, 70, 180)):
            with LatentPublisher(daemon.broker, stream="again", latent_format="sd1", record="all") as publisher:
                for step in range(3):
                    publisher.publish(sd1_latents_of(colour), step=step, total_steps=3)
                assert publisher.wait_until_acked(20)
                page.watch({"again": "thumb"})
                header, payload = page.picture()
                while header["run"] != publisher.run:
                    header, payload = page.picture()
                assert np.abs(decode_jpeg(payload).mean(axis=(0, 1)) - colour).max() <= 8
                assert publisher.stream == "again"
            runs.append(publisher.run)
            page.watch({})
    files = [decode_file(daemon.file(daemon.recording(run)["id"])) for run in runs]
    assert [len(pictures) for pictures in files] == [3, 3]
    assert daemon.streams()["again"]["run"] == runs[1]


def test_a_batch_is_shown_and_recorded_as_a_grid(daemon: Daemon) -> None:
    """(N,C,h,w) latents of `steps` come as one picture in which each of the N has its place."""
    colours = [(200, 60, 60), (60, 170, 60), (60, 70, 180), (200, 190, 70)]
    batch = np.stack([sd1_latents_of(colour) for colour in colours])
    with LatentPublisher(daemon.broker, stream="grid", latent_format="sd1", record="all") as publisher:
        publisher.publish(batch, step=0, total_steps=1)
        assert publisher.wait_until_acked(20)
    (picture,) = decode_file(daemon.file(daemon.recording(publisher.run)["id"]))
    assert picture.shape == (132, 132, 3)
    for colour, (top, left) in zip(colours, [(0, 0), (0, 68), (68, 0), (68, 68)], strict=True):
        part = picture[top + 8 : top + 56, left + 8 : left + 56].astype(int)
        assert np.abs(part.mean(axis=(0, 1)) - colour).max() <= 8


def test_frames_have_the_times_at_which_they_were_published(daemon: Daemon) -> None:
    """Frames published at uneven times are in the file at those times, to the millisecond."""
    pace, called = threading.Event(), []
    with LatentPublisher(daemon.broker, stream="uneven", latent_format="sd1", record="all") as publisher:
        for step, wait_s in enumerate((0.0, 0.02, 0.015, 0.6, 0.001, 0.9)):
            pace.wait(wait_s)
            before_s = time.monotonic()
            publisher.publish(sd1_latents_of((200, 60, 60)), step=step)
            called.append((before_s, time.monotonic()))
        assert publisher.wait_until_acked(20)
    with av.open(daemon.file(daemon.recording(publisher.run)["id"])) as container:
        times_s = [frame.time for frame in container.decode(video=0)]
    assert len(times_s) == len(called)
    for time_s, (before_s, after_s) in zip(times_s, called, strict=True):
        assert time_s is not None
        assert before_s - called[0][1] - 0.001 <= time_s <= after_s - called[0][0] + 0.001


def test_record_last_keeps_the_final_frame_alone(daemon: Daemon) -> None:
    """`record="last"` leaves a file of one picture: the last one published."""
    with LatentPublisher(daemon.broker, stream="last", latent_format="sd1", record="last") as publisher:
        for step, colour in enumerate([(200, 60, 60), (60, 170, 60), (60, 70, 180)]):
            publisher.publish(sd1_latents_of(colour), step=step, total_steps=3)
    recording = daemon.recording(publisher.run)
    (picture,) = decode_file(daemon.file(recording["id"]))
    assert np.abs(picture.mean(axis=(0, 1)) - (60, 70, 180)).max() <= 8


def test_record_button_keeps_from_now_on_and_stops(daemon: Daemon) -> None:
    """POST record all keeps the frames from then on, POST record off finishes the file while the run goes on."""
    with LatentPublisher(daemon.broker, stream="button", latent_format="sd1", record="off") as publisher:
        latents = sd1_latents_of((200, 60, 60))
        publisher.publish(latents, step=0)
        wait_for(lambda: daemon.streams().get("button"), of="the stream")
        daemon.json("/api/v1/streams/button/record", method="POST", body={"mode": "all"})
        step = 0

        def recorded() -> bool:
            nonlocal step
            step += 1
            publisher.publish(latents, step=step)
            rows = daemon.json("/api/v1/recordings")["recordings"]
            return any(row["run"] == publisher.run and row["frames"] >= 5 for row in rows)

        wait_for(recorded, of="5 recorded frames")
        daemon.json("/api/v1/streams/button/record", method="POST", body={"mode": "off"})
        recording = daemon.recording(publisher.run)
        assert daemon.streams()["button"]["state"] == "live"
    assert len(decode_file(daemon.file(recording["id"]))) == recording["frames"] >= 5


def test_stop_reaches_the_sampler(daemon: Daemon) -> None:
    """POST stop turns `publisher.stopped` true; a program that never reads it cannot be stopped, and is said so."""
    with LatentPublisher(daemon.broker, stream="stop/me", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of((90, 90, 90)), step=0)
        wait_for(lambda: daemon.streams().get("stop/me"), of="the stream")
        assert daemon.get("/api/v1/streams/stop/me/stop", method="POST", body={})[0] == 409
        assert not publisher.stopped
        wait_for(lambda: daemon.streams()["stop/me"]["stoppable"], of="stoppable")
        daemon.json("/api/v1/streams/stop/me/stop", method="POST", body={})
        wait_for(lambda: publisher.stopped, of="stopped")
    wait_for(lambda: daemon.streams()["stop/me"]["state"] == "stopped", of="state stopped")


def test_record_command_waits_for_the_stream_and_downloads_it(daemon: Daemon, tmp_path: Path) -> None:
    """`taesd-stream record NAME -o FILE` says that it waits, and writes the whole run once there is one."""
    output = tmp_path / "out.mp4"
    recorder = subprocess.Popen(
        [*COMMAND, "record", "by/command", "-o", str(output), "--connect", daemon.web],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert recorder.stderr is not None
    assert "waiting for by/command" in recorder.stderr.readline()
    await_wishes(daemon)
    with LatentPublisher(daemon.broker, stream="by/command", latent_format="sd1") as publisher:
        for step in range(7):
            publisher.publish(sd1_latents_of((60, 170, 60)), step=step, total_steps=7)
        assert publisher.wait_until_acked(20)
    assert recorder.wait(60) == 0
    recorder.stderr.close()
    assert len(decode_file(output)) == 7
