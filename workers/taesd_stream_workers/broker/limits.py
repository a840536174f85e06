"""What one client of the broker, and all together, may use of it: streams, bytes in memory, messages a second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from taesd_stream.config import BrokerConfig
from taesd_stream_workers.broker.runs import Run

TELL_S: Final = 1.0  # how often a client that is too fast is told
ALL: Final = "\0all"  # no client's name


class Limits:
    """Used in the broker's loop alone. A client is a key's name or, without keys, a host.

    Each check comes before the thing is made; `recount` sets the counts right twice a second, as runs end or are lost.
    """

    def __init__(self, config: BrokerConfig, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock_s = clock_s
        self._streams: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._tokens: dict[str | bytes, tuple[float, float]] = {}  # messages that may come now, and when that was so
        self._told_s: dict[str | bytes, float] = {}

    def may_speak(self, client: str | bytes) -> bool:
        """Whether another message is taken now of this client, or, by its id, this connection; if so it counts."""
        now, asked = self._clock_s(), self._config
        mine = self._refilled(client, asked.max_client_messages_s, now)
        everyones = self._refilled(ALL, asked.max_messages_s, now)
        if mine < 1 or everyones < 1:
            return False
        self._tokens[client] = (mine - 1, now)
        self._tokens[ALL] = (everyones - 1, now)
        return True

    def charge(self, client: str | bytes, messages: int) -> None:
        """One that was taken is as much work as so many more."""
        now, asked = self._clock_s(), self._config
        for one, rate in ((client, asked.max_client_messages_s), (ALL, asked.max_messages_s)):
            self._tokens[one] = (self._refilled(one, rate, now) - messages, now)

    def speed_refusal(self, client: str | bytes) -> str | None:
        """What to tell one that spoke too fast; None when it was told a moment ago."""
        now = self._clock_s()
        if now - self._told_s.get(client, float("-inf")) < TELL_S:
            return None
        self._told_s[client] = now
        asked = self._config
        if self._tokens.get(client, (1.0, now))[0] < 1:
            rate = f"over {asked.max_client_messages_s} messages a second of one client"
            return f"{rate}: broker.max_client_messages_s allows no more"
        return f"over {asked.max_messages_s} messages a second of all clients: broker.max_messages_s allows no more"

    def stream_refusal(self, client: str) -> str | None:
        """Why this client may open no other stream; None when it may."""
        asked, mine, every = self._config, self._streams[client], self._streams.total()
        if every >= asked.max_streams:
            return f"{every} streams are open: broker.max_streams = {asked.max_streams} allows no more"
        if mine >= asked.max_client_streams:
            allowed = f"broker.max_client_streams = {asked.max_client_streams} allows no more"
            return f"{mine} streams of one client are open: {allowed}"
        return None

    def memory_refusal(self, client: str, more_bytes: int) -> str | None:
        """Why no more bytes of latents are held for this client; None when they may be."""
        asked = self._config
        if (mine := self._bytes[client] + more_bytes) > asked.max_client_memory_bytes:
            allowed = f"broker.max_client_memory_bytes = {asked.max_client_memory_bytes} allows no more"
            return f"{mine} bytes of latents of one client: {allowed}"
        if (every := self._bytes.total() + more_bytes) > asked.max_memory_bytes:
            return f"{every} bytes of latents: broker.max_memory_bytes = {asked.max_memory_bytes} allows no more"
        return None

    def opened(self, client: str) -> None:
        """It has another stream."""
        self._streams[client] += 1

    def ended(self, client: str) -> None:
        """One of its streams is over."""
        self._streams[client] = max(0, self._streams[client] - 1)

    def holds(self, run: Run) -> None:
        """Count what is held of a run now."""
        self._bytes[run.client] += run.held_bytes - run.counted_bytes
        run.counted_bytes = run.held_bytes

    def recount(self, runs: Iterable[Run]) -> None:
        """Count anew, and forget clients that are quiet."""
        self._streams.clear()
        self._bytes.clear()
        for run in runs:
            if run.end is None:
                self._streams[run.client] += run.is_alive
                run.counted_bytes = run.held_bytes
            else:  # what is shown of ended runs has a bound of its own; a frame that waits for the log has none
                run.counted_bytes = run.front_bytes
            self._bytes[run.client] += run.counted_bytes
        now = self._clock_s()
        most = self._config.max_client_messages_s
        self._tokens = {
            client: one
            for client, one in self._tokens.items()
            if client == ALL or self._refilled(client, most, now) < most  # else it is as if never heard
        }
        self._told_s = {client: told_s for client, told_s in self._told_s.items() if now - told_s < TELL_S}

    def _refilled(self, client: str | bytes, rate: int, now: float) -> float:
        tokens, then = self._tokens.get(client, (float(rate), now))
        return min(float(rate), tokens + (now - then) * rate)
