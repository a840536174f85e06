"""A peer that is none of ours, to be told what no real one says: another clock, garbage, a redirect."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from types import TracebackType
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

STREAM = "far/away"
RUN = "00112233445566aa"
PICTURE = b"no picture at all"
ROW: dict[str, Any] = {
    "name": STREAM, "run": RUN, "state": "live", "flags": [], "kind": "steps", "latent_format": "sd1",
    "decoder": "linear", "width": 64, "height": 64, "step": 0, "total_steps": 9, "sigma": 1.0, "seq": 0, "fps": 1.0,
    "latency_ms": 1.0, "viewers": 0, "record": "off", "behind": 0, "stoppable": True, "meta": {}, "started": 1e9,
    "ended": None, "end_text": None, "note": None, "faults": 0, "files": [], "film": None,
}  # fmt: skip
STATS: dict[str, Any] = {"pictures_per_s": 1.0, "latency_ms": 1.0, "workers": 1}


class PeerStandin:
    """Speaks the page's side of a daemon at 127.0.0.1; its clock is `ahead_us` ahead of this machine's.

    state: what it tells next. said: messages of its clients but pings. asked: plain HTTP requests, each redirected, or
    answered by `answer`. head: a picture's, in place of a right one.
    """

    def __init__(self, ahead_us: int = 0) -> None:
        self._ahead_us = ahead_us
        self.state: Any = {"type": "state", "streams": [ROW], "recordings": [], "alerts": [], "stats": STATS}
        self.said: list[dict[str, Any]] = []
        self.asked: list[Request] = []
        self.answer: Response | None = None
        self.head: bytes | None = None
        self._clients: list[ServerConnection] = []

    @property
    def now_us(self) -> int:
        """Its clock."""
        return time.monotonic_ns() // 1000 + self._ahead_us

    def __enter__(self) -> PeerStandin:
        self._server = serve(self._talk, "127.0.0.1", 0, process_request=self._answer)
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients:
            client.close()
        self._server.shutdown()
        self._thread.join()

    def tell(self, state: Any) -> None:
        """Say this to all, and to who comes."""
        self.state = state
        for client in self._clients:
            with suppress(ConnectionClosed):
                client.send(json.dumps(state))

    def _answer(self, _connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/ws":
            return None
        self.asked.append(request)
        if self.answer is not None:
            return self.answer
        headers = Headers({"location": f"{self.url}/elsewhere", "content-length": "0", "connection": "close"})
        return Response(HTTPStatus.FOUND, "Found", headers, b"")

    def _talk(self, client: ServerConnection) -> None:
        self._clients.append(client)
        client.send(json.dumps({"type": "hello", "version": "0", "daemon": "standin", "page": "0"}))
        client.send(json.dumps(self.state))
        for text in client:
            message = json.loads(text)
            if message["type"] == "ping":
                client.send(json.dumps({"type": "pong", "t": message["t"], "now_us": self.now_us}))
                continue
            self.said.append(message)
            if message["type"] == "watch" and STREAM in message["streams"]:
                client.send(self._picture(message["streams"][STREAM]))

    def _picture(self, rendition: str) -> bytes:
        stamps = {
            f"{name}_us": self.now_us for name in ("sent", "received", "started", "decoded", "encoded", "streamed")
        }
        header = {"stream": STREAM, "run": RUN, "seq": 0, "rendition": rendition, "keyframe": True, "stamps": stamps}
        head = self.head or json.dumps(header).encode()
        return len(head).to_bytes(4, "big") + head + PICTURE
