"""Several daemons, one page: three real ones, of which the first has the others as its peers."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Response
from websockets.sync.client import connect

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.errors import ConfigError
from taesd_stream_workers.start_checks import check_start
from taesd_stream_workers.streamer.hub import MAX_FOLLOWERS
from taesd_stream_workers.streamer.web.peer import FOLLOWS, OWN_HEADER
from tests.commands import run_command
from tests.daemon import Daemon, clean_environment, free_port, wait_for
from tests.page_socket import PageSocket
from tests.peer_standin import PICTURE, ROW, RUN, STATS, STREAM, PeerStandin
from tests.pictures import decode_file, decode_h264, decode_jpeg, sd1_latents_of
from tests.three_daemons import COLOURS, ThreeDaemons, assert_shows, peers


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeDaemons]:
    """Three daemons for all tests that do not harm them."""
    with ThreeDaemons(tmp_path_factory.mktemp("farm")) as started:
        yield started


def await_pictures(page: PageSocket, streams: set[str]) -> None:
    """Take pictures until each stream has shown one; one may show two meanwhile."""
    while streams:
        streams = streams - {page.picture()[0]["stream"]}


@pytest.mark.faults
def test_one_page_shows_all(farm: ThreeDaemons) -> None:
    """The first daemon lists the streams of all, says whose each is, and gives pictures of it, by socket and HTTP."""
    with ExitStack() as stack:
        publishers = farm.publish(stack, "shown")
        streams = farm.first.streams()
        for name, daemon in farm.daemons.items():
            row = streams[f"{name}/shown"]
            assert (row["run"], row["daemon"]) == (publishers[name].run, None if name == "one" else daemon.web)
            status, jpeg = farm.first.get(f"/streams/{name}/shown/latest.jpg")
            assert status == 200
            assert_shows(decode_jpeg(jpeg), name)
        with PageSocket(farm.first) as page:
            page.watch({f"{name}/shown": "thumb" if name == "two" else "live" for name in COLOURS})
            seen = {}
            for header, payload in iter(page.picture, None):
                name = header["stream"].partition("/")[0]
                picture = decode_jpeg(payload) if header["rendition"] == "thumb" else decode_h264([payload])[0]
                assert_shows(picture, name)
                times = [header["stamps"][f"{word}_us"] for word in ("sent", "encoded", "streamed")]
                assert times == sorted(times)
                assert times[-1] <= time.monotonic_ns() // 1000
                seen[name] = header["run"]
                if len(seen) == 3:
                    break
            assert seen == {name: publisher.run for name, publisher in publishers.items()}
        assert "HTTP Request" not in farm.first.log()  # no line a request


@pytest.mark.slow
def test_nothing_goes_round(farm: ThreeDaemons) -> None:
    """Of two daemons that are each other's peers, each tells the other what is its own, and not what its peers have."""
    with ExitStack() as stack:
        farm.publish(stack, "round")
        expected = {"one/round": farm.first.web, "two/round": None}

        def listed() -> bool:
            rows = {name: row["daemon"] for name, row in farm.second.streams().items() if name.endswith("/round")}
            assert rows.keys() <= expected.keys()
            return rows == expected

        wait_for(listed, of="the first one's stream at the second")
        names = [row["name"] for row in farm.first.json("/api/v1/streams")["streams"]]
        assert len(names) == len(set(names))


