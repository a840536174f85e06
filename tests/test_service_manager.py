"""What systemd hears of a real role: started when bound, alive while its loop goes round, and when it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from taesd_stream_workers.role.service_manager import ServiceManager, take_notify_socket
from tests.daemon import COMMAND, Daemon, clean_environment

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="systemd is Linux's")


@contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(str(path))
        ours.settimeout(30)
        yield ours


def heard(ours: socket.socket, word: str) -> list[str]:
    """Everything that is said until `word` is, that included."""
    said = [ours.recv(4096).decode()]
    while word not in said[-1].split("\n"):
        said.append(ours.recv(4096).decode())
    return said


def test_a_role_says_ready_when_bound_then_progress_then_stopping(tmp_path: Path) -> None:
    """READY=1 comes with the bound address, WATCHDOG=1 from the loop, STOPPING=1 after SIGTERM."""
    sets = (
        "broker.bind=tcp://127.0.0.1:0",
        f"broker.workers_bind=ipc://{tmp_path}/workers",
        f"recording.folder={tmp_path}/r",
    )
    with listening(tmp_path / "notify") as ours:
        role = subprocess.Popen(
            [*COMMAND, "broker", *(word for one in sets for word in ("--set", one))],
            stdout=subprocess.DEVNULL,
            env={**clean_environment(tmp_path), "NOTIFY_SOCKET": str(tmp_path / "notify")},
        )
        try:
            first = heard(ours, "READY=1")
            assert len(first) == 1, first  # nothing before it: a watchdog must not count a start as progress
            assert "STATUS=bind=tcp://127.0.0.1:" in first[0]
            heard(ours, "WATCHDOG=1")
            role.send_signal(signal.SIGSTOP)
            ours.settimeout(2.5)  # over two ticks: what stands still says nothing
            with pytest.raises(TimeoutError):
                heard(ours, "nothing")
            role.send_signal(signal.SIGCONT)
            ours.settimeout(30)
            role.terminate()
            heard(ours, "STOPPING=1")
            assert role.wait(20) == 0
        finally:
            role.kill()
            role.wait()


@pytest.mark.slow
def test_a_daemon_speaks_for_itself_and_its_roles_do_not(tmp_path: Path) -> None:
    """`up` says ready once, when the whole daemon is, in its own process; no role has the socket's name."""
    with listening(tmp_path / "notify") as ours:
        with Daemon(tmp_path, environment={"NOTIFY_SOCKET": str(tmp_path / "notify")}) as daemon:
            assert f"page at {daemon.web}" in heard(ours, "READY=1")[-1]
            for role in ("broker", "streamer", "worker 0"):
                environment = Path(f"/proc/{daemon.pid_of(role)}/environ").read_bytes()
                assert b"NOTIFY_SOCKET" not in environment, role
            heard(ours, "WATCHDOG=1")
        heard(ours, "STOPPING=1")


def test_an_abstract_socket_and_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """@NAME is an abstract socket; without the variable nothing is said, and a socket that is gone is no error."""
    name = f"@taesd-stream-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind("\0" + name[1:])
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        ServiceManager.from_environment().ready("two\nlines")
        assert ours.recv(4096) == b"READY=1\nSTATUS=two lines"
    assert take_notify_socket() is None
    ServiceManager(str(tmp_path / "gone")).progress()
