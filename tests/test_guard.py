"""The door of the web address: foreign pages, foreign names, requests without the token, requests too large."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.errors import ConfigError
from taesd_stream_workers.role.web_token import load_token, page_link
from taesd_stream_workers.streamer.web.sockets import MAX_TEXT_BYTES
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.pictures import sd1_latents_of

STRANGER = 64321  # a user's number that nobody has


class Answer:
    """Status, headers and body of one request, sent as it is said."""

    def __init__(
        self, daemon: Daemon, path: str, headers: Mapping[str, str] = {}, method: str = "GET", body: bytes | None = None
    ) -> None:
        port = urlsplit(daemon.web).port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=15)
        connection.putrequest(method, path, skip_host=True)
        all_headers = {"Host": f"127.0.0.1:{port}", **headers}
        if body is not None:
            all_headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **all_headers}
        for name, value in all_headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        self.status, self.headers = answer.status, answer.headers
        is_endless = "Content-Length" not in answer.headers
        self.body = answer.read(1) if is_endless else answer.read()
        connection.close()


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on every interface, with a stream in it."""
    with Daemon(tmp_path_factory.mktemp("public"), "web.bind=0.0.0.0:0", "web.hosts=preview.example.org") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def token(public: Daemon) -> str:
    """The token that the daemon made."""
    return Path(public.facts["token_file"]).read_text().strip()


@pytest.fixture(scope="module")
def stream(public: Daemon, token: str) -> Iterator[str]:
    """A living stream of the public daemon."""
    with LatentPublisher(public.broker, stream="guarded", latent_format="sd1") as publisher:
        publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
        bearer = {"Authorization": f"Bearer {token}"}
        wait_for(lambda: b"guarded" in Answer(public, "/api/v1/streams", bearer).body, of="the stream")
        yield "guarded"


# --- Host and Origin: with or without a token ---


@pytest.mark.parametrize(
    "host", ["evil.example:{port}", "evil.example", "127.0.0.1:1", "127.0.0.1", "10.1.2.3:{port}", ""]
)
def test_a_name_that_is_not_ours_is_refused(daemon: Daemon, host: str) -> None:
    """DNS rebinding: a request under another name, or another port's, reaches no route."""
    answer = Answer(daemon, "/api/v1/streams", {"Host": host.format(port=urlsplit(daemon.web).port)})
    assert answer.status == 403
    assert json.loads(answer.body)["code"] == "forbidden"


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "http://localhost:{port}"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
    ids=str,
)
def test_a_foreign_page_reaches_nothing(daemon: Daemon, headers: dict[str, str]) -> None:
    """A form, a script, a picture or a frame of another site gets 403, and what it asked for is not done."""
    port = urlsplit(daemon.web).port
    headers = {name: value.format(port=port) for name, value in headers.items()}
    body = b'{"mode": "all"}'
    answer = Answer(daemon, "/api/v1/streams/foreign/record", headers, "POST", body)
    assert answer.status == 403
    assert Answer(daemon, "/api/v1/streams", headers).status == 403


def test_our_own_page_and_a_followed_link_are_let_in(daemon: Daemon) -> None:
    """Our page's own requests, and a link that a person follows from elsewhere, are answered."""
    own = {"Origin": daemon.web, "Sec-Fetch-Site": "same-origin"}
    assert Answer(daemon, "/api/v1/streams", own).status == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert Answer(daemon, "/", link).status == 200


def test_a_foreign_page_opens_no_socket(daemon: Daemon) -> None:
    """A WebSocket of another origin is refused before it is open: browsers let pages open them anywhere."""
    with (
        pytest.raises(InvalidStatus) as refused,
        connect(daemon.web.replace("http", "ws") + "/ws", origin=Origin("http://evil.example")),
    ):
        pass
    assert refused.value.response.status_code == 403


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/api/v1/streams", "/no/such", "/docs", "/metrics"])
def test_no_answer_may_be_framed_or_sniffed(daemon: Daemon, path: str) -> None:
    """Every answer, errors too, forbids frames, sniffing and use by other sites."""
    headers = Answer(daemon, path).headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-site"
    assert headers["referrer-policy"] == "no-referrer"


# --- the token ---


def test_loopback_asks_for_no_token(daemon: Daemon) -> None:
    """A daemon that only this machine reaches has no token, and makes no file for one."""
    assert daemon.facts["token_file"] is None
    assert Answer(daemon, "/api/v1/streams").status == 200


def test_the_token_is_its_owners_alone(public: Daemon, token: str) -> None:
    """The token's file has mode 0600 and 256 bits of chance in it; the log does not have it."""
    assert Path(public.facts["token_file"]).stat().st_mode & 0o777 == 0o600
    assert len(token) >= 43
    assert token not in public.log()


