"""A stream on its way to media servers: real FFmpeg receivers over RTSP and RTMP."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.errors import ConfigError
from taesd_stream_workers.streamer.push import format_of, shown
from tests.daemon import COMMAND, Daemon, clean_environment, free_port, wait_for
from tests.page_socket import PageSocket
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
@pytest.mark.parametrize("scheme", ["rtsp", "rtmp"])
def test_a_clip_is_received_in_its_time(scheme: str, tmp_path: Path) -> None:
    """A clip of 24 pictures a second comes to the receiver 1/24 s apart, through its rounds, in the clip's order."""
    url = f"{scheme}://127.0.0.1:{free_port()}/live/clip"
    environment = {"TAESD_STREAM_PUSHES": f'[{{"stream": "clip", "url": "{url}"}}]'}
    shades = [(40 + 12 * number,) * 3 for number in range(12)]
    with (
        Daemon(tmp_path, environment=environment) as daemon,
        LatentPublisher(daemon.broker, stream="clip", latent_format="sd1", kind="clip", fps=24) as publisher,
    ):
        receiver = Receiver(url, tmp_path / "out.ts")
        publisher.publish(np.stack([sd1_latents_of(shade) for shade in shades]), step=0)
        wait_for(lambda: receiver.file.exists() and receiver.file.stat().st_size > 60 * 188, 60, of="some rounds")
        frames = receiver.stop()
    times_s = [frame.time for frame in frames if frame.time is not None]
    # ffmpeg, as a receiver of RTSP, guesses the first picture's time from the second's, whoever sends
    steps_s = [after - before for before, after in pairwise(times_s[1:])]
    assert len(steps_s) > 2 * len(shades)
    assert steps_s == pytest.approx([1 / 24] * len(steps_s), abs=0.0015)  # RTMP has milliseconds
    greys = [float(to_rgb(frame)[16:-16, 16:-16].mean()) for frame in frames]
    rounds = [shade[0] for shade in shades] * (1 + len(greys) // len(shades))
    assert greys == pytest.approx(rounds[: len(greys)], abs=8)


class Relay:
    """A receiver's network: passes a push on to a server, with small buffers, and not while it is `stalled`."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._door = socket.socket()
        self._door.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 10)
        self._door.bind(("127.0.0.1", 0))
        self._door.listen()
        self.port = int(self._door.getsockname()[1])
        self.flows = threading.Event()
        self.flows.set()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._door.accept()
                try:
                    server = socket.create_connection(("127.0.0.1", self._server_port))
                except OSError:
                    client.close()
                    continue
                for source, sink in ((client, server), (server, client)):
                    self._threads.append(threading.Thread(target=self._pump, args=(source, sink), daemon=True))
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source, sink:
            while self.flows.wait() and (data := source.recv(64 << 10)):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No more of it."""
        self.flows.set()
        self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()


def dropped(daemon: Daemon) -> float:
    """Pictures of `live` that were not sent to a slow viewer, so far."""
    text = daemon.get("/metrics")[1].decode()
    return float(text.partition('\ntaesd_stream_dropped_total{rendition="live"} ')[2].partition("\n")[0] or 0)


@pytest.mark.slow
def test_a_receiver_that_stalls_gets_the_next_keyframe(tmp_path: Path) -> None:
    """It stops reading until pictures are dropped for it, then reads on: none leans on one that it did not get, the
    newest comes, and another viewer has had every one meanwhile."""
    noise = [np.random.default_rng(seed).standard_normal((4, 128, 128)).astype(np.float32) * 3 for seed in range(4)]
    port = free_port()
    relay = Relay(port)
    url = f"rtmp://127.0.0.1:{relay.port}/live/stalled"
    environment = {"TAESD_STREAM_PUSHES": f'[{{"stream": "stalled", "url": "{url}"}}]'}
    pace, step, seen = threading.Event(), 0, []
    with (
        contextlib.closing(relay),
        Daemon(tmp_path, environment=environment) as daemon,
        PageSocket(daemon) as page,
        LatentPublisher(daemon.broker, stream="stalled", latent_format="sd1", record="off") as publisher,
    ):
        receiver = Receiver(f"rtmp://127.0.0.1:{port}/live/stalled", tmp_path / "out.ts")
        page.watch({"stalled": "live"})

        def publish(latents: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> None:
            nonlocal step
            publisher.publish(latents, step=step)
            while page.picture()[0]["seq"] < step:
                pass
            seen.append(step)
            step += 1

        def publish_until(is_so: Callable[[], bool], timeout_s: float, of: str) -> None:
            def another() -> bool:
                publish(noise[step % len(noise)])
                pace.wait(0.03)
                return is_so()

            wait_for(another, timeout_s, of=of)

        publish_until(
            lambda: receiver.file.exists() and receiver.file.stat().st_size > 500_000, 60, "received pictures"
        )
        before = dropped(daemon)
        relay.flows.clear()
        publish_until(lambda: dropped(daemon) > before, 60, "dropped pictures")
        relay.flows.set()
        size = receiver.file.stat().st_size
        publish_until(lambda: receiver.file.stat().st_size > size + 1_000_000, 60, "what had waited, and more")

        quiet = 0

        def has_all() -> bool:
            """Flat pictures are small: a file that grows by no more has nothing of the noise to come."""
            nonlocal quiet
            size = receiver.file.stat().st_size
            publish(sd1_latents_of(GREEN, 128, 128))
            pace.wait(0.1)
            quiet = quiet + 1 if 0 < receiver.file.stat().st_size - size < 20_000 else 0
            return quiet >= 5

        wait_for(has_all, 60, of="the newest picture")
        received = receiver.stop()
    assert seen == list(range(step))
    assert 0 < len(received) < step
    assert np.abs(to_rgb(received[-1])[16:-16, 16:-16].astype(int) - GREEN).max() <= 8
    command = ["ffmpeg", "-v", "error", "-f", "mpegts", "-i", str(receiver.file), "-f", "null", "-"]
    complaints = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "gap" not in complaints
    assert "reference" not in complaints


@pytest.mark.slow
def test_the_configuration_pushes(tmp_path: Path) -> None:
    """A push of the configuration runs with the daemon, from the stream's first picture, and ends with it."""
    url = f"rtmp://127.0.0.1:{free_port()}/live/two"
    environment = {"TAESD_STREAM_PUSHES": f'[{{"stream": "pushed", "url": "{url}"}}]'}
    with Daemon(tmp_path, environment=environment) as daemon, publishing(daemon, "pushed"):
        receiver = Receiver(url, tmp_path / "out.ts")
        receiver.wait_for_bytes()
        assert_green(receiver.stop())


@pytest.mark.slow
def test_a_receiver_that_is_not_there_is_counted(tmp_path: Path) -> None:
    """Each try that finds nobody listening is in /metrics, by stream; that there is no picture yet is no failure."""
    url = f"rtmp://127.0.0.1:{free_port()}/live/nobody"
    environment = {"TAESD_STREAM_PUSHES": f'[{{"stream": "unheard", "url": "{url}"}}]'}
    counted = b'taesd_stream_push_failures_total{stream="unheard"}'
    with Daemon(tmp_path, environment=environment) as daemon:
        wait_for(lambda: "no picture yet" in daemon.log(), of="the first try")
        assert counted not in daemon.get("/metrics")[1]
        with publishing(daemon, "unheard"):
            wait_for(lambda: counted in daemon.get("/metrics")[1], 30, of="the failure counted")


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
