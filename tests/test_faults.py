"""Roles are killed while a run is kept: nobody is told, no frame is missing, the file is whole and in order."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, wait_for
from tests.pictures import decode_file, sd1_latents_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

FRAMES = 60
PACE_S = 0.05


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that a test may harm."""
    with Daemon(tmp_path) as one:
        yield one


def shade(step: int) -> tuple[int, int, int]:
    """A grey of its own for each step, 3 codes from the next."""
    return (40 + 3 * step, 40 + 3 * step, 40 + 3 * step)


def publish_all(publisher: LatentPublisher, kill_at: dict[int, tuple[int, int]]) -> None:
    """Publish every frame at a sampler's pace; at some steps a process gets a signal."""
    pace = threading.Event()
    for step in range(FRAMES):
        if step in kill_at:
            os.kill(*kill_at[step])
        publisher.publish(sd1_latents_of(shade(step)), step=step, total_steps=FRAMES)
        pace.wait(PACE_S)


def assert_whole(daemon: Daemon, run: str) -> None:
    """The recording has every frame, once and in order."""
    wait_for(daemon.is_ready, 60, of="the roles that were killed")
    recording = daemon.recording(run)
    assert (recording["frames"], recording["last_seq"], recording["gaps"]) == (FRAMES, FRAMES - 1, [])
    pictures = decode_file(daemon.file(recording["id"]))
    greys = [float(np.mean(picture)) for picture in pictures]
    assert greys == pytest.approx([shade(step)[0] for step in range(FRAMES)], abs=1.4)


def test_a_person_s_off_outlives_the_broker(tmp_path: Path) -> None:
    """A rule records the run that comes back to the next broker, till that hears what somebody said, a moment later."""
    rules = '[{"stream": "kept", "record": "all"}]'
    with (
        Daemon(tmp_path, environment={"TAESD_STREAM_RULES": rules}) as daemon,
        LatentPublisher(daemon.broker, stream="kept", latent_format="sd1") as publisher,
    ):

        def row() -> dict[str, Any]:
            return daemon.streams().get("kept") or {"record": None, "step": None, "state": None}

        publisher.publish(sd1_latents_of(shade(0)), step=0)
        wait_for(lambda: row()["record"] == "all", of="the rule")
        daemon.json("/api/v1/streams/kept/record", method="POST", body={"mode": "off"})
        wait_for(lambda: row()["record"] == "off", of="the wish")
        daemon.recording(publisher.run)
        os.kill(daemon.pid_of("broker"), signal.SIGKILL)
        wait_for(daemon.is_ready, 60, of="another broker")
        wait_for(lambda: row()["state"] == "live", 60, of="the run")
        publisher.publish(sd1_latents_of(shade(1)), step=1)
        wait_for(lambda: row()["step"] == 1, of="its next step")
        wait_for(lambda: row()["record"] == "off", of="the wish, heard again")


@pytest.mark.parametrize("role", ["broker", "worker 0", "streamer"])
def test_a_kept_run_survives_the_death_of_a_role(own_daemon: Daemon, role: str) -> None:
    """SIGKILL of one role in the middle of a kept run: the recording is whole, the publisher never knew."""
    with LatentPublisher(own_daemon.broker, stream="kept", latent_format="sd1", record="all") as publisher:
        publish_all(publisher, {20: (own_daemon.pid_of(role), signal.SIGKILL)})
        assert publisher.wait_until_acked(60), publisher.error
    assert_whole(own_daemon, publisher.run)


def test_a_fast_run_survives_the_death_of_the_streamer(own_daemon: Daemon) -> None:
    """What an older attempt has under way when the streamer comes back leaves no hole in the file."""
    count = 600
    with LatentPublisher(own_daemon.broker, stream="fast", latent_format="sd1", record="all") as publisher:
        pace = threading.Event()
        for step in range(count):
            if step == count // 3:
                os.kill(own_daemon.pid_of("streamer"), signal.SIGKILL)
            publisher.publish(sd1_latents_of((90, 90, 90)), step=step, total_steps=count)
            pace.wait(0.005)
        assert publisher.wait_until_acked(60), publisher.error
    wait_for(own_daemon.is_ready, 60, of="the streamer")
    recording = own_daemon.recording(publisher.run)
    assert (recording["frames"], recording["last_seq"], recording["gaps"]) == (count, count - 1, [])


def test_a_kept_run_survives_a_restart_of_the_daemon(tmp_path: Path) -> None:
    """The daemon is stopped in the middle of a kept run and started again: one file has all of it."""
    daemon = Daemon(tmp_path)
    with daemon:
        address = daemon.broker
        with LatentPublisher(address, stream="kept", latent_format="sd1", record="all") as publisher:
            half = FRAMES // 2
            for step in range(half):
                publisher.publish(sd1_latents_of(shade(step)), step=step, total_steps=FRAMES)
            assert publisher.wait_until_acked(60)
            assert daemon.stop() == 0
            for step in range(half, FRAMES):
                publisher.publish(sd1_latents_of(shade(step)), step=step, total_steps=FRAMES)
            daemon.start(f"broker.bind={address}")
            assert publisher.wait_until_acked(60), publisher.error
        assert_whole(daemon, publisher.run)


def test_what_was_acked_is_recorded_though_everything_died(tmp_path: Path) -> None:
    """SIGKILL of all roles at once after the ack: the next start finishes the recording without the publisher."""
    daemon = Daemon(tmp_path)
    with daemon:
        publisher = LatentPublisher(daemon.broker, stream="kept", latent_format="sd1", record="all")
        for step in range(FRAMES):
            publisher.publish(sd1_latents_of(shade(step)), step=step, total_steps=FRAMES)
        assert publisher.wait_until_acked(60)
        publisher.close()
        for role in ("worker 0", "streamer", "broker"):
            os.kill(daemon.pid_of(role), signal.SIGKILL)
        daemon.stop(signal.SIGKILL)
        daemon.start()
        assert_whole(daemon, publisher.run)


def test_recording_twice_in_one_run_makes_two_files(own_daemon: Daemon) -> None:
    """Record, stop, record again: each span of the run has its own finished file."""
    with LatentPublisher(own_daemon.broker, stream="twice", latent_format="sd1", record="off") as publisher:
        step = 0
        for count in (1, 2):
            mode = {"mode": "all"}
            wait_for(lambda: own_daemon.streams().get("twice"), of="the stream")
            own_daemon.json("/api/v1/streams/twice/record", method="POST", body=mode)

            def grows() -> bool:
                nonlocal step
                step += 1
                publisher.publish(sd1_latents_of((90, 90, 90)), step=step)
                rows = own_daemon.json("/api/v1/recordings")["recordings"]
                return any(row["state"] == "recording" and row["frames"] >= 3 for row in rows)

            wait_for(grows, of="a growing file")
            own_daemon.json("/api/v1/streams/twice/record", method="POST", body={"mode": "off"})

            def finished(count: int = count) -> bool:
                rows = own_daemon.json("/api/v1/recordings")["recordings"]
                return [row["state"] for row in rows] == ["finished"] * count

            wait_for(finished, of=f"{count} finished files")
    first, second = sorted(own_daemon.json("/api/v1/recordings")["recordings"], key=lambda row: int(row["first_seq"]))
    assert first["last_seq"] < second["first_seq"]
    for row in (first, second):
        assert len(decode_file(own_daemon.file(row["id"]))) == row["frames"]