@pytest.mark.parametrize(
    "path", ["/", "/page/app.js", "/api/v1/streams", "/api/v1/recordings", "/metrics", "/docs", "/openapi.json", "/no"]
)
@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Cookie": "taesd_stream_{port}=wrong"}], ids=str
)
def test_without_the_token_nothing_is_told(public: Daemon, path: str, headers: dict[str, str]) -> None:
    """Without the token, or with a wrong one, every path answers 401."""
    port = urlsplit(public.web).port
    answer = Answer(public, path, {name: value.format(port=port) for name, value in headers.items()})
    assert answer.status == 401
    assert json.loads(answer.body)["code"] == "token"


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_need_no_token(public: Daemon, path: str) -> None:
    """What service managers ask needs no token, and says nothing of what is painted."""
    answer = Answer(public, path)
    assert (answer.status, answer.body) == (200, b"{}")


def test_a_health_check_needs_no_token(public: Daemon, tmp_path: Path) -> None:
    """`health`, as a container of the streamer runs it, says that it is well where the page asks for a token."""
    words = ["health", "--role", "streamer", "--connect", public.web]
    done = run_command(*words, environment=clean_environment(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_sends_the_token_as_bearer(public: Daemon, token: str, stream: str) -> None:
    """`Authorization: Bearer TOKEN` opens the interface."""
    answer = Answer(public, "/api/v1/streams", {"Authorization": f"Bearer {token}"})
    assert [row["name"] for row in json.loads(answer.body)["streams"]] == [stream]


@pytest.mark.parametrize("suffix", ["live.ts", "live.mjpeg", "latest.jpg"])
def test_players_take_the_token_by_their_address(public: Daemon, token: str, stream: str, suffix: str) -> None:
    """Players that can send no header take `?token=`; with a wrong one, or none, they get nothing."""
    assert Answer(public, f"/streams/{stream}/{suffix}?token={token}").status == 200
    assert Answer(public, f"/streams/{stream}/{suffix}?token=wrong").status == 401
    assert Answer(public, f"/streams/{stream}/{suffix}").status == 401


def test_the_interface_takes_no_token_by_its_address(public: Daemon, token: str) -> None:
    """Addresses end in histories and logs: the JSON interface does not take the token there."""
    assert Answer(public, f"/api/v1/streams?token={token}").status == 401


def test_the_link_gives_a_cookie_once(public: Daemon, token: str) -> None:
    """The link with the token gives an HttpOnly, SameSite=Strict cookie and leads on to an address without it."""
    answer = Answer(public, f"/streams/a%22b/embed?token={token}&x=1", {"Accept": "text/html"})
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert answer.headers["cache-control"] == "no-store"
    assert b'url=/streams/a%22b/embed?x=1"' in answer.body
    assert token.encode() not in answer.body
    with_cookie = {"Cookie": 'other={"of": "another program"}; bare; ' + cookie.partition(";")[0]}
    assert Answer(public, "/", with_cookie).status == 200
    assert Answer(public, "/api/v1/streams", with_cookie).status == 200


@pytest.mark.parametrize("path", ["//evil.example/x", "/%5Cevil.example/x", "//%5C/evil.example"])
def test_the_link_leads_nowhere_else(public: Daemon, token: str, path: str) -> None:
    """A link made to lead a person to another site after the cookie leads to this one."""
    body = Answer(public, f"{path}?token={token}").body.decode()
    target = body.partition("url=")[2]
    assert target.startswith("/")
    assert target[1] not in "/\\"


def test_a_person_without_the_token_is_told_where_it_is(public: Daemon) -> None:
    """A browser without the cookie gets a page that says so, not JSON; a wrong link gets it too."""
    for path in ("/", "/?token=wrong"):
        answer = Answer(public, path, {"Accept": "text/html,*/*"})
        assert answer.status == 401
        assert b"taesd-stream up" in answer.body


def test_a_socket_needs_the_cookie(public: Daemon, token: str) -> None:
    """The page's WebSocket opens with the cookie, and not without."""
    url = f"ws://127.0.0.1:{urlsplit(public.web).port}/ws"
    with pytest.raises(InvalidStatus), connect(url):
        pass
    cookie = {"Cookie": f"taesd_stream_{urlsplit(public.web).port}={token}"}
    with connect(url, additional_headers=cookie) as socket:
        assert json.loads(socket.recv(timeout=15))["type"] == "hello"


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("preview.example.org", "https://preview.example.org", 200),
        ("127.0.0.1:{port}", "https://preview.example.org", 200),
        ("127.0.0.1:{port}", "https://preview.example.org:8443", 403),
        ("preview.example.org:8443", "https://preview.example.org:8443", 200),
        ("10.1.2.3:{port}", None, 200),
        (f"{socket.gethostname()}:{{port}}", f"http://{socket.gethostname()}:{{port}}", 200),
        (f"{socket.gethostname()}:{{port}}", f"http://{socket.gethostname()}:9", 403),
        ("preview.example.org", "https://evil.example", 403),
        ("evil.example", None, 403),
        ("preview.example.org.evil.example", None, 403),
    ],
)
def test_a_proxys_name(public: Daemon, token: str, host: str, origin: str | None, status: int) -> None:
    """Names of `web.hosts` are ours, and addresses in numbers; others are refused, and other pages of this host too."""
    port = urlsplit(public.web).port
    headers = {"Host": host.format(port=port), "Authorization": f"Bearer {token}"}
    headers |= {"Origin": origin.format(port=port)} if origin else {}
    assert Answer(public, "/api/v1/streams", headers).status == status


