"""Video through a real daemon: every frame of a clip, and of a live stream that comes latent by latent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from taesd_stream import LatentPublisher
from taesd_stream.models import build_decoder
from taesd_stream.models.tiny_video import VideoDecoder
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket
from tests.pictures import decode_file, decode_h264, psnr_db

LATENTS_T, FPS = 4, 16.0
PICTURES = 4 * LATENTS_T - 3


@pytest.fixture(scope="module")
def decoder() -> VideoDecoder:
    """A Wan 2.1 decoder with weights of our own."""
    torch.manual_seed(3)
    network = build_decoder("taew2_1")
    assert isinstance(network, VideoDecoder)
    return network.eval()


@pytest.fixture(scope="module")
def video_daemon(decoder: VideoDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that finds those weights."""
    folder = tmp_path_factory.mktemp("video")
    (folder / "weights").mkdir()
    save_file(decoder.state_dict(), folder / "weights" / "taew2_1.safetensors")
    with Daemon(folder, f"weights.folder={folder / 'weights'}") as daemon:
        yield daemon


def smooth_latents(seed: int) -> NDArray[np.float32]:
    """(T, 16, h, w) latents that change slowly, in space and time."""
    rough = torch.randn(1, 16, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(rough, size=(LATENTS_T, 8, 12), mode="trilinear", align_corners=True)
    return np.ascontiguousarray(smooth[0].transpose(0, 1).numpy())


@torch.no_grad()
def direct(decoder: VideoDecoder, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(T', H, W, 3) of the same latents, decoded at once in float32."""
    frames: Tensor = decoder.decode_clip(torch.from_numpy(latents)[None])[0]
    return (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()


def times_of(path: Path) -> list[float]:
    """When each picture of a file is shown, seconds."""
    with av.open(path) as container:
        return [float(frame.time or 0) for frame in container.decode(video=0)]


def assert_same_pictures(path: Path, expected: NDArray[np.uint8]) -> None:
    """The file holds exactly these pictures, in order, at the stream's rate."""
    pictures = decode_file(path)
    assert len(pictures) == len(expected)
    for number, (picture, wanted) in enumerate(zip(pictures, expected, strict=True)):
        assert psnr_db(picture, wanted) >= 30, f"picture {number}"
    assert times_of(path) == pytest.approx([number / FPS for number in range(len(expected))], abs=0.001)


def test_a_clip_is_recorded_with_all_its_frames(video_daemon: Daemon, decoder: VideoDecoder) -> None:
    """Two steps of a clip are two whole videos in the file, one after the other."""
    clips = [smooth_latents(seed) for seed in (1, 2)]
    with LatentPublisher(
        video_daemon.broker, stream="clip", latent_format="wan2_1", kind="clip", fps=FPS, record="all"
    ) as publisher:
        for step, latents in enumerate(clips):
            publisher.publish(latents, step=step, total_steps=2)
        assert publisher.wait_until_acked(30), publisher.error
    recording = video_daemon.recording(publisher.run)
    assert recording["frames"] == 2
    assert_same_pictures(
        video_daemon.file(recording["id"]), np.concatenate([direct(decoder, latents) for latents in clips])
    )


def test_a_live_stream_is_one_video_however_it_comes(video_daemon: Daemon, decoder: VideoDecoder) -> None:
    """Latents that are published one by one, and some together, are decoded as the whole video would be."""
    latents = smooth_latents(3)
    with LatentPublisher(
        video_daemon.broker, stream="live", latent_format="wan2_1", kind="live", fps=FPS, record="all"
    ) as publisher:
        for step, part in enumerate((latents[0], latents[1:3], latents[3])):
            publisher.publish(part, step=step)
        assert publisher.wait_until_acked(30), publisher.error
    recording = video_daemon.recording(publisher.run)
    assert_same_pictures(video_daemon.file(recording["id"]), direct(decoder, latents))


@pytest.mark.slow
def test_a_live_stream_that_begins_with_nan_goes_on(video_daemon: Daemon) -> None:
    """A latent that has no picture is a gap at the beginning of the file; those behind it are all there."""
    latents = smooth_latents(4)
    latents[0, 0, 0, 0] = np.nan
    with LatentPublisher(
        video_daemon.broker, stream="live/nan", latent_format="wan2_1", kind="live", fps=FPS, record="all"
    ) as publisher:
        for step, part in enumerate(latents):
            publisher.publish(part, step=step)
        assert publisher.wait_until_acked(30), publisher.error
    recording = video_daemon.recording(publisher.run)
    assert (recording["frames"], recording["last_seq"], recording["gaps"]) == (LATENTS_T - 1, LATENTS_T - 1, [0])


def test_streams_of_one_size_do_not_mix(video_daemon: Daemon, decoder: VideoDecoder) -> None:
    """Live streams that are stepped together each get their own video."""
    sources = {f"many/{seed}": smooth_latents(seed) for seed in range(10, 14)}
    publishers = {
        name: LatentPublisher(
            video_daemon.broker, stream=name, latent_format="wan2_1", kind="live", fps=FPS, record="all"
        )
        for name in sources
    }
    for step in range(LATENTS_T):
        for name, publisher in publishers.items():
            publisher.publish(sources[name][step], step=step)
    for name, publisher in publishers.items():
        assert publisher.wait_until_acked(30), publisher.error
        publisher.close()
        recording = video_daemon.recording(publisher.run)
        assert_same_pictures(video_daemon.file(recording["id"]), direct(decoder, sources[name]))


def test_a_viewer_of_a_clip_gets_every_frame(video_daemon: Daemon) -> None:
    """A step of a clip comes to a viewer as all its pictures, a keyframe first."""
    with (
        LatentPublisher(video_daemon.broker, stream="seen", latent_format="wan2_1", kind="clip", fps=FPS) as publisher,
        PageSocket(video_daemon) as page,
    ):
        page.watch({"seen": "live"})
        publisher.publish(smooth_latents(5), step=0)
        wait_for(lambda: video_daemon.streams().get("seen", {}).get("seq") == 0, of="the frame")
        headers = [page.picture()[0] for _ in range(PICTURES)]
    assert [header["index"] for header in headers] == list(range(PICTURES))
    assert [header["keyframe"] for header in headers] == [True] + [False] * (PICTURES - 1)
    assert {header["count"] for header in headers} == {PICTURES}


def test_a_late_viewer_does_not_move_a_live_stream(video_daemon: Daemon, decoder: VideoDecoder) -> None:
    """A viewer that comes between two latents sees the last picture at once; the next ones are as without him."""
    latents = smooth_latents(21)
    expected = direct(decoder, latents)
    with (
        LatentPublisher(video_daemon.broker, stream="late", latent_format="wan2_1", kind="live", fps=FPS) as publisher,
        PageSocket(video_daemon) as first,
    ):
        wait_for(lambda: "late" in video_daemon.streams(), of="the stream")
        first.watch({"late": "live"})
        wait_for(lambda: video_daemon.streams()["late"]["viewers"], of="the viewer")
        packets: list[bytes] = []
        for step in range(LATENTS_T):
            publisher.publish(latents[step], step=step)
            packets += [first.picture()[1] for _ in range(4 if step else 1)]
            if step == 1:
                with PageSocket(video_daemon) as late:
                    late.watch({"late": "live"})
                    header, payload = late.picture(5)
                assert (header["seq"], header["keyframe"]) == (1, True)
                assert psnr_db(decode_h264([payload])[0], expected[4]) >= 28
                packets.append(first.picture()[1])  # the same one, which every viewer gets
    pictures = decode_h264(packets)
    del pictures[5]
    assert len(pictures) == len(expected)
    for number, (picture, wanted) in enumerate(zip(pictures, expected, strict=True)):
        assert psnr_db(picture, wanted) >= 28, f"picture {number}"
