"""A disk that is full, a folder that cannot be made or is gone: said everywhere, of no harm to others, and healed."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.frames import LatentFrame
from taesd_stream.latent_log import read_messages
from taesd_stream.media.finished import finish_file
from tests.broker_role import BrokerRole, frame, new_run
from tests.daemon import COMMAND, Daemon, wait_for
from tests.page_socket import PageSocket
from tests.pictures import decode_file, sd1_latents_of
from tests.test_recording import chain, start

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

DISK_BYTES = 4 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def noise(seq: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Latents whose picture needs many bytes."""
    return np.random.default_rng(seq).standard_normal((4, 32, 32)).astype(np.float32)


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def rows(daemon: Daemon) -> list[dict[str, Any]]:
    """All recordings."""
    found: list[dict[str, Any]] = daemon.json("/api/v1/recordings")["recordings"]
    return found


def streams_of(daemon: Daemon) -> set[str]:
    """The streams that recordings are of."""
    return {row["stream"] for row in rows(daemon)}


def failed(daemon: Daemon, run: str) -> dict[str, Any] | None:
    """The row of a recording that stands still."""
    return next((row for row in rows(daemon) if row["run"] == run and row["state"] == "failed"), None)


def assert_said(daemon: Daemon, text: str) -> None:
    """The page warns of it and /metrics counts it."""
    with PageSocket(daemon) as page:
        page.watch({"beside": "thumb"})
        page.picture()
        wait_for(lambda: page.state or page.picture(), of="state")
        alerts = {alert["code"]: alert["text"] for alert in page.state["alerts"]}
        assert text in alerts["recording_failed"]
    metrics = daemon.get("/metrics")[1].decode()
    assert 'taesd_stream_recordings{state="failed"} 1.0' in metrics
    assert 'taesd_stream_alerts{code="recording_failed"} 1.0' in metrics
    assert float(metrics.partition("\ntaesd_stream_recording_errors_total ")[2].partition("\n")[0]) >= 1


def record_beside(daemon: Daemon) -> None:
    """Another stream is shown and recorded to its end."""
    with LatentPublisher(daemon.broker, stream="beside", latent_format="sd1", record="last") as publisher:
        publisher.publish(sd1_latents_of((60, 170, 60)), step=0)
    daemon.recording(publisher.run)


def test_on_a_full_disk_films_go_before_recordings_stand_still(tmp_path: Path, small_disk: Path) -> None:
    """What nobody asked to keep makes room for what is recorded; nothing of that is missing."""
    with Daemon(tmp_path, f"recording.folder={small_disk}", f"broker.log_folder={tmp_path / 'log'}") as daemon:
        with (
            PageSocket(daemon) as page,
            LatentPublisher(daemon.broker, stream="watched", latent_format="sd1") as watched,
        ):
            page.watch({"watched": "thumb"})
            for seq in range(6):
                watched.publish(noise(seq), step=seq)
                while page.picture()[0]["seq"] != seq:
                    pass
        films = wait_for(lambda: daemon.json("/api/v1/films")["films"], of="the film")
        with LatentPublisher(daemon.broker, stream="kept", latent_format="sd1", record="all") as kept:
            kept.publish(noise(0), step=0)
            with pytest.raises(OSError, match="No space"):
                fill(small_disk / "ballast")
            kept.publish(noise(1), step=1)
            wait_for(lambda: not daemon.json("/api/v1/films")["films"], 30, of="the film to go")
            (small_disk / "ballast").unlink()  # finishing takes room, too
        assert daemon.recording(kept.run)["frames"] == 2
        assert f"film_removed stream=watched run={films[0]['run']}" in daemon.log()


