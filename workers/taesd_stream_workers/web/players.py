"""A stream for players that speak plain HTTP: MPEG-TS for ffplay, VLC and PyAV, MJPEG for curl and OBS."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Final

from taesd_stream.frames import Packet, Rendition
from taesd_stream.media.clock import PlayerClock
from taesd_stream.media.mpegts import TransportStream
from taesd_stream_workers.hub import Hub
from taesd_stream_workers.viewer import Viewer

REPEAT_S: Final = 1.0  # a player's clock stands still when nothing comes
POLL_S: Final = 0.1
FIRST_REPEATS_S: Final = (0.1, 0.1)  # players want to see a picture or two before they open
BOUNDARY: Final = "taesd-stream-picture"
TS_TYPE: Final = "video/mp2t"
MJPEG_TYPE: Final = f"multipart/x-mixed-replace; boundary={BOUNDARY}"


async def transport_stream(hub: Hub, stream: str) -> AsyncIterator[bytes]:
    """The `live` rendition as MPEG-TS, until the player goes or the daemon stops.

    It begins at a keyframe that is asked for, and shows the last picture again while no other comes.
    """
    muxer, clock = TransportStream(), PlayerClock()
    waits_s = itertools.chain(FIRST_REPEATS_S, itertools.repeat(REPEAT_S))
    repeat_at_s = float("inf")
    async for packets in _packets(hub, stream, "live"):
        if packets:
            repeat_at_s = time.monotonic() + next(waits_s)
            timed = [replace(packet, pts=clock.stamp(packet, time.monotonic_ns())) for packet in packets]
            yield b"".join(muxer.mux(packet) for packet in timed)
        elif time.monotonic() >= repeat_at_s:
            repeat_at_s = time.monotonic() + REPEAT_S
            hub.keyframe(stream)
    yield muxer.close()


async def motion_jpeg(hub: Hub, stream: str) -> AsyncIterator[bytes]:
    """The `jpeg` rendition as parts of one endless answer. Browsers show each part when the next one begins."""
    async for packets in _packets(hub, stream, "jpeg"):
        for packet in packets:
            head = f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(packet.payload)}\r\n\r\n"
            yield head.encode() + bytes(packet.payload) + b"\r\n"


async def _packets(hub: Hub, stream: str, rendition: Rendition) -> AsyncIterator[list[Packet]]:
    """What one viewer of one stream gets, as it comes; an empty list now and then while nothing does."""
    viewer = Viewer(hub.latency)
    hub.join(viewer)
    hub.watch(viewer, viewer.want({stream: rendition}), viewer.wants)
    try:
        while not hub.is_closing:
            packets = [packet for packet, _ in viewer.take()]
            yield packets
            if packets:  # the player has taken them
                viewer.credit(stream)
            for starved in viewer.starved():
                hub.keyframe(starved)
            await viewer.wait(POLL_S)
    finally:
        hub.watch(viewer, viewer.want({}), {})
        hub.leave(viewer)
