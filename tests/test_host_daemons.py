"""`up --daemons N`: several daemons of one host, started, shown and stopped as one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.folder_lock import FolderLock
from taesd_stream_workers.host_daemons import configs_of, share_of
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.page_socket import PageSocket
from tests.pictures import PATCHES, decode_file, decode_jpeg, sd1_latents_of

PLACES = ("broker.bind=tcp://127.0.0.1:0", "web.bind=127.0.0.1:0", "recording.folder={}/films")
COLOURS = (PATCHES["red"], PATCHES["green"], PATCHES["blue"])


def test_each_daemon_has_places_of_its_own(tmp_path: Path) -> None:
    """Of three configurations each has its own ports and folders, the first those that were given."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] - 1
        config = load_config(
            values={
                "broker": {"bind": f"tcp://127.0.0.1:{port}", "log_folder": str(tmp_path / "log")},
                "recording": {"folder": str(tmp_path / "films")},
                "web": {"bind": "0.0.0.0:8765", "hosts": ["preview.example.org"]},
                "decoder": {"device": "cuda:0,cuda:1,cuda:2,cuda:3"},
                "pushes": [{"stream": "a", "url": "rtsp://127.0.0.1/a"}],
            }
        )
        first, second, third = configs_of(config, 3)
    assert first == config.with_values(decoder={"device": "cuda:0,cuda:3", "threads": first.decoder.threads})
    assert [one.decoder.device for one in (second, third)] == ["cuda:1", "cuda:2"]
    ports = [int(one.broker.bind.rpartition(":")[2]) for one in (second, third)]
    assert port + 1 < ports[0] < ports[1]  # the one behind the first's is in use
    assert [one.recording.folder for one in (second, third)] == [str(tmp_path / "films-2"), str(tmp_path / "films-3")]
    assert [one.broker.log_folder for one in (second, third)] == [str(tmp_path / "log-2"), str(tmp_path / "log-3")]
    assert {(one.web.bind, tuple(one.web.hosts), one.pushes) for one in (second, third)} == {("127.0.0.1:0", (), ())}


