"""One WebSocket a page, for all its streams: wishes in, state and pictures out."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from typing import Any, Final

from starlette.websockets import WebSocket, WebSocketDisconnect

from taesd_stream import __version__
from taesd_stream.frames import Rendition, is_stream_name
from taesd_stream_workers.hub import Hub
from taesd_stream_workers.viewer import Viewer, to_message

STATE_S: Final = 0.25
MAX_WATCHED: Final = 1000
STALLED_S: Final = 10.0
TRY_LATER: Final = 1013  # RFC 6455's registry: the page comes back by itself
MAX_NUMBER: Final = (1 << 63) - 1  # of a page's counts and times
MAX_TEXT_BYTES: Final = 256 << 10
_RENDITIONS: Final[tuple[Rendition, ...]] = ("thumb", "live", "jpeg")
_DAEMON: Final = secrets.token_hex(8)  # one start of the daemon: a page sees that it was restarted


async def serve_page(socket: WebSocket, *, hub: Hub, page_version: str) -> None:
    """Serve one page until it goes."""
    await socket.accept()
    if hub.is_full:
        await socket.close(TRY_LATER, "too many viewers")
        return
    viewer = Viewer(hub.latency)
    hub.join(viewer)
    hello = {"type": "hello", "version": __version__, "daemon": _DAEMON, "page": page_version}
    reader = asyncio.create_task(_read(socket, hub, viewer))
    try:
        await socket.send_text(json.dumps(hello))
        await _send(socket, hub, viewer, reader)
    except (WebSocketDisconnect, RuntimeError, OSError, TimeoutError):
        pass  # the page went, or stalled for too long: it comes back by itself
    finally:
        reader.cancel()
        hub.watch(viewer, viewer.want({}), {})
        hub.leave(viewer)


async def _send(socket: WebSocket, hub: Hub, viewer: Viewer, reader: asyncio.Task[None]) -> None:
    """serve: Packet -> viewer; when full, `live` drops to its next keyframe, whole pictures to the newest."""
    next_state_s = 0.0
    while not reader.done():
        now = time.monotonic()
        if viewer.is_state_dirty and now >= next_state_s:
            viewer.is_state_dirty = False
            next_state_s = now + STATE_S
            await asyncio.wait_for(socket.send_text(_state(hub)), STALLED_S)
        for packet, streamed_ns in viewer.take():
            await asyncio.wait_for(socket.send_bytes(to_message(packet, streamed_ns)), STALLED_S)
        for starved in viewer.starved():
            hub.keyframe(starved)
        await viewer.wait(max(0.01, next_state_s - time.monotonic()) if viewer.is_state_dirty else 1.0)


def _state(hub: Hub) -> str:
    return json.dumps(
        {
            "type": "state",
            "streams": hub.streams(),
            "recordings": hub.recordings,
            "stats": hub.stats(),
            "alerts": hub.alerts(),
        }
    )


async def _read(socket: WebSocket, hub: Hub, viewer: Viewer) -> None:
    while True:
        try:
            text = await socket.receive_text()
        except (WebSocketDisconnect, KeyError, RuntimeError):
            return
        try:
            message = _parse(text) if len(text) <= MAX_TEXT_BYTES else None
            answer = _handle(message, hub, viewer)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            answer = {"type": "error", "text": f"not understood: {error}"}
        if answer is not None:
            await socket.send_text(json.dumps(answer))


def _parse(text: str) -> Any:
    """JSON, without the numbers that are none: they would go back to the page, which cannot read them. ValueError."""
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _whole(value: Any) -> int:
    if not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise ValueError(f"expected a number up to {MAX_NUMBER}")
    return int(value)


def _handle(message: Any, hub: Hub, viewer: Viewer) -> dict[str, Any] | None:
    """One wish of the page. Raises: ValueError, TypeError, KeyError, AttributeError for what is none."""
    kind = message["type"]
    if kind == "watch":
        streams = _watched(message["streams"])
        hub.watch(viewer, viewer.want(streams), streams)
    elif kind == "credit":
        viewer.credit(str(message["stream"]))
    elif kind == "keyframe":
        stream = str(message["stream"])
        if viewer.wants.get(stream) == "live":
            viewer.restart_chain(stream)
            hub.keyframe(stream)
    elif kind == "shown":
        seq, shown_us = _whole(message["seq"]), _whole(message["shown_us"])
        viewer.shown(str(message["stream"]), str(message["run"]), seq, shown_us * 1000)
    elif kind == "ping":
        return {"type": "pong", "t": message["t"], "now_us": hub.clock_ns() // 1000}
    else:
        raise ValueError(f"type {kind!r}")
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
