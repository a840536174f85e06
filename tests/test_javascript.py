"""Another language at the wire: a publisher in JavaScript, written from docs/wire.md, against a real daemon."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from taesd_stream.frames import LatentFrame
from taesd_stream.messages import PublisherHello, StopRun
from tests.broker_peer import BrokerPeer
from tests.daemon import Daemon

FOLDER: Final = Path(__file__).parent / "javascript"
PUBLISHER: Final = FOLDER / "publisher.js"

Node = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def node() -> Node:
    """Runs publish.js with arguments; returns what it says at its end."""
    path = shutil.which("node")
    if path is None:
        pytest.skip("node is not installed: no JavaScript runs here")
    if not (FOLDER / "node_modules" / "zeromq").is_dir():
        pytest.skip("npm's packages are not there: npm ci --prefix tests/javascript")

    def run(*arguments: str) -> dict[str, Any]:
        done = subprocess.run([path, FOLDER / "publish.js", *arguments], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    return run


def test_it_is_short() -> None:
    """The whole client has at most 80 lines: the wire is simple enough for that."""
    assert len(PUBLISHER.read_text(encoding="utf-8").splitlines()) <= 80


def test_a_run_is_recorded(node: Node, daemon: Daemon) -> None:
    """What JavaScript publishes to be kept is in the recording, every frame, and the run ends as done."""
    said = node(daemon.broker, "js/kept", "all", "20")
    assert (said["opened"], said["ended"], said["step"], said["error"]) == (True, True, 20, None)
    assert daemon.recording(said["run"])["frames"] == 20
    row = daemon.streams()["js/kept"]
    assert (row["state"], row["meta"]["from"]) == ("done", "JavaScript")


def test_frames_are_as_told(node: Node, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Kept frames come whole, without a hole, with the values that were published."""
    doing = beside.submit(node, peer.address, "js/told", "all", "5")
    info = peer.opened()
    assert (info.stream, info.kind, info.latent_format, info.record) == ("js/told", "steps", "sd1", "all")
    peer.demand(info.run, "every", record="all")
    end = peer.finish()
    assert (end.last_seq, end.reason) == (4, "done")
    assert doing.result(30)["ended"]
    frames = {one.seq: one for one in peer.heard if isinstance(one, LatentFrame)}
    for seq in range(5):
        values = np.frombuffer(bytes(frames[seq].payload), np.float32)
        np.testing.assert_array_equal(values, np.full(256, seq / 5, np.float32))
        assert (frames[seq].step, frames[seq].total_steps, frames[seq].shape) == (seq, 5, (4, 8, 8))


def test_a_taken_name_and_a_new_broker(node: Node, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Refused for its name it opens under the one it is given; unknown to a new broker it says all of it again."""
    doing = beside.submit(node, peer.address, "js/name", "all", "4")
    info = peer.opened()
    peer.refuse(info.run, "taken", use="js/name~2")
    again = peer.opened()
    assert (again.stream, again.run) == ("js/name~2", info.run)
    peer.demand(info.run, "every", record="all")
    peer.frame(3)
    peer.refuse(info.run, "unknown_run")
    assert peer.opened().stream == "js/name~2"
    begin = len(peer.heard)
    peer.demand(info.run, "every", record="all")
    peer.finish()
    assert {one.seq for one in peer.heard[begin:] if isinstance(one, LatentFrame)} == {0, 1, 2, 3}
    said = doing.result(30)
    assert (said["stream"], said["ended"]) == ("js/name~2", True)


def test_the_last_one_is_kept(node: Node, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Where the broker keeps the last frame alone, the newest is sent as kept before END."""
    doing = beside.submit(node, peer.address, "js/last", "last", "4")
    info = peer.opened()
    peer.demand(info.run, "idle", record="last")
    assert peer.finish().last_seq == 3
    assert doing.result(30)["ended"]
    assert [one.seq for one in peer.heard if isinstance(one, LatentFrame) and one.kept] == [3]


def test_stop_is_heard(node: Node, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """It says that it can be stopped, and Stop ends its run early, as stopped."""
    doing = beside.submit(node, peer.address, "js/stop", "off", "3000")
    info = peer.opened()
    peer.demand(info.run, "watched", max_fps=5.0)
    hello = peer.next(PublisherHello)
    assert hello.runs[info.run].stoppable
    peer.send(StopRun(run=info.run))
    assert peer.finish().reason == "stopped"
    assert 0 < doing.result(30)["step"] < 3000
