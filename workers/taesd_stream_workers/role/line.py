"""A role's line to another role: what it is told at the door goes to the log, and its poller follows the socket."""

from __future__ import annotations

import logging
import time
from typing import Final

import zmq

from taesd_stream.line import Line

logger = logging.getLogger(__name__)

LOOK_S: Final = 0.1  # a look takes the GIL twice, and what it learns can wait


class RoleLine(Line):
    """One thread's. `attend` once a turn of the loop."""

    _said: str | None = None
    _next_look_s = 0.0

    def attend(self, poller: zmq.Poller | None = None) -> None:
        """See to it that somebody lets us in, and say when nobody does. poller: where the socket is waited for."""
        now = time.monotonic()
        if now < self._next_look_s:
            return
        self._next_look_s = now + LOOK_S
        old = self.socket
        if self.look() and poller is not None:
            poller.unregister(old)
            poller.register(self.socket, zmq.POLLIN)
        if self.error != self._said:
            if self.error is not None:
                logger.error("not_let_in %s", self.error)
            self._said = self.error