def test_fewer_devices_than_daemons_are_shared() -> None:
    """Three daemons and two devices: the first device has two of them; one daemon alone is as it was configured."""
    config = load_config(values={"decoder": {"device": "cuda:0,cuda:1"}, "broker": {"bind": "tcp://127.0.0.1:0"}})
    assert [one.decoder.device for one in configs_of(config, 3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert configs_of(config, 1) == [config]


def test_who_shares_a_gpu_is_told_of_mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU that several workers have, until NVIDIA's service that lets them share it has opened its pipe."""
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert share_of(2, ["cuda:0", "cuda:1"]) == share_of(2, ["cpu", "cpu"])
    said = share_of(3, ["cuda:0", "cuda:1", "cuda:0"])
    assert "cuda:0 in turns" in said
    assert "nvidia-cuda-mps-control -d" in said
    (tmp_path / "control").touch()
    assert share_of(3, ["cuda:0", "cuda:1", "cuda:0"]) == share_of(3, ["cpu", "cpu", "cpu"])


@pytest.mark.slow
def test_several_daemons_as_one(tmp_path: Path) -> None:
    """Three daemons by one command: one page for all, folders apart, one Ctrl-C that ends all with whole files.

    Each line of the log says whose it is.
    """
    with Daemon(tmp_path, "decoder.threads=1", options=("--daemons", "3")) as daemon, ExitStack() as stack:
        brokers = [daemon.broker, *(other["broker"] for other in daemon.facts["others"])]
        assert len(set(brokers)) == 3
        publishers = []
        for number, (broker, colour) in enumerate(zip(brokers, COLOURS, strict=True)):
            publisher = LatentPublisher(broker, stream=f"s{number}", latent_format="sd1", record="all")
            publishers.append(stack.enter_context(publisher))
            for step in range(3):
                publisher.publish(sd1_latents_of(colour), step=step, total_steps=10)
        wait_for(lambda: daemon.streams().keys() == {"s0", "s1", "s2"}, of="three streams")
        for number, colour in enumerate(COLOURS):
            status, jpeg = daemon.get(f"/streams/s{number}/latest.jpg")
            assert status == 200
            assert np.abs(decode_jpeg(jpeg).mean(axis=(0, 1)) - colour).max() <= 8
        chosen = [
            stack.enter_context(LatentPublisher(brokers, stream=f"any/{number}", latent_format="sd1"))
            for number in range(12)
        ]
        for publisher in chosen:
            publisher.publish(sd1_latents_of(COLOURS[0]), step=0)
        wait_for(lambda: {one.stream for one in chosen} <= daemon.streams().keys(), of="streams spread by their names")
        assert len({row["daemon"] for name, row in daemon.streams().items() if name.startswith("any/")}) > 1
        with PageSocket(daemon) as page:
            page.watch(dict.fromkeys(("s0", "s1", "s2"), "thumb"))
            assert {page.picture()[0]["stream"] for _ in COLOURS} == {"s0", "s1", "s2"}

        def written() -> bool:
            rows = daemon.json("/api/v1/recordings")["recordings"]
            return sorted(row["frames"] for row in rows) == [3, 3, 3]

        wait_for(written, of="three recordings")
        pids = [row["pid"] for one in (daemon.facts, *daemon.facts["others"]) for row in one["roles"]]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert "role_killed" not in daemon.log()
    logged = [json.loads(line) for line in daemon.log().splitlines()]
    roles = {f"daemon-{number}/{role}" for number in (1, 2, 3) for role in ("broker", "worker 0", "streamer")}
    said_ready = [line["text"] for line in logged if line["text"].startswith("role_ready")]
    assert {re.match(r"role_ready role=(.+?) \w+=", text)[1] for text in said_ready} == roles  # type: ignore[index]
    speakers = {line["process"] for line in logged}
    assert {f"daemon-{number}/broker" for number in (1, 2, 3)} < speakers <= roles | {"up"}
    for number, colour in enumerate(COLOURS, start=1):
        folder = daemon.recordings_folder if number == 1 else tmp_path / f"recordings-{number}"
        (file,) = [path for path in folder.rglob("*.mp4*") if ".films" not in path.parts]  # finished, or not yet
        pictures = decode_file(file)
        assert len(pictures) == 3
        assert np.abs(pictures[-1].mean(axis=(0, 1)) - colour).max() <= 8


@pytest.mark.faults
def test_a_daemon_of_several_heals(tmp_path: Path) -> None:
    """The streamer of one is killed: it is started again where it was, and its streams are on the page again."""
    with Daemon(tmp_path, "decoder.threads=1", options=("--daemons", "2")) as daemon, ExitStack() as stack:
        (other,) = daemon.facts["others"]
        publisher = stack.enter_context(LatentPublisher(other["broker"], stream="there", latent_format="sd1"))
        publisher.publish(sd1_latents_of(COLOURS[0]), step=0)
        wait_for(lambda: "there" in daemon.streams(), of="the stream")
        os.kill(next(row["pid"] for row in other["roles"] if row["role"] == "streamer"), signal.SIGKILL)
        wait_for(lambda: daemon.streams().get("there", {}).get("state") == "lost", of="its being noticed")
        wait_for(lambda: daemon.streams().get("there", {}).get("state") == "live", of="its being back")
        assert daemon.get("/streams/there/latest.jpg")[0] == 200


@pytest.mark.slow
def test_what_is_said_to_a_person(tmp_path: Path) -> None:
    """Without --json it prints the line to set for samplers, whose addresses are the brokers', and one page."""
    words = [word for one in PLACES for word in ("--set", one.format(tmp_path))]
    process = subprocess.Popen(
        [*COMMAND, "up", "--daemons", "2", *words],
        env=clean_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = {}
        while "Watch" not in said:
            name, _, text = process.stdout.readline().partition(" ")
            said[name] = text.strip()
        assert said["Share"].startswith("the 2 daemons have ")
        export = said["Publish"].removeprefix("export TAESD_STREAM_ADDRESS=")
        assert f"ready at {export.replace(',', ', ')}" == said["Broker"]
        assert said["Streamer"] == f"ready, recordings in {tmp_path / 'films'}, {tmp_path / 'films-2'}"
        with urllib.request.urlopen(f"{said['Watch']}/api/v1/streams", timeout=15) as answer:  # noqa: S310 our own daemon
            assert answer.read() == b'{"streams":[]}'
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
        assert process.stdout is not None
        process.stdout.close()


def test_a_folder_that_another_daemon_uses(tmp_path: Path) -> None:
    """What one of several cannot have is one line that names it, and exit code 2, before any is started."""
    (tmp_path / "films-2").mkdir()
    words = [word for one in PLACES for word in ("--set", one.format(tmp_path))]
    with FolderLock(tmp_path / "films-2"):
        done = run_command("up", "--daemons", "2", *words, environment=clean_environment(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert str(tmp_path / "films-2") in line


def test_no_daemons_at_all(tmp_path: Path) -> None:
    """`--daemons 0` is refused as usage."""
    done = run_command("up", "--daemons", "0", environment=clean_environment(tmp_path))
    assert done.returncode == 2
    assert "--daemons" in done.stderr
