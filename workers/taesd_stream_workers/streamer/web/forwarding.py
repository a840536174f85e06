"""Requests for what a peer has go on to it, and its answer comes back as it is made; all others are for our routes."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, quote, urlencode

from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from taesd_stream.frames import is_stream_name
from taesd_stream_workers.streamer import finite_json
from taesd_stream_workers.streamer.web.peer import OWN_HEADER, Peer, PeerError, body_of
from taesd_stream_workers.streamer.web.peers import ANSWER_S, CONNECT_S, Peers

if TYPE_CHECKING:
    from httpx2 import Response

logger = logging.getLogger(__name__)

_STREAM: Final = re.compile(
    r"(/api/v1)?/streams/(?P<name>.+)/(?P<act>record|stop|snapshot|live\.ts|live\.mjpeg|latest\.jpg)"
)
_RUN: Final = re.compile(r"/api/v1/runs/(?P<run>[0-9a-f]{16})/(film(/[0-9]{1,16}(\.jpg)?)?|keep|latents)")
_RECORDING: Final = re.compile(r"/api/v1/recordings/(?P<id>.+?)(?P<part>/file|/thumb)?")
# All that is passed on, so neither our cookie nor our token; and of the answer nothing that speaks for our address.
_ASKED: Final = ("accept", "content-type", "range", "if-range", "if-none-match", "if-modified-since")
_ANSWERED: Final = (
    *("content-type", "content-length", "content-range", "content-disposition", "accept-ranges"),
    *("etag", "last-modified", "cache-control"),
)
# A peer's answer is in our origin: were it a page, it could do nothing here.
_POLICY: Final = b"script-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_ENDLESS: Final = ("/live.ts", "/live.mjpeg")  # between two pictures may be any time
MAX_KEPT_BYTES: Final = 64 << 10  # of the answer to `keep`: an id


class Forwarding:
    """ASGI middleware. errors: counts the answers of its own by status and code."""

    def __init__(self, app: ASGIApp, *, peers: Peers, errors: Counter) -> None:
        self._app = app
        self._peers = peers
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http" or self._peers.are_none:
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        if OWN_HEADER in request.headers:
            return await self._app(scope, receive, send)
        try:
            if self._is_for_all(scope["path"]):
                await self._app(scope, await self._tell_all(request), send)
            elif receive_rest := await self._forward(request, send):
                await self._app(scope, receive_rest, send)
        except ClientDisconnect:
            pass
        except HTTPException as error:  # of a body or an address that is too large
            await self._refuse(request, send, error.status_code, "too_large", error.detail)
        return None

    def _who(self, path: str) -> tuple[Sequence[Peer], str]:
        """Whom to ask before ourselves, one after the other, and for which path there."""
        if (match := _STREAM.fullmatch(path)) and is_stream_name(match["name"]):
            name, act = match["name"], match["act"]
            owner = self._peers.owners().get(name)
            is_forgotten = act == "latest.jpg" and not self._peers.knows(name)  # files may remember it
            peers = [owner] if owner else self._peers.here if is_forgotten else []
            return peers, f"{match[1] or ''}/streams/{quote(name)}/{act}"
        if match := _RUN.fullmatch(path):
            return self._peers.of_run(match["run"]), path
        if (match := _RECORDING.fullmatch(path)) and (found := self._peers.of_recording(match["id"])):
            peer, own_id = found
            return [peer], f"/api/v1/recordings/{quote(own_id)}{match['part'] or ''}"
        return [], path

    def _is_for_all(self, path: str) -> bool:
        """Record of a stream that is not there yet: its next run may come up at any daemon."""
        match = _STREAM.fullmatch(path)
        if match is None or match["act"] != "record":
            return False
        return is_stream_name(match["name"]) and not self._peers.knows(match["name"])

    async def _tell_all(self, request: Request) -> Receive:
        """Say it to every peer. Returns: the request's body once more, for ourselves."""
        body = await request.body()
        path = quote(request.scope["path"])

        async def tell(peer: Peer) -> None:
            if (answer := await self._ask(peer, request, path, body)) is not None:
                await answer.aclose()

        await asyncio.gather(*(tell(peer) for peer in self._peers.here))
        return _again(body, request.receive)

    async def _forward(self, request: Request, send: Send) -> Receive | None:
        """Answer with what the peer that has it says. Returns: what to read where none has it, so that we answer."""
        peers, path = self._who(request.scope["path"])
        if not peers:
            return request.receive
        body = await request.body()
        text = ""
        for peer in peers:
            answer = await self._ask(peer, request, path, body) if peer.is_here else None
            if answer is None:
                text = f"The daemon at {peer.url} does not answer."
            elif answer.has_redirect_location or answer.status_code in (401, 403):
                await answer.aclose()
                text = f"The daemon at {peer.url} refuses this one: HTTP status {answer.status_code}."
            elif answer.status_code == 404:
                await answer.aclose()
            else:
                is_kept = path.endswith("/keep") and answer.status_code == 200
                await (self._pass_kept if is_kept else self._pass_back)(answer, peer, request, send)
                return None
        if not text:
            return _again(body, request.receive)
        await self._refuse(request, send, 502, "peer_away", text)
        return None

    async def _ask(self, peer: Peer, request: Request, path: str, body: bytes) -> Response | None:
        """The beginning of a peer's answer; None where it gives none. Raises: HTTPException for too long an address."""
        from httpx2 import HTTPError, InvalidURL, Timeout

        query = [(key, value) for key, value in parse_qsl(request.url.query) if key != "token"]
        headers = {name: request.headers[name] for name in _ASKED if name in request.headers}
        headers |= {"accept-encoding": "identity", OWN_HEADER: "all", **peer.bearer}
        encoded = {name.encode(): value.encode("latin-1") for name, value in headers.items()}  # as they came
        timeout = Timeout(None if path.endswith(_ENDLESS) else ANSWER_S, connect=CONNECT_S, pool=None)
        url = f"{peer.url}{path}{'?' if query else ''}{urlencode(query)}"
        http = self._peers.http
        try:
            asked = http.build_request(request.method, url, headers=encoded, content=body or None, timeout=timeout)
            async with asyncio.timeout(ANSWER_S):
                return await http.send(asked, stream=True)
        except InvalidURL as error:
            raise HTTPException(414, f"The address is too long to go on to {peer.url}: {error}.") from error
        except (HTTPError, TimeoutError) as error:
            logger.debug("peer_not_reached url=%s error=%s", peer.url, error)
            return None

    async def _pass_back(self, answer: Response, _peer: Peer, request: Request, send: Send) -> None:
        """All of an answer, until it ends, the client goes, or the daemon stops."""
        headers = [
            (key.lower(), value) for key, value in answer.headers.raw if key.decode("latin-1").lower() in _ANSWERED
        ]
        headers.append((b"content-security-policy", _POLICY))
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        copying = asyncio.create_task(_copy(answer, send))
        gone = asyncio.create_task(_gone(request.receive))
        try:
            ends: set[asyncio.Future[Any]] = {copying, gone, self._peers.closing}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            is_whole = copying.done() and copying.result()
        finally:
            copying.cancel()
            gone.cancel()
            await asyncio.gather(copying, gone, return_exceptions=True)
            await answer.aclose()
        if is_whole or "content-length" not in answer.headers:  # else the connection breaks off, as the peer's did
            await send({"type": "http.response.body", "body": b""})

    async def _pass_kept(self, answer: Response, peer: Peer, request: Request, send: Send) -> None:
        """The answer to `keep`: the new recording's id, as it is called here."""
        from httpx2 import HTTPError

        try:
            async with asyncio.timeout(ANSWER_S):
                kept = finite_json.parse(await body_of(answer, MAX_KEPT_BYTES))["id"]
            if not isinstance(kept, str | None):
                raise TypeError("no recording's id")
        except (HTTPError, TimeoutError, PeerError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.debug("answer_not_understood url=%s error=%s", answer.url, error)
            text = f"The daemon at {peer.url} answered what is not understood; it may have kept the film."
            return await self._refuse(request, send, 502, "peer_away", text)
        finally:
            await answer.aclose()
        told = {"id": None if kept is None else peer.our_id(kept)}
        await JSONResponse(told)(request.scope, request.receive, send)
        return None

    async def _refuse(self, request: Request, send: Send, status: int, code: str, text: str) -> None:
        self._errors.labels(status, code).inc()
        await JSONResponse({"code": code, "text": text}, status)(request.scope, request.receive, send)


async def _copy(answer: Response, send: Send) -> bool:
    """Returns: whether the answer came whole."""
    from httpx2 import HTTPError

    try:
        async for piece in answer.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except HTTPError as error:
        logger.debug("answer_broke_off url=%s error=%s", answer.url, error)
        return False
    return True


def _again(body: bytes, receive: Receive) -> Receive:
    """A request whose body was read, for who reads it now."""
    rest = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive_again() -> Message:
        return next(rest, None) or await receive()

    return receive_again


async def _gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
