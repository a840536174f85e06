"""Bad input at the daemon's doors: counted, said once, and of no harm to the other streams."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from taesd_stream import LatentPublisher, wire
from taesd_stream.frames import LatentFrame, StreamInfo
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket
from tests.pictures import sd1_latents_of

Socket = zmq.Socket[bytes]
INFO = StreamInfo(stream="raw", run="00000000000000aa", kind="steps", latent_format="sd1")
FRAME = LatentFrame(
    run=INFO.run,
    seq=0,
    index=0,
    step=0,
    total_steps=4,
    sigma=1.0,
    dtype="float16",
    shape=(4, 8, 8),
    kept=False,
    sent_ns=1,
    payload=bytes(4 * 8 * 8 * 2),
)


def damaged(**changes: object) -> list[bytes]:
    """FRAME's parts with some header keys replaced."""
    head, payload = wire.pack(FRAME)
    return [msgpack.packb(msgpack.unpackb(head) | changes), bytes(payload)]


# a field that is a thousand lists in each other, which msgpack reads and repr() does not
NESTED = b"\x83" + b"".join(map(msgpack.packb, ("v", wire.VERSION, "type", "FRAME", "run"))) + b"\x91" * 1010 + b"\x01"

BROKEN: dict[str, list[bytes]] = {
    "no_msgpack": [b"\xc1garbage"],
    "empty": [b""],
    "other_version": damaged(v=9),
    "other_type": damaged(type="JOB"),
    "short_payload": [damaged()[0], b"123"],
    "negative_shape": damaged(shape=[4, -8, 8]),
    "huge_shape": damaged(shape=[4, 1 << 19, 1 << 19]),
    "three_parts": [*damaged(), b"more"],
    "thousands_of_parts": [*damaged(), *[b""] * 5000],
    "nan_sigma": damaged(sigma=float("nan")),
    "nested_deeper_than_python_goes": [NESTED],
    "long_header": [b"\x81\xa1v" + b"\0" * (wire.MAX_HEADER_BYTES + 1)],
}


@pytest.fixture
def raw_socket(daemon: Daemon):  # type: ignore[no-untyped-def]
    """A publisher's socket without a publisher."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(daemon.broker)
    yield socket
    socket.close()
    context.term()


def broker_count(daemon: Daemon, name: str) -> float:
    """One of the broker's counters, from /metrics."""
    _, body = daemon.get("/metrics")
    for line in body.decode().splitlines():
        if line.startswith(f'taesd_stream_broker{{count="{name}"}}'):
            return float(line.split()[-1])
    return 0.0


@pytest.mark.parametrize("name", BROKEN)
def test_broken_messages_are_counted_and_harm_nobody(daemon: Daemon, raw_socket: Socket, name: str) -> None:
    """Each kind of broken message raises the counter, while another stream's pictures keep coming."""
    neighbour = LatentPublisher(daemon.broker, stream="neighbour", latent_format="sd1")
    with neighbour as publisher, PageSocket(daemon) as page:
        before = broker_count(daemon, "bad_messages")
        page.watch({publisher.stream: "thumb"})
        raw_socket.send_multipart(list[bytes](BROKEN[name]))
        wait_for(lambda: broker_count(daemon, "bad_messages") > before, of="the counter")
        publisher.publish(sd1_latents_of((90, 160, 90)), step=0)
        page.picture()


def test_a_message_of_thousands_of_parts_is_passed_over(daemon: Daemon, raw_socket: Socket) -> None:
    """It is one bad message, and what the same peer says after it is taken."""
    before = broker_count(daemon, "bad_messages")
    raw_socket.send_multipart([b""] * 5000)
    info = dataclasses.replace(INFO, stream="after-parts", run="00000000000000af")
    raw_socket.send_multipart([bytes(part) for part in wire.pack(info)])
    wait_for(lambda: daemon.streams().get("after-parts"), of="the stream opened after it")
    wait_for(lambda: broker_count(daemon, "bad_messages") == before + 1, of="the counter")


def test_an_oversized_message_ends_its_connection_only(daemon: Daemon, raw_socket: Socket) -> None:
    """A message over MAXMSGSIZE is cut off at the socket; the same peer and others go on."""
    raw_socket.send_multipart([b"\x80", bytes(wire.MAX_MESSAGE_BYTES + 1)])
    info = dataclasses.replace(INFO, stream="after-oversize", run="00000000000000ab")
    raw_socket.send_multipart([bytes(part) for part in wire.pack(info)])
    wait_for(lambda: daemon.streams().get("after-oversize"), of="the stream opened after it")


