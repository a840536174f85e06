"""The life of a daemon: it starts whole, heals itself, gives up loudly, and ends with every file closed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.folder_lock import FolderLock
from taesd_stream_workers.role.process import Role
from taesd_stream_workers.supervisor import MAX_BACKOFF_S, QUICK_DEATHS, SILENT_S, GaveUpError, Supervisor
from taesd_stream_workers.worker.priority import NICE
from tests.commands import run_command
from tests.daemon import COMMAND, Daemon, clean_environment, free_port, wait_for
from tests.page_socket import PageSocket
from tests.pictures import decode_file
from tests.processes import Terminal, children_of, lives, role_pid
from tests.troubles import patient

ROLES = ("broker", "streamer", "worker")
FREE_PORTS = ("broker.bind=tcp://127.0.0.1:0", "web.bind=127.0.0.1:0")
LATENTS = np.zeros((4, 8, 8), np.float32)
HANG_S = 60.0


def arguments(*sets: str) -> list[str]:
    """Words of the command line that set these keys."""
    return [word for one in sets for word in ("--set", one)]


def is_ready(daemon: Daemon) -> bool:
    """Whether /readyz says 200; False also while the streamer is away."""
    with contextlib.suppress(OSError):
        return daemon.get("/readyz")[0] == 200
    return False


def shows_a_picture(daemon: Daemon, stream: str) -> None:
    """A new sampler is painted, all the way to a JPEG."""
    with LatentPublisher(daemon.broker, stream=stream, latent_format="sd1") as publisher:
        publisher.publish(LATENTS, step=0, total_steps=2)
        wait_for(lambda: stream in daemon.streams(), of=f"{stream} in the list")
        picture = wait_for(lambda: _latest(daemon, stream), 60.0, of=f"a picture of {stream}")
        assert picture[:2] == b"\xff\xd8"


def _latest(daemon: Daemon, stream: str) -> bytes | None:
    status, body = daemon.get(f"/streams/{stream}/latest.jpg")
    return body if status == 200 else None


def test_up_reports_the_readiness_of_each_role(daemon: Daemon) -> None:
    """One line of JSON has every bound address, its port resolved, and each role with its process, ready."""
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", daemon.web)
    assert re.fullmatch(r"tcp://127\.0\.0\.1:[1-9]\d*", daemon.broker)
    assert {"web", "broker", "workers", "packets", "roles", "token_file"} == set(daemon.facts)
    assert [(row["role"], row["ready"]) for row in daemon.facts["roles"]] == [
        ("broker", True),
        ("streamer", True),
        ("worker 0", True),
    ]
    assert all(lives(row["pid"]) for row in daemon.facts["roles"])


@pytest.mark.skipif(sys.platform == "win32", reason="priorities are other ones there")
def test_a_worker_gives_way_to_the_sampler(daemon: Daemon) -> None:
    """All its threads want less of a processor than any other program; the broker, which answers samplers, does not."""
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    worker = Path(f"/proc/{daemon.pid_of('worker 0')}/task")
    threads = [int(entry.name) for entry in worker.iterdir()] if worker.exists() else [daemon.pid_of("worker 0")]
    started_before = 3  # at most: the main thread's watchers, which do no work
    priorities = sorted(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads)
    assert set(priorities[started_before:]) == {min(mine + NICE, 19)}
    assert os.getpriority(os.PRIO_PROCESS, daemon.pid_of("worker 0")) == min(mine + NICE, 19)
    assert os.getpriority(os.PRIO_PROCESS, daemon.pid_of("broker")) == mine


@pytest.mark.faults
@pytest.mark.parametrize("role", ROLES)
def test_a_killed_role_comes_back_where_it_was(role: str, healing: Daemon) -> None:
    """After SIGKILL of any role the daemon is ready again on the same addresses, and shows pictures."""
    killed = wait_for(lambda: role_pid(healing.process.pid, role), of=f"a {role} that runs")
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: role_pid(healing.process.pid, role) not in (None, killed), 30.0, of=f"another {role}")
    wait_for(lambda: healing.log().count(f"role_ready role={role}") == 2, 60.0, of=f"a line that the {role} is ready")
    wait_for(lambda: is_ready(healing), 60.0, of="the daemon ready again")
    wait_for(lambda: f"role_ended role={role}" in healing.log(), of="a line that says so")
    shows_a_picture(healing, f"after/{role}")


@pytest.fixture(scope="module")
def healing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose roles are killed."""
    with Daemon(tmp_path_factory.mktemp("healing")) as daemon:
        yield daemon


