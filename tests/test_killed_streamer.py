"""SIGKILL of the streamer at random moments of a recording: every acked frame is in the file, once, as painted."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, wait_for
from tests.pictures import decode_file, sd1_latents_of
from tests.processes import role_pid

FRAMES = 150
SHADES = 30
PACE_S = 0.04
KILLS = 4  # of one daemon: its supervisor gives up at the sixth quick death in a row


def greys(seq: int) -> tuple[int, int]:
    """What the two halves of a frame's picture show: no two frames alike."""
    return 40 + 6 * (seq % SHADES), 60 + 24 * (seq // SHADES)


def latents_of(seq: int) -> NDArray[np.float32]:
    """A picture that tells its frame."""
    left, right = (sd1_latents_of((grey,) * 3) for grey in greys(seq))
    return np.concatenate([left, right], axis=2)


def seq_in(picture: NDArray[Any]) -> int:
    """The frame that a picture tells."""
    left, right = (float(picture[16:48, start : start + 32].mean()) for start in (16, 80))
    return round((left - 40) / 6) + SHADES * round((right - 60) / 24)


def record_with_kills(folder: Path, kills: int, chance: random.Random) -> None:
    """Record one run while its streamer is killed, then read the file."""
    folder.mkdir()
    with Daemon(folder) as daemon:
        over = threading.Event()

        def kill() -> None:
            last: int | None = None
            for _ in range(kills):
                over.wait(chance.uniform(0.0, 1.2))
                pid = wait_for(lambda: (new := role_pid(daemon.process.pid, "streamer")) != last and new, 30)  # noqa: B023
                os.kill(int(pid), signal.SIGKILL)
                last = int(pid)

        killer = threading.Thread(target=kill)
        with LatentPublisher(daemon.broker, stream="killed", latent_format="sd1", record="all") as publisher:
            killer.start()
            for seq in range(FRAMES):
                publisher.publish(latents_of(seq), step=seq, total_steps=FRAMES)
                over.wait(PACE_S)
            assert publisher.wait_until_acked(60), publisher.error
            killer.join()
        wait_for(daemon.is_ready, 60, of="the streamer")
        recording = daemon.recording(publisher.run)
        assert (recording["frames"], recording["last_seq"], recording["gaps"]) == (FRAMES, FRAMES - 1, [])
        assert [seq_in(one) for one in decode_file(daemon.file(recording["id"]))] == list(range(FRAMES))


@pytest.mark.faults
@pytest.mark.timeout(180)
def test_every_acked_frame_is_there_once_after_three_kills(tmp_path: Path) -> None:
    """Three SIGKILLs at random moments: all frames are in the file, in order, each once, each as it was painted."""
    record_with_kills(tmp_path / "run", 3, random.Random(3))  # noqa: S311 a test's chance


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_acked_frame_is_there_once_after_twenty_kills(tmp_path: Path) -> None:
    """Twenty SIGKILLs at random moments of five recordings: all frames are in the files, once, in order."""
    for number in range(20 // KILLS):
        record_with_kills(tmp_path / f"run{number}", KILLS, random.Random(100 + number))  # noqa: S311