def test_wrong_channels_are_refused_by_name(daemon: Daemon, raw_socket: Socket) -> None:
    """A shape that does not fit the format is no picture but a note that names both, on the stream itself."""
    info = dataclasses.replace(INFO, stream="wrong-channels", run="00000000000000ac", latent_format="flux1")
    raw_socket.send_multipart([bytes(part) for part in wire.pack(info)])
    frame = dataclasses.replace(FRAME, run=info.run)
    raw_socket.send_multipart([bytes(part) for part in wire.pack(frame)])
    row = wait_for(
        lambda: (row := daemon.streams().get("wrong-channels", {})).get("note") and row, of="the note on the stream"
    )
    assert "16 channels" in row["note"]
    assert "4" in row["note"]
    assert row["state"] == "waiting"


def test_nan_latents_give_no_picture_and_no_harm(daemon: Daemon) -> None:
    """NaN-filled latents of one stream are named on it; a neighbour in the same batch gets its picture."""
    with (
        LatentPublisher(daemon.broker, stream="nan/bad", latent_format="sd1") as bad,
        LatentPublisher(daemon.broker, stream="nan/good", latent_format="sd1") as good,
        PageSocket(daemon) as page,
    ):
        page.watch({"nan/bad": "thumb", "nan/good": "thumb"})
        bad.publish(np.full((4, 8, 8), np.nan, np.float32), step=0)
        good.publish(sd1_latents_of((90, 160, 90)), step=0)
        assert page.picture()[0]["stream"] == "nan/good"
        row = wait_for(lambda: (row := daemon.streams().get("nan/bad", {})).get("note") and row, of="the note")
        assert "NaN" in row["note"]


def test_a_bad_frame_is_forgotten_with_the_next_good_one(daemon: Daemon) -> None:
    """The note about a frame without a picture goes when the stream shows one again."""
    with (
        LatentPublisher(daemon.broker, stream="nan/once", latent_format="sd1") as publisher,
        PageSocket(daemon) as page,
    ):
        page.watch({"nan/once": "thumb"})
        publisher.publish(np.full((4, 8, 8), np.nan, np.float32), step=0)
        wait_for(lambda: daemon.streams().get("nan/once", {}).get("note"), of="the note")
        publisher.publish(sd1_latents_of((90, 160, 90)), step=1)
        page.picture()
        wait_for(lambda: daemon.streams()["nan/once"]["note"] is None, of="the note's end")
        assert "degraded" not in daemon.streams()["nan/once"]["flags"]


def test_patchified_latents_have_their_pictures_size(daemon: Daemon) -> None:
    """FLUX.2 latents of 128 channels, as ComfyUI holds them: the list and the packets say the size of their picture."""
    with (
        LatentPublisher(daemon.broker, stream="patches", latent_format="flux2") as publisher,
        PageSocket(daemon) as page,
    ):
        page.watch({"patches": "live"})
        publisher.publish(np.zeros((128, 8, 4), np.float32), step=0)
        header, _ = page.picture()
        row = wait_for(lambda: (row := daemon.streams().get("patches", {})).get("width") and row, of="the size")
    assert (row["width"], row["height"]) == (64, 128)
    assert (header["width"], header["height"]) == (64, 128)


@pytest.mark.faults
def test_record_for_a_lost_run_means_its_next_one(daemon: Daemon, raw_socket: Socket) -> None:
    """Record pressed on a run whose publisher vanished keeps the next run of that name."""
    info = dataclasses.replace(INFO, stream="vanished", run="00000000000000ad")
    raw_socket.send_multipart([bytes(part) for part in wire.pack(info)])
    wait_for(lambda: daemon.streams().get("vanished", {}).get("state") == "lost", 30.0, of="lost")
    daemon.json("/api/v1/streams/vanished/record", method="POST", body={"mode": "all"})
    with LatentPublisher(daemon.broker, stream="vanished", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of((90, 160, 90)), step=0)
        wait_for(lambda: daemon.streams()["vanished"]["run"] == publisher.run, of="the new run")
        assert daemon.streams()["vanished"]["record"] == "all"


