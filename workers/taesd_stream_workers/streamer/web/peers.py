"""The streams and recordings of several daemons as one list: this one's own and its peers'."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from taesd_stream.config import Config
from taesd_stream_workers.role.web_token import peer_tokens
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.viewer import Viewer
from taesd_stream_workers.streamer.web.finished_rows import FinishedRows, News, Told, with_daemon
from taesd_stream_workers.streamer.web.peer import ALIVE, MAX_STATE_BYTES, OWN_HEADER, Peer, PeerError, Row, body_of

if TYPE_CHECKING:
    from httpx2 import AsyncClient

logger = logging.getLogger(__name__)

DAEMON: Final = secrets.token_hex(8)  # one start of this daemon: a page sees that it was restarted
STATE_S: Final = 0.25  # a page is told no more often
CONNECT_S: Final = 3.0
KEEP_S: Final = 2.0  # an idle connection; the peer's server closes it after 5
ANSWER_S: Final = 60.0  # a growing file is copied before its first byte comes


def peers_of(config: Config) -> list[Peer]:
    """The peers of the configuration. Raises: ConfigError for a token's file that cannot be used."""
    return [Peer(one.url, token) for one, token in zip(config.peers, peer_tokens(config), strict=True)]


class Peers:
    """What a page is told: the hub's rows, and beside them those of other daemons. In the web thread's loop.

    Of two runs of one name the living one is listed, else the newer: a publisher whose daemon went has opened the
    stream anew at another. own: the same without peers, for daemons whose peer this one is: nothing goes round.
    """

    http: AsyncClient
    closing: asyncio.Future[None]  # is done when the daemon stops: endless answers end

    def __init__(self, hub: Hub, peers: Sequence[Peer] = ()) -> None:
        self._hub = hub
        self._peers = peers
        self._viewers: set[Viewer] = set()
        self._finished = FinishedRows()
        self._changes = 0
        self._state: tuple[tuple[int, int], float, str] = ((-1, 0), 0.0, "")  # of which changes, when, the text
        self.own = Peers(hub) if peers else self

    @asynccontextmanager
    async def following(self) -> AsyncIterator[None]:
        """Keep up with every peer for the time of an `async with`."""
        if not self._peers:
            yield
            return
        from httpx2 import AsyncClient, Limits, Timeout  # a daemon without peers does without it

        timeout = Timeout(ANSWER_S, connect=CONNECT_S, pool=None)
        limits = Limits(max_connections=None, keepalive_expiry=KEEP_S)
        # No proxies, cookies or passwords of the environment; and where a peer points to, nobody follows.
        async with AsyncClient(trust_env=False, follow_redirects=False, timeout=timeout, limits=limits) as self.http:
            self.closing = asyncio.get_running_loop().create_future()
            tasks = [
                asyncio.create_task(peer.follow(self._hub.clock_ns, DAEMON, self._tell_viewers)) for peer in self._peers
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """The daemon stops."""
        if self._peers and not self.closing.done():
            self.closing.set_result(None)

    def asked_by(self, headers: Mapping[str, str]) -> Peers:
        """What is told to whoever asks with these headers."""
        return self.own if OWN_HEADER in headers else self

    def join(self, viewer: Viewer) -> None:
        """From now on the viewer is told of changes at the peers."""
        self._viewers.add(viewer)

    def leave(self, viewer: Viewer) -> None:
        """No more."""
        self._viewers.discard(viewer)

    def _tell_viewers(self) -> None:
        self._changes += 1
        for viewer in self._viewers:
            viewer.state_changed()

    # --- what there is ---

    async def films(self) -> list[Row]:
        """The peers' films; those of a peer that does not answer soon are left out."""

        async def ask(peer: Peer) -> list[Row]:
            from httpx2 import HTTPError

            headers = {"accept-encoding": "identity", OWN_HEADER: "all", **peer.bearer}
            try:
                async with (
                    asyncio.timeout(CONNECT_S),
                    self.http.stream("GET", f"{peer.url}/api/v1/films", headers=headers) as answer,
                ):
                    return peer.films_in(await body_of(answer, MAX_STATE_BYTES))
            except (HTTPError, TimeoutError, PeerError, ValueError, RecursionError, MemoryError) as error:
                logger.debug("films_not_told url=%s error=%s", peer.url, error)
                return []

        return [row for rows in await asyncio.gather(*map(ask, self.here)) for row in rows]

    def streams(self) -> list[Row]:
        """A row for each name."""
        owners = self.owners()
        ours = _told(row for row in self._hub.streams() if row["name"] not in owners)
        return ours + [row for peer in self._peers for row in peer.streams if owners.get(row["name"]) is peer]

    def recordings(self) -> list[Row]:
        """All of all daemons: growing ones first, then the newest."""
        rows = _told(self._recordings())
        return sorted(rows, key=lambda row: (row["state"] == "finished", -row["started"])) if self._peers else rows

    def growing(self) -> list[Row]:
        """Those that are not finished."""
        return _told(row for row in self._recordings() if row["state"] != "finished")

    def state_json(self, known: Told | None) -> tuple[str, News]:
        """What a page is told, as JSON, and in it what it does not know yet of the finished recordings.

        Made once for all that ask at the same time.
        """
        changes, now_s = (self._hub.changes, self._changes), time.monotonic()
        if changes != self._state[0] or now_s - self._state[1] >= STATE_S:  # an alert comes by time alone
            told = {"type": "state", "streams": self.streams(), "stats": self.stats(), "alerts": self.alerts()}
            self._state = changes, now_s, json.dumps(told | {"growing": self.growing()})
            self._finished.take(row for row in self._recordings() if row["state"] == "finished")
        news = self._finished.news(known)
        return f"{self._state[2][:-1]}{news.fields}}}", news

    def _recordings(self) -> Iterator[Row]:
        yield from self._hub.recordings
        for peer in self._peers:
            yield from peer.recordings

    def alerts(self) -> list[dict[str, str]]:
        """What everybody must know now."""
        away = [
            {"code": "peer_away", "text": f"The daemon at {peer.url} {peer.error}."}
            for peer in self._peers
            if peer.error
        ]
        return [*self._hub.alerts(), *away, *(alert for peer in self._peers for alert in peer.alerts)]

    def stats(self) -> dict[str, Any]:
        """What the page's header shows: of all daemons together, the longest latency."""
        parts = [self._hub.stats(), *(peer.stats for peer in self._peers if peer.stats)]
        latencies = [part["latency_ms"] for part in parts if part["latency_ms"] is not None]
        return {
            "pictures_per_s": round(sum(part["pictures_per_s"] for part in parts), 1),
            "latency_ms": max(latencies, default=None),
            "workers": sum(part["workers"] for part in parts),
        }

    # --- who has it ---

    @property
    def are_none(self) -> bool:
        """Whether this daemon has no peers."""
        return not self._peers

    @property
    def here(self) -> list[Peer]:
        """Those that answer."""
        return [peer for peer in self._peers if peer.is_here]

    def owners(self) -> dict[str, Peer]:
        """The names whose listed run is a peer's."""
        if not self._peers:
            return {}
        own = self._hub.state.streams if self._hub.state else ()
        best: dict[str, tuple[tuple[bool, float], Peer | None]] = {row["name"]: (_rank(row), None) for row in own}
        for peer in self._peers:
            for row in peer.streams:
                if row["name"] not in best or _rank(row) > best[row["name"]][0]:
                    best[row["name"]] = _rank(row), peer
        return {name: peer for name, (_, peer) in best.items() if peer is not None}

    def knows(self, stream: str) -> bool:
        """Whether any daemon lists the name."""
        own = self._hub.state.streams if self._hub.state else ()
        return stream in self.owners() or any(row["name"] == stream for row in own)

    def of_run(self, run: str) -> list[Peer]:
        """The peers to ask for a run: none where it is ours; all where nobody lists it, for films are not listed."""
        own = [*(self._hub.state.streams if self._hub.state else ()), *self._hub.recordings]
        if run in self._hub.films or any(row["run"] == run for row in own):
            return []
        listing = [peer for peer in self.here if any(row["run"] == run for row in (*peer.streams, *peer.recordings))]
        return listing or self.here

    def of_recording(self, recording_id: str) -> tuple[Peer, str] | None:
        """Whose recording an id means, and its id there; None: it is ours, or nobody's."""
        own_id, _, name = recording_id.rpartition("@")
        if not {"", ".", ".."}.isdisjoint(own_id.split("/")):  # it becomes part of an address there, as a path is read
            return None
        return next(((peer, own_id) for peer in self._peers if peer.name == name), None)


def _told(rows: Iterable[Row]) -> list[Row]:
    return [with_daemon(row) for row in rows]


def _rank(row: Row) -> tuple[bool, float]:
    return row["state"] in ALIVE, row["started"]
