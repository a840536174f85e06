"""Players over plain HTTP: the picture is there at once, in the right colours, and the daemon can still stop."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Route

from taesd_stream import LatentPublisher
from taesd_stream_workers.streamer.web import players
from taesd_stream_workers.streamer.web.server import SEND_BUFFER_BYTES
from tests.daemon import Daemon, wait_for
from tests.pictures import Pixels, decode_jpeg, sd1_latents_of, to_rgb
from tests.readme_document import README
from tests.troubles import deaf_viewer

RED = (200, 60, 60)
LOW_DELAY = {"flags": "low_delay", "probesize": "20000", "analyzeduration": "300000", "fpsprobesize": "0"}


def open_player(url: str) -> av.container.InputContainer:
    """What README tells people to type in Python."""
    return av.open(url, "r", format="mpegts", options=LOW_DELAY, timeout=30)


def test_a_player_that_comes_late_sees_the_newest_picture(daemon: Daemon) -> None:
    """A player of live.ts that comes between two slow steps reads the newest picture, and it is shown again."""
    with LatentPublisher(daemon.broker, stream="play/late", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of(RED, 32, 32), step=0)
        wait_for(lambda: daemon.streams().get("play/late", {}).get("seq") == 0, of="the frame")
        with open_player(f"{daemon.web}/streams/play/late/live.ts") as player:
            frames = player.decode(video=0)
            for frame in (next(frames), next(frames)):
                assert np.abs(to_rgb(frame).astype(int) - RED).max() <= 8


def test_a_player_sees_every_new_step(daemon: Daemon) -> None:
    """While a player reads live.ts, a new publish comes to it as the next new picture, larger ones too."""
    colours = [(200, 60, 60), (60, 170, 60), (60, 70, 180)]
    with LatentPublisher(daemon.broker, stream="play/steps", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of(colours[0], 32, 32), step=0)
        wait_for(lambda: daemon.streams().get("play/steps", {}).get("seq") == 0, of="the frame")
        with open_player(f"{daemon.web}/streams/play/steps/live.ts") as player:
            seen = []
            for frame in player.decode(video=0):
                colour = tuple(to_rgb(frame).mean(axis=(0, 1)).round())
                number = int(np.argmin([np.abs(np.subtract(colour, one)).sum() for one in colours]))
                if number not in seen:
                    seen.append(number)
                    if len(seen) == len(colours):
                        break
                    side = 32 if len(seen) == 1 else 40
                    publisher.publish(sd1_latents_of(colours[len(seen)], side, side), step=len(seen))
            assert seen == [0, 1, 2]
            assert (frame.width, frame.height) == (320, 320)


def test_mjpeg_gives_whole_pictures(daemon: Daemon) -> None:
    """live.mjpeg is parts of one answer, each a JPEG of the stream."""
    with LatentPublisher(daemon.broker, stream="play/mjpeg", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of(RED), step=0)
        wait_for(lambda: daemon.streams().get("play/mjpeg", {}).get("seq") == 0, of="the frame")
        url = f"{daemon.web}/streams/play/mjpeg/live.mjpeg"
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 our own daemon
            assert answer.headers["content-type"].startswith("multipart/x-mixed-replace")
            assert answer.readline().startswith(b"--")
            length = next(int(line.split()[1]) for line in answer if line.startswith(b"Content-Length"))
            assert answer.readline() == b"\r\n"
            picture = answer.read(length)
            assert np.abs(decode_jpeg(picture).astype(int) - RED).max() <= 8
            # a browser shows a part when the next one begins: the last picture of a run comes once more
            assert answer.readline() == b"\r\n"
            assert [answer.readline()[:2] for _ in range(4)] == [b"--", b"Co", b"Co", b"\r\n"]
            assert answer.read(length) == picture


def grey_clip(count: int) -> NDArray[np.float32]:
    """A clip of so many pictures, each brighter than the one before."""
    return np.stack([sd1_latents_of((40 + 150 * number // count,) * 3) for number in range(count)])


def live_packets(daemon: Daemon) -> float:
    """Pictures of `live` that the worker has made so far."""
    text = daemon.get("/metrics")[1].decode()
    return float(text.partition('\ntaesd_stream_packets_total{rendition="live"} ')[2].partition("\n")[0] or 0)


@pytest.mark.faults
def test_a_clip_goes_round_in_a_player_in_its_time(daemon: Daemon) -> None:
    """A clip of 3 s in live.ts: after 4 s the player has seen 4 s of it; the worker has decoded it twice at most."""
    before, count = live_packets(daemon), 72
    with LatentPublisher(daemon.broker, stream="play/clip", latent_format="sd1", kind="clip", fps=24) as publisher:
        publisher.publish(grey_clip(count), step=0)
        wait_for(lambda: daemon.streams().get("play/clip", {}).get("seq") == 0, of="the frame")
        with open_player(f"{daemon.web}/streams/play/clip/live.ts") as player:
            frames = player.decode(video=0)
            next(frames)  # it looked at the format first
            first, began_s, brightness, early_s = next(frames).time or 0.0, time.monotonic(), [], []
            while (took_s := time.monotonic() - began_s) <= 4.0:
                frame = next(frames)
                brightness.append(float(to_rgb(frame).mean()))
                early_s.append((frame.time or 0.0) - first - took_s)
    last_s = early_s[-24:]  # of a second; a machine that stands still makes some of them late
    assert -1.0 < max(last_s) < 1.0, last_s
    assert sum(b < a - 50 for a, b in pairwise(brightness)) == 1  # it began anew, once
    assert live_packets(daemon) - before <= 2 * count


def test_a_clip_goes_round_in_mjpeg(daemon: Daemon) -> None:
    """live.mjpeg of a clip of half a second: two of its rounds take at least as long as they last, not a moment."""
    with LatentPublisher(daemon.broker, stream="play/round", latent_format="sd1", kind="clip", fps=24) as publisher:
        publisher.publish(grey_clip(12), step=0)
        wait_for(lambda: daemon.streams().get("play/round", {}).get("seq") == 0, of="the frame")
        with urllib.request.urlopen(f"{daemon.web}/streams/play/round/live.mjpeg", timeout=30) as answer:  # noqa: S310
            parts = (line for line in answer if line.startswith(b"Content-Length"))
            next(parts)
            began_s = time.monotonic()
            for _ in range(24):
                next(parts)
            assert time.monotonic() - began_s > 0.8


@pytest.mark.parametrize("name", ["live.ts", "live.mjpeg"])
def test_a_player_that_left_is_forgotten(daemon: Daemon, name: str) -> None:
    """When the connection is closed, the stream has no viewer any more."""
    with LatentPublisher(daemon.broker, stream="play/left", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of(RED), step=0)
        wait_for(lambda: daemon.streams().get("play/left", {}).get("seq") == 0, of="the frame")
        with urllib.request.urlopen(f"{daemon.web}/streams/play/left/{name}", timeout=30) as answer:  # noqa: S310
            assert answer.read(100)
            wait_for(lambda: daemon.streams()["play/left"]["viewers"] == 1, of="the viewer")
        wait_for(lambda: daemon.streams()["play/left"]["viewers"] == 0, of="its end")


@pytest.mark.parametrize("name", ["live.ts", "live.mjpeg", "latest.jpg"])
def test_an_unknown_stream_is_a_404_that_says_so(daemon: Daemon, name: str) -> None:
    """Nobody waits for a stream that is not there."""
    status, body = daemon.get(f"/streams/no/such/{name}")
    assert status == 404
    assert b"no/such" in body


def headless(player: str, words: list[str], folder: Path) -> list[str]:
    """README's command line of a player, its pictures written to a folder instead of shown on a screen."""
    if player == "mpv":
        return [
            *words[:-1],
            "--vo=image",
            "--vo-image-format=png",
            f"--vo-image-outdir={folder}",
            "--no-audio",
            words[-1],
        ]
    if player == "VLC":
        scene = ["--vout=dummy", "--video-filter=scene", "--scene-format=png", "--scene-ratio=1"]
        return ["cvlc", *words[1:-1], *scene, f"--scene-path={folder}", "--no-audio", words[-1]]
    return [*words[:-1], "-f", "mpegts", "-flush_packets", "1", f"{folder}/copy.ts"]


