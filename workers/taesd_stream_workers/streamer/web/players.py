"""A stream for players that speak plain HTTP: MPEG-TS for ffplay, VLC and PyAV, MJPEG for curl and OBS."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Final

from starlette.responses import StreamingResponse
from starlette.types import Message, Send

from taesd_stream.frames import Packet, Rendition
from taesd_stream.media.clock import PlayerClock
from taesd_stream.media.mpegts import TransportStream
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.viewer import Viewer
from taesd_stream_workers.streamer.web.clip_loop import ClipLoop
from taesd_stream_workers.streamer.web.sockets import STALLED_S

REPEAT_S: Final = 1.0  # a player's clock stands still when nothing comes
POLL_S: Final = 0.1
FIRST_REPEATS_S: Final = (0.1, 0.1)  # players want to see a picture or two before they open
PIECE_BYTES: Final = 64 << 10  # each has STALLED_S to go, so that a slow player that reads is in time
BOUNDARY: Final = "taesd-stream-picture"
TS_TYPE: Final = "video/mp2t"
MJPEG_TYPE: Final = f"multipart/x-mixed-replace; boundary={BOUNDARY}"


class PlayerResponse(StreamingResponse):
    """An answer without end. A player that takes nothing for STALLED_S is let go, and with it its place."""

    async def stream_response(self, send: Send) -> None:
        """Send it; StreamingResponse calls this."""

        async def in_time(message: Message) -> None:
            async with asyncio.timeout(STALLED_S):
                await send(message)

        pictures = self.body_iterator
        assert isinstance(pictures, AsyncGenerator)
        self.body_iterator = _in_pieces(pictures)
        try:
            async with contextlib.aclosing(pictures):
                await super().stream_response(in_time)
        except TimeoutError:  # should it read again it has the end; if not, the connection's own limit ends this wait
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _in_pieces(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    async for chunk in chunks:
        for start in range(0, len(chunk), PIECE_BYTES):
            yield chunk[start : start + PIECE_BYTES]


async def transport_stream(hub: Hub, stream: str) -> AsyncIterator[bytes]:
    """The `live` rendition as MPEG-TS, until the player goes or the daemon stops.

    It begins at a keyframe that is asked for, and shows the last picture again while no other comes; a clip goes round.
    """
    muxer, clock = TransportStream(), PlayerClock()
    waits_s = itertools.chain(FIRST_REPEATS_S, itertools.repeat(REPEAT_S))
    repeat_at_s = float("inf")
    async for due in _due(hub, stream, "live"):
        if due:
            repeat_at_s = float("inf") if due[-1][0].kind == "clip" else time.monotonic() + next(waits_s)
            timed = [replace(packet, pts=clock.stamp(packet, at_ns)) for packet, at_ns in due]
            yield b"".join(muxer.mux(packet) for packet in timed)
        elif time.monotonic() >= repeat_at_s:
            repeat_at_s = time.monotonic() + REPEAT_S
            hub.keyframe(stream)
    yield muxer.close()


async def motion_jpeg(hub: Hub, stream: str) -> AsyncIterator[bytes]:
    """The `jpeg` rendition as parts of one endless answer.

    Browsers show each part when the next one begins: where no other comes, the last is sent once more.
    """
    last, repeat_at_s = b"", float("inf")
    async for due in _due(hub, stream, "jpeg"):
        for packet, _ in due:
            head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(packet.payload)}\r\n\r\n"
            last, repeat_at_s = head.encode() + bytes(packet.payload) + b"\r\n", time.monotonic() + REPEAT_S
            yield last
        if time.monotonic() >= repeat_at_s:
            repeat_at_s = float("inf")
            yield last


async def _due(hub: Hub, stream: str, rendition: Rendition) -> AsyncIterator[list[tuple[Packet, int]]]:
    """What one viewer of one stream gets, as `ClipLoop.due`; an empty list now and then while nothing is due."""
    viewer, loop = Viewer(hub.latency), ClipLoop()
    hub.join(viewer)
    hub.watch(viewer, viewer.want({stream: rendition}), viewer.wants)
    try:
        while not hub.is_closing:
            taken = viewer.take()
            for packet, _ in taken:
                loop.add(packet)
            yield loop.due(time.monotonic_ns())
            if taken:  # the player has taken them
                viewer.credit(stream)
            for starved in viewer.starved():
                hub.keyframe(starved)
            await viewer.wait(loop.wait_s(time.monotonic_ns(), POLL_S))
    finally:
        hub.watch(viewer, viewer.want({}), {})
        hub.leave(viewer)
