"""Who may speak to the web address: checked for every request, before any route sees it.

Three doors. Host and Origin: a web page elsewhere must not reach a daemon through its reader's browser, neither by a
name that it lets point here (DNS rebinding) nor by a form. The token, where others can reach the address at all: by
the link once, then by a cookie; `Authorization: Bearer` for programs, `?token=` for players that can send neither.
The size of what is sent.
"""

from __future__ import annotations

import hmac
import html
import ipaddress
import json
from collections.abc import Sequence
from typing import Final
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import cookie_parser
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY_BYTES: Final = 64 << 10  # of a request: the largest is a line of JSON
COOKIE_AGE_S: Final = 365 * 24 * 3600
OPEN_PATHS: Final = ("/healthz", "/readyz")  # what probes ask says nothing of what is painted
PLAYER_SUFFIXES: Final = ("/live.ts", "/live.mjpeg", "/latest.jpg")
EMBED_SUFFIX: Final = "/embed"
_SAFE: Final = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-resource-policy": b"same-site",
}
_ASK: Final = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>taesd-stream</title>
<meta name="viewport" content="width=device-width">
<body style="font:16px system-ui;max-width:32rem;margin:15vh auto;padding:0 1rem">
<h1 style="font-size:1.2rem">This daemon asks for its token</h1>
<p>Open the whole link that <code>taesd-stream up</code> printed at its start, or paste the token here.</p>
<form><label>Token <input name="token" type="password" autocomplete="current-password" required></label>
<button>Open</button></form></body></html>"""
_ASK_POLICY: Final = b"default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'"


class Guard:
    """ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        port: int,
        hosts: Sequence[str],
        proxies: Sequence[str],
        token: str | None,
        refused: Counter,
    ) -> None:
        """port: that is bound. hosts: names of this host. proxies: names of others, by which people come.

        token: None asks for none. refused: counts by reason.
        """
        self._app = app
        self._port = port
        self._proxies = {name.lower() for name in proxies}
        self._names = {"localhost", *(name.lower() for name in hosts)} | self._proxies
        self._is_public = token is not None
        self._token = token
        self._cookie = f"taesd_stream_{port}"  # cookies do not know ports: two daemons of a host need two names
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        if not self._is_from_here(scope, headers):
            way = "web.hosts may name others" if self._is_public else "through a tunnel, too, the port must be this one"
            text = f"Not from here: open this page by its own address, as in http://127.0.0.1:{self._port}; {way}"
            return await self._refuse(scope, send, 403, "forbidden", text, "origin")
        query = dict(parse_qsl(scope["query_string"].decode("latin-1")))
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            if scope["type"] == "http" and scope["method"] == "GET" and self._is_page(scope) and "token" in query:
                return await self._take_token(scope, send, headers, query)
            if not self._has_token(scope, headers, query):
                return await self._ask(scope, send, headers)
        if _length(headers) > MAX_BODY_BYTES:
            text = f"A request's body may have {MAX_BODY_BYTES} bytes."
            return await self._refuse(scope, send, 413, "too_large", text, "size")
        return await self._app(scope, _Bounded(receive), self._safe(scope, send))

    # --- Host, Origin ---

    def _is_from_here(self, scope: Scope, headers: dict[bytes, str]) -> bool:
        host = headers.get(b"host", "")
        origin = headers.get(b"origin")
        if not self._is_our_host(host) or (origin is not None and not self._is_our_origin(origin, host)):
            return False
        # What a foreign page asks for without an Origin: a picture, a script, a frame; not a link that is followed.
        is_link = headers.get(b"sec-fetch-mode") == "navigate" and scope.get("method") == "GET"
        is_framed = headers.get(b"sec-fetch-dest") in ("iframe", "frame", "object", "embed")
        may_come = is_link and (not is_framed or scope["path"].endswith(EMBED_SUFFIX))
        return headers.get(b"sec-fetch-site") != "cross-site" or may_come

    def _is_our_host(self, host: str) -> bool:
        """By a name of ours, or by a number: a number cannot be made to point elsewhere."""
        try:
            parts = urlsplit(f"//{host}")
            name, port = parts.hostname or "", parts.port
        except ValueError:
            return False
        is_our_port = (port or 80) == self._port or self._is_public  # a proxy has a port of its own
        if name in self._names:
            return is_our_port
        try:
            number = ipaddress.ip_address(name)
        except ValueError:
            return False
        return is_our_port and (number.is_loopback or self._is_public)

    def _is_our_origin(self, origin: str, host: str) -> bool:
        """The address of the request itself; or a proxy's name, where the proxy put another Host in its place.

        Not any address of this host, nor of the proxy's: on another port may be another user's page, which browsers
        count as the same site. A proxy on a port of its own must pass Host on.
        """
        try:
            parts = urlsplit(origin)
            is_proxy = parts.hostname in self._proxies and parts.port in (None, 80, 443)
            return parts.netloc.lower() == host.lower() or is_proxy
        except ValueError:
            return False

    # --- the token ---

    def _is_page(self, scope: Scope) -> bool:
        return not scope["path"].endswith(PLAYER_SUFFIXES) and not scope["path"].startswith("/api/")

    def _is_right(self, token: str) -> bool:
        return self._token is not None and hmac.compare_digest(token.encode(), self._token.encode())

    def _has_token(self, scope: Scope, headers: dict[bytes, str], query: dict[str, str]) -> bool:
        scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            return self._is_right(bearer.strip())
        if scope["path"].endswith(PLAYER_SUFFIXES) and "token" in query:
            return self._is_right(query["token"])
        # As a browser reads them: http.cookies forgets ours behind one of another program that breaks RFC 6265.
        return self._is_right(cookie_parser(headers.get(b"cookie", "")).get(self._cookie, ""))

    async def _take_token(self, scope: Scope, send: Send, headers: dict[bytes, str], query: dict[str, str]) -> None:
        """The link with the token: from here on the cookie has it, and the address bar no longer."""
        if not self._is_right(query.pop("token")):
            return await self._ask(scope, send, headers)
        target = "/" + quote(scope["path"].lstrip("/")) + (f"?{urlencode(query)}" if query else "")
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict; Max-Age={COOKIE_AGE_S}"
        secure = "; Secure" if scope["scheme"] == "https" or headers.get(b"x-forwarded-proto") == "https" else ""
        # A page that only then goes on: a redirect from another site's link would not send a Strict cookie.
        body = f'<!doctype html><meta http-equiv="refresh" content="0;url={html.escape(target)}">'.encode()
        extra = [(b"set-cookie", (cookie + secure).encode("latin-1")), (b"cache-control", b"no-store")]
        await _answer(send, 200, b"text/html; charset=utf-8", body, extra)
        return None

    async def _ask(self, scope: Scope, send: Send, headers: dict[bytes, str]) -> None:
        if scope["type"] == "http" and "text/html" in headers.get(b"accept", "") and self._is_page(scope):
            self._refused.labels("token").inc()
            return await _answer(
                send, 401, b"text/html; charset=utf-8", _ASK, [(b"content-security-policy", _ASK_POLICY)]
            )
        text = "This daemon asks for its token: Authorization: Bearer TOKEN, or the link that it printed at its start."
        return await self._refuse(scope, send, 401, "token", text, "token")

    # --- answers ---

    async def _refuse(self, scope: Scope, send: Send, status: int, code: str, text: str, reason: str) -> None:
        self._refused.labels(reason).inc()
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": code})
            return
        extra = [(b"www-authenticate", b"Bearer")] if status == 401 else []
        await _answer(send, status, b"application/json", json.dumps({"code": code, "text": text}).encode(), extra)

    def _safe(self, scope: Scope, send: Send) -> Send:
        """Every answer says that it may not be sniffed, loaded by other sites, or, but for `embed`, framed."""
        framed = b"*" if scope["path"].endswith(EMBED_SUFFIX) else b"'none'"

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {key.lower() for key, _ in message["headers"]}
                added = _SAFE | {b"content-security-policy": b"frame-ancestors " + framed}
                message["headers"] = [*message["headers"], *((k, v) for k, v in added.items() if k not in there)]
            await send(message)

        return send_safely


class _Bounded:
    """Reads a request's body up to the bound, whatever its head said of the length."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            if self._bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"A request's body may have {MAX_BODY_BYTES} bytes.")
        return message


def _length(headers: dict[bytes, str]) -> int:
    value = headers.get(b"content-length", "0")
    return int(value) if value.isascii() and value.isdigit() else 0


async def _answer(
    send: Send, status: int, media_type: bytes, body: bytes, extra: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    length = str(len(body)).encode()
    headers = [(b"content-type", media_type), (b"content-length", length), *_SAFE.items(), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
