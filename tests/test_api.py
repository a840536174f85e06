"""The HTTP interface and the page's socket before wishes that are none, and the library before many at once."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

from taesd_stream import LatentPublisher
from taesd_stream_workers.library import Library
from tests.daemon import Daemon
from tests.pictures import sd1_latents_of


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/no/such/route", None, 404, "not_found"),
        ("GET", "/api/v1/recordings/none/file", None, 404, "no_recording"),
        ("PUT", "/api/v1/streams", None, 405, "method_not_allowed"),
        ("POST", "/api/v1/streams/a/record", {"mode": "some"}, 422, "bad_request"),
        ("POST", "/api/v1/streams/a/record", None, 422, "bad_request"),
        ("GET", "/api/v1/recordings/none/file?frames=many", None, 422, "bad_request"),
        ("GET", "/streams/a/latest.jpg?rendition=record", None, 422, "bad_request"),
    ],
)
def test_every_error_has_a_code_and_a_text(
    daemon: Daemon, method: str, path: str, body: dict[str, Any] | None, status: int, code: str
) -> None:
    """What the framework refuses is answered as our own errors are: {"code", "text"}."""
    got, answer = daemon.get(path, method=method, body=body)
    assert got == status
    error = json.loads(answer)
    assert error.keys() == {"code", "text"}
    assert error["code"] == code
    assert error["text"]


def test_a_bad_request_says_what_is_wrong(daemon: Daemon) -> None:
    """The text of a 422 names the field, and what it may be."""
    _, answer = daemon.get("/api/v1/streams/a/record", method="POST", body={"mode": "some"})
    text = json.loads(answer)["text"]
    assert "mode" in text
    assert "'all'" in text


def test_the_description_of_the_interface_tells_the_errors(daemon: Daemon) -> None:
    """/openapi.json has {"code", "text"} for errors, and nowhere the framework's own form."""
    described = daemon.json("/openapi.json")
    assert set(described["components"]["schemas"]["ErrorAnswer"]["properties"]) == {"code", "text"}
    assert "HTTPValidationError" not in json.dumps(described)


# --- the page's socket ---


@pytest.fixture
def socket(daemon: Daemon) -> Iterator[ClientConnection]:
    """A page's WebSocket, raw."""
    with connect(daemon.web.replace("http", "ws") + "/ws", max_size=None) as one:
        yield one


def answer_to(socket: ClientConnection, text: str) -> dict[str, Any]:
    """What the daemon says to it, besides state."""
    socket.send(text)
    while True:
        message = json.loads(socket.recv(timeout=20))
        if message["type"] not in ("hello", "state"):
            return dict(message)


SHOWN = '{"type": "shown", "stream": "a", "run": "b", "seq": %s, "shown_us": %s}'


@pytest.mark.parametrize(
    "text",
    [
        *(SHOWN % (0, number) for number in ("Infinity", "-Infinity", "NaN", "1e999", "1" + 400 * "0", "null")),
        *(SHOWN % (number, 0) for number in ("Infinity", "1e999", "[]")),
        '{"type": "ping", "t": 1e999}',
        '{"type": "ping", "t": NaN}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:80],
)
def test_a_number_that_is_none_does_not_end_the_socket(socket: ClientConnection, text: str) -> None:
    """It is answered with an error, and the page is served on."""
    assert answer_to(socket, text)["type"] == "error"
    assert answer_to(socket, '{"type": "ping", "t": 5}')["t"] == 5


# --- the library ---


def test_a_finished_file_is_found_whoever_else_reads_the_folder(daemon: Daemon, tmp_path: Path) -> None:
    """A file that is there is found at once, while the writing thread and others look through the folder too."""
    with LatentPublisher(daemon.broker, stream="api/file", latent_format="sd1", record="all") as publisher:
        publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
        assert publisher.wait_until_acked(20)
    source = daemon.file(daemon.recording(publisher.run)["id"])
    library = Library(tmp_path)
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            library.rows()

    with ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(400):
                os.link(source, tmp_path / f"{number}.mp4")
                assert library.path_of(str(number)) == tmp_path / f"{number}.mp4"
        finally:
            is_over.set()
        for one in reading:
            one.result(60)
    assert {row["id"] for row in library.rows()} == {str(number) for number in range(400)}
