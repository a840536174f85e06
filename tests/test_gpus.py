"""Several devices: which workers a daemon starts, on which processors, and that one's death is the others' work."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream_workers.role.gpus import devices, local_cpus
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

STREAMS = 6


def test_named_devices_have_a_worker_each() -> None:
    """`decoder.device` with commas is as many workers, and a device may have two."""
    assert devices("cpu", 0) == ["cpu"]
    assert devices("cuda:0, cuda:1,cuda:1", 0) == ["cuda:0", "cuda:1", "cuda:1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0-3,8-9\n", {0, 1, 2, 3, 8, 9}), ("5\n", {5}), ("\n", set())],
)
def test_processors_next_to_a_device_are_read(tmp_path: Path, text: str, expected: set[int]) -> None:
    """Ranges and single numbers of sysfs's list are read; a device whose list is empty has none."""
    folder = tmp_path / "0000:1b:00.0"
    folder.mkdir()
    (folder / "local_cpulist").write_text(text)
    assert local_cpus("0000:1B:00.0", tmp_path) == expected


def test_a_device_that_the_system_does_not_know_has_no_side(tmp_path: Path) -> None:
    """Without sysfs, or without the device in it, nothing is known, and nothing is pinned."""
    assert local_cpus("0000:1b:00.0", tmp_path) == set()


@pytest.mark.faults
def test_the_death_of_one_worker_is_the_other_s_work(tmp_path: Path) -> None:
    """Of two workers one is killed under load: its streams are shown by the other, and a kept run loses nothing."""
    latents = np.random.default_rng(0).standard_normal((4, 8, 8)).astype(np.float32)
    with Daemon(tmp_path, "decoder.device=cpu,cpu", "decoder.threads=1") as daemon, PageSocket(daemon) as page:
        names = [f"s{number}" for number in range(STREAMS)]
        publishers = [
            LatentPublisher(daemon.broker, stream=name, latent_format="sd1", record="all" if name == "s0" else "off")
            for name in names
        ]
        page.watch(dict.fromkeys(names, "live"))
        step = 0

        def publish_all() -> None:
            nonlocal step
            for publisher in publishers:
                publisher.publish(latents + step / 100, step=step)
            step += 1

        def both_work() -> bool:
            publish_all()
            rows = daemon.json("/api/v1/workers")["workers"]
            return len(rows) == 2 and all(row["frames"] for row in rows)

        wait_for(both_work, 60, of="frames of both workers")
        os.kill(daemon.pid_of("worker 1"), signal.SIGKILL)
        killed_at = step
        shown: set[str] = set()

        def all_shown() -> bool:
            publish_all()
            for header, _ in (page.picture() for _ in names):
                if header["seq"] >= killed_at:
                    shown.add(header["stream"])
            return shown == set(names)

        wait_for(all_shown, 60, of="newer pictures of every stream")
        run = publishers[0].run
        for publisher in publishers:
            publisher.close(30)
        recording = daemon.recording(run)
        assert (recording["frames"], recording["gaps"]) == (step, [])
