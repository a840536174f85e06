"""Players over plain HTTP: the picture is there at once, in the right colours, and the daemon can still stop."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, wait_for
from tests.pictures import decode_jpeg, sd1_latents_of, to_rgb

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
            assert np.abs(decode_jpeg(answer.read(length)).astype(int) - RED).max() <= 8


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
