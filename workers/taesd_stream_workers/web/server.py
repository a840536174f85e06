"""The web thread: one event loop with uvicorn in it, on a socket that we bound ourselves."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Final
from urllib.parse import urlsplit

import uvicorn

from taesd_stream.config import Config
from taesd_stream.errors import ConfigError
from taesd_stream_workers.addresses import require_loopback
from taesd_stream_workers.hub import Hub
from taesd_stream_workers.recorder import Recorder
from taesd_stream_workers.web.api import make_app

# A reader that stalls is held back by the kernel's buffers too: kept small, they hold no seconds of stale video.
SEND_BUFFER_BYTES: Final = 256 << 10
GRACE_S: Final = 1  # an endless stream must not hold the exit


class WebServer:
    """The page and the HTTP interface, in a thread of their own."""

    def __init__(self, config: Config, hub: Hub, recorder: Recorder) -> None:
        self._address = require_loopback("web.bind", config.web.bind)
        self._hub = hub
        self._recorder = recorder
        self._thread = threading.Thread(target=self._run, name="web")
        self._server: uvicorn.Server | None = None

    def bind(self) -> str:
        """Take the address. Returns the page's URL. Raises: ConfigError when it is in use."""
        parts = urlsplit(f"//{self._address}")
        host, port = parts.hostname or "127.0.0.1", parts.port or 0
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        try:
            self._socket.bind((host, port))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"web.bind = {self._address}: {error.strerror}; choose another with --set web.bind=127.0.0.1:PORT"
            ) from error
        port = self._socket.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        self._url = f"http://{shown}:{port}"
        app = make_app(self._hub, self._recorder, port)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                lifespan="off",
                timeout_graceful_shutdown=GRACE_S,
                server_header=False,
            )
        )
        return self._url

    def start(self) -> None:
        """Start serving."""
        self._thread.start()

    def stop(self) -> None:
        """Close every connection and join the thread."""
        if self._server is not None:
            self._hub.call(self._hub.close)
            self._server.should_exit = True
            self._thread.join(GRACE_S + 2)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        assert self._server is not None
        self._hub.attach(asyncio.get_running_loop())
        await self._server.serve(sockets=[self._socket])
