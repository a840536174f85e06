"""The supervisor: starts the roles, hears when each is ready, restarts what died, and stops in data order."""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from taesd_stream.config import AUTO, Config, PeerDaemon
from taesd_stream.errors import ConfigError, TaesdStreamError
from taesd_stream_workers.role.addresses import MAX_IPC_PATH_BYTES
from taesd_stream_workers.role.gpus import devices
from taesd_stream_workers.role.process import Reports, Role
from taesd_stream_workers.role.service_manager import ServiceManager

logger = logging.getLogger(__name__)

READY_S: Final = 60.0  # a worker imports torch and opens its device
SILENT_S: Final = 20.0  # no tick for so long: hung; over Lifecycle's own limit, which prints where it hangs
AWAY_S: Final = 5.0  # our own loop stood for so long: whoever was silent may have spoken to a deaf ear
QUICK_DEATHS: Final = 5  # in a row, each within STEADY_S of its start: give up
STEADY_S: Final = 30.0
MAX_BACKOFF_S: Final = 10.0
LAST_WORDS_S: Final = 1.0  # a process that has ended has its report in the pipe
USAGE_EXIT: Final = 2
# In data order: no new latents, what is decoded reaches its file, files are closed. When each must have ended,
# seconds from the word to stop: the streamer has most to close, and with our own exit it is under 5 s.
STOP_BY_S: Final[Mapping[str, float]] = {"broker": 1.5, "worker": 2.5, "streamer": 4.4}