@pytest.mark.slow
def test_record_and_stop_through_the_first(farm: ThreeDaemons) -> None:
    """Record and Stop of a peer's stream reach its sampler; the file comes through the first daemon, by Range too."""
    with LatentPublisher(farm.second.broker, stream="two/kept", latent_format="sd1") as publisher:
        assert not publisher.stopped
        publisher.publish(sd1_latents_of(COLOURS["two"]), step=0)
        wait_for(lambda: farm.first.streams().get("two/kept", {}).get("stoppable"), of="the stream")
        farm.first.json("/api/v1/streams/two/kept/record", method="POST", body={"mode": "all"})
        wait_for(lambda: farm.second.streams()["two/kept"]["record"] == "all", of="its being recorded")
        for step in range(1, 4):
            publisher.publish(sd1_latents_of(COLOURS["two"]), step=step)
        farm.first.json("/api/v1/streams/two/kept/stop", method="POST")
        wait_for(lambda: publisher.stopped, of="the stop")
    row = farm.first.recording(publisher.run)
    assert (row["daemon"], row["stream"]) == (farm.second.web, "two/kept")
    theirs = farm.second.recording(publisher.run)
    assert row["id"] == f"{theirs['id']}@{farm.second.web.removeprefix('http://')}"
    path = farm.first.file(row["id"])
    with av.open(str(path)) as container:
        assert sum(1 for _ in container.decode(video=0)) == row["frames"] >= 3
    url = f"{farm.first.web}/api/v1/recordings/{row['id']}/file"
    request = urllib.request.Request(url, headers={"range": "bytes=100-199"})  # noqa: S310 our own daemon
    with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310
        assert answer.status == 206
        assert answer.headers["content-range"] == f"bytes 100-199/{row['bytes']}"
        assert answer.headers["content-disposition"].startswith("attachment")
        assert answer.read() == path.read_bytes()[100:200]
    about = farm.first.json(f"/api/v1/runs/{publisher.run}")
    assert [one["id"] for one in about["recordings"]] == about["stream"]["files"] == [row["id"]]
    farm.first.json(f"/api/v1/recordings/{row['id']}", method="DELETE")
    for daemon in (farm.second, farm.first):
        wait_for(partial(is_not_listed, daemon, publisher.run), of="its end")


def is_not_listed(daemon: Daemon, run: str) -> bool:
    """Whether a daemon lists no recording of a run."""
    return all(row["run"] != run for row in daemon.json("/api/v1/recordings")["recordings"])


@pytest.mark.slow
def test_the_command_line_records_a_peer_s_stream(farm: ThreeDaemons, tmp_path: Path) -> None:
    """`taesd-stream record`, told of the first daemon alone, keeps and downloads what another one has."""
    with LatentPublisher(farm.third.broker, stream="three/cli", latent_format="sd1", record="all") as publisher:
        for step in range(3):
            publisher.publish(sd1_latents_of(COLOURS["three"]), step=step)
        wait_for(lambda: "three/cli" in farm.first.streams(), of="the stream")
        words = ("record", "three/cli", "-o", tmp_path / "out.mp4", "--frames", "2", "--connect", farm.first.web)
        done = run_command(*words, environment=clean_environment(tmp_path))
        assert done.returncode == 0, done.stderr
    pictures = decode_file(tmp_path / "out.mp4")
    assert len(pictures) == 2
    assert_shows(pictures[0], "three")


@pytest.mark.slow
def test_a_player_reads_a_peer_s_stream(farm: ThreeDaemons) -> None:
    """live.ts of a peer's stream plays through the first daemon, in the right colour, and ends when the player goes."""
    with ExitStack() as stack:
        farm.publish(stack, "played")
        options = {"probesize": "20000", "analyzeduration": "300000", "fpsprobesize": "0"}
        url = f"{farm.first.web}/streams/three/played/live.ts"
        with av.open(url, format="mpegts", options=options, timeout=20) as container:
            frame = next(container.decode(video=0))
            assert isinstance(frame, av.VideoFrame)
            assert_shows(frame.to_ndarray(format="rgb24"), "three")

        def watched() -> int:
            return int(farm.third.streams()["three/played"]["viewers"])

        wait_for(lambda: watched() == 0, of="the player's end at the peer")


@pytest.mark.slow
def test_films_of_a_peer(farm: ThreeDaemons) -> None:
    """A film that only a peer has is listed, its steps come through the first daemon, and it can be kept from there."""
    with ExitStack() as stack:
        publisher = stack.enter_context(LatentPublisher(farm.third.broker, stream="three/film", latent_format="sd1"))
        page = stack.enter_context(PageSocket(farm.first))
        page.watch({"three/film": "live"})
        publisher.publish(sd1_latents_of(COLOURS["three"]), step=0)
        page.picture()
        wait_for(lambda: farm.third.streams()["three/film"]["film"] == 0, of="its film")
    row = wait_for(
        lambda: next((one for one in farm.first.json("/api/v1/films")["films"] if one["run"] == publisher.run), None),
        of="the film",
    )
    assert row["daemon"] == farm.third.web
    assert [step[0] for step in farm.first.json(f"/api/v1/runs/{publisher.run}/film")["steps"]] == [0]
    status, jpeg = farm.first.get(f"/api/v1/runs/{publisher.run}/film/0.jpg")
    assert status == 200
    assert_shows(decode_jpeg(jpeg), "three")
    wait_for(lambda: farm.third.streams()["three/film"]["ended"], of="the run's end")
    kept = farm.first.json(f"/api/v1/runs/{publisher.run}/keep", method="POST")
    assert farm.first.recording(publisher.run)["id"] == kept["id"]


