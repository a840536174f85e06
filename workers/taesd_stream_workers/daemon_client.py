"""The daemon's HTTP interface, as the command line calls it."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

from taesd_stream.errors import TaesdStreamError, UnreachableError

TIMEOUT_S: Final = 10.0
CHUNK_BYTES: Final = 1 << 20


class DaemonError(TaesdStreamError):
    """The daemon answered, and said no."""


class DaemonClient:
    """Calls to one daemon. Raises: UnreachableError when nothing answers, DaemonError with the daemon's own words."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/") if "://" in address else f"http://{address.rstrip('/')}"

    def streams(self) -> list[dict[str, Any]]:
        """GET /api/v1/streams."""
        rows: list[dict[str, Any]] = self._json("GET", "/api/v1/streams")["streams"]
        return rows

    def recordings(self) -> list[dict[str, Any]]:
        """GET /api/v1/recordings."""
        rows: list[dict[str, Any]] = self._json("GET", "/api/v1/recordings")["recordings"]
        return rows

    def record(self, stream: str, mode: str) -> None:
        """Keep a stream from now on, or the next run of its name."""
        self._json("POST", f"/api/v1/streams/{urllib.parse.quote(stream)}/record", {"mode": mode})

    def is_ready(self) -> bool:
        """GET /readyz."""
        try:
            self._json("GET", "/readyz")
        except (DaemonError, UnreachableError):
            return False
        return True

    def download(self, recording_id: str, frames: int | None) -> Iterator[tuple[bytes, int]]:
        """Pieces of a recording's file, and its whole size in bytes."""
        path = f"/api/v1/recordings/{urllib.parse.quote(recording_id)}/file"
        with self._open("GET", path + (f"?frames={frames}" if frames else "")) as answer:
            total = int(answer.headers.get("content-length") or 0)
            while piece := answer.read(CHUNK_BYTES):
                yield piece, total

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        with self._open(method, path, body) as answer:
            value: dict[str, Any] = json.loads(answer.read())
            return value

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 the address is the user's own
            self.address + path, data, {"content-type": "application/json"}, method=method
        )
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
        except urllib.error.HTTPError as error:
            raise DaemonError(_text_of(error)) from error
        except OSError as error:
            raise UnreachableError(f"no daemon answers at {self.address}: start one with `taesd-stream up`") from error


def _text_of(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["text"])
    except (ValueError, KeyError, OSError):
        return f"{error.code} {error.reason}"
