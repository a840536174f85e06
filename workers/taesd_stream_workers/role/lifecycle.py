"""How a role lives: it says when it is ready and that it goes on, and ends when told to or when its parent is gone."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

from taesd_stream_workers.role.service_manager import ServiceManager

TICK_S: Final = 1.0
STILL_S: Final = 15.0  # a loop that has not ticked for so long prints its stacks and exits
HUNG_S: Final = 30.0  # work beside the loop that makes no progress for so long is hung
START_S: Final = 60.0  # imports, a device that is opened, files of a former process that are taken over
CLOSE_S: Final = 20.0


class Lifecycle:
    """One role process. Supervised: config came on stdin, so that pipe's end is the word to stop; stdout is the report.

    `stop` is set from a signal (started alone) or from the end of stdin (supervised). A role that can drain first does
    so at SIGTERM; a second one ends it.
    """

    def __init__(self, role: str, *, is_supervised: bool) -> None:
        self.role = role
        self.stop = threading.Event()
        self._is_supervised = is_supervised
        self._on_stop: list[Callable[[], None]] = []
        self._drain: Callable[[], None] | None = None
        self._next_tick_s = 0.0
        self._output = threading.Lock()
        self._manager = ServiceManager.from_environment()

    def start(self) -> None:
        """Watch for the word to stop; call in the main thread."""
        _exit_after(START_S)
        if self._is_supervised:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's, which stops us in data order
            threading.Thread(target=self._wait_for_stdin, name="lifeline", daemon=True).start()
        else:
            signal.signal(signal.SIGINT, self._handle_signal)
        signal.signal(signal.SIGTERM, self._handle_signal)

    def on_stop(self, wake: Callable[[], None]) -> None:
        """Also call `wake` when told to stop: it makes a poller return."""
        self._on_stop.append(wake)
        if self.stop.is_set():
            wake()

    def on_drain(self, drain: Callable[[], None]) -> None:
        """At the first SIGTERM call this instead; the role then ends by itself."""
        self._drain = drain

    def ready(self, **facts: object) -> None:
        """The sockets are bound, the model is warm: say so, with the addresses that were taken."""
        # What a role is made of stays. Else every full collection looks at it again, with all threads held meanwhile:
        # a worker's 190,000 objects take 70 ms, of a latency that is to be 50.
        gc.freeze()
        self._report({"ready": self.role, **facts})
        self._manager.ready(" ".join(f"{key}={value}" for key, value in facts.items()))

    def refuse(self, text: str) -> None:
        """These settings are not to be run with: tell the supervisor why."""
        self._report({"refused": text})

    def tick(self) -> None:
        """The loop made progress. Only the loop that does the work may call this."""
        now = time.monotonic()
        if now < self._next_tick_s:
            return
        self._next_tick_s = now + TICK_S
        _exit_after(STILL_S)
        self._manager.progress()
        if self._is_supervised:
            self._report({"tick": self.role})

    def end(self) -> None:
        """The loop is over. Closing too must come to an end, or a role would outlive a supervisor that was killed."""
        _exit_after(CLOSE_S)
        self._manager.stopping()

    def _report(self, line: dict[str, object]) -> None:
        with self._output, contextlib.suppress(OSError, ValueError):
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()

    def _wait_for_stdin(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(sys.stdin.fileno(), 4096):
                pass
        self._set_stop()

    def _handle_signal(self, number: int, _frame: FrameType | None) -> None:
        drain, self._drain = self._drain, None
        if number == signal.SIGTERM and drain is not None:
            drain()
        else:
            self._set_stop()

    def _set_stop(self) -> None:
        self.stop.set()
        for wake in self._on_stop:
            wake()


def _exit_after(limit_s: float) -> None:
    """Unless called again before: print every stack and exit with code 1.

    A thread of ours could not run while something holds the GIL; this timer can.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True)
