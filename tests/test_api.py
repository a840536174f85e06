"""The HTTP interface and the page's socket before wishes that are none, and the library before many at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from websockets.sync.client import ClientConnection, connect

from taesd_stream import LatentPublisher
from taesd_stream.config import Config
from taesd_stream.media.finished import SUMMARY_KEY
from taesd_stream_workers.streamer.library import Library
from taesd_stream_workers.streamer.web import schema
from taesd_stream_workers.streamer.web.api import LATEST_WAIT_S
from taesd_stream_workers.streamer.web.server import sampler_settings
from tests.daemon import Daemon, wait_for
from tests.pictures import decode_jpeg, sd1_latents_of


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


def test_the_page_says_where_samplers_connect(daemon: Daemon) -> None:
    """Its lines would lead to the usual address, and this daemon's broker has another one."""
    assert f'data-set="TAESD_STREAM_ADDRESS={daemon.broker}"' in daemon.get("/")[1].decode()


@pytest.mark.parametrize(
    ("bind", "keys", "shown"),
    [
        ("tcp://127.0.0.1:5760", "", ""),
        ("tcp://127.0.0.1:5999", "", "TAESD_STREAM_ADDRESS=tcp://127.0.0.1:5999"),
        ("ipc:///run/user/7/latents", "", "TAESD_STREAM_ADDRESS=ipc:///run/user/7/latents"),
        ("tcp://192.0.2.7:5760", "/keys", "TAESD_STREAM_ADDRESS=tcp://192.0.2.7:5760 and TAESD_STREAM_KEYS_FOLDER"),
        ("tcp://127.0.0.1:5760", "/keys", "TAESD_STREAM_ADDRESS=tcp://127.0.0.1:5760 and TAESD_STREAM_KEYS_FOLDER"),
        ("tcp://0.0.0.0:5999", "", "TAESD_STREAM_ADDRESS=tcp://*:5999"),
        ("tcp://*:5999", "", "TAESD_STREAM_ADDRESS=tcp://*:5999"),
        ("tcp://[::]:5999", "", "TAESD_STREAM_ADDRESS=tcp://*:5999"),
    ],
)
def test_what_a_sampler_needs_to_be_told(bind: str, keys: str, shown: str) -> None:
    """The usual address it finds by itself; of every interface the page knows a host that leads here, its own."""
    config = Config().with_values(broker={"bind": bind}, security={"keys_folder": keys})
    assert sampler_settings(config) == shown


@pytest.mark.slow
def test_a_picture_that_does_not_come_is_a_503(daemon: Daemon) -> None:
    """latest.jpg of a stream without a frame waits 4 s, then says that there was none."""
    with LatentPublisher(daemon.broker, stream="empty", latent_format="sd1", record="off"):
        wait_for(lambda: "empty" in daemon.streams(), of="the stream")
        began_s = time.monotonic()
        status, body = daemon.get("/streams/empty/latest.jpg")
        assert time.monotonic() - began_s >= LATEST_WAIT_S
    assert (status, json.loads(body)["code"]) == (503, "no_picture")


def test_a_picture_that_comes_meanwhile_is_the_answer(daemon: Daemon) -> None:
    """latest.jpg of a stream without a frame waits, and gives the first one that is published."""
    with (
        LatentPublisher(daemon.broker, stream="awaited", latent_format="sd1", record="off") as publisher,
        ThreadPoolExecutor(1) as pool,
    ):
        wait_for(lambda: "awaited" in daemon.streams(), of="the stream")
        answer = pool.submit(daemon.get, "/streams/awaited/latest.jpg")
        wait_for(lambda: daemon.streams()["awaited"]["viewers"] == 1, of="who waits")
        publisher.publish(sd1_latents_of((60, 170, 60)), step=0)
        status, body = answer.result(20)
    assert status == 200
    assert np.abs(decode_jpeg(body).astype(int) - (60, 170, 60)).max() <= 8


def test_a_bad_request_says_what_is_wrong(daemon: Daemon) -> None:
    """The text of a 422 names the field, what it may be and what came; of a bad name, however long, its beginning."""
    _, answer = daemon.get("/api/v1/streams/a/record", method="POST", body={"mode": "some"})
    text = json.loads(answer)["text"]
    assert "mode" in text
    assert "'all'" in text
    assert text.endswith("got 'some'")
    _, answer = daemon.get(f"/api/v1/streams/-{'a' * 2000}/record", method="POST", body={"mode": "all"})
    text = json.loads(answer)["text"]
    assert "the first of them a letter or digit" in text
    assert len(text) < 300


def test_the_description_of_the_interface_tells_the_errors(daemon: Daemon) -> None:
    """/openapi.json has {"code", "text"} for errors, and nowhere the framework's own form."""
    described = daemon.json("/openapi.json")
    assert set(described["components"]["schemas"]["ErrorAnswer"]["properties"]) == {"code", "text"}
    assert "HTTPValidationError" not in json.dumps(described)


def test_answers_are_what_the_description_says(daemon: Daemon) -> None:
    """Streams, runs and recordings have exactly the keys that /openapi.json gives them, of the types that it says."""
    with LatentPublisher(daemon.broker, stream="api/described", latent_format="sd1", record="all") as publisher:
        publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
        assert publisher.wait_until_acked(20)
    recording = daemon.recording(publisher.run)
    schema.RecordingRow.model_validate(recording, strict=True)
    assert recording.keys() == schema.RecordingRow.model_fields.keys()
    row = daemon.streams()["api/described"]
    schema.StreamRow.model_validate(row, strict=True)
    assert row.keys() == schema.StreamRow.model_fields.keys()
    run = daemon.json(f"/api/v1/runs/{publisher.run}")
    schema.Run.model_validate(run, strict=True)
    assert (run["name"], run["stream"]["run"], run["recordings"]) == ("api/described", publisher.run, [recording])