@pytest.mark.faults
@pytest.mark.parametrize("role", ["worker", *(pytest.param(role, marks=pytest.mark.slow) for role in ROLES[:2])])
def test_a_hung_role_is_replaced(role: str, tmp_path: Path) -> None:
    """A role that was stopped in the middle of its work is found, killed and started again."""
    with Daemon(tmp_path) as daemon:
        hung = daemon.pid_of("worker 0" if role == "worker" else role)
        os.kill(hung, signal.SIGSTOP)
        wait_for(lambda: not lives(hung), HANG_S, of=f"the end of the hung {role}")
        wait_for(lambda: is_ready(daemon), HANG_S, of="the daemon ready again")
        assert f"role_hung role={role}" in daemon.log()
        shows_a_picture(daemon, "after")


@pytest.mark.faults
@pytest.mark.slow
def test_a_supervisor_that_was_paused_takes_no_role_for_hung(tmp_path: Path) -> None:
    """Ctrl-Z for longer than a role may be silent, then fg: the same roles go on."""
    with Daemon(tmp_path) as daemon:
        before = set(children_of(daemon.process.pid))
        os.kill(daemon.process.pid, signal.SIGSTOP)
        over_s = time.monotonic() + SILENT_S + 4  # the roles tick into a pipe that nobody reads
        wait_for(lambda: time.monotonic() > over_s, HANG_S, of="the end of the pause")
        os.kill(daemon.process.pid, signal.SIGCONT)
        shows_a_picture(daemon, "after")
        wait_for(lambda: is_ready(daemon), of="the daemon ready")
        assert set(children_of(daemon.process.pid)) == before
        assert "role_hung" not in daemon.log()


HUNG_LOOP = """
import ctypes
from taesd_stream_workers.role.lifecycle import Lifecycle
lifecycle = Lifecycle("worker", is_supervised=True)
lifecycle.start()
lifecycle.tick()
ctypes.PyDLL(None).sleep(600)  # a PyDLL's call keeps the interpreter's lock: no thread of Python runs
"""


@pytest.mark.faults
def test_a_loop_that_hangs_in_native_code_says_where(tmp_path: Path) -> None:
    """A role that holds the interpreter's lock prints its stack and ends, though its supervisor is gone."""
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_LOOP], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    try:
        _, errors = process.communicate(timeout=HANG_S)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1
    assert b'File "<string>", line 7 in <module>' in errors  # the call that does not return


@pytest.mark.faults
def test_a_role_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    """After a few deaths in a row `up` says which role, ends the others, and exits with 70."""
    daemon = Daemon(tmp_path)
    daemon.start()
    others = set(children_of(daemon.process.pid))

    def ended() -> bool:
        pid = role_pid(daemon.process.pid, "broker")
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return daemon.process.poll() is not None

    wait_for(ended, 90.0, of="the end of `up`")
    assert daemon.stop() == 70
    assert "taesd-stream: the broker ended 6 times in a row, last with exit code -9" in daemon.log().splitlines()
    assert not any(lives(pid) for pid in others)


def test_a_worker_that_dies_again_and_again_ends_no_other() -> None:
    """One broken GPU of several: its worker is tried for ever, later each time, while another one works."""
    with Supervisor(load_config()) as supervisor:
        roles = {name: Role(name, name.split()[0], load_config()) for name in ("broker", "worker 0", "worker 1")}
        supervisor._roles.update(roles)
        for role in roles.values():
            role.is_ready, role.started_s = True, time.monotonic()
        for _ in range(3 * QUICK_DEATHS):
            supervisor._back_off(roles["worker 1"], "exit code 1")
        assert roles["worker 1"].restart_at_s - time.monotonic() < MAX_BACKOFF_S
        for alone in ("broker", "worker 0"):
            for _ in range(QUICK_DEATHS):
                supervisor._back_off(roles[alone], "exit code 1")
            with pytest.raises(GaveUpError, match=f"the {alone} ended"):
                supervisor._back_off(roles[alone], "exit code 1")
        supervisor._roles.clear()


@pytest.mark.faults
def test_a_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    """After SIGKILL of the supervisor its children end by themselves, and theirs."""
    daemon = Daemon(tmp_path)
    daemon.start()
    children = set(children_of(daemon.process.pid))
    family = children | {pid for child in children for pid in children_of(child)}
    assert len(children) == 3
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_for(lambda: not any(lives(pid) for pid in family), 30.0, of="the end of its children")


