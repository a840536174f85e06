"""A real daemon for tests: `taesd-stream up` as a process, on free ports, in a folder of its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from tests.processes import children_of, lives

T = TypeVar("T")

COMMAND = [sys.executable, "-m", "taesd_stream_workers.cli"]
START_S = 60.0


def wait_for(what: Callable[[], T | None], timeout_s: float = 20.0, *, of: str = "the condition") -> T:
    """The first true answer of `what`, asked again and again until the deadline."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        found = what()
        if found:
            return found
        if time.monotonic() > deadline_s:
            raise AssertionError(f"{of}: not within {timeout_s} s")
        select.select([], [], [], 0.05)


def once_in_three(measure: Callable[[int], T], is_good: Callable[[T], bool]) -> None:
    """A measurement of time is good in one of three tries, numbered from 0: others may use the machine as well."""
    measured: list[T] = []
    while not measured or not is_good(measured[-1]):
        assert len(measured) < 3, measured
        measured.append(measure(len(measured)))


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def clean_environment(folder: Path) -> dict[str, str]:
    """This process's environment with a home of its own and no settings of ours."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("TAESD_STREAM_")}
    own = {"HOME": folder, "XDG_STATE_HOME": folder / "state", "XDG_CACHE_HOME": folder / "cache"}
    return kept | {key: str(path) for key, path in own.items()}


class Daemon:
    """`with Daemon(folder) as daemon:` runs one; it must end by Ctrl-C with exit code 0."""

    def __init__(
        self,
        folder: Path,
        *sets: str,
        command: str = "up",
        options: Iterable[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.recordings_folder = folder / "recordings"
        self._sets = [
            "broker.bind=tcp://127.0.0.1:0",
            "web.bind=127.0.0.1:0",
            f"recording.folder={self.recordings_folder}",
            *sets,
        ]
        self._command = (command, *options)
        self._environment = {**clean_environment(folder), **(environment or {})}

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        code = self.stop()
        if kind is None:
            assert code == 0, f"exit code {code}:\n{self.log()[-3000:]}"

    def start(self, *more_sets: str) -> None:
        """Start it and wait until every role is ready."""
        self.facts = self._spawn(*self._command, "--json", sets=(*self._sets, *more_sets))
        self.web: str = self.facts["web"]
        self.broker: str = self.facts["broker"]

    def _spawn(self, *command: str, sets: Iterable[str]) -> dict[str, Any]:
        """Start a command of ours with these keys set. Returns the line of JSON that it says once it is ready."""
        self._log = (self.folder / "daemon.log").open("ab")
        self.process = subprocess.Popen(
            [*COMMAND, *command, *(word for one in sets for word in ("--set", one))],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._environment,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], START_S)
        line = self.process.stdout.readline() if ready else b""
        assert line, f"{command[0]} did not start:\n{self.log()[-3000:]}"
        facts: dict[str, Any] = json.loads(line)
        return facts

    def stop(self, number: int = signal.SIGINT) -> int:
        """Send a signal and wait for the end. Returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            return self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()
            self._log.close()

    def kill(self) -> None:
        """SIGKILL of the supervisor. Its roles end by themselves, and until then their addresses are in use."""
        roles = children_of(self.process.pid)
        self.stop(signal.SIGKILL)
        wait_for(lambda: not any(lives(pid) for pid in roles), 30.0, of="the end of its roles")

    def log(self) -> str:
        """All that it logged."""
        return (self.folder / "daemon.log").read_text()

    def pid_of(self, role: str) -> int:
        """Process id of a role as it was at the start."""
        return next(int(row["pid"]) for row in self.facts["roles"] if row["role"] == role)

    def get(self, path: str, *, method: str = "GET", body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body of an HTTP answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 our own daemon
            self.web + path, data, {"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=15) as answer:  # noqa: S310
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def is_ready(self) -> bool:
        """Whether every role works; False also while nobody listens."""
        try:
            return self.get("/readyz")[0] == 200
        except OSError:
            return False

    def json(self, path: str, *, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        """Body of an HTTP answer that must be 200."""
        status, answer = self.get(path, method=method, body=body)
        assert status == 200, f"{method} {path}: {status} {answer[:300]!r}"
        return json.loads(answer)

    def streams(self) -> dict[str, dict[str, Any]]:
        """Rows of /api/v1/streams by name."""
        return {row["name"]: row for row in self.json("/api/v1/streams")["streams"]}

    def recording(self, run: str) -> dict[str, Any]:
        """The finished recording of a run, waited for."""

        def finished() -> dict[str, Any] | None:
            rows: list[dict[str, Any]] = self.json("/api/v1/recordings")["recordings"]
            return next((row for row in rows if row["run"] == run and row["state"] == "finished"), None)

        return wait_for(finished, 60.0, of=f"recording of {run}")

    def file(self, recording_id: str) -> Path:
        """A recording's file, downloaded."""
        status, body = self.get(f"/api/v1/recordings/{recording_id}/file")
        assert status == 200, body[:300]
        path = self.folder / f"{recording_id.replace('/', '-')}.downloaded.mp4"
        path.write_bytes(body)
        return path
