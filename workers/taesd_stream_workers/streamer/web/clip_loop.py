"""A clip as a player sees it: over and over, each picture in its time, from the packets that came once."""

from __future__ import annotations

from typing import Final

from taesd_stream.frames import CLOCK_HZ, Packet

LATE_NS: Final = 250_000_000  # a clip that is later begins anew from now on: it does not run to catch up
ALONE_TICKS: Final = CLOCK_HZ  # how long the picture of a clip of one lasts


class ClipLoop:
    """What one player is shown of one stream and rendition: of a clip each picture when it is due, all else at once.

    `add` what comes, then send what is `due`. A newer clip takes the place of the one at hand with its first picture.
    """

    def __init__(self) -> None:
        self._now: list[Packet] = []  # of other kinds
        self._clip: list[Packet] = []  # its pictures, as far as they came
        self._next = 0  # which of them is shown next
        self._began_ns: int | None = None  # when the clip began, this time round; None: as soon as it is asked for

    def add(self, packet: Packet) -> None:
        """A packet came. Of a clip that is here whole, made again for another viewer, nothing is needed."""
        if packet.kind != "clip":
            self._clip, self._next = [], 0
            self._now.append(packet)
        elif packet.index == 0 and not (self._is_whole and _frame_of(packet) == _frame_of(self._clip[0])):
            self._clip, self._next, self._began_ns = [packet], 0, None
        elif self._clip and _frame_of(packet) == _frame_of(self._clip[0]) and packet.index == len(self._clip):
            self._clip.append(packet)

    def due(self, now_ns: int) -> list[tuple[Packet, int]]:
        """What to send now, each packet with the time at which it was due. now_ns: a monotonic clock."""
        found = [(packet, now_ns) for packet in self._now]
        self._now = []
        while (at_ns := self._next_ns(now_ns)) is not None and at_ns <= now_ns:
            found.append((self._clip[self._next], at_ns))
            self._next += 1
            if self._is_whole and self._next == len(self._clip):
                self._next, self._began_ns = 0, at_ns + _ns(self._last_ticks)
        return found

    def wait_s(self, now_ns: int, most_s: float) -> float:
        """How long nothing is due, at most most_s."""
        at_ns = self._next_ns(now_ns)
        return most_s if at_ns is None else min(most_s, max(0.0, (at_ns - now_ns) / 1e9))

    def _next_ns(self, now_ns: int) -> int | None:
        """When the next picture of the clip is due; None while it is not here."""
        if self._next == len(self._clip):
            return None
        if self._began_ns is None or (self._next == 0 and now_ns - self._began_ns > LATE_NS):
            self._began_ns = now_ns
        return self._began_ns + _ns(self._clip[self._next].pts - self._clip[0].pts)

    @property
    def _is_whole(self) -> bool:
        return bool(self._clip) and len(self._clip) == self._clip[0].count

    @property
    def _last_ticks(self) -> int:
        return max(1, self._clip[-1].pts - self._clip[-2].pts) if len(self._clip) > 1 else ALONE_TICKS


def _frame_of(packet: Packet) -> tuple[str, int]:
    return packet.run, packet.seq


def _ns(ticks: int) -> int:
    return ticks * 1_000_000_000 // CLOCK_HZ
