"""The supervisor: starts the roles, hears when each is ready, restarts what died, and stops in data order."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from taesd_stream.config import AUTO, Config
from taesd_stream.errors import ConfigError, TaesdStreamError

logger = logging.getLogger(__name__)

READY_S: Final = 60.0  # a worker imports torch and opens its device
SILENT_S: Final = 20.0  # no tick for so long: hung
STOP_S: Final = 2.0  # of each role; the whole stop takes under 5 s
QUICK_DEATHS: Final = 5  # in a row, each within STEADY_S of its start: give up
STEADY_S: Final = 30.0
MAX_BACKOFF_S: Final = 10.0
USAGE_EXIT: Final = 2


class GaveUpError(TaesdStreamError):
    """A role dies each time it is started."""


@dataclass(slots=True)
class Role:
    """One child process, by name: "broker", "worker 0", "streamer"."""

    name: str
    command: str
    config: Config
    process: subprocess.Popen[bytes] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    is_ready: bool = False
    started_s: float = 0.0
    heard_s: float = 0.0
    deaths: int = 0
    restart_at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Addresses:
    """What was bound, ports resolved."""

    web: str
    broker: str
    workers: str
    packets: str


class Supervisor:
    """Broker, decode workers and streamer of one host. `with` starts and stops them; `run` watches over them."""

    def __init__(self, config: Config, *, workers: int = 1, is_verbose: bool = False) -> None:
        self._workers = workers
        self._is_verbose = is_verbose
        self._folder = tempfile.TemporaryDirectory(prefix="taesd-stream-", ignore_cleanup_errors=True)
        self._config = _with_inner_sockets(config, Path(self._folder.name))
        self._roles: dict[str, Role] = {}
        self._reports: queue.SimpleQueue[tuple[Role, int, dict[str, Any] | None]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self.addresses: Addresses | None = None

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> Addresses:
        """Start every role and wait until each is ready.

        Returns: where people and samplers reach it. Raises: ConfigError when a role refuses its settings.
        """
        broker = self._start_role("broker", "broker", self._config)
        self._wait_ready([broker])
        # A restarted broker must be where the others look for it: from now on its ports are fixed.
        bind, workers_bind = broker.facts["bind"], broker.facts["workers_bind"]
        self._config = self._config.with_values(broker={"bind": bind, "workers_bind": workers_bind})
        broker.config = self._config
        started = [self._start_role("streamer", "streamer", self._config)]
        started += [self._start_role(f"worker {number}", "worker", self._config) for number in range(self._workers)]
        self._wait_ready(started)
        streamer = started[0]
        web = streamer.facts["web"]
        streamer.config = self._config.with_values(
            web={"bind": web.removeprefix("http://")}, streamer={"packets_bind": streamer.facts["packets_bind"]}
        )
        self.addresses = Addresses(web, bind, workers_bind, streamer.facts["packets_bind"])
        return self.addresses

    def run(self) -> None:
        """Watch until told to stop. Raises: GaveUpError when a role dies again and again."""
        while not self._stop.is_set():
            self._take_report(timeout_s=0.2)
            now = time.monotonic()
            for role in self._roles.values():
                if role.process is None:
                    if now >= role.restart_at_s:
                        self._spawn(role)
                elif role.process.poll() is not None:
                    self._on_death(role)
                elif now - role.heard_s > (SILENT_S if role.is_ready else READY_S):
                    logger.error("role_hung role=%s", role.name)
                    role.process.kill()

    def stop(self) -> None:
        """Make `run` return. Any thread, and signal handlers."""
        self._stop.set()

    def close(self) -> None:
        """Stop the roles in data order: no new latents, what is decoded reaches its file, files are closed."""
        for command in ("broker", "worker", "streamer"):
            children = [role.process for role in self._roles.values() if role.command == command and role.process]
            for process in children:
                if process.stdin is not None:
                    with contextlib.suppress(OSError):
                        process.stdin.close()
            for process in children:
                _wait_or_kill(process)
        self._roles.clear()
        self._folder.cleanup()

    def status(self) -> list[dict[str, Any]]:
        """Each role, its process and whether it is ready."""
        return [
            {"role": role.name, "pid": role.process.pid if role.process else None, "ready": role.is_ready, **role.facts}
            for role in self._roles.values()
        ]

    def _start_role(self, name: str, command: str, config: Config) -> Role:
        role = self._roles[name] = Role(name, command, config)
        self._spawn(role)
        return role

    def _spawn(self, role: Role) -> None:
        verbose = ["--verbose"] if self._is_verbose else []
        # A session of its own: Ctrl-C reaches us alone, and we stop the roles in data order.
        role.process = subprocess.Popen(
            [sys.executable, "-m", "taesd_stream_workers.cli", role.command, "--config", "-", *verbose],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert role.process.stdin is not None
        role.is_ready = False
        role.started_s = role.heard_s = time.monotonic()
        threading.Thread(target=self._listen, args=(role, role.process), daemon=True).start()
        with contextlib.suppress(OSError):  # it may be dead already: then its exit code tells
            role.process.stdin.write(role.config.to_json().encode() + b"\n")
            role.process.stdin.flush()

    def _listen(self, role: Role, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                self._reports.put((role, process.pid, json.loads(line)))
        self._reports.put((role, process.pid, None))

    def _take_report(self, timeout_s: float) -> None:
        try:
            role, pid, report = self._reports.get(timeout=timeout_s)
        except queue.Empty:
            return
        if role.process is None or role.process.pid != pid or report is None:
            return
        role.heard_s = time.monotonic()
        if "ready" in report:
            role.facts = {key: value for key, value in report.items() if key != "ready"}
            role.is_ready = True
            logger.info("role_ready role=%s %s", role.name, " ".join(f"{k}={v}" for k, v in role.facts.items()))

    def _wait_ready(self, roles: list[Role]) -> None:
        deadline_s = time.monotonic() + READY_S
        while not all(role.is_ready for role in roles):
            self._take_report(timeout_s=0.1)
            for role in roles:
                code = role.process.poll() if role.process else None
                if code == USAGE_EXIT:
                    raise ConfigError("")  # the role has said why, in its one line
                if code is not None:
                    raise GaveUpError(f"the {role.name} ended with exit code {code} before it was ready")
            if self._stop.is_set():
                raise KeyboardInterrupt
            if time.monotonic() > deadline_s:
                late = ", ".join(role.name for role in roles if not role.is_ready)
                raise GaveUpError(f"not ready after {READY_S:.0f} s: {late}")

    def _on_death(self, role: Role) -> None:
        assert role.process is not None
        code, lived_s = role.process.returncode, time.monotonic() - role.started_s
        role.deaths = role.deaths + 1 if lived_s < STEADY_S else 1
        if role.deaths > QUICK_DEATHS:
            raise GaveUpError(f"the {role.name} ended {role.deaths} times in a row, last with exit code {code}")
        delay_s = min(MAX_BACKOFF_S, 0.2 * 2 ** (role.deaths - 1))
        logger.error("role_ended role=%s exit_code=%s restart_in_s=%.1f", role.name, code, delay_s)
        _close_pipes(role.process)
        role.process, role.is_ready = None, False
        role.restart_at_s = time.monotonic() + delay_s


def _with_inner_sockets(config: Config, folder: Path) -> Config:
    """Sockets between the roles: files in a folder made for this daemon; where there are none, free local ports."""
    if sys.platform == "win32":
        workers, packets = "tcp://127.0.0.1:0", "tcp://127.0.0.1:0"
    else:
        workers, packets = f"ipc://{folder / 'workers'}", f"ipc://{folder / 'packets'}"
    if config.broker.workers_bind == AUTO:
        config = config.with_values(broker={"workers_bind": workers})
    if config.streamer.packets_bind == AUTO:
        config = config.with_values(streamer={"packets_bind": packets})
    return config


def _wait_or_kill(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        logger.error("role_killed pid=%d", process.pid)
        process.kill()
        process.wait()
    _close_pipes(process)


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Any:
    """Ctrl-C and SIGTERM call `stop` for the time of the `with`."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
