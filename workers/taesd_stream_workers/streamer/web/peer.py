"""One other daemon whose streams this one's page shows: what it tells of itself, followed over a WebSocket."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pydantic import BaseModel, Field
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus, WebSocketException

from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import Kind, RecordMode, RunState, is_stream_name
from taesd_stream.sockets import ClockOffset
from taesd_stream_workers.streamer import finite_json
from taesd_stream_workers.streamer.web import schema

if TYPE_CHECKING:
    from httpx2 import Response

logger = logging.getLogger(__name__)

OWN_HEADER: Final = "x-taesd-stream-own"  # whoever asks with it gets what is this daemon's own, nothing of its peers
FOLLOWS: Final = "all"  # the header's value on the socket that follows the state, and watches nothing
PICTURES: Final = "pictures"  # the header's value on a page's socket that needs no state
MAX_STATE_BYTES: Final = 64 << 20  # a thousand streams are about 1 MiB, and what their meta holds
MAX_FINISHED: Final = 100_000  # recordings that are remembered of a peer, about 100 MB
PING_S: Final = 1.0
SILENT_S: Final = 5.0  # a peer answers the protocol's own pings within this time, or its connection is over
WAITS_S: Final = (0.2, 0.5, 1.0, 2.0, 5.0)  # between attempts to connect
ALIVE: Final = ("waiting", "live")
MAX_NUMBER: Final = (1 << 63) - 1  # of counts and times

Row = dict[str, Any]

# Every key that a row of ours has: a peer of another version may not know them all.
_NO_STREAM: Final[Row] = dict.fromkeys(schema.StreamRow.model_fields)
_NO_RECORDING: Final[Row] = dict.fromkeys(schema.RecordingRow.model_fields)


class PeerError(TaesdStreamError):
    """What a peer says cannot be used, and in words why."""


# UnicodeError: of a host's name that is none.
PEER_ERRORS: Final = (OSError, UnicodeError, WebSocketException, PeerError)


class _Stream(BaseModel):
    """What nobody can do without; of another version more may be there, or less."""

    name: str
    run: str = Field(pattern=schema.ID_PATTERN)
    state: RunState
    flags: list[str]
    kind: Kind
    record: RecordMode
    files: list[str]
    meta: dict[str, Any]
    started: float
    ended: float | None


class _Recording(BaseModel):
    id: str
    run: str | None
    state: str
    frames: int
    bytes: int
    meta: dict[str, Any]
    started: float


class _Alert(BaseModel):
    code: str
    text: str


class _Stats(BaseModel):
    pictures_per_s: float
    latency_ms: float | None
    workers: int


class _Told(BaseModel):
    """The part of a state that is used."""

    streams: list[_Stream]
    growing: list[_Recording] = []
    recordings: list[_Recording] = []
    gone: list[str] = []
    alerts: list[_Alert]
    stats: _Stats


class _Film(BaseModel):
    run: str = Field(pattern=schema.ID_PATTERN)
    stream: str
    started: float
    meta: dict[str, Any]


class _Films(BaseModel):
    films: list[_Film]


class _Connect(connect):
    """Without redirects: a peer is where it was said to be, and its token goes nowhere else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Peer:
    """What it told last. All in the web thread's loop.

    streams, recordings: its rows, `daemon` in each; a recording's id has `@name` behind it, so that ours and theirs
    differ. error: why it is away; None while it is here.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        """url: http://host:port."""
        self.url = url
        self.name = urlsplit(url).netloc
        self.bearer = {"authorization": f"Bearer {token}"} if token else {}
        self.streams: list[Row] = []
        self.recordings: list[Row] = []
        self._finished: dict[str, Row] = {}  # of them, as they were told last
        self.alerts: list[dict[str, str]] = []
        self.stats: dict[str, Any] = {}
        self.error: str | None = None
        self.is_here = False
        self._clock = ClockOffset()

    @property
    def offset_us(self) -> int:
        """Add this to our clock to get the peer's, as it stamps its pictures."""
        return (self._clock.offset_ns or 0) // 1000

    def connect(self, what: str, *, max_bytes: int, ping_s: float | None) -> _Connect:
        """A page's socket at the peer, for `async with`; what is not read yet waits there. Raises: PEER_ERRORS.

        what: the value of OWN_HEADER. max_bytes: of a message. ping_s: how soon a silent peer is given up.
        """
        return _Connect(
            f"ws{self.url.removeprefix('http')}/ws",
            additional_headers={OWN_HEADER: what, **self.bearer},
            user_agent_header=None,
            proxy=None,  # one of the environment would not find this host's own daemons
            compression=None,
            open_timeout=SILENT_S,
            ping_interval=ping_s,
            ping_timeout=ping_s,
            close_timeout=1.0,
            max_size=max_bytes,
            max_queue=2,
        )

    async def follow(self, clock_ns: Callable[[], int], daemon: str, changed: Callable[[], None]) -> None:
        """Keep up with the peer, for ever.

        clock_ns: ours. daemon: our own start's name, by which a peer that is we ourselves is known. changed: is called
        when there is something new.
        """
        failures = 0
        while True:
            try:
                async with self.connect(FOLLOWS, max_bytes=MAX_STATE_BYTES, ping_s=SILENT_S) as socket:
                    await self._listen(socket, clock_ns, daemon, changed)
            except PEER_ERRORS as error:
                failures = 0 if self.is_here else failures
                self._lose(self._explained(error))
                changed()
            except Exception:  # whatever a peer sends, MemoryError too: it is asked again
                logger.exception("peer_failed url=%s", self.url)
                self._lose("cannot be followed: the log says why")
                changed()
            await asyncio.sleep(WAITS_S[min(failures, len(WAITS_S) - 1)])
            failures += 1

    async def _listen(
        self, socket: ClientConnection, clock_ns: Callable[[], int], daemon: str, changed: Callable[[], None]
    ) -> None:
        clock, next_ping_s = ClockOffset(), 0.0
        while True:
            if time.monotonic() >= next_ping_s:
                await socket.send(f'{{"type": "ping", "t": {clock_ns()}}}')
                next_ping_s = time.monotonic() + PING_S
            message = await socket.recv()
            try:
                told = finite_json.parse(message)
                if told["type"] == "pong":
                    clock.add(_whole(told["t"]), _whole(told["now_us"]) * 1000, clock_ns())
                    self._clock = clock
                elif told["type"] == "hello" and told["daemon"] == daemon:
                    raise PeerError("is this daemon itself")
                elif told["type"] == "state":
                    self._take(told)
                    changed()
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                logger.debug("peer_not_understood url=%s error=%s", self.url, error)
                raise PeerError("is not understood: it may be of another version") from error

    def _take(self, state: dict[str, Any]) -> None:
        """A whole state. Raises: ValidationError, a ValueError."""
        _Told.model_validate(state, strict=True)  # what is checked here is used as it came
        self.streams = [
            {**_NO_STREAM, **row, "daemon": self.url, "files": [self.our_id(one) for one in row["files"]]}
            for row in state["streams"]
            if is_stream_name(row["name"])
        ]
        for one in state.get("gone", ()):
            self._finished.pop(self.our_id(one), None)
        self._finished |= {row["id"]: row for row in self._recordings_of(state.get("recordings", ()))}
        if len(self._finished) > MAX_FINISHED:
            raise PeerError(f"lists more than {MAX_FINISHED} recordings")
        self.recordings = [*self._recordings_of(state.get("growing", ())), *self._finished.values()]
        self.alerts = [{"code": one["code"], "text": f"{self.name}: {one['text']}"} for one in state["alerts"]]
        self.stats = state["stats"]
        if not self.is_here:
            logger.info("peer_here url=%s", self.url)
        self.is_here, self.error = True, None

    def _recordings_of(self, rows: Iterable[Row]) -> list[Row]:
        return [{**_NO_RECORDING, **row, "daemon": self.url, "id": self.our_id(row["id"])} for row in rows]

    def films_in(self, answer: bytes) -> list[Row]:
        """The rows of its GET /api/v1/films. Raises: ValueError, RecursionError for what is none."""
        told = finite_json.parse(answer)
        _Films.model_validate(told, strict=True)
        return [{**row, "daemon": self.url} for row in told["films"]]

    def _lose(self, text: str) -> None:
        """It is away: its streams stay, as lost; its files cannot be had."""
        if text != self.error:
            logger.warning("peer_away url=%s reason=%s", self.url, text)
        self.is_here, self.error = False, text
        self.streams = [_lost(row) for row in self.streams]
        self.recordings, self._finished, self.alerts, self.stats = [], {}, [], {}

    def _explained(self, error: Exception) -> str:
        if isinstance(error, InvalidStatus) and error.response.status_code in (401, 403):
            return "does not let this one in: give its token's file in [[peers]], and it must know its name (web.hosts)"
        if isinstance(error, InvalidStatus):
            return f"is no daemon's page: HTTP status {error.response.status_code}"
        return str(error) if isinstance(error, PeerError) else "does not answer"

    def our_id(self, recording_id: str) -> str:
        """What one of its recordings is called here."""
        return f"{recording_id}@{self.name}"


async def body_of(answer: Response, max_bytes: int) -> bytes:
    """The whole body of an answer, as it came. Raises: PeerError for one of more bytes; httpx2.HTTPError."""
    body = bytearray()
    async for piece in answer.aiter_raw():
        body += piece
        if len(body) > max_bytes:
            raise PeerError(f"answered more than {max_bytes} bytes")
    return bytes(body)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or abs(value) > MAX_NUMBER:
        raise ValueError(f"expected a whole number up to {MAX_NUMBER}")
    return value


def _lost(row: Row) -> Row:
    quiet = {"flags": [], "stoppable": False, "fps": None, "latency_ms": None, "files": []}
    ended = {"state": "lost", "ended": time.time()} if row["state"] in ALIVE else {}
    return {**row, **quiet, **ended}
