"""One open page: what it watches, and what waits to be sent to it. Drops here, so that nobody else waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from taesd_stream.frames import Packet, Rendition
from taesd_stream_workers.role.broken_chains import ASK_AGAIN_S
from taesd_stream_workers.streamer import finite_json
from taesd_stream_workers.streamer.latency import STAMPS, Latency, in_order

LIVE_BYTES: Final = 2 << 20  # of one stream's chain waiting for one viewer; past it, drop to the next keyframe
LIVE_PACKETS: Final = 30
CLIP_BYTES: Final = 16 << 20  # a clip is shown whole or not at all


class _Chain:
    """Packets of `live` that wait for one viewer: deltas cannot be dropped singly, so it drops to the next keyframe.

    asked_s: when a keyframe was asked for, for a chain begins with one.
    """

    def __init__(self, asked_s: float) -> None:
        self.packets: deque[tuple[Packet, int]] = deque()
        self._run = ""
        self._needs_key = True
        self._is_starved = False  # something was dropped, and no keyframe came since
        self._ask_at_s = asked_s + ASK_AGAIN_S
        self._held_bytes = 0

    def offer(self, packet: Packet, streamed_ns: int) -> int:
        """Queue it. Returns how many pictures were dropped."""
        if packet.is_keyframe:
            self._needs_key = self._is_starved = False
            self._run = packet.run
        elif self._needs_key or packet.run != self._run:
            self._is_starved = True
            return 1
        self.packets.append((packet, streamed_ns))
        self._held_bytes += len(packet.payload)
        return self._drop_older() if self._is_over() else 0

    def _is_over(self) -> bool:
        newest = self.packets[-1][0]
        frames = len(self.packets) - newest.index  # the pictures of the frame at hand count as one
        return frames > LIVE_PACKETS or self._held_bytes > (CLIP_BYTES if newest.kind == "clip" else LIVE_BYTES)

    def _drop_older(self) -> int:
        """Drop all in front of the last keyframe; where there is none behind the first, all of it."""
        keys = [place for place, (packet, _) in enumerate(self.packets) if packet.is_keyframe and packet.index == 0]
        if not keys or not keys[-1]:
            dropped = len(self.packets)
            self.clear()
            self._is_starved = True
            return dropped
        for _ in range(keys[-1]):
            self.take()
        return keys[-1]

    def asks(self, now_s: float) -> bool:
        """Whether to ask for a keyframe now: it may be lost on its way, so again while packets are dropped."""
        if not self._is_starved or now_s < self._ask_at_s:
            return False
        self._is_starved = False
        self._ask_at_s = now_s + ASK_AGAIN_S
        return True

    def take(self) -> tuple[Packet, int]:
        """The oldest waiting one."""
        packet, streamed_ns = self.packets.popleft()
        self._held_bytes -= len(packet.payload)
        return packet, streamed_ns

    def clear(self) -> None:
        """Drop all, and begin again at a keyframe."""
        self.packets.clear()
        self._held_bytes = 0
        self._needs_key = True


class Viewer:
    """Used in the web thread's event loop alone."""

    def __init__(
        self, latency: Latency, clock_s: Callable[[], float] = time.monotonic, *, is_follower: bool = False
    ) -> None:
        """is_follower: another daemon that keeps up with the state, and no viewer."""
        self.is_follower = is_follower
        self.wants: dict[str, Rendition] = {}
        self.is_state_dirty = True
        self._latency = latency
        self._clock_s = clock_s
        self._something = asyncio.Event()
        self._chains: dict[str, _Chain] = {}
        self._pictures: dict[str, list[tuple[Packet, int]]] = {}  # whole pictures: only those of the newest frame wait
        self._on_way: dict[str, tuple[str, int]] = {}  # run and seq that the credit was given for: all of its pictures
        self._credits: dict[str, int] = {}
        self._sent: dict[tuple[str, str, int], int] = {}  # (stream, run, seq) -> sent_ns, to know what `shown` means

    def want(self, streams: dict[str, Rendition]) -> dict[str, Rendition]:
        """Replace what is watched. Returns what was."""
        before, self.wants = self.wants, streams
        for stream in before:
            if streams.get(stream) != before[stream]:
                self._chains.pop(stream, None)
                self._pictures.pop(stream, None)
                self._credits.pop(stream, None)
                self._on_way.pop(stream, None)
        for stream, rendition in streams.items():
            if rendition == "live" and stream not in self._chains:
                self._chains[stream] = _Chain(self._clock_s())
            self._credits.setdefault(stream, 1)
        return before

    def offer(self, packet: Packet, streamed_ns: int) -> None:
        """A packet of some stream came; it is queued if this page watches that rendition."""
        if self.wants.get(packet.stream) != packet.rendition:
            return
        if packet.rendition == "live":
            dropped = self._chains[packet.stream].offer(packet, streamed_ns)
        else:
            waiting = self._pictures.get(packet.stream, [])
            is_same = bool(waiting) and _frame_of(waiting[0][0]) == _frame_of(packet) and packet.index > 0
            dropped = 0 if is_same else len(waiting)
            self._pictures[packet.stream] = [*(waiting if is_same else ()), (packet, streamed_ns)]
        if dropped:
            self._latency.dropped.labels(packet.rendition).inc(dropped)
        self._something.set()

    def credit(self, stream: str) -> None:
        """The page has drawn a picture of the stream and takes the next."""
        if stream in self.wants:
            self._credits[stream] = 1
            self._something.set()

    def state_changed(self) -> None:
        """There is something new to tell."""
        self.is_state_dirty = True
        self._something.set()

    def restart_chain(self, stream: str) -> None:
        """The page has dropped, or could not decode: what waits is of no use to it."""
        if stream in self._chains:
            self._chains[stream].clear()

    def starved(self) -> list[str]:
        """Streams that cannot go on without a keyframe: whoever owns this viewer asks for one, each time."""
        now_s = self._clock_s()
        return [stream for stream, chain in self._chains.items() if chain.asks(now_s)]

    def shown(self, stream: str, run: str, seq: int, shown_ns: int) -> None:
        """The page has drawn it."""
        sent_ns = self._sent.pop((stream, run, seq), None)
        if sent_ns is not None:
            self._latency.on_shown(sent_ns, shown_ns)

    async def wait(self, timeout_s: float) -> None:
        """Return when there is something to send, or after the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 can swallow a cancellation
                await self._something.wait()
        self._something.clear()

    def take(self) -> list[tuple[Packet, int]]:
        """The pictures to send now, each with the time it came to the streamer."""
        taken = [chain.take() for chain in self._chains.values() for _ in range(len(chain.packets))]
        for stream, waiting in list(self._pictures.items()):
            frame = _frame_of(waiting[0][0])
            if frame != self._on_way.get(stream):
                if self._credits.get(stream, 0) < 1:
                    continue
                self._credits[stream], self._on_way[stream] = 0, frame
            taken += self._pictures.pop(stream)
        for packet, _ in taken:
            self._sent[packet.stream, packet.run, packet.seq] = packet.stamps.sent_ns
        while len(self._sent) > 4096:
            del self._sent[next(iter(self._sent))]
        return taken


def _frame_of(packet: Packet) -> tuple[str, int]:
    return packet.run, packet.seq


def to_message(packet: Packet, streamed_ns: int) -> bytes:
    """A packet as a binary WebSocket message: uint32 header length (big-endian), JSON header, payload. Times in us."""
    times_ns = in_order(packet.stamps, streamed_ns)
    header: dict[str, Any] = {
        "stream": packet.stream,
        "run": packet.run,
        "seq": packet.seq,
        "index": packet.index,
        "count": packet.count,
        "step": packet.step,
        "total_steps": packet.total_steps,
        "sigma": packet.sigma,
        "rendition": packet.rendition,
        "kind": packet.kind,
        "parts": packet.parts,
        "columns": packet.columns,
        "keyframe": packet.is_keyframe,
        "pts": packet.pts,
        "width": packet.width,
        "height": packet.height,
        "decoder": packet.decoder,
        "stamps": {f"{stage}_us": time_ns // 1000 for stage, time_ns in zip(STAMPS, times_ns, strict=True)},
    }
    return pack_picture(header, bytes(packet.payload))


def pack_picture(header: dict[str, Any], payload: bytes) -> bytes:
    """The binary message of a picture."""
    head = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack(">I", len(head)) + head + payload


def unpack_picture(message: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a picture's binary message. Raises: ValueError, struct.error for what is none."""
    (length,) = struct.unpack_from(">I", message)
    header = finite_json.parse(message[4 : 4 + length])
    if not isinstance(header, dict):
        raise ValueError("a picture's header: expected an object")
    return header, message[4 + length :]