def test_a_kept_nan_frame_is_a_gap_that_the_file_lists(daemon: Daemon) -> None:
    """In a kept run a frame that cannot be decoded is passed over; the recording names it and has all others."""
    with LatentPublisher(daemon.broker, stream="nan/kept", latent_format="sd1", record="all") as publisher:
        for step in range(5):
            latents = sd1_latents_of((90, 160, 90))
            publisher.publish(latents * np.nan if step == 2 else latents, step=step, total_steps=5)
        assert publisher.wait_until_acked(20)
    recording = daemon.recording(publisher.run)
    assert (recording["frames"], recording["gaps"], recording["last_seq"]) == (4, [2], 4)


def test_a_format_without_decoder_says_so(daemon: Daemon) -> None:
    """A format with neither weights nor factors shows `No decoder for NAME`."""
    with LatentPublisher(daemon.broker, stream="nodecoder", latent_format="born_yesterday") as publisher:
        with PageSocket(daemon) as page:
            page.watch({"nodecoder": "thumb"})
            publisher.publish(np.zeros((7, 8, 8), np.float32), step=0)
            row = wait_for(lambda: (row := daemon.streams().get("nodecoder", {})).get("note") and row, of="the note")
        assert "No decoder for born_yesterday" in row["note"]


def test_what_waits_for_a_decoder_is_told_and_can_be_given_up(daemon: Daemon) -> None:
    """A kept run that nobody can decode is a recording that stands still: people read why, and may delete it."""

    def row_of(run: str) -> dict[str, Any] | None:
        rows = daemon.json("/api/v1/recordings")["recordings"]
        return next((row for row in rows if row["run"] == run), None)

    with LatentPublisher(daemon.broker, stream="waits", latent_format="born_yesterday", record="all") as publisher:
        publisher.publish(np.zeros((7, 8, 8), np.float32), step=0)
        row = wait_for(lambda: row_of(publisher.run), of="its row")
        assert row["state"] == "failed"
        assert row["error"].startswith("No decoder for born_yesterday:")
        assert row["latents"] > 0
        path = f"/api/v1/recordings/{row['id']}"
        assert daemon.get(path, method="DELETE")[0] == 409  # it goes on
        publisher.close()
    wait_for(lambda: daemon.get(path, method="DELETE")[0] == 200, of="the end of the run")
    wait_for(lambda: row_of(publisher.run) is None, of="the end of its row")
    wait_for(lambda: not [*daemon.recordings_folder.glob(f".latents/{publisher.run}*")], of="the end of its log")


def test_a_taken_name_is_opened_as_another(daemon: Daemon) -> None:
    """While a run of a name lives, a second publisher of that name becomes NAME~2, and both show."""
    with (
        LatentPublisher(daemon.broker, stream="taken", latent_format="sd1") as first,
        LatentPublisher(daemon.broker, stream="other-first", latent_format="sd1"),
    ):
        first.publish(sd1_latents_of((90, 160, 90)), step=0)
        wait_for(lambda: daemon.streams().get("taken"), of="the first")
        with LatentPublisher(daemon.broker, stream="taken", latent_format="sd1") as second:
            second.publish(sd1_latents_of((160, 90, 90)), step=0)
            wait_for(lambda: daemon.streams().get("taken~2"), of="the second")
            assert second.stream == "taken~2"
            assert daemon.streams()["taken"]["run"] == first.run


def test_foreign_hosts_and_origins_are_refused(daemon: Daemon) -> None:
    """A page of another site cannot reach the daemon, neither by its name nor by a cross-origin request."""
    import http.client

    host = daemon.web.removeprefix("http://")
    for headers in ({"Host": "evil.example"}, {"Host": host, "Origin": "http://evil.example"}):
        connection = http.client.HTTPConnection(host, timeout=5)
        connection.request("GET", "/api/v1/streams", headers=headers)
        assert connection.getresponse().status == 403
        connection.close()


@pytest.mark.parametrize("path", ["/api/v1/recordings/..%2f..%2fetc%2fpasswd/file", "/page/..%2fapi.py", "/page/x"])
def test_names_from_outside_are_no_paths(daemon: Daemon, path: str) -> None:
    """Ids and file names from a URL are looked up, never made into paths."""
    assert daemon.get(path)[0] == 404
