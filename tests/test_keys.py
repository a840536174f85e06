"""Keys: who has the right one is let in, who has not is refused, counted and told, also while a connection stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import zmq

from taesd_stream import LatentPublisher, wire
from taesd_stream.errors import ConfigError
from taesd_stream.keys import Keys, load_keys
from taesd_stream.line import Line
from taesd_stream.messages import (
    Cursor,
    End,
    PublisherHello,
    Record,
    Refused,
    RunHello,
    State,
    Stats,
    StopStream,
    StreamerHello,
)
from taesd_stream_workers.role.key_files import AllowList, clients_in, make_client, revoke
from tests.broker_role import BrokerRole, frame, new_run
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, wait_for
from tests.golden_messages import FRAME, PACKET
from tests.golden_messages import OPEN as GOLDEN_OPEN
from tests.pictures import sd1_latents_of

STRANGER = 64321  # a user's number that nobody has
LATENTS = sd1_latents_of((90, 160, 90))
Context = zmq.Context[zmq.Socket[bytes]]


class Lines:
    """Lines of a test, closed at its end."""

    def __init__(self) -> None:
        self._context: Context = zmq.Context()
        self._made: list[Line] = []

    def to(self, address: str, folder: Path, kind: int = zmq.DEALER) -> Line:
        """One that dials with the keys of a folder."""
        self._made.append(Line(self._context, kind, address, keys=load_keys(folder)))
        return self._made[-1]

    def drop(self, line: Line) -> None:
        """Close one now: its other end finds it gone."""
        line.close()
        self._made.remove(line)

    def close(self) -> None:
        """Close all; hangs where one was left open behind our back."""
        for line in self._made:
            line.close()
        self._context.term()


class Guarded:
    """A daemon whose three sockets ask for keys, and folders of clients."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.right = make_client(self.folder, "right", "samplers")
        self.other = make_client(self.folder, "other", "samplers")
        self.decoder = make_client(self.folder, "decoder", "workers")
        self.foreign = make_client(folder / "foreign", "foreign", "samplers")
        self.unknown = folder / "unknown"  # a pair that nobody allowed, and the daemon's real public key
        shutil.copytree(self.foreign, self.unknown)
        shutil.copy(self.right / "server.pub", self.unknown)
        inner = ("broker.workers_bind=tcp://127.0.0.1:0", "streamer.packets_bind=tcp://127.0.0.1:0")
        self.daemon = Daemon(folder, f"security.keys_folder={self.folder}", *inner)

    def publisher(self, stream: str, keys: Path | None, **options: object) -> LatentPublisher:
        """A sampler with a client's folder."""
        options = {"latent_format": "sd1", "keys_folder": keys, **options}
        return LatentPublisher(self.daemon.broker, stream=stream, **options)  # type: ignore[arg-type]

    def worker_count(self) -> int:
        """How many workers the broker has."""
        return len(self.daemon.json("/api/v1/workers")["workers"])

    def count(self, name: str, metric: str = "taesd_stream_broker") -> float:
        """A counter of refused clients, from /metrics."""
        lines = self.daemon.get("/metrics")[1].decode().splitlines()
        rows = [line for line in lines if line.startswith(f'{metric}{{count="{name}"}}')]
        return float(rows[0].split()[-1]) if rows else 0.0


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """One guarded daemon for the tests that do not harm it."""
    one = Guarded(tmp_path_factory.mktemp("guarded"))
    with one.daemon:
        yield one


@pytest.fixture
def lines() -> Iterator[Lines]:
    """Lines of the test."""
    one = Lines()
    yield one
    one.close()


