"""A stream on its way to media servers: real FFmpeg receivers over RTSP and RTMP."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.errors import ConfigError
from taesd_stream_workers.push import format_of, shown
from tests.daemon import COMMAND, Daemon, clean_environment, free_port, wait_for
from tests.pictures import sd1_latents_of, to_rgb

pytestmark = pytest.mark.timeout(180)
GREEN = (60, 170, 60)


@contextlib.contextmanager
def publishing(daemon: Daemon, stream: str) -> Iterator[None]:
    """A sampler that publishes ten steps a second."""
    over = threading.Event()

    def publish() -> None:
        with LatentPublisher(daemon.broker, stream=stream, latent_format="sd1") as publisher:
            step = 0
            while not over.wait(0.1):
                publisher.publish(sd1_latents_of(GREEN), step=step)
                step += 1

    thread = threading.Thread(target=publish)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class Receiver:
    """ffmpeg that listens, and writes what comes, as it comes."""

    def __init__(self, url: str, file: Path) -> None:
        listen = ["-rtsp_flags", "listen"] if url.startswith("rtsp") else ["-listen", "1"]
        probing = ["-probesize", "20000", "-analyzeduration", "300000", "-fpsprobesize", "0"]
        command = [
            "ffmpeg",
            "-loglevel",
            "error",
            "-y",
            *listen,
            *probing,
            "-i",
            url,
            "-c",
            "copy",
            "-flush_packets",
            "1",
        ]
        self.file = file
        self.process = subprocess.Popen([*command, "-f", "mpegts", str(file)], stdin=subprocess.DEVNULL)

    def wait_for_bytes(self) -> None:
        """Until it has written some pictures."""
        wait_for(lambda: self.file.exists() and self.file.stat().st_size > 8 * 188, 60, of="received pictures")

    def stop(self) -> list[av.VideoFrame]:
        """Its end. Returns what it received, decoded."""
        self.process.terminate()
        self.process.wait(15)
        frames: list[av.VideoFrame] = []
        with av.open(self.file) as container, contextlib.suppress(av.FFmpegError):  # its tail may be torn
            frames.extend(container.decode(video=0))
        return frames


def assert_green(frames: list[av.VideoFrame]) -> None:
    """Every picture is what was published, and times go forward."""
    assert len(frames) >= 3
    for frame in frames:
        assert np.abs(to_rgb(frame)[16:-16, 16:-16].astype(int) - GREEN).max() <= 8
    times = [frame.pts for frame in frames if frame.pts is not None]
    assert times == sorted(set(times))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["rtsp", "rtmp"])
def test_a_receiver_gets_the_pictures_and_again_after_a_break(scheme: str, daemon: Daemon, tmp_path: Path) -> None:
    """`push` reaches a receiver that comes late, and reaches it again when it was killed and is back."""
    stream, url = f"push/{scheme}", f"{scheme}://127.0.0.1:{free_port()}/live/one"
    command = [*COMMAND, "push", stream, url, "--connect", daemon.web]
    process = subprocess.Popen(command, env=clean_environment(tmp_path), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    try:
        assert "waiting for" in next(lines)
        with publishing(daemon, stream):
            assert any("again in" in line for line in lines)  # nobody listens yet
            for number in range(2):
                receiver = Receiver(url, tmp_path / f"{number}.ts")
                assert any("pushing" in line for line in lines)
                receiver.wait_for_bytes()
                assert_green(receiver.stop())
    finally:
        process.terminate()
        process.wait(15)
        process.stderr.close()


@pytest.mark.slow
def test_the_configuration_pushes(tmp_path: Path) -> None:
    """A push of the configuration runs with the daemon, from the stream's first picture, and ends with it."""
    url = f"rtmp://127.0.0.1:{free_port()}/live/two"
    environment = {"TAESD_STREAM_PUSHES": f'[{{"stream": "pushed", "url": "{url}"}}]'}
    with Daemon(tmp_path, environment=environment) as daemon, publishing(daemon, "pushed"):
        receiver = Receiver(url, tmp_path / "out.ts")
        receiver.wait_for_bytes()
        assert_green(receiver.stop())


@pytest.mark.parametrize("url", ["http://a/b", "srt://a:1", "rtsp:///x", "rtmp", "file:///tmp/x", "rtsp://[::1"])
def test_an_address_that_nothing_can_be_pushed_to(url: str) -> None:
    """Other kinds of addresses are refused with those that there are."""
    with pytest.raises(ConfigError, match="expected rtsp://"):
        format_of(url)


def test_a_secret_in_an_address_is_not_shown() -> None:
    """What is logged of an address has neither its password nor its key."""
    assert shown("rtmp://me:secret@host/app/name?key=secret") == "rtmp://host/app/…"
    assert shown("rtmps://host:443/live2/secret-key") == "rtmps://host:443/live2/…"
    assert shown("rtsp://me:secret@host:8554/name?key=secret") == "rtsp://host:8554/name"