@pytest.mark.slow
@pytest.mark.parametrize("player", ["mpv", "VLC", "ffmpeg"])
def test_players_show_the_stream_with_the_options_of_readme(player: str, daemon: Daemon) -> None:
    """Opened between two slow steps, a player shows the newest picture in its colour, and then the next step's."""
    line = next(line for line in README.read_text().splitlines() if line.startswith(f"| {player} |"))
    words = shlex.split(
        line.split("`")[1].replace("http://127.0.0.1:8765/streams/my-run", f"{daemon.web}/streams/play/by")
    )
    colours = [RED, (60, 70, 180)]
    with (
        tempfile.TemporaryDirectory() as name,
        LatentPublisher(daemon.broker, stream="play/by", latent_format="sd1") as publisher,
    ):
        folder = Path(name)
        folder.chmod(0o777)  # VLC will not run as root
        command = headless(player, words, folder)
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        publisher.publish(sd1_latents_of(colours[0], 32, 32), step=0)
        wait_for(lambda: daemon.streams().get("play/by", {}).get("seq") == 0, of="the frame")
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "HOME": name},
                user="nobody" if player == "VLC" and os.geteuid() == 0 else None,
            )
        try:
            for step, colour in enumerate(colours):
                if step:
                    publisher.publish(sd1_latents_of(colour, 32, 32), step=step)
                wait_for(lambda colour=colour: newest_is(folder, colour), 40, of=f"{colour} in {player}")  # type: ignore[misc]
        finally:
            process.terminate()
            process.wait(15)


