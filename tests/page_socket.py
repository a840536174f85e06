"""A page's WebSocket for tests without a browser: watches streams, takes their pictures."""

from __future__ import annotations

import json
import struct
import time
from types import TracebackType
from typing import Any

import numpy as np
from websockets.sync.client import connect

from taesd_stream import LatentPublisher
from tests.daemon import Daemon


class PageSocket:
    """A viewer as the page is one. `pictures` yields (header, payload)."""

    def __init__(self, daemon: Daemon) -> None:
        self._connection = connect(daemon.web.replace("http", "ws") + "/ws", max_size=None)
        self.state: dict[str, Any] = {}
        self.hello: dict[str, Any] = {}
        self._watched: dict[str, str] = {}

    def __enter__(self) -> PageSocket:
        self._socket = self._connection.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.__exit__(kind, error, trace)

    def say(self, message_type: str, **fields: Any) -> None:
        """Send one message."""
        self._socket.send(json.dumps({"type": message_type, **fields}))

    def watch(self, streams: dict[str, str]) -> None:
        """Watch these renditions of these streams, by name, and no others."""
        self._watched = streams
        self.say("watch", streams=streams)

    def picture(self, timeout_s: float = 20.0) -> tuple[dict[str, Any], bytes]:
        """The next picture of what is watched; gives its credit back. What was under way before is passed over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            message = self._socket.recv(timeout=max(0.01, deadline_s - time.monotonic()))
            if isinstance(message, bytes):
                (length,) = struct.unpack_from(">I", message)
                header: dict[str, Any] = json.loads(message[4 : 4 + length])
                if header["rendition"] != "live":
                    self.say("credit", stream=header["stream"], rendition=header["rendition"])
                if self._watched.get(header["stream"]) == header["rendition"]:
                    return header, message[4 + length :]
                continue
            self._take_text(json.loads(message))

    def next_state(self, timeout_s: float = 20.0) -> dict[str, Any]:
        """The next state that is told; pictures that come before it are passed over."""
        self.state = {}
        deadline_s = time.monotonic() + timeout_s
        while not self.state:
            message = self._socket.recv(timeout=max(0.01, deadline_s - time.monotonic()))
            if isinstance(message, str):
                self._take_text(json.loads(message))
        return self.state

    def _take_text(self, message: dict[str, Any]) -> None:
        if message["type"] == "state":
            self.state = message
        elif message["type"] == "hello":
            self.hello = message


def await_wishes(daemon: Daemon) -> None:
    """What the daemon was asked for has reached its broker: behind it a picture is asked for, and comes.

    A publisher that opens from here on is told of it; its own connection would be in no order with the wish.
    """
    latents = np.zeros((4, 2, 2), np.float32)
    with PageSocket(daemon) as page, LatentPublisher(daemon.broker, stream="wishes", latent_format="sd1") as publisher:
        publisher.publish(latents, step=0, total_steps=1)
        page.watch({"wishes": "thumb"})
        page.picture()
