"""The web thread: one event loop with uvicorn in it, on a socket that we bound ourselves."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from typing import Final

import uvicorn

from taesd_stream.config import Config
from taesd_stream.errors import ConfigError
from taesd_stream.wire import DEFAULT_ADDRESS
from taesd_stream_workers.role.addresses import on_host, tcp_socket, web_address
from taesd_stream_workers.role.web_token import load_token
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.recorder import Recorder
from taesd_stream_workers.streamer.web.api import make_app
from taesd_stream_workers.streamer.web.copies import Copies
from taesd_stream_workers.streamer.web.guard import Guard
from taesd_stream_workers.streamer.web.peers import Peers, peers_of
from taesd_stream_workers.streamer.web.sockets import MAX_TEXT_BYTES

# A reader that stalls is held back by the kernel's buffers too: kept small, they hold no seconds of stale video.
SEND_BUFFER_BYTES: Final = 256 << 10
# Who takes nothing for so long is cut off by the kernel, which else holds what waits for it, and its descriptor, for
# ever. To it a reader of a kilobyte a second takes nothing for a minute, and a download may be paused for some.
DEAF_S: Final = 600.0
GRACE_S: Final = 1  # an endless stream must not hold the exit


class WebServer:
    """The page and the HTTP interface, in a thread of their own."""

    def __init__(self, config: Config, hub: Hub, recorder: Recorder, *, deaf_s: float = DEAF_S) -> None:
        self._host, self._asked_port = web_address(config)
        self._config = config
        self._hub = hub
        self._recorder = recorder
        self._deaf_s = deaf_s
        self._peers = Peers(hub, peers_of(config))
        self._copies = Copies(config.recording_folder)
        self._thread = threading.Thread(target=self._run, name="web")
        self._server: uvicorn.Server | None = None
        self._error: BaseException | None = None

    def bind(self) -> str:
        """Take the address. Returns the page's URL.

        Raises: ConfigError when it is in use, or when its token's file cannot be used.
        """
        host, token = self._host, load_token(self._config)
        self._socket = tcp_socket(host)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        if sys.platform == "linux":  # others have no such option; each connection has it from this socket
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * self._deaf_s))
        try:
            self._socket.bind((host, self._asked_port))
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            text = f"web.bind = {self._config.web.bind}: {error.strerror}"
            raise ConfigError(f"{text}; choose another with --set web.bind=127.0.0.1:PORT") from error
        self.port: int = self._socket.getsockname()[1]
        shown = reachable_host(host)
        url = f"http://[{shown}]:{self.port}" if ":" in shown else f"http://{shown}:{self.port}"
        own_names = [socket.gethostname(), f"{socket.gethostname()}.local"] if token else []
        guarded = Guard(
            make_app(self._hub, self._recorder, self._peers, self._copies, settings=sampler_settings(self._config)),
            port=self.port,
            hosts=[host, *own_names],
            proxies=self._config.web.hosts,
            token=token,
            refused=self._hub.latency.refused,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                guarded,
                log_config=None,
                access_log=False,
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                ws_max_size=MAX_TEXT_BYTES,
                lifespan="off",
                timeout_graceful_shutdown=GRACE_S,
                server_header=False,
            )
        )
        return url

    def start(self) -> None:
        """Start serving. The recording folder is this process's own by now."""
        self._copies.clear()
        self._thread.start()

    def check(self) -> None:
        """Raises: whatever ended the thread: its socket would be listened to, and nobody would answer. Any thread."""
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Close every connection and join the thread."""
        if self._server is not None:
            self._hub.call(self._hub.close)
            self._hub.call(self._peers.close)
            self._server.should_exit = True
            self._thread.join(GRACE_S + 2)
            self._copies.clear()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 the streamer ends with it
            self._error = error

    async def _serve(self) -> None:
        assert self._server is not None
        self._hub.attach(asyncio.get_running_loop())
        async with self._peers.following():
            await self._server.serve(sockets=[self._socket])


def sampler_settings(config: Config) -> str:
    """What a sampler's environment needs to find the broker, "" for nothing; * is a host's name that leads here."""
    bind, keys = config.broker.bind, config.keys_folder
    if bind == DEFAULT_ADDRESS and keys is None:
        return ""
    return f"TAESD_STREAM_ADDRESS={on_host(bind, '*')}" + (" and TAESD_STREAM_KEYS_FOLDER" if keys is not None else "")


def reachable_host(host: str) -> str:
    """Where others reach what is bound to `host`: for every interface, the address of the one that leads outside."""
    if host not in ("0.0.0.0", "::"):  # noqa: S104 nothing is bound here
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing: only a route is chosen (RFC 5737: nobody's address)
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