def test_a_full_disk_is_said_and_healed(tmp_path: Path, small_disk: Path) -> None:
    """On a full disk a recording stands still, said by page, command and metrics; with space back it is whole."""
    with Daemon(tmp_path, f"recording.folder={small_disk}", f"broker.log_folder={tmp_path / 'log'}") as daemon:
        record_beside(daemon)
        with LatentPublisher(daemon.broker, stream="large", latent_format="sd1", record="all") as publisher:
            publisher.publish(noise(0), step=0)
            ballast = small_disk / "ballast"
            with pytest.raises(OSError, match="No space"):
                fill(ballast)
            for seq in range(1, 30):
                publisher.publish(noise(seq), step=seq)
            row = wait_for(lambda: failed(daemon, publisher.run), of="the error")
            assert "No space left" in row["error"]
            assert publisher.wait_until_acked(20), publisher.error  # the log is on another disk: samplers go on
            assert_said(daemon, "No space left")
            command = subprocess.Popen(
                [*COMMAND, "record", "large", "-o", str(tmp_path / "large.mp4"), "--connect", daemon.web],
                stderr=subprocess.PIPE,
                text=True,
            )
            assert command.stderr is not None
            assert any("recording waits" in line for line in command.stderr)
            ballast.unlink()
        recording = daemon.recording(publisher.run)
        assert (recording["frames"], recording["gaps"]) == (30, [])
        assert len(decode_file(daemon.file(recording["id"]))) == 30
        assert daemon.json("/api/v1/workers")["workers"][0]["frames"] < 45  # what the disk did not take had waited
        command.stderr.read()
        command.stderr.close()
        assert command.wait(60) == 0
        assert len(decode_file(tmp_path / "large.mp4")) == 30
        assert b'taesd_stream_alerts{code="recording_failed"}' not in daemon.get("/metrics")[1]


def test_what_a_log_may_hold_does_not_shrink_with_restarts(tmp_path: Path, small_disk: Path) -> None:
    """Of 4 MiB that were free it may hold 2, also at a start that finds 1.5 MiB of them in the log already."""
    run = new_run()
    with BrokerRole(tmp_path, f"broker.log_folder={small_disk}") as broker:
        with broker.publisher() as publisher:
            publisher.open(run, "restarts", record="all")
            for seq in range(3):
                publisher.say(frame(run, seq, kept=True, shape=(4, 256, 256)))
            publisher.ack(run, 2)
        broker.kill()
        broker.start()
        with broker.publisher() as publisher:
            publisher.open(run, "restarts", record="all")
            publisher.say(frame(run, 3, kept=True))
            publisher.ack(run, 3)
            assert "log_full" not in broker.alerts()


def test_a_copy_that_is_done_needs_no_room(small_disk: Path) -> None:
    """Dead between a finished copy and the growing file's end, without room for another copy: it is ended now."""
    recording = start(small_disk)
    for packet in chain(0, 2):
        recording.write(replace(packet, payload=bytes(packet.payload) + b"\0\0\0\1\x0c" + b"\xff" * 300_000 + b"\x80"))
    (growing,) = recording.paths
    data = growing.read_bytes()
    (copy,) = recording.finish()
    growing.write_bytes(data)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - len(data) // 2))
    assert finish_file(growing) == [copy]
    assert not growing.exists()
    copy.rename(small_disk / "other.mp4")
    growing.write_bytes(data)
    with pytest.raises(OSError, match="No space"):
        finish_file(growing)
    assert growing.exists()


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_stops_its_stream_alone(tmp_path: Path) -> None:
    """Where a stream's folder cannot be made its recording waits, others do not; then all frames are there."""
    with Daemon(tmp_path) as daemon:
        (daemon.recordings_folder / "blocked").write_text("a file where the folder should be")
        with LatentPublisher(daemon.broker, stream="blocked", latent_format="sd1", record="all") as publisher:
            for seq in range(5):
                publisher.publish(sd1_latents_of((40 + 30 * seq,) * 3), step=seq)
            wait_for(lambda: failed(daemon, publisher.run), of="the error")
            record_beside(daemon)
            assert_said(daemon, "blocked")
        (daemon.recordings_folder / "blocked").unlink()
        recording = daemon.recording(publisher.run)
        assert (recording["frames"], recording["first_seq"], recording["last_seq"]) == (5, 0, 4)


