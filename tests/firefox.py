"""Firefox for tests, by its own Marionette protocol: a length, a colon, and JSON, over TCP. No driver is needed."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from tests.daemon import wait_for


class Firefox:
    """`with Firefox(folder) as firefox:` runs one, headless; the test skips where there is none."""

    def __init__(self, folder: Path) -> None:
        self._profile = folder / "profile"
        self._numbers = itertools.count()

    def __enter__(self) -> Firefox:
        path = shutil.which("firefox-esr") or shutil.which("firefox")
        if path is None:
            pytest.skip("no Firefox on the path")
        self._profile.mkdir()
        (self._profile / "user.js").write_text('user_pref("marionette.port", 0);\n')
        command = [path, "-headless", "-marionette", "-no-remote", "-profile", str(self._profile)]
        environment = {"HOME": str(self._profile.parent), "PATH": "/usr/bin:/bin"}
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        port_file = self._profile / "MarionetteActivePort"
        port = wait_for(lambda: port_file.read_text() if port_file.exists() else None, 60.0, of="Firefox")
        self._socket = socket.create_connection(("127.0.0.1", int(port)), timeout=60)
        self._receive()  # its greeting
        self._call("WebDriver:NewSession", {})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(20)

    def go(self, url: str) -> None:
        """Load an address."""
        self._call("WebDriver:Navigate", {"url": url})

    def run(self, script: str) -> Any:
        """What a function body returns in the page."""
        return self._call("WebDriver:ExecuteScript", {"script": script, "args": []})["value"]

    def wait_until(self, expression: str, timeout_s: float = 30.0) -> None:
        """Wait until an expression is true in the page."""
        wait_for(lambda: self.run(f"return Boolean({expression})"), timeout_s, of=expression)

    def _call(self, command: str, parameters: dict[str, Any]) -> Any:
        number = next(self._numbers)
        data = json.dumps([0, number, command, parameters]).encode()
        self._socket.sendall(f"{len(data)}:".encode() + data)
        _, answered, error, result = self._receive()
        assert (answered, error) == (number, None), error
        return result

    def _receive(self) -> Any:
        head = b""
        while not head.endswith(b":"):
            head += self._socket.recv(1)
        wanted = int(head[:-1])
        body = b""
        while len(body) < wanted:
            body += self._socket.recv(wanted - len(body))
        return json.loads(body)
