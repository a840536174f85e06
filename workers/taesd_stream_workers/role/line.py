"""A role's line to another role: what it is told at the door goes to the log, and its poller follows the socket."""

from __future__ import annotations

import logging

import zmq

from taesd_stream.line import Line

logger = logging.getLogger(__name__)


class RoleLine(Line):
    """One thread's. `attend` once a turn of the loop."""

    _said: str | None = None

    def attend(self, poller: zmq.Poller | None = None) -> None:
        """See to it that somebody lets us in, and say when nobody does. poller: where the socket is waited for."""
        old = self.socket
        if self.look() and poller is not None:
            poller.unregister(old)
            poller.register(self.socket, zmq.POLLIN)
        if self.error != self._said:
            if self.error is not None:
                logger.error("not_let_in %s", self.error)
            self._said = self.error