@pytest.mark.slow
def test_record_before_the_stream_is_there(farm: ThreeDaemons) -> None:
    """Record for a name that no daemon knows holds at whichever daemon the stream comes up."""
    farm.first.json("/api/v1/streams/three/early/record", method="POST", body={"mode": "all"})
    with LatentPublisher(farm.third.broker, stream="three/early", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of(COLOURS["three"]), step=0)
        wait_for(lambda: farm.first.streams().get("three/early", {}).get("record") == "all", of="its being recorded")


@pytest.mark.slow
def test_what_no_daemon_has(farm: ThreeDaemons) -> None:
    """Unknown streams, runs and recordings are refused as a daemon alone refuses them."""
    for method, path, code in (
        ("GET", "/streams/nobody/latest.jpg", "no_stream"),
        ("POST", "/api/v1/streams/nobody/stop", "no_stream"),
        ("GET", "/api/v1/runs/0123456789abcdef/film", "no_film"),
        ("GET", f"/api/v1/recordings/none@{farm.second.web.removeprefix('http://')}/file", "no_recording"),
        ("GET", "/api/v1/recordings/none@evil.example:80/file", "no_recording"),
    ):
        status, answer = farm.first.get(path, method=method)
        assert (status, json.loads(answer)["code"]) == (404, code), path


def alerts(daemon: Daemon) -> list[str]:
    """What a page of the daemon warns of now."""
    with PageSocket(daemon) as page:
        return [one["text"] for one in page.next_state()["alerts"]]


@pytest.mark.slow
def test_a_peer_that_asks_for_its_token(tmp_path: Path) -> None:
    """A peer on every interface is shown by its token's file; without the token the alert says the way out."""
    folders = [tmp_path / name for name in ("peer", "with", "without")]
    for folder in folders:
        folder.mkdir()
    with Daemon(folders[0], "web.bind=0.0.0.0:0") as peer, ExitStack() as stack:
        url = f"http://127.0.0.1:{peer.web.rpartition(':')[2]}"
        publisher = stack.enter_context(LatentPublisher(peer.broker, stream="guarded", latent_format="sd1"))
        publisher.publish(sd1_latents_of(COLOURS["two"]), step=0)
        known = json.dumps([{"url": url, "token_file": peer.facts["token_file"]}])
        first = stack.enter_context(Daemon(folders[1], environment={"TAESD_STREAM_PEERS": known}))
        wait_for(lambda: "guarded" in first.streams(), of="the stream")
        assert_shows(decode_jpeg(first.get("/streams/guarded/latest.jpg")[1]), "two")
        page = stack.enter_context(PageSocket(first))
        page.watch({"guarded": "live"})
        assert_shows(decode_h264([page.picture()[1]])[0], "two")
        other = stack.enter_context(Daemon(folders[2], environment=peers(url)))
        wait_for(lambda: any("give its token's file in [[peers]]" in text for text in alerts(other)), of="the alert")


@pytest.mark.faults
def test_endless_answers_do_not_hold_the_exit(tmp_path: Path) -> None:
    """A daemon that passes a peer's endless streams on ends as quickly and quietly as one without."""
    with ThreeDaemons(tmp_path) as farm, ExitStack() as stack:
        farm.publish(stack, "x")
        for name in ("live.ts", "live.mjpeg"):
            answer = stack.enter_context(urllib.request.urlopen(f"{farm.first.web}/streams/two/x/{name}", timeout=15))  # noqa: S310
            assert answer.read(100)
        assert farm.first.stop() == 0
        assert "role_killed" not in farm.first.log()
        assert "ERROR" not in farm.first.log()
        farm.first.start()


