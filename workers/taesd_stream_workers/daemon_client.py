"""The daemon's HTTP interface, as the command line calls it."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any, Final

from taesd_stream.errors import ConfigError, TaesdStreamError, UnreachableError

TIMEOUT_S: Final = 10.0
COPY_S: Final = 60.0  # a growing file is copied before its first byte comes
CHUNK_BYTES: Final = 1 << 20
TOKEN_HINT: Final = "give --connect, or $TAESD_STREAM_CONNECT, the whole link that `taesd-stream up` printed"  # noqa: S105


class DaemonError(TaesdStreamError):
    """The daemon answered, and said no."""


class DaemonClient:
    """Calls to one daemon.

    Raises: UnreachableError when none answers there, DaemonError with the daemon's own words.
    """

    def __init__(self, address: str) -> None:
        """address: host:port, or with http://, or the whole link with a token. Raises: ConfigError for what is none."""
        self.address, _, query = address.partition("?")
        self.address = self.address.rstrip("/")
        if "://" not in self.address:
            self.address = f"http://{self.address}"
        self.token = dict(urllib.parse.parse_qsl(query)).get("token")
        self._headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            parts = urllib.parse.urlsplit(self.address)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise ConfigError(f"--connect {address}: expected the web address, as in http://127.0.0.1:8765")
        # A proxy of the environment would not find this host's own daemon.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def streams(self) -> list[dict[str, Any]]:
        """GET /api/v1/streams."""
        return self._rows("/api/v1/streams", "streams")

    def recordings(self) -> list[dict[str, Any]]:
        """GET /api/v1/recordings."""
        return self._rows("/api/v1/recordings", "recordings")

    def workers(self) -> list[dict[str, Any]]:
        """The workers of GET /api/v1/workers."""
        return self._rows("/api/v1/workers", "workers")

    def desired_workers(self) -> int:
        """How many decode workers the offered load needs, of GET /api/v1/workers."""
        desired = self._json("GET", "/api/v1/workers").get("desired_workers")
        if not isinstance(desired, int):
            raise self._other_server()
        return desired

    def record(self, stream: str, mode: str) -> None:
        """Keep a stream from now on, or the next run of its name."""
        self._json("POST", f"/api/v1/streams/{urllib.parse.quote(stream)}/record", {"mode": mode})

    def require_alive(self) -> None:
        """GET /healthz. Raises: UnreachableError."""
        self._json("GET", "/healthz")

    def require_ready(self) -> None:
        """GET /readyz. Raises: DaemonError with what is missing."""
        self._json("GET", "/readyz")

    def download(self, recording_id: str, frames: int | None, part: int | None = None) -> Iterator[tuple[bytes, int]]:
        """Pieces of a recording's file, and its whole size in bytes.

        frames: only the first so many. part: of one that grows still, and will be several files.
        """
        path = f"/api/v1/recordings/{urllib.parse.quote(recording_id)}/file"
        asked = urllib.parse.urlencode({key: value for key, value in (("frames", frames), ("part", part)) if value})
        with self._open("GET", f"{path}?{asked}" if asked else path, timeout_s=COPY_S) as answer:
            total = int(answer.headers.get("content-length") or 0)
            read = 0
            try:
                while piece := answer.read(CHUNK_BYTES):
                    read += len(piece)
                    yield piece, total
            except (OSError, HTTPException) as error:
                raise UnreachableError(f"{self.address}: the download broke off: {error}") from error
            if read < total:
                raise UnreachableError(f"{self.address}: the download broke off: {read} of {total} bytes came")

    def _rows(self, path: str, key: str) -> list[dict[str, Any]]:
        rows = self._json("GET", path).get(key)
        if not isinstance(rows, list):
            raise self._other_server()
        return rows

    def _json(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            with self._open(method, path, body) as answer:
                value = json.loads(answer.read())
        except ValueError as error:
            raise self._other_server() from error
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from error
        if not isinstance(value, dict):
            raise self._other_server()
        return value

    def _open(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 the address is the user's own
            self.address + path, data, {"content-type": "application/json", **self._headers}, method=method
        )
        try:
            return self._opener.open(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 401:
                    raise DaemonError(f"{self.address}: asks for its token: {TOKEN_HINT}") from error
                raise DaemonError(f"{self.address}: {_text_of(error)}") from error
        except (OSError, HTTPException) as error:
            raise self._no_answer(error) from error

    def _no_answer(self, error: Exception) -> UnreachableError:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            return UnreachableError(f"{self.address}: what listens there gives no answer; it may be very busy")
        return UnreachableError(f"no daemon answers at {self.address}: start one with `taesd-stream up`")

    def _other_server(self) -> UnreachableError:
        return UnreachableError(f"{self.address}: what answers there is no taesd-stream; --connect says where one is")


def _text_of(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["text"])
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        return f"{error.code} {error.reason}"