def run_cli(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """A command, with a home of its own."""
    return run_command(*words, environment=clean_environment(folder))


# --- who is let in ---


def test_with_the_right_keys_a_run_is_recorded(guarded: Guarded) -> None:
    """Sampler, worker and streamer, each by its key over tcp: every kept frame reaches the file."""
    with guarded.publisher("right", guarded.right, record="all") as publisher:
        for step in range(3):
            publisher.publish(LATENTS, step=step, total_steps=3)
        assert publisher.wait_until_acked(30), publisher.error
    assert guarded.daemon.recording(publisher.run)["frames"] == 3


def test_the_folder_may_come_from_the_environment(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """TAESD_STREAM_KEYS_FOLDER stands for keys_folder."""
    monkeypatch.setenv("TAESD_STREAM_KEYS_FOLDER", str(guarded.other))
    with guarded.publisher("environment", None) as publisher:
        wait_for(lambda: guarded.daemon.streams().get("environment"), of="the stream")
        assert publisher.error is None


@pytest.mark.parametrize(
    ("keys", "said", "counted"),
    [
        ("none", "asks for a key", "refused_without_key"),
        ("unknown", "refuses this key", "refused_key"),
        ("foreign", "breaks off every handshake", "refused_handshake"),
    ],
)
def test_a_sampler_without_the_right_key_is_refused(guarded: Guarded, keys: str, said: str, counted: str) -> None:
    """No key, a key that nobody allowed, another daemon's key: the sampler goes on, is told why, and is counted."""
    before = guarded.count(counted)
    folder = {"none": None, "unknown": guarded.unknown, "foreign": guarded.foreign}[keys]
    publisher = guarded.publisher(f"refused-{keys}", folder)
    try:
        publisher.publish(LATENTS, step=0)
        wait_for(lambda: said in (publisher.error or ""), of=f"the sampler being told, has {publisher.error}")
        wait_for(lambda: guarded.count(counted) > before, of="the counter")
        assert f"refused-{keys}" not in guarded.daemon.streams()
        assert counted in guarded.daemon.log()
    finally:
        publisher.close(timeout_s=0.1)


def test_a_refused_sampler_gets_in_as_soon_as_its_key_is_allowed(guarded: Guarded) -> None:
    """It knocks again by itself, and the list of keys is read again without a restart: nothing kept is lost."""
    with guarded.publisher("late", guarded.unknown, record="all") as publisher:
        publisher.publish(LATENTS, step=0)
        wait_for(lambda: "refuses this key" in (publisher.error or ""), of="the refusal")
        public = clients_in(guarded.foreign.parent.parent)[0].public.decode()
        (guarded.folder / "samplers" / "late.pub").write_text(f'    public-key = "{public}"\n')
        (guarded.folder / "samplers" / "late.pub").chmod(0o644)
        assert publisher.wait_until_acked(0.0) is False
        wait_for(lambda: publisher.error is None and publisher.wait_until_acked(1.0), of="the ack")
    revoke(guarded.folder, "late")
    assert guarded.daemon.recording(publisher.run)["frames"] == 1


def test_a_key_is_known_as_soon_as_it_is_asked_for(tmp_path: Path) -> None:
    """However lately the list was read in its turn, the first stranger has it read again; not each one behind him."""
    make_client(tmp_path, "first", "samplers")
    allowed = AllowList(tmp_path)
    make_client(tmp_path, "late", "samplers")
    public = {client.name: client.public for client in clients_in(tmp_path)}
    allowed.look()
    assert allowed.name_of("samplers", public["late"]) is None
    allowed.look_for_stranger()
    for name in ("first", "late"):
        assert allowed.name_of("samplers", public[name]) == name
    revoke(tmp_path, "late")
    allowed.look_for_stranger()
    assert allowed.name_of("samplers", public["late"]) == "late"  # for a moment


def test_a_revoked_key_ends_what_its_connection_may_say(guarded: Guarded, lines: Lines) -> None:
    """A connection that stands is cut off within a second: its frames are dropped, both sides say so, others go on."""
    keys = make_client(guarded.folder, "leaver", "samplers")
    line, run = lines.to(guarded.daemon.broker, keys), "00000000000000a1"
    opening = replace(GOLDEN_OPEN, stream="cut", run=run, kind="steps", latent_format="sd1", record="off")
    with guarded.publisher("leaver", keys) as publisher, guarded.publisher("stayer", guarded.right) as stayer:
        assert line.socket.poll(20_000, zmq.POLLOUT)
        for message in (opening, replace(FRAME, run=run, seq=0, kept=False)):
            line.socket.send_multipart(wire.pack(message))
        wait_for(lambda: guarded.daemon.streams().get("cut", {}).get("seq") == 0, of="the first frame")
        revoke(guarded.folder, "leaver")
        wait_for(lambda: "revoked" in (publisher.error or ""), of="the sampler being told")
        for message in (replace(FRAME, run=run, seq=1, kept=False), opening):
            line.socket.send_multipart(wire.pack(message))
        assert refusal(line, run).code == "key"
        stayer.publish(LATENTS, step=0)
        wait_for(lambda: guarded.daemon.streams().get("stayer", {}).get("seq") == 0, of="another's frame")
        assert guarded.daemon.streams()["cut"]["seq"] == 0
        assert stayer.error is None
    wait_for(lambda: guarded.count("refused_revoked") > 0, of="the counter")
    assert "refused_revoked" in guarded.daemon.log()


# --- whose stream it is ---


def test_nobody_takes_over_another_keys_run(guarded: Guarded, lines: Lines) -> None:
    """Whoever knows a run's id and has another key can neither end it, nor feed it, nor say HELLO for it."""
    line = lines.to(guarded.daemon.broker, guarded.other)
    with guarded.publisher("mine", guarded.right) as publisher:
        publisher.publish(LATENTS, step=0)
        wait_for(lambda: guarded.daemon.streams().get("mine", {}).get("seq") == 0, of="the frame")
        assert line.socket.poll(20_000, zmq.POLLOUT)
        stolen = replace(FRAME, run=publisher.run, seq=99, index=99, kept=False)
        hello = PublisherHello(runs={publisher.run: RunHello(next_seq=100)}, echo_ns=0)
        for message in (stolen, End(run=publisher.run, last_seq=99, reason="failed"), hello):
            line.socket.send_multipart(wire.pack(message))
        assert refusal(line, publisher.run).code == "key"
        assert (guarded.daemon.streams()["mine"]["seq"], guarded.daemon.streams()["mine"]["state"]) == (0, "live")


def test_a_lost_runs_name_waits_for_its_own_key(guarded: Guarded, lines: Lines) -> None:
    """While a sampler is lost another key that wants its name gets another; its own key may take it."""
    mine = lines.to(guarded.daemon.broker, guarded.right)
    other = lines.to(guarded.daemon.broker, guarded.other)
    opening = replace(GOLDEN_OPEN, stream="vanished", kind="steps", latent_format="sd1", record="off")
    for line, run in ((mine, "00000000000000b1"), (other, "00000000000000b2")):
        assert line.socket.poll(20_000, zmq.POLLOUT)
        line.socket.send_multipart(wire.pack(replace(opening, run=run)))
        wait_for(lambda: "vanished" in guarded.daemon.streams(), of="the first run")
    refused = refusal(other, "00000000000000b2")
    assert (refused.code, refused.use) == ("taken", "vanished~2")
    lines.drop(mine)
    other.socket.send_multipart(wire.pack(replace(opening, run="00000000000000b3")))
    assert refusal(other, "00000000000000b3").code == "taken"  # though its connection is gone
    again = lines.to(guarded.daemon.broker, guarded.right)
    assert again.socket.poll(20_000, zmq.POLLOUT)

    def takes_it() -> bool:
        again.socket.send_multipart(wire.pack(replace(opening, run="00000000000000b4")))
        return bool(guarded.daemon.streams()["vanished"]["run"] == "00000000000000b4")

    wait_for(takes_it, of="its own key's new run, once the broker has noticed that the first one is gone")


def has_error(line: Line) -> bool:
    """Whether it was told why it is not let in."""
    line.look()
    return line.error is not None


def refusal(line: Line, run: str) -> Refused:
    """The next REFUSED of a run."""
    while True:
        assert line.socket.poll(20_000), "no answer"
        message = wire.unpack(line.socket.recv_multipart(), wire.TO_PUBLISHER)
        if isinstance(message, Refused) and message.run == run:
            return message


# --- workers and the streamer ---


def test_a_workers_key_is_not_the_streamers(tmp_path: Path) -> None:
    """It may neither take the packets, nor end a recording, nor stop or keep a stream: counted, and nothing happens."""
    sampler = make_client(tmp_path / "keys", "sampler", "samplers")
    decoder = make_client(tmp_path / "keys", "worker", "workers")
    run = new_run()
    with BrokerRole(tmp_path, f"security.keys_folder={tmp_path / 'keys'}") as broker:
        broker.keys = load_keys(tmp_path / "keys")
        with (
            broker.publisher(load_keys(sampler)) as publisher,
            broker.streamer(),
            broker.worker(credits=0) as worker,
            broker.peer(broker.inside, wire.TO_STREAMER, keys=load_keys(decoder)) as other,
        ):
            publisher.open(run, "kept", record="all")
            publisher.say(frame(run, 0, kept=True))
            publisher.ack(run, 0)
            publisher.end(run, 0)
            publisher.open(new_run(), "goes/on")
            other.say(StreamerHello(endpoint="tcp://127.0.0.1:6666"))
            other.say(Cursor(run=run, attempt=9, written=0, synced=0, finished=True))
            other.say(StopStream(stream="goes/on"))
            other.say(Record(stream="goes/on", mode="all"))
            told = other.ask(Stats(), State)
            rows = {row["name"]: row for row in told.streams}
            assert (rows["goes/on"]["record"], rows["goes/on"]["flags"]) == ("off", [])
            assert told.stats["counts"]["refused_role"] == 4
            worker.hello(credits=1)
            assert worker.job().packets_to == "tcp://127.0.0.1:9"
            assert list(broker.log_folder.glob(f"{run}.*"))
    assert "key=worker is a decode worker's" in broker.log()


def test_a_samplers_key_opens_no_inner_socket(guarded: Guarded, lines: Lines) -> None:
    """What may publish may neither ask where workers connect nor push packets to the streamer."""
    facts = guarded.daemon.facts
    before = guarded.count("refused_key", "taesd_stream_gate")
    inner = lines.to(facts["workers"], guarded.right)
    packets = lines.to(facts["packets"], guarded.right, zmq.PUSH)
    for line in (inner, packets):
        wait_for(partial(has_error, line), of="the refusal")
        assert "refuses this key" in (line.error or "")
        with pytest.raises(zmq.Again):
            line.socket.send_multipart(wire.pack(PACKET), zmq.NOBLOCK)
    wait_for(lambda: guarded.count("refused_key", "taesd_stream_gate") > before, of="the streamer's own counter")


def test_health_asks_by_its_key(guarded: Guarded, tmp_path: Path) -> None:
    """`health --role worker` gets STATS with a worker's key; with a sampler's, or none, exit code 69 and the reason."""
    where = ("--set", f"broker.workers_bind={guarded.daemon.facts['workers']}")

    def ask(folder: Path | None) -> tuple[int, str]:
        keys = () if folder is None else ("--set", f"security.keys_folder={folder}")
        done = run_cli(tmp_path, "health", "--role", "worker", *where, *keys)
        return done.returncode, done.stderr

    assert ask(guarded.decoder)[0] == 0
    assert ask(guarded.folder)[0] == 0  # the daemon's own
    for folder, said in ((guarded.right, "refuses this key"), (None, "asks for a key")):
        code, text = ask(folder)
        assert (code, text.count("\n")) == (69, 1)
        assert said in text


@pytest.mark.faults
def test_a_worker_of_another_host_comes_by_its_key_and_goes_with_it(guarded: Guarded, tmp_path: Path) -> None:
    """A worker with a key of its own joins; when that is revoked it gets no more jobs, and says why."""
    keys = make_client(guarded.folder, "gpu-2", "workers")
    sets = (f"broker.workers_bind={guarded.daemon.facts['workers']}", f"security.keys_folder={keys}")
    options = [word for one in sets for word in ("--set", one)]
    log = tmp_path / "worker.log"
    with log.open("wb") as errors:
        worker = subprocess.Popen(
            [*COMMAND, "worker", *options], stderr=errors, stdout=errors, env=clean_environment(tmp_path)
        )
    try:
        wait_for(lambda: guarded.worker_count() == 2, 60, of="the second worker")
        revoke(guarded.folder, "gpu-2")
        wait_for(lambda: guarded.worker_count() == 1, 30, of="the broker without it")
        wait_for(lambda: "refuses this key" in log.read_text(), 30, of="the worker saying so")
    finally:
        worker.terminate()
        worker.wait(20)


@pytest.mark.slow
def test_a_worker_that_is_not_let_in_says_why(guarded: Guarded, tmp_path: Path) -> None:
    """A worker with a sampler's key ends with 69, and its line is about the key, not about an absent broker."""
    sets = (f"broker.workers_bind={guarded.daemon.facts['workers']}", f"security.keys_folder={guarded.right}")
    done = run_cli(tmp_path, "worker", *(word for one in sets for word in ("--set", one)))
    assert done.returncode == 69
    assert "refuses this key" in done.stderr.splitlines()[-1]


# --- public addresses ---

PUBLIC = {
    "broker": "broker.bind=tcp://0.0.0.0:0",
    "workers": "broker.workers_bind=tcp://0.0.0.0:0",
    "packets": "streamer.packets_bind=tcp://0.0.0.0:0",
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_bind_without_keys_does_not_start(name: str, tmp_path: Path) -> None:
    """Exit code 2, and one line with the key, the address and both ways out."""
    done = run_cli(tmp_path, "up", "--set", PUBLIC[name], "--set", f"recording.folder={tmp_path}/films")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for word in (PUBLIC[name].replace("=", " = "), "keys new", "security.keys_folder", "--insecure"):
        assert word in done.stderr


def test_a_worker_dials_no_other_host_without_keys(tmp_path: Path) -> None:
    """What may not be bound without keys may not be dialled either: latents would cross the network in the open."""
    done = run_cli(tmp_path, "worker", "--set", "broker.workers_bind=tcp://gpu.example:5761")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--insecure" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["keys", "insecure"])
def test_a_public_daemon_works(how: str, tmp_path: Path) -> None:
    """Every socket on every interface, with keys, or without and --insecure: a kept run reaches its file."""
    keys = make_client(tmp_path / "keys", "one", "samplers") if how == "keys" else None
    word = "security.insecure=true" if keys is None else f"security.keys_folder={tmp_path / 'keys'}"
    with Daemon(tmp_path, word, *PUBLIC.values()) as daemon:
        address = daemon.broker.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
        with LatentPublisher(address, stream="a", latent_format="sd1", record="all", keys_folder=keys) as publisher:
            publisher.publish(LATENTS, step=0, total_steps=1)
            assert publisher.wait_until_acked(30), publisher.error
        assert daemon.recording(publisher.run)["frames"] == 1


# --- files ---


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Every file with a secret is made with mode 0600, every folder with 0700, whatever the umask."""
    before = os.umask(0)
    try:
        issued = make_client(tmp_path / "keys", "one", "samplers")
    finally:
        os.umask(before)
    files = [tmp_path / "keys" / "server.key", issued / "client.key"]
    assert [file.stat().st_mode & 0o777 for file in files] == [0o600, 0o600]
    folders = [tmp_path / "keys", tmp_path / "keys" / "samplers", issued]
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3
    assert "secret-key" not in (issued / "server.pub").read_text()


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A key file of mode 0644 is no key: the daemon exits with 2, a publisher raises, and the line says chmod."""
    issued = make_client(tmp_path / "keys", "one", "samplers")
    (issued / "client.key").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        LatentPublisher("tcp://127.0.0.1:9", stream="a", latent_format="sd1", keys_folder=issued)
    (tmp_path / "keys" / "server.key").chmod(0o640)
    done = run_cli(tmp_path, "broker", "--set", f"security.keys_folder={tmp_path / 'keys'}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "chmod 600" in done.stderr


def test_a_secret_that_root_gives_to_our_group_is_taken(tmp_path: Path) -> None:
    """As Kubernetes mounts it: of root, readable for our group alone. One for all, or to be written, is refused."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another user's group")
    with tempfile.TemporaryDirectory() as name:  # one that another user can reach
        file = make_client(tmp_path, "one", "samplers").rename(Path(name) / "one") / "client.key"
        for folder in (Path(name), file.parent):
            folder.chmod(0o755)
        os.chown(file, 0, STRANGER)

        def read_as_stranger(mode: int) -> str:
            file.chmod(mode)
            imports = "import os; from pathlib import Path; from taesd_stream.keys import read_pair"
            become = f"os.setgroups([]); os.setgid({STRANGER}); os.setuid({STRANGER})"
            done = subprocess.run(
                [sys.executable, "-c", f"{imports}; {become}; read_pair(Path({str(file)!r}))"],
                capture_output=True,
                text=True,
                check=False,
            )
            return done.stderr

        assert read_as_stranger(0o440) == ""
        assert "chmod 600" in read_as_stranger(0o444)
        assert "chmod 600" in read_as_stranger(0o460)


def test_a_list_that_others_can_write_is_refused(tmp_path: Path) -> None:
    """Who could put a file there could allow himself: the folder and its files must be their owner's to write."""
    make_client(tmp_path, "one", "samplers")
    (tmp_path / "samplers").chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        AllowList(tmp_path)
    (tmp_path / "samplers").chmod(0o700)
    (tmp_path / "samplers" / "one.pub").chmod(0o666)
    with pytest.raises(ConfigError, match="chmod go-w"):
        AllowList(tmp_path)


def test_a_file_without_a_key_allows_nobody_and_harms_no_other(tmp_path: Path) -> None:
    """A broken file that comes while the daemon runs is said; the other keys stay."""
    make_client(tmp_path, "one", "samplers")
    one = clients_in(tmp_path)[0]
    allowed = AllowList(tmp_path)
    (tmp_path / "samplers" / "broken.pub").write_text("public-key = nothing")
    allowed.read()
    assert allowed.name_of("samplers", one.public) == "one"
    assert allowed.name_of("workers", one.public) is None
    revoke(tmp_path, "one")  # also beside a file that cannot be read
    allowed.read()
    assert allowed.name_of("samplers", one.public) is None


@pytest.mark.parametrize("damage", ["missing", "half", "other pair"])
def test_files_that_are_no_keys_are_named(damage: str, tmp_path: Path) -> None:
    """A missing file, half a pair, a secret of another public key: an error with the file's name."""
    issued = make_client(tmp_path / "keys", "one", "samplers")
    text = (issued / "client.key").read_text()
    if damage == "missing":
        (issued / "server.pub").unlink()
    elif damage == "half":
        (issued / "client.key").write_text(text.replace("secret-key", "# secret-key"))
    else:
        public, secret = zmq.curve_keypair()
        keys = load_keys(issued)
        (issued / "client.key").write_text(text.replace(keys.public.decode(), public.decode()))
        assert secret != keys.secret
    with pytest.raises(ConfigError, match="server.pub" if damage == "missing" else "client.key"):
        load_keys(issued)


def test_a_pair_is_not_shown_with_its_secret(tmp_path: Path) -> None:
    """The secret is in no repr, so in no log and no traceback of ours."""
    keys: Keys = load_keys(make_client(tmp_path, "one", "samplers"))
    assert keys.secret.decode() not in repr(keys)
    assert keys.public.decode() in repr(keys)


def test_the_commands_make_list_and_revoke(tmp_path: Path) -> None:
    """`keys new` prints the folder to move, `list` shows whose key it is, `revoke` takes it away."""
    word = ("--set", f"security.keys_folder={tmp_path / 'keys'}")
    issued = Path(run_cli(tmp_path, "keys", "new", "laptop", "--for", "worker", *word).stdout.strip())
    assert load_keys(issued).server == load_keys(tmp_path / "keys").server
    [row] = json.loads(run_cli(tmp_path, "keys", "list", "--json", *word).stdout)["keys"]
    assert (row["name"], row["for"], row["public"]) == ("laptop", "worker", load_keys(issued).public.decode())
    assert run_cli(tmp_path, "keys", "revoke", "laptop", *word).returncode == 0
    assert clients_in(tmp_path / "keys") == []
    assert not issued.exists()


@pytest.mark.parametrize("name", ["laptop", "../up", "", ".hidden", "a b", "x" * 65])
def test_a_name_is_used_once_and_is_no_path(name: str, tmp_path: Path) -> None:
    """A second key of one name would hide the first; a name from outside never becomes a path."""
    make_client(tmp_path, "laptop", "workers")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=f"^{re.escape(name)}: "):
        make_client(tmp_path, name, "samplers")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["file", "file/keys", "dangling", "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_line(place: str, tmp_path: Path) -> None:
    """A file, below a file, a link to nowhere, a name too long: named, with the option, and exit code 2."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "keys")
    done = run_cli(tmp_path, "keys", "new", "laptop", "--set", f"security.keys_folder={tmp_path / place}")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert re.search(
        r"keys cannot be (written|read): .*; name another folder with --set security.keys_folder=DIR", done.stderr
    )
    assert str(tmp_path / place) in done.stderr or place == "file/keys"


def test_revoking_what_is_not_there_says_so(tmp_path: Path) -> None:
    """A slip of the pen must not pass for a key that was revoked."""
    make_client(tmp_path, "laptop", "samplers")
    with pytest.raises(ConfigError, match="keys list"):
        revoke(tmp_path, "lapdog")