@pytest.mark.faults
def test_a_peer_that_dies_and_comes_back(tmp_path: Path) -> None:
    """A peer is killed: it is said, its streams are lost, all else goes on; it is back by itself, with its pictures."""
    with ThreeDaemons(tmp_path) as farm, ExitStack() as stack:
        farm.publish(stack, "x", record="off")
        with PageSocket(farm.first) as page:
            page.watch({f"{name}/x": "thumb" for name in COLOURS})
            await_pictures(page, {f"{name}/x" for name in COLOURS})
            address, broker = farm.third.web.removeprefix("http://"), farm.third.broker
            farm.third.kill()
            text = f"The daemon at http://{address} does not answer."
            wait_for(lambda: text in alerts(farm.first), of="the alert")
            row = farm.first.streams()["three/x"]
            assert (row["state"], row["stoppable"]) == ("lost", False)
            assert farm.first.get("/streams/three/x/latest.jpg")[0] == 502
            for name in ("one", "two"):
                assert farm.first.get(f"/streams/{name}/x/latest.jpg")[0] == 200
            farm.third.start(f"web.bind={address}", f"broker.bind={broker}")
            stack.enter_context(LatentPublisher(broker, stream="three/y", latent_format="sd1")).publish(
                sd1_latents_of(COLOURS["three"]), step=0
            )
            wait_for(lambda: "three/y" in farm.first.streams(), of="the peer's streams")
            assert text not in alerts(farm.first)
            page.watch({"three/y": "live"})
            assert_shows(decode_h264([page.picture()[1]])[0], "three")


@pytest.mark.faults
def test_a_stream_that_goes_to_another_daemon(tmp_path: Path) -> None:
    """A name that opens anew at another daemon, its first run lost, is shown from there to a page that watched it."""
    with ThreeDaemons(tmp_path) as farm, ExitStack() as stack, PageSocket(farm.first) as page:
        before = stack.enter_context(LatentPublisher(farm.third.broker, stream="moving", latent_format="sd1"))
        before.publish(sd1_latents_of(COLOURS["three"]), step=0)
        page.watch({"moving": "live"})
        assert_shows(decode_h264([page.picture()[1]])[0], "three")
        address = farm.third.web.removeprefix("http://")
        farm.third.kill()
        after = stack.enter_context(LatentPublisher(farm.second.broker, stream="moving", latent_format="sd1"))
        after.publish(sd1_latents_of(COLOURS["two"]), step=0)
        pictures = iter(page.picture, None)  # one of the first run may be on its way
        payload = next(payload for header, payload in pictures if header["run"] == after.run)
        assert_shows(decode_h264([payload])[0], "two")
        assert farm.first.streams()["moving"]["daemon"] == farm.second.web
        farm.third.start(f"web.bind={address}")


@pytest.mark.faults
def test_a_peer_that_hangs(tmp_path: Path) -> None:
    """A peer whose streamer stands still is away after some seconds; the first daemon's own pictures go on."""
    with ThreeDaemons(tmp_path) as farm, ExitStack() as stack, PageSocket(farm.first) as page:
        publisher = farm.publish(stack, "x")["one"]
        page.watch({f"{name}/x": "live" for name in COLOURS})
        await_pictures(page, {f"{name}/x" for name in COLOURS})
        os.kill(farm.third.pid_of("streamer"), signal.SIGSTOP)
        try:
            step = 0

            def told() -> bool:
                nonlocal step
                step += 1
                publisher.publish(sd1_latents_of(COLOURS["one"]), step=step)
                header, _ = page.picture(5.0)
                return header["stream"] != "one/x" or any("does not answer" in text for text in alerts(farm.first))

            wait_for(told, 30.0, of="the alert")
        finally:
            os.kill(farm.third.pid_of("streamer"), signal.SIGCONT)
        wait_for(lambda: not alerts(farm.first), 30.0, of="the peer")