def test_what_waits_can_be_downloaded_as_latents(tmp_path: Path) -> None:
    """While a recording waits its row tells of a latent log that holds every frame; downloading takes nothing away."""
    with Daemon(tmp_path, "broker.log_folder=" + str(tmp_path / "log")) as daemon:
        (daemon.recordings_folder / "waits").write_text("a file where the folder should be")
        with LatentPublisher(daemon.broker, stream="waits", latent_format="sd1", record="all") as publisher:
            for seq in range(5):
                publisher.publish(sd1_latents_of((40 + 30 * seq,) * 3), step=seq)
            assert publisher.wait_until_acked(20), publisher.error
            row = wait_for(lambda: failed(daemon, publisher.run), of="the error")
            status, body = daemon.get(f"/api/v1/runs/{publisher.run}/latents")
        assert (status, row["latents"] > 0) == (200, True)
        path = tmp_path / "downloaded.latents"
        path.write_bytes(body)
        assert [one.seq for one in read_messages(path) if isinstance(one, LatentFrame)] == [0, 1, 2, 3, 4]
        (daemon.recordings_folder / "waits").unlink()
        assert daemon.recording(publisher.run)["frames"] == 5
        wait_for(lambda: daemon.get(f"/api/v1/runs/{publisher.run}/latents")[0] == 404, of="the log's end")
        assert daemon.get("/api/v1/runs/..%2Fsecret/latents")[0] in (404, 422)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    """Permission denied is an error of the recording, and gone when the permission is there."""
    with Daemon(tmp_path) as daemon:
        daemon.recordings_folder.chmod(0o500)
        with LatentPublisher(daemon.broker, stream="denied", latent_format="sd1", record="all") as publisher:
            publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
            row = wait_for(lambda: failed(daemon, publisher.run), of="the error")
            assert "Permission denied" in row["error"]
            daemon.recordings_folder.chmod(0o700)
        assert daemon.recording(publisher.run)["frames"] == 1


@pytest.mark.slow
def test_a_folder_that_was_removed_begins_anew(tmp_path: Path) -> None:
    """Files that are removed while they grow are said to be gone; what comes then is in a new file, and is finished."""
    with Daemon(tmp_path, f"broker.log_folder={tmp_path / 'log'}") as daemon:
        pace = threading.Event()
        with LatentPublisher(daemon.broker, stream="gone", latent_format="sd1", record="all") as publisher:
            seq = 0

            def publish_until(found: Callable[[], bool]) -> None:
                nonlocal seq
                while not found():
                    publisher.publish(sd1_latents_of((200, 60, 60)), step=seq)
                    seq += 1
                    pace.wait(0.1)

            publish_until(lambda: any(row["frames"] >= 3 for row in rows(daemon)))
            shutil.rmtree(daemon.recordings_folder / "gone")
            publish_until(lambda: "was removed while it grew" in daemon.log())
            publish_until(lambda: any(row["state"] == "recording" and row["frames"] >= 3 for row in rows(daemon)))
            assert publisher.wait_until_acked(20)
        recording = daemon.recording(publisher.run)
        assert recording["last_seq"] == seq - 1
        pictures = decode_file(daemon.file(recording["id"]))
        assert len(pictures) == recording["frames"] == seq - recording["first_seq"]


@pytest.mark.slow
def test_old_recordings_go_by_age_and_by_bytes(tmp_path: Path) -> None:
    """Retention removes whole finished recordings, oldest first, and says so; strangers' files stay."""
    with Daemon(tmp_path, "recording.max_bytes=60000", "recording.max_age_s=3600") as daemon:
        runs = []
        for number in range(3):
            with LatentPublisher(daemon.broker, stream=f"r{number}", latent_format="sd1", record="all") as publisher:
                publisher.publish(noise(number), step=0)
            runs.append(daemon.recording(publisher.run))
        sizes = [row["bytes"] for row in runs]
        assert sum(sizes) > 60000 > max(sizes), sizes
        stranger = daemon.recordings_folder / "holiday.mp4"
        stranger.write_bytes(bytes(1 << 20))
        wait_for(lambda: "r0" not in streams_of(daemon), 30, of="the oldest to go")
        assert "r2" in streams_of(daemon)
        assert "recording_removed id=r0/" in daemon.log()
        os.utime(daemon.recordings_folder / f"{runs[2]['id']}.mp4", (0, 0))
        wait_for(lambda: "r2" not in streams_of(daemon), 30, of="the one that is too old to go")
        assert stranger.exists()
