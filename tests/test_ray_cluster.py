"""Decode workers in a real Ray cluster of several nodes on this machine: placed, killed, moved, scaled, taken away."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.scaling import LOW_FOR_S
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.pictures import decode_file
from tests.processes import lives

pytest.importorskip("ray", reason="the extra `ray` is not installed")

# Ray's own imports and sockets warn; what it does is not ours to judge.
pytestmark = pytest.mark.filterwarnings("default")

MOVE_S = 90.0  # Ray calls a node dead after 15 s, then a worker imports torch on a busy machine
BACKLOG_S = 300.0  # two slow cores decode a quarter of what comes under load


class WorkerlessDaemon:
    """Broker and streamer, each alone, on tcp: their workers come from elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Daemon:
        broker = self._start("broker", "broker.bind=tcp://127.0.0.1:0", "broker.workers_bind=tcp://127.0.0.1:0")
        inner = f"broker.workers_bind={broker['workers_bind']}"
        streamer = self._start("streamer", inner, "streamer.packets_bind=tcp://127.0.0.1:0", "web.bind=127.0.0.1:0")
        daemon = Daemon(self.folder)
        daemon.web, daemon.broker = streamer["web"], broker["bind"]
        daemon.facts = {"workers": broker["workers_bind"]}
        return daemon

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, role: str, *sets: str) -> dict[str, Any]:
        words = [word for one in (*sets, f"recording.folder={self.folder / 'recordings'}") for word in ("--set", one)]
        log = self._stack.enter_context((self.folder / f"{role}.log").open("wb"))
        process = self._stack.enter_context(
            subprocess.Popen(
                [*COMMAND, role, *words], stdout=subprocess.PIPE, stderr=log, env=clean_environment(self.folder)
            )
        )
        self._stack.callback(process.kill)
        assert process.stdout is not None
        facts: dict[str, Any] = json.loads(process.stdout.readline())
        threading.Thread(target=process.stdout.read, daemon=True).start()  # its ticks
        return facts


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that takes no worker, and two nodes of two cores."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            made.add_node(num_cpus=2, object_store_memory=80 << 20)
        yield made
    finally:
        made.shutdown()


def ray_command(cluster: Any, *words: str, **environment: str) -> str:
    """What `taesd-stream ray …` prints; it must exit with 0."""
    command = [*COMMAND, "ray", *words, "--cluster", cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def placed(cluster: Any) -> list[dict[str, Any]]:
    """Rows of `ray status` of workers that are ready."""
    rows: list[dict[str, Any]] = json.loads(ray_command(cluster, "status"))["workers"]
    return [row for row in rows if row["ready"]]


def up(cluster: Any, daemon: Daemon, *words: str) -> None:
    """Place workers for the daemon."""
    words = ("--broker", daemon.facts["workers"], "--gpus-per-worker", "0", "--set", "decoder.threads=1", *words)
    ray_command(cluster, "up", *words, TAESD_STREAM_CONNECT=daemon.web)


def decoding(daemon: Daemon) -> set[int]:
    """Process ids of the workers that the daemon knows."""
    return {int(worker["id"].split(":")[2]) for worker in daemon.json("/api/v1/workers")["workers"]}


def refusals(cluster: Any) -> list[str]:
    """Why workers refused their settings, of `ray status`."""
    rows: list[dict[str, Any]] = json.loads(ray_command(cluster, "status"))["workers"]
    return [row["refusal"] for row in rows if "refusal" in row]


def asked_of_autoscaler(cluster: Any) -> list[dict[str, float]]:
    """What Ray's autoscaler was asked for last; it holds until something else is."""
    gcs = pytest.importorskip("ray._raylet").GcsClient(address=cluster.address)  # its stubs lack the name
    text = gcs.internal_kv_get(b"autoscaler_resource_request", None)
    asked: list[dict[str, float]] = json.loads(text or "[]")
    return asked


class KeptRun:
    """A sampler that keeps every frame, some a second, until told to end."""

    def __init__(
        self, daemon: Daemon, name: str = "kept", latent_format: str = "sd1", size: int = 8, every_s: float = 0.2
    ) -> None:
        self._publisher = LatentPublisher(daemon.broker, stream=name, latent_format=latent_format, record="all")
        self._shape = (LATENT_FORMATS[latent_format].channels, size, size)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._publish)
        self.frames = 0

    def __enter__(self) -> KeptRun:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def _publish(self) -> None:
        while not self._stop.wait(self._every_s):
            self._publisher.publish(np.full(self._shape, self.frames % 7 - 3, np.float32), step=self.frames)
            self.frames += 1

    def end(self) -> str:
        """Close the stream, all acked. Returns its run."""
        if self._stop.is_set():
            return self._publisher.run
        self._stop.set()
        self._thread.join()
        assert self._publisher.wait_until_acked(timeout_s=60), self._publisher.error
        self._publisher.close()
        return self._publisher.run


def every_frame_once(daemon: Daemon, kept: KeptRun) -> None:
    """The recording holds all that was published."""
    recording = daemon.recording(kept.end())
    assert (recording["frames"], recording["gaps"]) == (kept.frames, [])
    assert len(decode_file(daemon.file(recording["id"]))) == kept.frames