@pytest.mark.slow
def test_times_of_another_clock(tmp_path: Path) -> None:
    """Pictures of a peer whose clock is an hour ahead have times of ours on the page; `shown` goes back as theirs."""
    with PeerStandin(ahead_us=3_600_000_000) as peer, Daemon(tmp_path, environment=peers(peer.url)) as daemon:
        wait_for(lambda: STREAM in daemon.streams(), of="the peer's stream")
        with PageSocket(daemon) as page:
            page.watch({STREAM: "live"})
            header, payload = page.picture()
            assert payload == PICTURE
            now_us = time.monotonic_ns() // 1000
            assert all(abs(time_us - now_us) < 10_000_000 for time_us in header["stamps"].values())
            page.say("shown", stream=STREAM, run=RUN, seq=0, shown_us=now_us)
            shown = wait_for(lambda: next((one for one in peer.said if one["type"] == "shown"), None), of="shown")
            assert abs(shown["shown_us"] - now_us - 3_600_000_000) < 1_000_000


@pytest.mark.slow
def test_a_peer_gets_what_is_meant_for_it_and_leads_nowhere(tmp_path: Path) -> None:
    """A request goes on with the peer's token, without ours and without cookies; a redirect is a 502, not followed."""
    secret = tmp_path / "peer-token"
    secret.write_text("peer-secret-0123456789")
    secret.chmod(0o600)
    with PeerStandin() as peer:
        environment = {"TAESD_STREAM_PEERS": json.dumps([{"url": peer.url, "token_file": str(secret)}])}
        with Daemon(tmp_path, environment=environment) as daemon:
            wait_for(lambda: STREAM in daemon.streams(), of="the peer's stream")
            request = urllib.request.Request(  # noqa: S310 our own daemon
                f"{daemon.web}/streams/{STREAM}/latest.jpg?rendition=thumb&token=ours",
                headers={"cookie": "taesd_stream_1=ours", "authorization": "Bearer ours", "range": "bytes=0-"},
            )
            with pytest.raises(urllib.error.HTTPError) as refused, urllib.request.urlopen(request, timeout=15):  # noqa: S310
                pass
            with refused.value:
                assert (refused.value.code, json.loads(refused.value.read())["code"]) == (502, "peer_away")
            assert [one.path for one in peer.asked] == [f"/streams/{STREAM}/latest.jpg?rendition=thumb"]
            headers = dict(peer.asked[0].headers.raw_items())
            assert headers["authorization"] == "Bearer peer-secret-0123456789"
            assert "ours" not in str(headers)
            assert headers["range"] == "bytes=0-"


@pytest.mark.slow
@pytest.mark.parametrize(
    "state",
    [
        {"type": "state", "streams": [{"name": STREAM}], "recordings": [], "alerts": [], "stats": STATS},
        {"type": "state", "streams": [ROW], "recordings": [], "alerts": [], "stats": STATS | {"workers": "3"}},
        {"type": "state"},
        [1, 2],
        {"type": "pong", "t": 0, "now_us": "1"},
        {"type": "pong", "t": 0, "now_us": 1 << 70},
    ],
    ids=["row", "stats", "empty", "list", "clock-text", "clock-huge"],
)
def test_a_peer_that_talks_nonsense(state: Any, tmp_path: Path) -> None:
    """What a peer says and cannot be is an alert, and of no harm; when it makes sense again it is a peer again."""
    with PeerStandin() as peer, Daemon(tmp_path, environment=peers(peer.url)) as daemon:
        wait_for(lambda: STREAM in daemon.streams(), of="the peer's stream")
        assert daemon.json("/api/v1/films") == {"films": []}  # the peer answers with a redirect
        good = peer.state
        peer.tell(state)
        wait_for(lambda: any("is not understood" in text for text in alerts(daemon)), of="the alert")
        assert daemon.is_ready()
        peer.tell(good)
        wait_for(lambda: daemon.streams()[STREAM]["state"] == "live", of="the peer's stream")


