"""A Hugging Face hub for tests: files of repositories over HTTP, with the headers that huggingface_hub asks for."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class HubServer:
    """`with HubServer({"owner/name/file": content}) as hub:` serves them at `hub.url`.

    large: files that the hub keeps by their sha256; the others have git's hash. damaged: files that are sent with one
    byte changed. asked: the requests, in order.
    """

    files: dict[str, bytes]
    large: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> HubServer:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self, has_body=False)

            def do_GET(self) -> None:
                hub._answer(self, has_body=True)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def etag(self, name: str) -> str:
        """The hash that the hub has for a file."""
        content = self.files[name]
        if name in self.large:
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 git's own

    def _answer(self, request: BaseHTTPRequestHandler, *, has_body: bool) -> None:
        self.asked.append(f"{request.command} {request.path}")
        repository, found, file = request.path.lstrip("/").partition("/resolve/main/")
        if not found:
            repository, found, file = request.path.lstrip("/").partition(f"/resolve/{COMMIT}/")
        name = f"{repository}/{file}"
        if name not in self.files:
            request.send_response(404)
            known = any(one.startswith(f"{repository}/") for one in self.files)
            request.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        content = self.files[name]
        request.send_response(200)
        request.send_header("X-Repo-Commit", COMMIT)
        request.send_header("X-Linked-Etag" if name in self.large else "ETag", f'"{self.etag(name)}"')
        request.send_header("X-Linked-Size", str(len(content)))
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if has_body:
            request.wfile.write(bytes([content[0] ^ 1]) + content[1:] if name in self.damaged else content)
