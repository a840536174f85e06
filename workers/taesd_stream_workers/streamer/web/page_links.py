"""One page's wishes, each to the daemon that has the stream; of a peer's streams the pictures, on their way down.

A page has a socket of its own at each peer that it watches something of. So a page that is slow is a viewer that is
slow there too: its credits, its keyframes and its drops are that daemon's work, and nobody else waits for it. Nothing
waits here: a picture that the page does not take yet is not read.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket as os_socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final

from websockets.asyncio.client import ClientConnection

from taesd_stream.frames import Rendition
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.viewer import Viewer, pack_picture, unpack_picture
from taesd_stream_workers.streamer.web.pace import Pace
from taesd_stream_workers.streamer.web.peer import PEER_ERRORS, PICTURES, WAITS_S, Peer, PeerError
from taesd_stream_workers.streamer.web.peers import Peers

logger = logging.getLogger(__name__)

MAX_PICTURE_BYTES: Final = 32 << 20  # a clip goes as pictures, each far smaller
RECEIVE_BUFFER_BYTES: Final = 64 << 10  # left alone, the kernel's would hold seconds of stale video
Send = Callable[[bytes], Awaitable[None]]


class PageLinks:
    """Of one page. viewer: the hub's, for what is ours. send: to the page; it is the page's own who cannot take it."""

    def __init__(self, hub: Hub, peers: Peers, viewer: Viewer, send: Send) -> None:
        self._hub = hub
        self._peers = peers
        self._viewer = viewer
        self._send = send
        self._wanted: dict[str, Rendition] = {}
        self._links: dict[Peer, _Link] = {}
        self._pace = Pace()

    async def watch(self, streams: dict[str, Rendition]) -> None:
        """Replace what is watched. Returns when the page may say the next."""
        changed = len(self._wanted.items() ^ streams.items())
        self._wanted = streams
        await self.spread()
        await asyncio.sleep(self._pace.wait_s(changed))

    async def keyframe(self, stream: str) -> None:
        """The page has dropped, or begins. Returns when it may say the next."""
        if link := self.of(stream):
            await link.say("keyframe", stream=stream)
        elif self._viewer.wants.get(stream) == "live":
            self._viewer.restart_chain(stream)
            self._hub.keyframe(stream)
        await asyncio.sleep(self._pace.wait_s(1))

    async def spread(self) -> None:
        """Each stream is watched where it is: it may have come up at another daemon."""
        owners = self._peers.owners()
        ours = {name: rendition for name, rendition in self._wanted.items() if name not in owners}
        if ours != self._viewer.wants:
            self._hub.watch(self._viewer, self._viewer.want(ours), ours)
        theirs: dict[Peer, dict[str, Rendition]] = {}
        for name, rendition in self._wanted.items():
            if name in owners and owners[name].is_here:
                theirs.setdefault(owners[name], {})[name] = rendition
        for peer in self._links.keys() - theirs.keys():
            self._links.pop(peer).close()
        for peer, streams in theirs.items():
            if peer in self._links:
                await self._links[peer].want(streams)
            else:
                self._links[peer] = _Link(peer, self._send, streams)

    def of(self, stream: str) -> _Link | None:
        """The link by which a stream comes; None: it is ours."""
        return next((link for link in self._links.values() if stream in link.wants), None)

    def close(self) -> None:
        """The page has gone."""
        for link in self._links.values():
            link.close()
        self._links.clear()
        self._hub.watch(self._viewer, self._viewer.want({}), {})


class _Link:
    """One page's socket at one peer, for as long as it watches something there."""

    def __init__(self, peer: Peer, send: Send, streams: dict[str, Rendition]) -> None:
        self.wants = streams
        self._peer = peer
        self._send = send
        self._socket: ClientConnection | None = None
        self._task = asyncio.create_task(self._run())

    async def want(self, streams: dict[str, Rendition]) -> None:
        """Replace what is watched."""
        if streams != self.wants:
            self.wants = streams
            await self.say("watch", streams=streams)

    def close(self) -> None:
        """Nothing of it is watched any more."""
        self.wants = {}
        self._task.cancel()

    async def say(self, kind: str, **fields: Any) -> None:
        """Pass a wish on; without a connection it is lost, and the next connection begins with what is watched."""
        if self._socket is None:
            return
        try:
            await self._socket.send(json.dumps({"type": kind, **fields}))
        except PEER_ERRORS as error:
            logger.debug("wish_lost url=%s error=%s", self._peer.url, error)

    async def shown(self, stream: str, run: str, seq: int, shown_us: int) -> None:
        """The page has drawn it, at a moment of our clock."""
        await self.say("shown", stream=stream, run=run, seq=seq, shown_us=shown_us + self._peer.offset_us)

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                # Without pings: a page that is slow reads their answers late. That the peer is there, `follow` knows.
                async with self._peer.connect(PICTURES, max_bytes=MAX_PICTURE_BYTES, ping_s=None) as socket:
                    kernel: os_socket.socket = socket.transport.get_extra_info("socket")
                    kernel.setsockopt(os_socket.SOL_SOCKET, os_socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
                    self._socket = socket
                    await self.say("watch", streams=self.wants)
                    async for message in socket:
                        failures = 0
                        if isinstance(message, bytes):
                            await self._pass_on(message)
            except PEER_ERRORS as error:
                logger.debug("pictures_broke_off url=%s error=%s", self._peer.url, error)
            except Exception:  # whatever a peer sends, MemoryError too: the page goes on, and asks again
                logger.exception("pictures_failed url=%s", self._peer.url)
            finally:
                self._socket = None
            await asyncio.sleep(WAITS_S[min(failures, len(WAITS_S) - 1)])
            failures += 1

    async def _pass_on(self, message: bytes) -> None:
        """A picture to the page, its times on our clock. One that nobody asked that peer for is passed over."""
        try:
            header, payload = unpack_picture(message)
            if self.wants.get(header["stream"]) != header["rendition"]:
                return
            offset_us = self._peer.offset_us
            header["stamps"] = {name: time_us - offset_us for name, time_us in header["stamps"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
            raise PeerError(f"sent a picture that is none: {error}") from error
        await self._send(pack_picture(header, payload))