def ask(url: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a raw request: urllib would refuse or change some."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=15)
    with contextlib.closing(connection):
        connection.putrequest(method, f"/{path}", skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value.encode("latin-1"))
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


@pytest.mark.slow
def test_names_that_are_paths_reach_nothing_at_a_peer(tmp_path: Path) -> None:
    """Parts as `..` in a recording's or stream's name, which lead to other addresses there, are no names."""
    with PeerStandin() as peer, Daemon(tmp_path, environment=peers(peer.url)) as daemon:
        wait_for(lambda: STREAM in daemon.streams(), of="the peer's stream")
        name = peer.url.removeprefix("http://")
        for path in (
            f"/api/v1/recordings/..%2F..%2F..%2Fmetrics@{name}",
            f"/api/v1/recordings/a%2F.%2Fb@{name}/file",
            f"/api/v1/recordings/a%2F%2Fb@{name}/thumb",
            f"/api/v1/recordings/@{name}",
            "/streams/..%2F..%2Fx/latest.jpg",
            "/streams/a%2F%2Fb/latest.jpg",
        ):
            assert ask(f"{daemon.web}{path}")[0] in (404, 405), path
        assert peer.asked == []
        ask(f"{daemon.web}/api/v1/recordings/a%2Fb@{name}/file")
        assert [one.path for one in peer.asked] == ["/api/v1/recordings/a/b/file"]


@pytest.mark.slow
def test_answers_of_a_peer_do_no_harm(tmp_path: Path) -> None:
    """A peer's page may run no script in our origin; an answer that is none is a 502 in words, as is no traceback."""

    def answered(status: HTTPStatus, body: bytes, **headers: str) -> Response:
        fields = {"content-length": str(len(body)), "connection": "close", **headers}
        return Response(status, status.phrase, Headers(fields), body)

    with PeerStandin() as peer, Daemon(tmp_path, environment=peers(peer.url)) as daemon:
        wait_for(lambda: STREAM in daemon.streams(), of="the peer's stream")
        url = f"{daemon.web}/streams/{STREAM}/latest.jpg"
        peer.answer = answered(
            HTTPStatus.OK, b"<script>alert(1)</script>", **{"content-type": "text/html", "etag": "é"}
        )
        status, headers, _ = ask(url, if_none_match='"é"')
        assert (status, headers["x-content-type-options"]) == (200, "nosniff")
        assert "script-src 'none'" in headers["content-security-policy"]
        assert peer.asked[-1].headers["if-none-match"] == '"é"'
        status, _, body = ask(f"{url}?x={'%C3%A9' * 15_000}")
        assert (status, json.loads(body)["code"]) == (414, "too_large")
        for kept in (b"[]", b"{}", b'{"id": 1}', b"no json", b"[" * 30_000, b'{"id": "' + b"x" * 70_000 + b'"}'):
            peer.answer = answered(HTTPStatus.OK, kept)
            status, _, body = ask(f"{daemon.web}/api/v1/runs/{RUN}/keep", "POST")
            assert (status, json.loads(body)["code"]) == (502, "peer_away"), kept[:20]
        peer.answer = answered(HTTPStatus.OK, b'{"id": "a"}')
        status, _, body = ask(f"{daemon.web}/api/v1/runs/{RUN}/keep", "POST")
        assert (status, json.loads(body)["id"]) == (200, f"a@{peer.url.removeprefix('http://')}")
        peer.answer = answered(HTTPStatus.OK, b'{"films": [' + b" " * (65 << 20))
        assert daemon.json("/api/v1/films") == {"films": []}
        assert "Traceback" not in daemon.log()


@pytest.mark.slow
def test_a_picture_that_cannot_be_read_ends_no_link(tmp_path: Path) -> None:
    """A header that is nested too deep breaks the connection off; the next one brings pictures to the same page."""
    with PeerStandin() as peer, Daemon(tmp_path, environment=peers(peer.url)) as daemon:
        wait_for(lambda: STREAM in daemon.streams(), of="the peer's stream")
        peer.head = b"[" * 200_000
        with PageSocket(daemon) as page:
            page.watch({STREAM: "live"})
            wait_for(lambda: sum(one["type"] == "watch" for one in peer.said) >= 2, of="the second connection")
            peer.head = None
            assert page.picture()[1] == PICTURE


@pytest.mark.slow
def test_a_full_peer_is_followed(tmp_path: Path) -> None:
    """A daemon that takes no more viewers still tells its state to another one, which is none of them."""
    for name in ("full", "first"):
        (tmp_path / name).mkdir()
    with (
        Daemon(tmp_path / "full", "web.max_viewers=1") as full,
        PageSocket(full),
        LatentPublisher(full.broker, stream="watched", latent_format="sd1") as publisher,
        Daemon(tmp_path / "first", environment=peers(full.web)) as first,
    ):
        publisher.publish(sd1_latents_of(COLOURS["two"]), step=0)
        wait_for(lambda: "watched" in first.streams(), of="the peer's stream")
        assert alerts(first) == []


def test_not_any_number_of_daemons_follows(daemon: Daemon) -> None:
    """Who says to be a daemon is no viewer, but past 64 of them the next is closed with 1013; one goes, one comes."""
    url, own = daemon.web.replace("http", "ws") + "/ws", {OWN_HEADER: FOLLOWS}
    with ExitStack() as stack:
        followers = [stack.enter_context(connect(url, additional_headers=own)) for _ in range(MAX_FOLLOWERS)]
        for follower in followers:
            assert json.loads(follower.recv(20))["type"] == "hello"
        with connect(url, additional_headers=own) as one_more, pytest.raises(ConnectionClosed) as refused:
            one_more.recv(20)
        assert refused.value.rcvd is not None
        assert refused.value.rcvd.code == 1013
        with PageSocket(daemon) as page:
            assert page.next_state()
        followers[0].close()

        def comes() -> bool:
            with connect(url, additional_headers=own) as another, suppress(ConnectionClosed):
                return bool(json.loads(another.recv(20))["type"] == "hello")
            return False

        wait_for(comes, of="a place for another")


@pytest.mark.slow
def test_a_daemon_that_is_its_own_peer(tmp_path: Path) -> None:
    """A daemon that is given its own address says so, and lists nothing twice."""
    port = free_port()
    with (
        Daemon(tmp_path, f"web.bind=127.0.0.1:{port}", environment=peers(f"http://127.0.0.1:{port}")) as daemon,
        LatentPublisher(daemon.broker, stream="mine", latent_format="sd1") as publisher,
    ):
        publisher.publish(sd1_latents_of(COLOURS["one"]), step=0)
        wait_for(lambda: any("is this daemon itself" in text for text in alerts(daemon)), of="the alert")
        wait_for(lambda: "mine" in daemon.streams(), of="its stream")
        assert daemon.streams()["mine"]["daemon"] is None


@pytest.mark.faults
def test_a_deaf_page_delays_nobody(farm: ThreeDaemons) -> None:
    """A page that reads nothing holds up no page beside it; when it reads again it comes to the newest picture."""
    noise = np.random.default_rng(0).standard_normal((8, 4, 64, 64)).astype(np.float32)
    with (
        LatentPublisher(farm.second.broker, stream="two/busy", latent_format="sd1") as publisher,
        PageSocket(farm.first) as deaf,
        PageSocket(farm.first) as page,
    ):
        publisher.publish(noise[0], step=0)
        wait_for(lambda: "two/busy" in farm.first.streams(), of="the stream")
        deaf.watch({"two/busy": "live"})
        page.watch({"two/busy": "live"})
        assert page.picture()[0]["seq"] == 0
        for step in range(1, 150):
            publisher.publish(noise[step % 8], step=step)
            while page.picture()[0]["seq"] < step:
                pass
        seqs = [deaf.picture()[0] for _ in range(3)]
        assert all(header["stream"] == "two/busy" for header in seqs)

        def caught_up() -> bool:
            header, _ = deaf.picture()
            return bool(header["seq"] == 149)

        wait_for(caught_up, 30.0, of="the newest picture on the deaf page")


@pytest.mark.parametrize(
    "url",
    ["gpu-2:8765", "ftp://gpu-2", "http://", "http://me@gpu-2", "http://gpu-2/x", "http://a?token=b", "http://a:0"],
)
def test_an_address_that_is_no_peer_s(url: str) -> None:
    """Other addresses than a page's are refused, with what is expected."""
    with pytest.raises(ConfigError, match=r"peers\.0\.url: .*expected http://host:port"):
        load_config(values={"peers": [{"url": url}]})


def test_a_peer_s_token_that_others_can_read(tmp_path: Path) -> None:
    """A token's file that is open to others is refused before anything starts, by its key."""
    secret = tmp_path / "token"
    secret.write_text("0123456789abcdef")
    secret.chmod(0o644)
    config = load_config(values={"peers": [{"url": "http://gpu-2:8765", "token_file": str(secret)}]})
    with pytest.raises(ConfigError, match=r"peers\.0\.token_file = .*chmod 600"):
        check_start(config.with_values(web={"bind": "127.0.0.1:0"}), ["streamer"])