@pytest.mark.faults
def test_a_killed_supervisor_leaves_no_hung_orphan(tmp_path: Path) -> None:
    """A role that was hung when its supervisor was killed ends as soon as it goes on, whatever it was waiting for."""
    daemon = Daemon(tmp_path)
    daemon.start()
    children = set(children_of(daemon.process.pid))
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    daemon.stop(signal.SIGKILL)
    for pid in children:
        os.kill(pid, signal.SIGCONT)
    wait_for(lambda: not any(lives(pid) for pid in children), HANG_S, of="the end of its children")


@pytest.mark.parametrize(
    "how", ["ctrl-c", *(pytest.param(how, marks=pytest.mark.faults) for how in ("sigterm", "hangup"))]
)
def test_stopping_closes_every_file_whoever_watches(how: str, tmp_path: Path) -> None:
    """While a picture is waited for, a page is open and a recording grows: exit 0, no role killed, a playable file."""
    daemon = Daemon(tmp_path, environment=patient(tmp_path / "patient"))
    daemon.start()
    with PageSocket(daemon) as page, _waiting_reader(daemon):
        publisher = LatentPublisher(daemon.broker, stream="growing", latent_format="sd1", record="all")
        page.watch({"growing": "live"})
        for step in range(5):
            publisher.publish(LATENTS + step / 4, step=step)
        assert publisher.wait_until_acked(30), publisher.error
        page.picture()
        wait_for(lambda: _written(daemon) == 5, 30.0, of="five frames in the file")
        if how == "ctrl-c":  # a terminal tells the whole foreground group, and the roles are not in it
            os.killpg(daemon.process.pid, signal.SIGINT)
        code = daemon.stop({"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM, "hangup": signal.SIGHUP}[how])
        publisher.close(timeout_s=0.1)
    assert code == 0, daemon.log()[-3000:]
    assert "role_killed" not in daemon.log()
    assert "Traceback" not in daemon.log()
    growing = list(daemon.recordings_folder.rglob("*.mp4*"))
    assert len(growing) == 1, growing
    assert len(decode_file(growing[0])) == 5


def _written(daemon: Daemon) -> int:
    return sum(row["frames"] for row in daemon.json("/api/v1/recordings")["recordings"])


@contextlib.contextmanager
def _waiting_reader(daemon: Daemon) -> Iterator[None]:
    """An HTTP request under way for a picture that does not come, on a connection that nobody closes."""
    publisher = LatentPublisher(daemon.broker, stream="silent", latent_format="sd1")
    wait_for(lambda: "silent" in daemon.streams(), of="the silent stream")
    host, port = daemon.web.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET /streams/silent/latest.jpg HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        yield
    publisher.close(timeout_s=0.1)


@pytest.mark.parametrize("at", ["first child", "all children"])
def test_ctrl_c_while_it_starts(at: str, tmp_path: Path) -> None:
    """Told to stop before all is ready it stops: exit 0, no line of an error, no child left."""
    process = start("up", *FREE_PORTS, f"recording.folder={tmp_path / 'recordings'}", folder=tmp_path)
    wanted = 1 if at == "first child" else 3
    wait_for(lambda: len(children_of(process.pid)) >= wanted, 30.0, of="children")
    children = set(children_of(process.pid))
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, ""), errors
    assert "Traceback" not in errors
    assert "ERROR" not in errors
    assert not any(lives(pid) for pid in children)


def start(command: str, *sets: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A command of ours in a session of its own, its output in pipes."""
    return subprocess.Popen(
        [*COMMAND, command, *arguments(*sets)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**clean_environment(folder), **environment},
        start_new_session=True,
    )


def refusal(command: str, *sets: str, folder: Path, **environment: str) -> tuple[int, list[str]]:
    """Exit code and all lines of a command that must not run."""
    done = run_command(command, *arguments(*sets), environment={**clean_environment(folder), **environment})
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("key", "value", "role"),
    [("broker.bind", "tcp://127.0.0.1:{}", "broker"), ("web.bind", "127.0.0.1:{}", "streamer")],
)
def test_a_port_in_use(key: str, value: str, role: str, alone: bool, taken_port: int, tmp_path: Path) -> None:
    """It is one line with the key, the address and the way out, and exit code 2; of `up` and of the role alone."""
    sets = [*FREE_PORTS, f"recording.folder={tmp_path / 'recordings'}", f"{key}={value.format(taken_port)}"]
    code, lines = refusal(role if alone else "up", *sets, folder=tmp_path)
    assert code == 2
    (line,) = lines
    assert line.startswith(f"taesd-stream: {key} = {value.format(taken_port)}: Address already in use")
    assert f"--set {key}=" in line


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("web.bnd=127.0.0.1:0", "did you mean web.bind"),
        ("decoder.max_batch_size=0", "greater than or equal to 1, got '0'"),
        ("weights.folder={}/absent", "weights.folder = {}/absent: there is no such folder"),
        ("weights.folder={}/file", "weights.folder = {}/file: expected the folder"),
        ("recording.folder={}/file/below", "recording.folder = {}/file/below: cannot be used"),
        ("broker.log_folder={}/file", "broker.log_folder = {}/file: cannot be used"),
        ("broker.bind=5760", "broker.bind = 5760: expected tcp://host:port, as in tcp://127.0.0.1:5760"),
        ("broker.bind=tcp://0.0.0.0:0", "broker.bind = tcp://0.0.0.0:0: other hosts can reach it"),
        ("broker.bind=tcp://127.0.0.1:70000", "broker.bind = tcp://127.0.0.1:70000: Port out of range"),
        ("web.bind=here", "web.bind = here: expected host:port, as in 127.0.0.1:8765"),
    ],
)
def test_a_wrong_setting_is_one_line(word: str, expected: str, tmp_path: Path) -> None:
    """It names the key, what came and what is right, on stderr alone, with exit code 2 and no other line."""
    (tmp_path / "file").touch()
    sets = [*FREE_PORTS, f"recording.folder={tmp_path / 'recordings'}", word.format(tmp_path)]
    code, lines = refusal("up", *sets, folder=tmp_path)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("taesd-stream: ")
    assert expected.format(tmp_path) in lines[0]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    """What only the worker can know ends `up` the same way: one line of an error, the last, and exit code 2."""
    sets = [*FREE_PORTS, f"recording.folder={tmp_path / 'recordings'}", "decoder.device=cuda:63"]
    code, lines = refusal("up", *sets, folder=tmp_path)
    assert code == 2
    assert [line.startswith("taesd-stream: decoder.device = cuda:63: ") for line in lines[-1:]] == [True]
    assert not any("ERROR" in line or "Traceback" in line for line in lines)


def test_a_folder_of_another_daemon(tmp_path: Path) -> None:
    """A recording folder that another daemon uses is refused with its process and the way out."""
    folder = tmp_path / "recordings"
    with FolderLock(folder):
        code, lines = refusal("up", *FREE_PORTS, f"recording.folder={folder}", folder=tmp_path)
    assert (code, len(lines)) == (2, 1), lines
    assert f"recording.folder = {folder}: in use by another taesd-stream (process {os.getpid()})" in lines[0]


@pytest.mark.slow
def test_the_environment_sets_keys_of_every_role(tmp_path: Path) -> None:
    """Addresses and folders by environment reach the roles; piped, a start is under ten lines of JSON on stderr."""
    environment = {
        "TAESD_STREAM_BROKER__BIND": "tcp://127.0.0.1:0",
        "TAESD_STREAM_WEB__BIND": "127.0.0.1:0",
        "TAESD_STREAM_RECORDING__FOLDER": str(tmp_path / "by-environment"),
        "TMPDIR": str(tmp_path / ("deep" * 25)),  # too long for socket files: they are not needed then
    }
    Path(environment["TMPDIR"]).mkdir()
    process = start("up", folder=tmp_path, **environment)
    assert process.stdout is not None
    shown = ""
    while "Watch" not in shown and (line := process.stdout.readline()):
        shown += line
    assert re.search(r"Watch +http://127\.0\.0\.1:(?!8765\b)\d+\n", shown), shown
    assert (tmp_path / "by-environment" / ".latents").is_dir()
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, ""), errors
    logged = [json.loads(line) for line in errors.splitlines()]  # piped, all of stderr is JSON lines
    assert {line["level"] for line in logged} == {"INFO"}
    assert [line["text"].split()[1] for line in logged if line["text"].startswith("role_ready")][:1] == ["role=broker"]
    assert {"up", "broker"} <= {line["process"] for line in logged} <= {"up", "broker", "worker 0", "streamer"}
    assert len(logged) < 10


def test_on_a_terminal_the_page_is_the_last_line(tmp_path: Path) -> None:
    """A healthy start shows under ten lines for people, no log, and ends with the page's address; Ctrl-C ends it."""
    sets = [*FREE_PORTS, f"recording.folder={tmp_path / 'recordings'}"]
    terminal = Terminal([*COMMAND, "up", *arguments(*sets)], clean_environment(tmp_path))
    wait_for(lambda: re.search(r"Watch.*http\S+\r\n", terminal.read()), 60.0, of="the page's address")
    lines = _lines(terminal.shown)
    assert len(lines) < 10, lines
    assert re.fullmatch(r"Watch +http://127\.0\.0\.1:\d+", lines[-1])
    assert [line.split()[0] for line in lines[:3]] == ["Broker", "Streamer", "Decoder"]
    terminal.process.send_signal(signal.SIGINT)
    wait_for(lambda: terminal.read() and terminal.process.poll() is not None, of="its end")
    assert terminal.process.returncode == 0
    assert _lines(terminal.read())[len(lines) :] == ["Stopping: closing every file."]
    terminal.close()


def test_on_a_terminal_an_error_is_one_line(tmp_path: Path) -> None:
    """A wrong setting shows one line of text there too."""
    terminal = Terminal([*COMMAND, "up", *arguments("web.bnd=1")], clean_environment(tmp_path))
    wait_for(lambda: terminal.read() and terminal.process.poll() is not None, of="its end")
    assert terminal.process.returncode == 2
    assert _lines(terminal.read()) == ["taesd-stream: web.bnd: there is no such key; did you mean web.bind?"]
    terminal.close()


def _lines(shown: str) -> list[str]:
    """What stays on a terminal: without colours, and without what was wiped away."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    return [last for line in plain.split("\r\n") if (last := line.rpartition("\r")[2]) and "Starting" not in last]


@pytest.mark.faults
def test_roles_alone_make_a_daemon(tmp_path: Path) -> None:
    """Broker, worker and streamer, each started alone and told only tcp addresses, show a sampler's picture."""
    with contextlib.ExitStack() as stack:
        inner = [f"{key}=tcp://127.0.0.1:{free_port()}" for key in ("broker.workers_bind", "streamer.packets_bind")]
        sets = [*FREE_PORTS, *inner, f"recording.folder={tmp_path / 'recordings'}"]
        alone = {role: stack.enter_context(start(role, *sets, folder=tmp_path)) for role in ROLES}
        facts = {}
        for role, process in alone.items():
            stack.callback(process.kill)
            threading.Thread(target=process.stderr.read, daemon=True).start()  # type: ignore[union-attr]
            assert process.stdout is not None
            facts[role] = json.loads(process.stdout.readline())
        daemon = Daemon(tmp_path)
        daemon.web, daemon.broker = facts["streamer"]["web"], facts["broker"]["bind"]
        wait_for(lambda: is_ready(daemon), 60.0, of="the daemon ready")
        shows_a_picture(daemon, "alone")
        for role in ROLES:
            alone[role].send_signal(signal.SIGINT)
            assert alone[role].wait(30) == 0, role


def test_a_streamer_without_its_web_part_ends(tmp_path: Path) -> None:
    """What ends the web thread ends the role, which says what: a page that nobody answers is worse than none."""
    (tmp_path / "httpx2.py").write_text("raise ImportError('this one is broken')\n")  # a daemon with peers needs it
    (tmp_path / "peers.toml").write_text('[[peers]]\nurl = "http://127.0.0.1:9"\n')
    sets = arguments(*FREE_PORTS, f"recording.folder={tmp_path / 'recordings'}")
    environment = clean_environment(tmp_path) | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [*COMMAND, "streamer", "--config", str(tmp_path / "peers.toml"), *sets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 70
    assert "ImportError: this one is broken" in done.stderr


def test_what_a_role_is_made_of_is_not_collected_again() -> None:
    """Once it is ready a full collection looks at what came since alone, not at every module's objects."""
    code = """if True:
        import gc
        import torch
        from taesd_stream_workers.role.lifecycle import Lifecycle
        before = len(gc.get_objects())
        Lifecycle("worker", is_supervised=True).ready()
        print(before, len(gc.get_objects()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    before, after = map(int, done.stdout.splitlines()[-1].split())
    assert after < before / 10


@pytest.mark.slow
def test_a_worker_without_a_broker(tmp_path: Path) -> None:
    """It waits a while, then says where it looked, and exits with 69."""
    code, lines = refusal("worker", f"broker.workers_bind=tcp://127.0.0.1:{free_port()}", folder=tmp_path)
    assert code == 69
    assert lines[-1].startswith("taesd-stream: no broker answers at tcp://127.0.0.1:")
    assert not any("ERROR" in line or "Traceback" in line for line in lines)
