"""What goes wrong around a daemon, done on purpose: roles killed, stopped or hung, garbage, floods, deaf viewers."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import zmq

from taesd_stream import wire
from taesd_stream.sockets import dial
from tests.daemon import Daemon, wait_for
from tests.golden_messages import BROKEN, FRAME
from tests.golden_messages import OPEN as GOLDEN_OPEN
from tests.processes import role_pid

# A worker in whose processes this lies on the path hangs, with the interpreter's lock held, when it gets SIGUSR1.
HANG: Final = """
import ctypes, signal, sys
if "worker" in sys.argv or "worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, lambda *_: ctypes.PyDLL(None).sleep(600))
"""

PATIENT: Final = """
from taesd_stream_workers import supervisor
supervisor.STOP_BY_S = {role: 3 * by_s for role, by_s in supervisor.STOP_BY_S.items()}
"""


def hangable(folder: Path) -> dict[str, str]:
    """The environment of a daemon whose worker can be hung by SIGUSR1."""
    return _customized(folder, HANG)


def patient(folder: Path) -> dict[str, str]:
    """The environment of a daemon that kills a role only after three times as long as usual, on a busy machine."""
    return _customized(folder, PATIENT)


def _customized(folder: Path, code: str) -> dict[str, str]:
    """Every Python process of the daemon runs the code first."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def pid_of(daemon: Daemon, role: str) -> int:
    """The process of a role that runs now."""
    return wait_for(lambda: role_pid(daemon.process.pid, role), 60, of=f"a {role}")


def kill(daemon: Daemon, role: str) -> None:
    """SIGKILL."""
    os.kill(pid_of(daemon, role), signal.SIGKILL)


def hang(daemon: Daemon) -> None:
    """The worker holds the interpreter's lock for ever; needs `hangable`."""
    os.kill(pid_of(daemon, "worker"), signal.SIGUSR1)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP, and SIGCONT at the end."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def send_garbage(daemon: Daemon) -> None:
    """Every broken message that we know, from one client."""
    with _client(daemon) as client:
        for broken in BROKEN.values():
            client.send_multipart([bytes(part) for part in broken.parts] or [b""])


def flood(daemon: Daemon, seconds: float) -> int:
    """Frames of one run, as fast as the connection takes them, paying heed to nothing. Returns how many."""
    run, sent, until_s = "00000000000000f1", 0, time.monotonic() + seconds
    with _client(daemon) as client:
        client.send_multipart(
            wire.pack(dataclasses.replace(GOLDEN_OPEN, stream="flood", run=run, kind="steps", latent_format="sd1"))
        )
        while time.monotonic() < until_s:
            client.send_multipart(wire.pack(dataclasses.replace(FRAME, run=run, seq=sent, index=sent, kept=False)))
            sent += 1
    return sent


@contextmanager
def deaf_viewer(daemon: Daemon, stream: str, name: str = "live.mjpeg") -> Iterator[None]:
    """A player that asks for a stream and never reads. name: of what it asks for."""
    parts = urlsplit(daemon.web)
    wait_for(lambda: stream in daemon.streams(), of="the stream")  # else it is told 404, and gone
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect((parts.hostname, parts.port))
        one.sendall(f"GET /streams/{stream}/{name} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        yield


@contextmanager
def slow_reader(daemon: Daemon, stream: str) -> Iterator[None]:
    """A player that reads a few bytes now and then."""
    over = threading.Event()
    parts = urlsplit(daemon.web)
    wait_for(lambda: stream in daemon.streams(), of="the stream")  # else it is told 404, and gone
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect((parts.hostname, parts.port))
        one.sendall(f"GET /streams/{stream}/live.mjpeg HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())

        def read() -> None:
            with suppress(OSError):
                while not over.wait(0.05) and one.recv(256):
                    pass

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield
        finally:
            over.set()
            with suppress(OSError):  # it was let go
                one.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextmanager
def _client(daemon: Daemon) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    client = dial(context, zmq.DEALER, daemon.broker, hwm=100)
    try:
        client.setsockopt(zmq.SNDTIMEO, 20_000)
        yield client
    finally:
        client.close(linger=0)
        context.term()
