"""One WebSocket a page, for all its streams: wishes in, state and pictures out."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from taesd_stream import __version__
from taesd_stream.frames import Rendition, is_stream_name
from taesd_stream_workers.streamer import finite_json
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.viewer import Viewer, to_message
from taesd_stream_workers.streamer.web.finished_rows import News, Told
from taesd_stream_workers.streamer.web.page_links import PageLinks
from taesd_stream_workers.streamer.web.peer import FOLLOWS, MAX_NUMBER, OWN_HEADER, PICTURES
from taesd_stream_workers.streamer.web.peers import DAEMON, STATE_S, Peers

MAX_WATCHED: Final = 1000
STALLED_S: Final = 10.0
TRY_LATER: Final = 1013  # RFC 6455's registry: the page comes back by itself
MAX_TEXT_BYTES: Final = 256 << 10
_GONE: Final = (WebSocketDisconnect, RuntimeError, OSError, TimeoutError)  # the page went, or stalled for too long
_RENDITIONS: Final[tuple[Rendition, ...]] = ("thumb", "live", "jpeg")


async def serve_page(socket: WebSocket, *, hub: Hub, peers: Peers, page_version: str) -> None:
    """Serve one page until it goes."""
    await socket.accept()
    is_follower = socket.headers.get(OWN_HEADER) == FOLLOWS
    if hub.is_followed_enough if is_follower else hub.is_full:
        await socket.close(TRY_LATER, "too many daemons follow this one" if is_follower else "too many viewers")
        return
    viewer = Viewer(hub.latency, is_follower=is_follower)
    peers = peers.asked_by(socket.headers)
    hub.join(viewer)
    peers.join(viewer)

    async def send_theirs(message: bytes) -> None:
        try:
            await _in_time(socket.send_bytes(message))
        except _GONE:
            reader.cancel()

    links = PageLinks(hub, peers, viewer, send_theirs)
    hello = {"type": "hello", "version": __version__, "daemon": DAEMON, "page": page_version}
    reader = asyncio.create_task(_read(socket, hub, viewer, links))
    state = None if socket.headers.get(OWN_HEADER) == PICTURES else peers.state_json
    try:
        await socket.send_text(json.dumps(hello))
        await _send(socket, hub, viewer, links, reader, state)
    except _GONE:
        pass  # it comes back by itself
    finally:
        reader.cancel()
        links.close()
        peers.leave(viewer)
        hub.leave(viewer)


async def _send(
    socket: WebSocket,
    hub: Hub,
    viewer: Viewer,
    links: PageLinks,
    reader: asyncio.Task[None],
    state: Callable[[Told | None], tuple[str, News]] | None,
) -> None:
    """serve: Packet -> viewer; when full, `live` drops to its next keyframe, whole pictures to the newest.

    state: `Peers.state_json`; None for who wants pictures alone.
    """
    next_state_s = 0.0
    known: Told | None = None
    while not reader.done():
        now = time.monotonic()
        if viewer.is_state_dirty and now >= next_state_s:
            viewer.is_state_dirty = False
            next_state_s = now + STATE_S
            await links.spread()
            if state is not None:
                text, news = state(known)
                known = news.known
                viewer.is_state_dirty = news.is_more
                await _in_time(socket.send_text(text))
        for packet, streamed_ns in viewer.take():
            await _in_time(socket.send_bytes(to_message(packet, streamed_ns)))
        for starved in viewer.starved():
            hub.keyframe(starved)
        await viewer.wait(max(0.01, next_state_s - time.monotonic()) if viewer.is_state_dirty else 1.0)


async def _in_time(sending: Awaitable[None]) -> None:
    """Raises: TimeoutError when the page stalls; and what `sending` raises."""
    async with asyncio.timeout(STALLED_S):  # wait_for of Python 3.11 can swallow a cancellation
        await sending


async def _read(socket: WebSocket, hub: Hub, viewer: Viewer, links: PageLinks) -> None:
    while True:
        try:
            text = await socket.receive_text()
        except (WebSocketDisconnect, KeyError, RuntimeError):
            return
        try:
            message = finite_json.parse(text) if len(text) <= MAX_TEXT_BYTES else None
            answer = await _handle(message, hub, viewer, links)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            answer = {"type": "error", "text": f"not understood: {error}"}
        if answer is not None:
            await socket.send_text(json.dumps(answer))


def _whole(value: Any) -> int:
    if not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"expected a number up to {MAX_NUMBER}")
    return int(value)


async def _handle(message: Any, hub: Hub, viewer: Viewer, links: PageLinks) -> dict[str, Any] | None:
    """One wish of the page. Raises: ValueError, TypeError, KeyError, AttributeError for what is none."""
    kind = message["type"]
    if kind == "watch":
        if viewer.is_follower:
            raise ValueError("who follows the state is no viewer, and watches nothing")
        await links.watch(_watched(message["streams"]))
    elif kind == "ping":
        return {"type": "pong", "t": message["t"], "now_us": hub.clock_ns() // 1000}
    elif kind == "keyframe":
        await links.keyframe(str(message["stream"]))
    elif kind not in ("credit", "shown"):
        raise ValueError(f"type {kind!r}")
    elif link := links.of(stream := str(message["stream"])):
        if kind == "shown":
            await link.shown(stream, str(message["run"]), _whole(message["seq"]), _whole(message["shown_us"]))
        else:
            await link.say(kind, stream=stream)
    elif kind == "credit":
        viewer.credit(stream)
    else:
        seq, shown_us = _whole(message["seq"]), _whole(message["shown_us"])
        viewer.shown(stream, str(message["run"]), seq, shown_us * 1000)
    return None


def _watched(streams: dict[str, Any]) -> dict[str, Rendition]:
    if len(streams) > MAX_WATCHED:
        raise ValueError(f"at most {MAX_WATCHED} streams can be watched")
    wanted: dict[str, Rendition] = {}
    for name, word in streams.items():
        rendition = next((one for one in _RENDITIONS if one == word), None)
        if rendition is None or not is_stream_name(name):
            raise ValueError(f"{name!r}: {word!r}")
        wanted[name] = rendition
    return wanted
