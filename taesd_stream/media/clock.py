"""Times of pictures, in ticks of 1/90000 s: which one a picture gets, and how a chain of them goes on. Pure."""

from __future__ import annotations

from typing import Final

from taesd_stream.frames import CLOCK_HZ, Packet

PROVISIONAL_TICKS: Final = CLOCK_HZ // 30  # how long a picture lasts while nobody knows when the next one comes
DEFAULT_FPS: Final = 24.0  # of a `clip` or `live` run that names none: what most video models are trained at
_NS_PER_S: Final = 1_000_000_000


def picture_pts(index: int, fps: float | None) -> int:
    """The time of a `clip` or `live` picture: its place there by the rate, so that no rounding adds up."""
    return round(index * CLOCK_HZ / (fps or DEFAULT_FPS))


def steps_pts(sent_ns: int, opened_ns: int) -> int:
    """The time of a `steps` picture: when it was published, from the run's opening on; sent again it keeps its own.

    A publisher never puts two frames into one tick.
    """
    return max(0, (sent_ns - opened_ns) * CLOCK_HZ // _NS_PER_S)


class PlayerClock:
    """The time of each picture for one player, whose clock goes on through repeats, new runs and clips that loop.

    A picture keeps its own time where it can; else it comes as long after the last one as it really does. The first one
    may have waited for this player for long, and its run goes on from now: else the next step would lie in the future.
    """

    def __init__(self) -> None:
        self._run: str | None = None
        self._base = 0  # from the run's times to the player's
        self._shift = 0  # the same for the frame at hand
        self._last = -1
        self._last_ns = 0

    def stamp(self, packet: Packet, now_ns: int) -> int:
        """The time of the next picture. now_ns: a monotonic clock."""
        if packet.index == 0:
            now = self._last + max(1, (now_ns - self._last_ns) * CLOCK_HZ // _NS_PER_S) if self._run else 0
            if packet.run != self._run:
                self._base = now - packet.pts - _waited_ticks(packet)
            self._shift = self._base if packet.pts + self._base > self._last else now - packet.pts
        self._run, self._last, self._last_ns = packet.run, packet.pts + self._shift, now_ns
        return self._last


def _waited_ticks(packet: Packet) -> int:
    """How long a frame waited at the broker before somebody wanted to see it; 0: not measured, or of video."""
    stamps = packet.stamps
    if packet.kind != "steps" or not stamps.received_ns:
        return 0
    return max(0, stamps.started_ns - stamps.received_ns) * CLOCK_HZ // _NS_PER_S


class ForwardPts:
    """One timeline for pictures whose own times may begin again: repeats, and clip after clip.

    A frame that would begin at or before the last picture begins where that one ends; else it keeps its own times.
    """

    def __init__(self, last: int = -1, ends_at: int = 0) -> None:
        """last: time of the last picture already there (-1: none). ends_at: when it would end."""
        self._last = last
        self._ends_at = ends_at
        self._shift = 0

    def stamp(self, pts: int, *, index: int) -> int:
        """The time of the next picture. index: its place in its frame; its later pictures move with the first."""
        if index == 0:
            self._shift = 0 if pts > self._last else self._ends_at - pts
        moved = max(pts + self._shift, self._last + 1)
        self._ends_at = moved + (moved - self._last if index else PROVISIONAL_TICKS)
        self._last = moved
        return moved
