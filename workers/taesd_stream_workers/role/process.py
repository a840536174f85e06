"""One role as a child process: its config goes in by stdin, its reports come out of stdout, closing stdin ends it."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from taesd_stream.config import Config

logger = logging.getLogger(__name__)

Reports: TypeAlias = "queue.SimpleQueue[tuple[Role, int, dict[str, Any]]]"  # who, in which process, what it said


@dataclass(slots=True)
class Role:
    """A child by name. All but the listening runs in the supervisor's thread.

    name: what log lines call it, its own too: "broker", "worker 0", "daemon-2/streamer". device: of a decode worker.
    facts: what it said when it was ready, its bound addresses among them. deaths: in a row, each soon after a start.
    refusal: why the process that ran last would not have its settings.
    """

    name: str
    command: str
    config: Config
    device: str = ""
    process: subprocess.Popen[bytes] | None = None
    listener: threading.Thread | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    is_ready: bool = False
    started_s: float = 0.0
    heard_s: float = 0.0
    deaths: int = 0
    refusal: str = ""
    restart_at_s: float = 0.0

    def spawn(self, options: Sequence[str], reports: Reports) -> None:
        """Start the process; from now on its reports come by the queue."""
        words = [self.command, "--config", "-", "--name", self.name, *options]
        # A session of its own: Ctrl-C reaches the supervisor alone, which stops the roles in data order.
        process = self.process = subprocess.Popen(
            [sys.executable, "-m", "taesd_stream_workers.cli", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.is_ready, self.refusal = False, ""
        self.started_s = self.heard_s = time.monotonic()
        self.listener = threading.Thread(target=self._listen, args=(process, reports), daemon=True)
        self.listener.start()
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it may be dead already: then its exit code tells
            process.stdin.write(self.config.to_json().encode() + b"\n")
            process.stdin.flush()

    def take(self, pid: int, report: dict[str, Any]) -> bool:
        """Take a report, if it is of the process that runs now. Returns whether the role became ready by it."""
        if self.process is None or self.process.pid != pid:
            return False
        self.heard_s = time.monotonic()
        self.refusal = str(report.get("refused", self.refusal))
        if "ready" not in report:
            return False
        self.facts = {key: value for key, value in report.items() if key != "ready"}
        self.is_ready = True
        return True

    def drop_process(self, restart_at_s: float) -> None:
        """The process is dead; another is due at that time."""
        self.ask_to_stop()
        self.process, self.is_ready, self.restart_at_s = None, False, restart_at_s

    def ask_to_stop(self) -> None:
        """Close its stdin: it ends by itself, its files closed."""
        if self.process is not None and self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    def wait_or_kill(self, deadline_s: float) -> None:
        """Wait for its end until a moment of time.monotonic(), then kill it."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            if self.is_ready:  # before that it has nothing to lose
                logger.error("role_killed role=%s pid=%d", self.name, self.process.pid)
            self.process.kill()
            self.process.wait()

    def _listen(self, process: subprocess.Popen[bytes], reports: Reports) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    report = json.loads(line)
                    if isinstance(report, dict):
                        reports.put((self, process.pid, report))
