"""Chains with a hole: a delta behind a dropped packet shows rubbish, so all goes up to the next keyframe."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from taesd_stream.frames import Packet

ASK_AGAIN_S: Final = 0.5  # a keyframe that was asked for may be lost, or late
MAX_BROKEN: Final = 4096  # runs; one that ended with a hole is never mended
_CHAINS: Final = ("live", "film")  # `record` has attempts instead


class BrokenChains:
    """Which runs' packets are of no use before a keyframe. Not locked: one thread, or its owner's lock.

    ask: called with a stream whose `live` needs a keyframe, at most every ASK_AGAIN_S a run; a `film` has one soon by
    itself. clock_s: a monotonic clock.
    """

    def __init__(self, ask: Callable[[str], None], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock_s = clock_s
        self._ask_at_s: dict[tuple[str, str], float] = {}  # by run and rendition, each with a hole: when to ask again

    def lose(self, packet: Packet) -> None:
        """The packet is dropped. Of a chain the rest must go too."""
        if packet.rendition not in _CHAINS:
            return
        chain, now_s = (packet.run, packet.rendition), self._clock_s()
        ask_at_s = self._ask_at_s.pop(chain, now_s)
        if now_s >= ask_at_s and packet.rendition == "live":
            self._ask(packet.stream)
            ask_at_s = now_s + ASK_AGAIN_S
        self._ask_at_s[chain] = ask_at_s
        if len(self._ask_at_s) > MAX_BROKEN:
            del self._ask_at_s[next(iter(self._ask_at_s))]

    def takes(self, packet: Packet) -> bool:
        """Whether the packet can be shown behind what came before it; if not, it is lost too. A keyframe mends."""
        chain = (packet.run, packet.rendition)
        if chain not in self._ask_at_s:
            return True
        if packet.is_keyframe:
            del self._ask_at_s[chain]
            return True
        self.lose(packet)
        return False
