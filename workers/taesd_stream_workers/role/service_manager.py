"""What systemd is told of this process: ready, still making progress, stopping. Silent where no systemd listens."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Final

NOTIFY_SOCKET: Final = "NOTIFY_SOCKET"


def take_notify_socket() -> str | None:
    """The service manager's socket, taken out of the environment: our children must not speak in our name.

    A leading @ is an abstract socket's NUL. Source: sd_notify(3).
    """
    address = os.environ.pop(NOTIFY_SOCKET, "")
    return "\0" + address[1:] if address.startswith("@") else address or None


class ServiceManager:
    """Where to say READY=1, WATCHDOG=1 and STOPPING=1 (sd_notify(3)); one datagram each, never waited for."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    @classmethod
    def from_environment(cls) -> ServiceManager:
        """The one that started us, if it asked to be told."""
        return cls(take_notify_socket())

    def ready(self, status: str) -> None:
        """Sockets are bound, models are warm: the unit counts as started."""
        self._say(f"READY=1\nSTATUS={_one_line(status)}")

    def progress(self) -> None:
        """The loop that does the work went round. Only that loop may say so: a hung one must be found out."""
        self._say("WATCHDOG=1")

    def stopping(self) -> None:
        """Told to stop, closing."""
        self._say("STOPPING=1\nSTATUS=closing files")

    def _say(self, text: str) -> None:
        if self._address is None:
            return
        # A manager that restarts, or does not read, is no reason for us to fail or wait.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto(text.encode(), self._address)


def _one_line(text: str) -> str:
    return text.replace("\n", " ")
