"""The web thread, with real connections: pages that ask for too much, and those that take nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.sync.client import ClientConnection, connect

from taesd_stream.config import load_config
from taesd_stream.messages import Watch
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.latency import Latency
from taesd_stream_workers.streamer.recorder import Recorder
from taesd_stream_workers.streamer.web import pace
from taesd_stream_workers.streamer.web.server import DEAF_S, WebServer
from tests.daemon import wait_for
from tests.golden_messages import PACKET
from tests.test_recorder import after_a_file
from tests.test_viewer import STREAM, state

LISTENS = "0A"  # a state of /proc/net/tcp


class Served:
    """A streamer's web thread alone. told: what its broker would be told."""

    def __init__(self, folder: Path, deaf_s: float) -> None:
        config = load_config(sets=[f"recording.folder={folder}", "web.bind=127.0.0.1:0"])
        self.told: list[Any] = []
        self.hub = Hub(Latency(), self.told.append)
        self._recorder = Recorder(config, self.told.append, self.hub.offer_recordings)
        self._server = WebServer(config, self.hub, self._recorder, deaf_s=deaf_s)

    def __enter__(self) -> Served:
        self.web = self._server.bind()
        self._recorder.start()
        self._server.start()
        with urllib.request.urlopen(f"{self.web}/healthz", timeout=20):  # noqa: S310 it is there: states reach it
            return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()
        self._recorder.close()

    def page(self) -> ClientConnection:
        """One more WebSocket."""
        return connect(self.web.replace("http", "ws") + "/ws", max_size=None)

    @contextmanager
    def deaf(self, path: str, *headers: str, then: bytes = b"") -> Iterator[None]:
        """A connection that asks for something, says `then` once it is answered, and reads nothing."""
        parts = urlsplit(self.web)
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect((parts.hostname, parts.port))
            lines = (f"GET {path} HTTP/1.1", f"Host: {parts.netloc}", *headers, "", "")
            one.sendall("\r\n".join(lines).encode())
            if then:
                assert one.recv(1, socket.MSG_PEEK)
                one.sendall(then)
            yield

    def tasks(self) -> int:
        """How many are under way in its loop."""
        seen: list[int] = []
        self.hub.call(lambda: seen.append(len(asyncio.all_tasks())))
        return wait_for(lambda: seen, of="the loop")[0]

    def connections(self) -> int:
        """How many of its descriptors are connections."""
        port = f":{urlsplit(self.web).port:04X}"
        rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        return sum(row[1].endswith(port) and row[3] != LISTENS and row[9] != "0" for row in rows)


def told_last(told: list[Any]) -> dict[str, int]:
    """By stream: the viewers that the broker was told of last."""
    return {message.stream: message.viewers for message in told if isinstance(message, Watch)}


def test_a_page_that_changes_its_mind_too_often_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read no faster than it may speak, and nothing that it said is lost."""
    monkeypatch.setattr(pace, "WISHES_PER_S", 5000)
    with Served(tmp_path, DEAF_S) as served, served.page() as page:
        began_s = time.monotonic()
        for turn in range(10):
            streams = {f"{turn}/{number}": "thumb" for number in range(1000)}
            page.send(json.dumps({"type": "watch", "streams": streams}))
        page.send('{"type": "ping", "t": 1}')
        while json.loads(page.recv(timeout=20))["type"] != "pong":
            pass
        assert len(served.told) == 19_000 <= pace.AT_ONCE + 5000 * (time.monotonic() - began_s)
        watched = {stream for stream, viewers in told_last(served.told).items() if viewers}
        assert watched == {f"9/{number}" for number in range(1000)}


def test_a_page_that_asks_for_too_many_keyframes_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read no faster than it may ask."""
    monkeypatch.setattr(pace, "WISHES_PER_S", 200)
    with Served(tmp_path, DEAF_S) as served, served.page() as page:
        began_s = time.monotonic()
        page.send(json.dumps({"type": "watch", "streams": {STREAM: "live"}}))
        for _ in range(2400):
            page.send(json.dumps({"type": "keyframe", "stream": STREAM}))
        page.send('{"type": "ping", "t": 1}')
        while json.loads(page.recv(timeout=20))["type"] != "pong":
            pass
        assert pace.AT_ONCE + 200 * (time.monotonic() - began_s) >= 2401


def test_a_page_may_speak_so_much_in_any_time() -> None:
    """What is over is paid by waiting; a rest earns no more than what may come at once."""
    now_s = 100.0
    one = pace.Pace(lambda: now_s)
    assert one.wait_s(pace.AT_ONCE) == 0
    assert one.wait_s(pace.WISHES_PER_S) == pytest.approx(1.0)
    now_s += 0.25
    assert one.wait_s(0) == pytest.approx(0.75)
    now_s += 3600
    assert one.wait_s(pace.AT_ONCE) == 0
    assert one.wait_s(1) > 0


def upgrade(*messages: str) -> tuple[tuple[str, ...], bytes]:
    """Headers of a WebSocket, and what its client says at once."""
    headers = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    frames = b"".join(bytes([0x81, 0x80 | len(text), 0, 0, 0, 0]) + text.encode() for text in messages)  # masked by 0
    return (*headers, f"Sec-WebSocket-Key: {'A' * 22}=="), frames


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no TCP_USER_TIMEOUT")
def test_who_takes_nothing_leaves_nothing_behind(tmp_path: Path) -> None:
    """A page, a player, a picture and a download that nobody reads: their connections and their tasks are gone soon."""
    with after_a_file(tmp_path, [], 2):
        pass
    (path,) = tmp_path.rglob("*.mp4")
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 8 << 20, b"free") + bytes((8 << 20) - 8))  # larger than the kernel's buffers
    large = [replace(PACKET, rendition=one, payload=bytes(8 << 20)) for one in ("thumb", "jpeg")]
    headers, watch = upgrade(json.dumps({"type": "watch", "streams": {STREAM: "thumb"}}))
    with Served(tmp_path, 3.0) as served, ExitStack() as deaf:
        served.hub.offer_state(state(1))
        wait_for(lambda: served.hub.state is not None, of="the state")
        idle = served.tasks()
        recording = f"/api/v1/recordings/{path.relative_to(tmp_path).with_suffix('')}/file"
        for name in (f"/streams/{STREAM}/live.mjpeg", f"/streams/{STREAM}/latest.jpg"):
            deaf.enter_context(served.deaf(name))
        deaf.enter_context(served.deaf("/ws", *headers, then=watch))
        wait_for(lambda: {("thumb", 1), ("jpeg", 2)} <= watched(served), of="the viewers")
        deaf.enter_context(served.deaf(recording))  # the last: from now on it is deaf
        wait_for(lambda: served.connections() == 4, of="all of them")
        for packet in large:
            served.hub.offer_packet(packet, 0)
        wait_for(lambda: served.connections() == 0, of="the end of their connections")
        wait_for(lambda: served.tasks() <= idle, of="the end of their tasks")


def watched(served: Served) -> set[tuple[str, int]]:
    """Rendition and number of viewers of all that is watched."""
    return {(watch.rendition, watch.viewers) for watch in served.hub.watches()}
