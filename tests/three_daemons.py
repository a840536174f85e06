"""Three real daemons, of which the first has the others as its peers."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from taesd_stream import LatentPublisher
from tests.daemon import Daemon, wait_for
from tests.pictures import PATCHES, sd1_latents_of

COLOURS = {"one": PATCHES["red"], "two": PATCHES["green"], "three": PATCHES["blue"]}


def peers(*urls: str) -> dict[str, str]:
    """The environment of a daemon that has these peers."""
    return {"TAESD_STREAM_PEERS": json.dumps([{"url": url} for url in urls])}


class ThreeDaemons:
    """Three daemons. The second has the first as its peer too, so that something could go round."""

    def __init__(self, folder: Path) -> None:
        # Bound, so that nothing else takes the port; not listening, so that a daemon that wants it may have it, too.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self._port = self._held.getsockname()[1]
        self.folder = folder
        self.second = self._daemon("second", peers(f"http://127.0.0.1:{self._port}"))
        self.third = self._daemon("third", {})

    def _daemon(self, name: str, environment: Mapping[str, str], *sets: str) -> Daemon:
        folder = self.folder / name
        folder.mkdir()
        return Daemon(folder, "decoder.threads=1", *sets, environment=environment)

    def __enter__(self) -> ThreeDaemons:
        self._stack = ExitStack()
        self._stack.enter_context(self._held)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self._stack.enter_context, (self.second, self.third)))
        bind = f"web.bind=127.0.0.1:{self._port}"
        self.first = self._daemon("first", peers(self.second.web, self.third.web), bind)
        self._stack.enter_context(self.first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if kind is None:
            for daemon in self.daemons.values():
                assert "Traceback" not in daemon.log(), daemon.log()[-3000:]

    @property
    def daemons(self) -> dict[str, Daemon]:
        return {"one": self.first, "two": self.second, "three": self.third}

    def publish(
        self, stack: ExitStack, prefix: str, *, total_steps: int | None = None, **options: Any
    ) -> dict[str, LatentPublisher]:
        """A stream at each daemon, each of one colour: one/PREFIX at the first, two/PREFIX, three/PREFIX."""
        publishers = {}
        for name, daemon in self.daemons.items():
            publisher = LatentPublisher(daemon.broker, stream=f"{name}/{prefix}", latent_format="sd1", **options)
            publishers[name] = stack.enter_context(publisher)
            publisher.publish(sd1_latents_of(COLOURS[name]), step=0, total_steps=total_steps)
        wait_for(lambda: {one.stream for one in publishers.values()} <= self.first.streams().keys(), of="all streams")
        return publishers


def assert_shows(picture: Any, name: str) -> None:
    """A picture is of the colour of a daemon's stream."""
    assert np.abs(picture.mean(axis=(0, 1)) - COLOURS[name]).max() <= 8, name