def test_the_command_line_takes_the_link(public: Daemon, token: str, stream: str, tmp_path: Path) -> None:
    """`--connect`, or its variable, takes the whole link; without the token the refusal says so."""
    environment = clean_environment(tmp_path)
    refused = run_command("streams", "--once", "--connect", public.web, environment=environment)
    assert refused.returncode != 0
    assert "token" in refused.stderr
    environment["TAESD_STREAM_CONNECT"] = f"{public.web}/?token={token}"
    done = run_command("streams", "--once", environment=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert stream in done.stdout


def test_ray_takes_the_link_by_its_variable(public: Daemon, token: str, tmp_path: Path) -> None:
    """`ray up` needs no token in its command line: with the link in the environment it comes as far as Ray."""
    words = ("ray", "up", "--broker", "tcp://127.0.0.1:1", "--cluster", "no-cluster")
    environment = clean_environment(tmp_path)
    refused = run_command(*words, environment={**environment, "TAESD_STREAM_CONNECT": public.web})
    assert refused.returncode != 0
    assert "token" in refused.stderr
    done = run_command(*words, environment={**environment, "TAESD_STREAM_CONNECT": f"{public.web}/?token={token}"})
    assert done.returncode != 0
    assert "Ray" in done.stderr
    assert "token" not in done.stderr


def test_refusals_are_counted(public: Daemon, token: str) -> None:
    """/metrics counts what was refused at the door, by reason."""
    Answer(public, "/api/v1/streams")
    metrics = Answer(public, "/metrics", {"Authorization": f"Bearer {token}"}).body.decode()
    count = metrics.partition('taesd_stream_refused_requests_total{reason="token"} ')[2].partition("\n")[0]
    assert float(count) >= 1


def test_up_prints_the_link(tmp_path: Path) -> None:
    """`taesd-stream up` on an address that others reach ends its greeting with the link that has the token."""
    sets = ["web.bind=0.0.0.0:0", "broker.bind=tcp://127.0.0.1:0", f"recording.folder={tmp_path / 'r'}"]
    words = [word for one in sets for word in ("--set", one)]
    process = subprocess.Popen(
        [*COMMAND, "up", *words], stdout=subprocess.PIPE, env=clean_environment(tmp_path), text=True
    )
    assert process.stdout is not None
    try:
        link = next(line.split()[1] for line in process.stdout if line.startswith("Watch"))
    finally:
        process.terminate()
        process.wait(15)
        process.stdout.close()
    token = next(tmp_path.rglob("web-token")).read_text().strip()
    assert link.endswith(f"/?token={token}")
    assert "//0." not in link


# --- the token's file ---


def config_with(path: Path, bind: str = "0.0.0.0:0"):  # type: ignore[no-untyped-def]
    """A configuration whose token is in this file."""
    return load_config(sets=[f"web.token_file={path}", f"web.bind={bind}"])


def test_a_token_is_made_once(tmp_path: Path) -> None:
    """The first start makes the token, later ones have the same; the link has it."""
    config = config_with(tmp_path / "new" / "token")
    token = load_token(config)
    assert token
    assert load_token(config) == token
    assert page_link(config, "http://a:1") == f"http://a:1/?token={token}"
    assert page_link(config_with(tmp_path / "none", "127.0.0.1:0"), "http://a:1") == "http://a:1"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_token_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    """A token's file that others can read is refused with the command that mends it."""
    path = tmp_path / "token"
    path.write_text("x" * 40)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}"):
        load_token(config_with(path))