@pytest.mark.faults
def test_a_worker_that_is_killed_is_back_and_no_frame_is_lost(tmp_path: Path, cluster: Any) -> None:
    """An actor is placed and decodes; its worker is killed and another comes; a kept run has every frame; all end."""
    with WorkerlessDaemon(tmp_path) as daemon, KeptRun(daemon) as kept:
        up(cluster, daemon, "--min", "1", "--max", "1")
        (first,) = wait_for(lambda: placed(cluster), MOVE_S, of="a worker that is ready")
        wait_for(lambda: decoding(daemon) == {first["pid"]}, of="the daemon knows it")
        os.kill(first["pid"], signal.SIGKILL)
        (second,) = wait_for(
            lambda: [row for row in placed(cluster) if row["pid"] != first["pid"]], MOVE_S, of="another worker"
        )
        every_frame_once(daemon, kept)
        ray_command(cluster, "down")
        assert json.loads(ray_command(cluster, "status"))["workers"] == []
        wait_for(lambda: not lives(second["pid"]), of="the end of the last worker")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--broker", "tcp://10.0.0.1:5761"], "broker.workers_bind"),
        (["--broker", "tcp://127.0.0.1:5761", "--set", "weights.folder=w"], "weights.folder = w: expected an absolute"),
        (
            ["--broker", "tcp://10.0.0.1:5761", "--set", "security.keys_folder=k"],
            "security.keys_folder = k: expected an",
        ),
    ],
)
def test_what_every_worker_would_refuse_is_not_placed(words: list[str], message: str, tmp_path: Path) -> None:
    """Others' addresses without keys, and folders that Ray would look for elsewhere, end the command at once."""
    done = run_command("ray", "up", *words, "--connect", "http://127.0.0.1:1", environment=clean_environment(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr


def test_workers_may_go_without_keys_by_a_word(tmp_path: Path) -> None:
    """`--insecure`, which the refusal names, is an option here too: the command comes as far as the daemon."""
    words = ("--broker", "tcp://10.0.0.1:5761", "--insecure", "--connect", "http://127.0.0.1:1")
    done = run_command("ray", "up", *words, environment=clean_environment(tmp_path))
    assert (done.returncode, "127.0.0.1:1" in done.stderr) == (69, True), done.stderr


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_a_worker_that_refuses_its_settings_says_so(tmp_path: Path, cluster: Any) -> None:
    """It is not started again and again: `ray status` has the reason, the next `ray up` puts another in its place, and
    after `ray down` the autoscaler is asked for nothing."""
    folder = tmp_path / "later"
    words = ("--min", "1", "--max", "1", "--set", f"weights.folder={folder}")
    with WorkerlessDaemon(tmp_path) as daemon:
        up(cluster, daemon, *words)
        (refusal,) = wait_for(lambda: refusals(cluster), MOVE_S, of="the refusal")
        assert f"weights.folder = {folder}" in refusal
        assert refusals(cluster) == [refusal]
        folder.mkdir()
        up(cluster, daemon, *words)
        wait_for(lambda: placed(cluster), MOVE_S, of="a worker that is ready")
        assert refusals(cluster) == []
        assert len(wait_for(lambda: asked_of_autoscaler(cluster), of="what the controller asks for")) == 1
        ray_command(cluster, "down")
        assert asked_of_autoscaler(cluster) == []


@pytest.mark.faults
def test_a_node_of_another_version_is_not_tried_for_ever(tmp_path: Path, cluster: Any) -> None:
    """A key that the node's package has not is a refusal too, of the one actor that was made: it is not made anew."""
    place = (
        "import ray, sys; from taesd_stream_workers import ray_cluster as r;"
        "ray.init(address=sys.argv[1], namespace=r.NAMESPACE, log_to_driver=False, logging_level='ERROR');"
        "r.place(r.Plan(web=sys.argv[2], values={'decoder': {'of_a_later_version': 1}}, min_workers=1, max_workers=1,"
        "gpus_per_worker=0.0, cpus_per_worker=1.0))"
    )
    with WorkerlessDaemon(tmp_path) as daemon:
        subprocess.run([sys.executable, "-c", place, cluster.address, daemon.web], check=True)
        (refusal,) = wait_for(lambda: refusals(cluster), MOVE_S, of="the refusal")
        assert "of_a_later_version" in refusal
        wait_for(lambda: asked_of_autoscaler(cluster), of="a round of the controller")
        assert refusals(cluster) == [refusal]
        ray_command(cluster, "down")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_and_the_head_may_die_and_the_number_follows_the_load(tmp_path: Path, cluster: Any) -> None:
    """A dead node's worker moves; with the head dead decoding goes on; load adds a worker, calm takes it away again;
    and through all of it a kept run loses no frame."""
    with WorkerlessDaemon(tmp_path) as daemon, KeptRun(daemon) as kept:
        up(cluster, daemon, "--min", "1", "--max", "2", "--settle-s", "3")
        wait_for(lambda: placed(cluster), MOVE_S, of="a worker that is ready")

        with contextlib.ExitStack() as load:
            for number in range(4):
                load.enter_context(KeptRun(daemon, f"load-{number}", "flux2", size=64, every_s=0.05))
            wait_for(lambda: len(placed(cluster)) == 2, MOVE_S, of="a second worker under load")
        wait_for(lambda: not any(row["behind"] for row in daemon.streams().values()), BACKLOG_S, of="what was kept")
        calm_s = LOW_FOR_S + MOVE_S
        wait_for(lambda: len(placed(cluster)) == 1, calm_s, of="one worker after the load")

        (left,) = placed(cluster)
        node = next(one for one in cluster.worker_nodes if one.node_id == left["node"])
        cluster.remove_node(node, allow_graceful=False)
        wait_for(
            lambda: [row for row in placed(cluster) if row["node"] != left["node"]], MOVE_S, of="a worker elsewhere"
        )
        wait_for(lambda: (pids := decoding(daemon)) and left["pid"] not in pids, 30.0, of="the daemon knows it")

        cluster.head_node.kill_gcs_server(check_alive=False)
        before = kept.frames
        wait_for(lambda: kept.frames > before + 25, 30.0, of="frames published without a head")
        every_frame_once(daemon, kept)