def test_an_unknown_run(daemon: Daemon) -> None:
    """A run that is neither open nor recorded is 404."""
    status, answer = daemon.get("/api/v1/runs/0123456789abcdef")
    assert (status, json.loads(answer)["code"]) == (404, "no_run")


def test_a_snapshot_is_the_newest_picture(daemon: Daemon) -> None:
    """A snapshot is a JPEG of the newest picture, named by its stream, run and seq."""
    with LatentPublisher(daemon.broker, stream="api/snap", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of((60, 170, 60)), step=0)
        wait_for(lambda: "api/snap" in daemon.streams(), of="the stream")
        with urllib.request.urlopen(f"{daemon.web}/api/v1/streams/api/snap/snapshot", timeout=15) as answer:  # noqa: S310
            assert f'"api-snap-{publisher.run[:6]}-0.jpg"' in answer.headers["content-disposition"]
            assert np.abs(decode_jpeg(answer.read()).mean(axis=(0, 1)) - (60, 170, 60)).max() <= 8


def test_errors_are_counted(daemon: Daemon) -> None:
    """/metrics counts error answers by status and code."""
    daemon.get("/api/v1/runs/0123456789abcdef")
    assert b'taesd_stream_http_errors_total{code="no_run",status="404"}' in daemon.get("/metrics")[1]


def test_docs_are_a_page_that_needs_nothing_from_elsewhere(daemon: Daemon) -> None:
    """/docs names every path of /openapi.json and loads nothing: no script, no address of another host."""
    status, body = daemon.get("/docs")
    page = body.decode()
    assert status == 200
    for path in daemon.json("/openapi.json")["paths"]:
        assert path in page
    assert "<script" not in page
    assert "http://" not in page
    assert "https://" not in page


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_interface_is_as_described_whatever_is_sent(tmp_path: Path) -> None:
    """schemathesis: no generated request, good or broken, gets a 500 or an answer that /openapi.json does not say.

    A daemon of its own: a stream that another test left without a picture answers a snapshot with 503, as it should.
    """
    with (
        Daemon(tmp_path) as daemon,
        LatentPublisher(daemon.broker, stream="fuzzed", latent_format="sd1", record="all") as publisher,
    ):
        publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
        assert publisher.wait_until_acked(20)
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{daemon.web}/openapi.json"]
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        endless = ["--exclude-path-regex", r"live\.(ts|mjpeg)$"]
        done = subprocess.run(
            [*command, "--checks", checks, *endless, "--max-examples", "25", "--no-color", "--seed", "7"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


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


FILES = 80
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


def test_a_page_that_is_opened_again_fetches_nothing_twice(daemon: Daemon) -> None:
    """Its files are asked for each time, and sent where they are others than before."""
    url = f"{daemon.web}/page/app.js"
    with urllib.request.urlopen(url, timeout=15) as first:  # noqa: S310 our own daemon
        tag = first.headers["etag"]
    for known, expected in ((tag, 304), ('W/"another"', 200)):
        request = urllib.request.Request(url, headers={"if-none-match": known})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=15) as again:  # noqa: S310
                status = again.status
        except urllib.error.HTTPError as error:
            with error:
                status = error.code
        assert status == expected


# --- the library ---


@pytest.mark.parametrize(
    "odd",
    [
        {"started": None},
        {"started": 10**400},
        {"run": 5},
        {"run": "none of ours"},
        {"stream": "\ud800"},
        {"meta": "red"},
        {"meta": {"prompt": "\ud800"}},
        {"missing": 3},
        {"part": "a"},
        {"last_seq": 0.5},
    ],
    ids=str,
)
def test_a_file_with_somebody_elses_tag_is_none_of_ours(odd: dict[str, Any], daemon: Daemon, tmp_path: Path) -> None:
    """It is not listed, and the others still are; numbers that are no JSON are null."""
    with LatentPublisher(daemon.broker, stream="api/odd", latent_format="sd1", record="all") as publisher:
        publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
        assert publisher.wait_until_acked(20)
    source = daemon.file(daemon.recording(publisher.run)["id"])
    told = {"stream": "a", "run": publisher.run, "started": 1.0, "meta": {"cfg": float("nan"), "sigma": "1e999"}}
    for name, summary in (("ours", told), ("odd", told | odd)):
        options = {"movflags": "use_metadata_tags"}
        with av.open(source) as reader, av.open(tmp_path / f"{name}.mp4", "w", options=options) as writer:
            copy = writer.add_stream_from_template(reader.streams.video[0])
            writer.metadata[SUMMARY_KEY] = json.dumps(summary).replace('"1e999"', "1e999")
            for packet in reader.demux(video=0):
                if packet.pts is not None:
                    packet.stream = copy
                    writer.mux(packet)
    (row,) = Library(tmp_path).rows()
    assert (row["id"], row["meta"]) == ("ours", {"cfg": None, "sigma": None})


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
            for number in range(FILES):
                os.link(source, tmp_path / f"{number}.mp4")
                assert library.path_of(str(number)) == tmp_path / f"{number}.mp4"
        finally:
            is_over.set()
        for one in reading:
            one.result(60)
    assert {row["id"] for row in library.rows()} == {str(number) for number in range(FILES)}