def test_a_token_that_root_gives_to_our_group_is_taken(tmp_path: Path) -> None:
    """The rule of keys: a Secret of Kubernetes is root's, readable for our group; one for all, or to be written, is
    refused."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user's group")
    with tempfile.TemporaryDirectory() as name:  # one that another user can reach
        Path(name).chmod(0o755)
        path = Path(name) / "token"
        path.write_text("x" * 40)
        os.chown(path, 0, STRANGER)
        become = f"import os; os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})"
        imports = (
            "from taesd_stream.config import load_config; from taesd_stream_workers.role.web_token import load_token"
        )
        read = f"print(load_token(load_config(sets=['web.token_file={path}', 'web.bind=0.0.0.0:0'])))"

        def read_as_stranger(mode: int) -> str:
            path.chmod(mode)
            done = subprocess.run(
                [sys.executable, "-c", f"{imports}; {become}; {read}"], capture_output=True, text=True, check=False
            )
            return done.stdout or done.stderr

        assert read_as_stranger(0o440) == "x" * 40 + "\n"
        assert f"chmod 600 {path}" in read_as_stranger(0o444)
        assert f"chmod 600 {path}" in read_as_stranger(0o460)


@pytest.mark.parametrize("content", [b"", b"short\n", b"\xff" * 40, "ü".encode() * 40, b"a b\x00" * 20])
def test_a_token_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    """An empty, short or unreadable token is refused by its file's name."""
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="token_file"):
        load_token(config_with(path))


# --- sizes and numbers ---


def test_a_body_that_is_too_large_is_refused(daemon: Daemon) -> None:
    """A body over the bound is refused by what its head says, and when its head says nothing."""
    path = "/api/v1/streams/a/record"
    assert Answer(daemon, path, method="POST", body=b" " * (65 << 10)).status == 413
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(daemon.web).port, timeout=15)
    try:
        pieces = iter([b" " * 8192] * 20)
        connection.request("POST", path, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, set(json.loads(answer.read()))) == (413, {"code", "text"})
    finally:
        connection.close()


def drain(socket: ClientConnection) -> None:
    """Take what comes until the socket ends."""
    while True:
        socket.recv(timeout=15)


def test_a_text_that_is_too_large_ends_the_socket(daemon: Daemon) -> None:
    """A WebSocket message that goes over the bound, by one byte, ends its socket."""
    with connect(daemon.web.replace("http", "ws") + "/ws") as socket:
        with suppress(ConnectionClosed):  # it may come before the last byte has gone
            # the last byte is the one too many: what a server leaves unread makes TCP throw away its last word
            socket.send([" " * MAX_TEXT_BYTES, " "])
        with pytest.raises(ConnectionClosed) as closed:
            drain(socket)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


@pytest.mark.faults
def test_one_viewer_too_many_is_told_to_come_later(tmp_path: Path) -> None:
    """Past `web.max_viewers` a page is closed with 1013 and a player gets 503; when one leaves, another may come."""
    with (
        Daemon(tmp_path, "web.max_viewers=1") as daemon,
        LatentPublisher(daemon.broker, stream="a", latent_format="sd1") as publisher,
    ):
        publisher.publish(sd1_latents_of((200, 60, 60)), step=0)
        wait_for(lambda: daemon.streams(), of="the stream")
        url = daemon.web.replace("http", "ws") + "/ws"
        with connect(url) as first:
            assert json.loads(first.recv(timeout=15))["type"] == "hello"
            with connect(url) as second, pytest.raises(ConnectionClosed) as closed:
                second.recv(timeout=15)
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013
            assert daemon.get("/streams/a/live.ts")[0] == 503
        wait_for(lambda: Answer(daemon, "/streams/a/live.ts").status == 200, of="a free place")


@pytest.mark.parametrize(
    "path", ["/page/../api.py", "/page/%2e%2e/api.py", "/page/..%2fapi.py", "/page/%2e%2e%2f%2e%2e%2f__init__.py"]
)
def test_no_path_leads_out_of_the_page(daemon: Daemon, path: str) -> None:
    """Names of files are looked up in a table, never joined to a folder."""
    assert Answer(daemon, path).status == 404


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "..", "a%00b", "..%2foutside", "%2e%2e%2foutside"]
)
@pytest.mark.parametrize(("method", "suffix"), [("GET", "/file"), ("GET", "/thumb"), ("DELETE", "")])
def test_no_path_leads_out_of_the_recordings(daemon: Daemon, name: str, method: str, suffix: str) -> None:
    """An id that is no recording's is 404, and what lies beside the folder is neither read nor removed by it."""
    outside = daemon.folder / "outside.mp4"
    outside.write_bytes(b"not yours")
    answer = Answer(daemon, f"/api/v1/recordings/{name}{suffix}", method=method)
    assert answer.status == 404
    assert b"not yours" not in answer.body
    assert outside.read_bytes() == b"not yours"
