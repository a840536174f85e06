"""Which run a stream's name means, and which worker shows it: pictures of a former one, however late, are not shown."""

from __future__ import annotations

from typing import Final

from taesd_stream.frames import Packet
from taesd_stream.messages import State

FORMER_NS: Final = 60_000_000_000  # so far ahead of STATE, which comes twice a second, no time of the same clock is


class NewestRuns:
    """Used in one thread. Both sources are ordered by the broker's clock, for packets and STATE overtake each other."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[str, int]] = {}  # by name: the run, and when it was the newest, broker's clock
        self._placed_ns: dict[str, int] = {}  # by run: since when the worker that shows it is its worker
        self._state_ns = 0

    def on_state(self, state: State) -> None:
        """The broker says which run each name means."""
        if state.now_ns < self._state_ns:  # its host was started anew, and the clock with it
            self._newest.clear()
            self._placed_ns.clear()
        self._state_ns = state.now_ns
        named = {row["name"]: row["run"] for row in state.streams}
        later = {name: one for name, one in self._newest.items() if one[1] > state.now_ns}
        self._newest = {name: (run, state.now_ns) for name, run in named.items()} | later
        known = {run for run, _ in self._newest.values()}
        self._placed_ns = {run: placed_ns for run, placed_ns in self._placed_ns.items() if run in known}

    def is_replaced(self, packet: Packet) -> bool:
        """Whether another run of its name is newer. A frame that came to the broker later is of a newer run."""
        received_ns = packet.stamps.received_ns  # 0 of one that waited in the log: then STATE alone decides
        if self._is_of_former_clock(received_ns):
            return True
        run, since_ns = self._newest.get(packet.stream, (packet.run, received_ns))
        if received_ns > since_ns:
            run, since_ns = packet.run, received_ns
        self._newest[packet.stream] = (run, since_ns)
        return run != packet.run

    def has_moved(self, packet: Packet) -> bool:
        """Whether another worker shows its run by now: one that was silent for a while goes on where it stopped."""
        if self._is_of_former_clock(packet.placed_ns):
            return True
        placed_ns = max(packet.placed_ns, self._placed_ns.get(packet.run, 0))
        self._placed_ns[packet.run] = placed_ns
        return packet.placed_ns < placed_ns

    def _is_of_former_clock(self, broker_ns: int) -> bool:
        """Whether a time is of before the broker's host was started anew: believed, it would hide all that follows."""
        return bool(self._state_ns) and broker_ns > self._state_ns + FORMER_NS