class GaveUpError(TaesdStreamError):
    """A role dies each time it is started."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """What was bound, ports resolved."""

    web: str
    broker: str
    workers: str
    packets: str


class Supervisor:
    """Broker, decode workers and streamer of one host. `with` stops them at its end; `run` watches over them."""

    def __init__(self, config: Config, *, name: str = "", options: Sequence[str] = ()) -> None:
        """name: of this daemon where there are several. options: words that every role's command gets, as --verbose."""
        self._name = name
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="taesd-stream-", ignore_cleanup_errors=True)
        self._config = _with_inner_sockets(config, Path(self._folder.name))
        self._roles: dict[str, Role] = {}
        self._reports: Reports = queue.SimpleQueue()
        self._stop = threading.Event()
        self._manager = ServiceManager.from_environment()

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_peers(self, peers: Sequence[PeerDaemon]) -> None:
        """Daemons whose streams the page shows too; before `start`."""
        self._config = self._config.model_copy(update={"peers": (*self._config.peers, *peers)})

    def start(self) -> Addresses | None:
        """Start every role and wait until each is ready.

        Returns: where people and samplers reach it; None when told to stop before that.
        Raises: ConfigError when a role refuses its settings, GaveUpError when one does not get ready.
        """
        broker = self._start_role("broker", "broker")
        if not self._wait_ready():
            return None
        # A restarted role must be where the others look for it: from now on its ports are fixed.
        bind, workers_bind = broker.facts["bind"], broker.facts["workers_bind"]
        self._config = self._config.with_values(broker={"bind": bind, "workers_bind": workers_bind})
        streamer = self._start_role("streamer", "streamer")
        for number, device in enumerate(devices(self._config.decoder.device, self._config.decoder.min_free_bytes)):
            self._start_role(f"worker {number}", "worker", device)
        if not self._wait_ready():
            return None
        web, packets_bind = streamer.facts["web"], streamer.facts["packets_bind"]
        web_host = self._config.web.bind.rpartition(":")[0]
        self._config = self._config.with_values(
            web={"bind": f"{web_host}:{streamer.facts['web_port']}"}, streamer={"packets_bind": packets_bind}
        )
        for role in self._roles.values():
            role.config = self._config_of(role)
        self._manager.ready(f"page at {web}, samplers at {bind}")
        return Addresses(web, bind, workers_bind, packets_bind)

    def run(self) -> None:
        """Watch until told to stop. Raises: GaveUpError when a role dies again and again."""
        looked_s = time.monotonic()
        while not self._stop.is_set():
            self._take_reports(timeout_s=0.2)
            now = time.monotonic()
            if now - looked_s > AWAY_S:  # Ctrl-Z, a debugger, a machine that was paused
                for role in self._roles.values():
                    role.heard_s = now
            looked_s = now
            self._manager.progress()
            for role in self._roles.values():
                self._look_after(role, now)

    def stop(self) -> None:
        """Make `start` and `run` return. Any thread, and signal handlers."""
        self._stop.set()

    def close(self) -> None:
        """Stop the roles in data order."""
        self._manager.stopping()
        begun_s = time.monotonic()
        for command, by_s in STOP_BY_S.items():
            mine = [role for role in self._roles.values() if role.command == command]
            for role in mine:
                role.ask_to_stop()
            for role in mine:
                role.wait_or_kill(begun_s + (by_s if role.is_ready else 0.0))
        self._roles.clear()
        self._folder.cleanup()

    def status(self) -> list[dict[str, Any]]:
        """Each role, its process, whether it is ready, and what it said then."""
        return [
            {"role": name, "pid": role.process.pid if role.process else None, "ready": role.is_ready, **role.facts}
            for name, role in self._roles.items()
        ]

    def _start_role(self, name: str, command: str, device: str = "") -> Role:
        full_name = f"{self._name}/{name}" if self._name else name
        role = self._roles[name] = Role(full_name, command, self._config, device=device)
        role.config = self._config_of(role)
        role.spawn(self._options, self._reports)
        return role

    def _config_of(self, role: Role) -> Config:
        return self._config.with_values(decoder={"device": role.device}) if role.device else self._config

    def _take_reports(self, timeout_s: float) -> None:
        """Wait for a report, then take all that are there."""
        with contextlib.suppress(queue.Empty):
            role, pid, report = self._reports.get(timeout=timeout_s)
            while True:
                if role.take(pid, report):
                    facts = " ".join(f"{key}={value}" for key, value in role.facts.items())
                    logger.info("role_ready role=%s %s", role.name, facts)
                role, pid, report = self._reports.get_nowait()

    def _wait_ready(self) -> bool:
        """Whether all that was started is ready; False when told to stop before that."""
        deadline_s = time.monotonic() + READY_S
        while not self._stop.is_set():
            self._take_reports(timeout_s=0.1)
            for role in self._roles.values():
                code = role.process.poll() if role.process else None
                if code == USAGE_EXIT:
                    raise ConfigError(self._refusal_of(role))
                if code is not None:
                    raise GaveUpError(f"the {role.name} ended with exit code {code} before all was ready")
            late = [role.name for role in self._roles.values() if not role.is_ready]
            if not late:
                return True
            if time.monotonic() > deadline_s:
                raise GaveUpError(f"not ready after {READY_S:.0f} s: {', '.join(late)}")
        return False

    def _refusal_of(self, role: Role) -> str:
        """What a role that has ended said last; empty where it has said it itself, having no config yet."""
        if role.listener is not None:
            role.listener.join(LAST_WORDS_S)
        self._take_reports(timeout_s=0.0)
        return role.refusal

    def _look_after(self, role: Role, now: float) -> None:
        if role.process is None:
            if now >= role.restart_at_s:
                self._start_again(role)
        elif role.process.poll() is not None:
            self._on_death(role, role.process.returncode)
        elif now - role.heard_s > (SILENT_S if role.is_ready else READY_S):
            logger.error("role_hung role=%s silent_s=%.0f", role.name, now - role.heard_s)
            role.process.kill()
            role.heard_s = now

    def _start_again(self, role: Role) -> None:
        try:
            role.spawn(self._options, self._reports)
        except OSError as error:  # no memory for a process, or too many of them: that passes
            self._back_off(role, f"no process: {error.strerror}")

    def _on_death(self, role: Role, code: int) -> None:
        if code == USAGE_EXIT and (refusal := self._refusal_of(role)):
            logger.error("role_refused role=%s %s", role.name, refusal)
        self._back_off(role, f"exit code {code}")

    def _back_off(self, role: Role, reason: str) -> None:
        """It does not run: it is started again, later each time. Raises: GaveUpError where nothing works without it."""
        now = time.monotonic()
        role.deaths = role.deaths + 1 if now - role.started_s < STEADY_S else 1
        others = (one for one in self._roles.values() if one is not role and one.command == role.command)
        if role.deaths > QUICK_DEATHS and not any(one.is_ready for one in others):
            raise GaveUpError(f"the {role.name} ended {role.deaths} times in a row, last with {reason}")
        delay_s = min(MAX_BACKOFF_S, 0.2 * 2 ** min(role.deaths - 1, QUICK_DEATHS))
        logger.error("role_ended role=%s reason=%r restart_in_s=%.1f", role.name, reason, delay_s)
        role.drop_process(now + delay_s)


def _with_inner_sockets(config: Config, folder: Path) -> Config:
    """Sockets between the roles: files in a folder made for this daemon; where there can be none, free local ports."""
    workers, packets = f"ipc://{folder / 'workers'}", f"ipc://{folder / 'packets'}"
    if sys.platform == "win32" or len(str(folder / "workers").encode()) > MAX_IPC_PATH_BYTES:
        workers = packets = "tcp://127.0.0.1:0"
    if config.broker.workers_bind == AUTO:
        config = config.with_values(broker={"workers_bind": workers})
    if config.streamer.packets_bind == AUTO:
        config = config.with_values(streamer={"packets_bind": packets})
    return config


@contextlib.contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and the terminal's end call `stop` for the time of the `with`; under nohup its end does not."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop()

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