def newest_is(folder: Path, colour: tuple[int, int, int]) -> bool:
    """Whether the last whole picture that a player wrote has a colour."""
    shown: list[Pixels] = []
    for path in sorted(folder.glob("*.png"))[-2:]:
        with contextlib.suppress(OSError, SyntaxError):  # it is writing it
            shown.append(np.asarray(Image.open(path).convert("RGB")))
    for path in folder.glob("*.ts"):
        with contextlib.suppress(av.FFmpegError), av.open(path) as container:
            shown += [to_rgb(frame) for frame in container.decode(video=0)]
    # VLC's pictures are as far off as BT.601 is from BT.709
    return bool(shown) and bool(np.abs(shown[-1][16:-16, 16:-16].astype(int) - colour).max() <= 24)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["live.ts", "live.mjpeg"])
def test_a_player_that_takes_nothing_gives_its_place_back(tmp_path: Path, name: str) -> None:
    """With one place, held by a player that never reads, the next one is refused; after 10 s of it, it is let in."""
    noise = [np.random.default_rng(seed).standard_normal((4, 64, 64)).astype(np.float32) * 3 for seed in range(4)]
    step, pace = 0, threading.Event()
    with (
        Daemon(tmp_path, "web.max_viewers=1") as own,
        LatentPublisher(own.broker, stream="deaf", latent_format="sd1", record="off") as publisher,
    ):

        def status() -> int:
            nonlocal step
            publisher.publish(noise[step % len(noise)], step=step)
            step += 1
            pace.wait(0.05)
            try:
                with urllib.request.urlopen(f"{own.web}/streams/deaf/{name}", timeout=30) as answer:  # noqa: S310
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        wait_for(lambda: status() == 200, of="the stream")
        wait_for(lambda: b"taesd_stream_viewers 0.0" in own.get("/metrics")[1], of="an empty house")
        with deaf_viewer(own, "deaf", name):
            wait_for(lambda: status() == 503, of="a full house")
            wait_for(lambda: status() == 200, 60, of="its place")


@pytest.mark.faults
def test_a_slow_player_that_reads_is_not_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that take a player longer than the time limit each reach it whole, for it reads all the while."""
    monkeypatch.setattr(players, "STALLED_S", 0.3)
    chunks, pace = [bytes([number]) * (1 << 20) for number in range(3)], threading.Event()

    async def pictures() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        app = Starlette(routes=[Route("/", lambda _: players.PlayerResponse(pictures()))])
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            with socket.socket() as player:
                player.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
                player.connect(listening.getsockname())
                player.sendall(b"GET / HTTP/1.0\r\n\r\n")
                taken = b""
                while piece := player.recv(64 << 10, socket.MSG_WAITALL):
                    taken += piece
                    pace.wait(0.03)
        finally:
            server.should_exit = True
            thread.join()
    assert taken.partition(b"\r\n\r\n")[2] == b"".join(chunks)


@pytest.mark.faults
def test_endless_answers_do_not_hold_the_exit(tmp_path: Path) -> None:
    """With a player and an MJPEG reader connected the daemon ends with exit code 0, and both see the end."""
    with Daemon(tmp_path) as own, LatentPublisher(own.broker, stream="endless", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of(RED), step=0)
        wait_for(lambda: own.streams().get("endless", {}).get("seq") == 0, of="the frame")
        answers = [
            urllib.request.urlopen(f"{own.web}/streams/endless/{name}", timeout=30)  # noqa: S310
            for name in ("live.ts", "live.mjpeg")
        ]
        assert all(answer.read(188) for answer in answers)
        started_s = time.monotonic()
        assert own.stop() == 0
        assert time.monotonic() - started_s < 5.0  # the promise itself (README): files closed, exit 0 within 5 s
        for answer in answers:
            answer.read()
            answer.close()
