"""Times of pictures, in ticks of 1/90000 s: which one a picture gets, and how a chain of them goes on. Pure."""

from __future__ import annotations

from typing import Final

from taesd_stream.frames import CLOCK_HZ, Kind

PROVISIONAL_TICKS: Final = CLOCK_HZ // 30  # how long a picture lasts while nobody knows when the next one comes
DEFAULT_FPS: Final = 24.0  # of a `clip` or `live` run that names none: what most video models are trained at
_NS_PER_S: Final = 1_000_000_000


class SteadyPts:
    """Times of one run's pictures, for one rendition.

    `steps`: when it was published, counted from the run's first frame; `live`: its place in the run / fps;
    `clip`: its place in the clip / fps.
    """

    def __init__(self, kind: Kind, fps: float | None = None, *, epoch_ns: int | None = None) -> None:
        """epoch_ns: `sent_ns` of the run's first frame; None: of the first frame that is stamped here.

        Raises: ValueError when fps is not above 0.
        """
        if fps is not None and not fps > 0:
            raise ValueError(f"fps: expected above 0, got {fps}")
        self._kind = kind
        self._fps = fps or DEFAULT_FPS
        self._epoch_ns = epoch_ns
        self._seq = -1
        self._last = -1

    def stamp(self, *, seq: int, sent_ns: int, index: int = 0, count: int = 1) -> list[int]:
        """The times of the `count` pictures of frame `seq`; the same frame again gets the same ones.

        index: of the first of them in the run, in pictures (`live` only).
        `steps` grow strictly from one frame to the next: two frames in one tick are put one tick apart.
        """
        if self._kind == "steps":
            return [self._since_first(seq, sent_ns)] * count
        first = index if self._kind == "live" else 0
        return [round((first + i) * CLOCK_HZ / self._fps) for i in range(count)]

    def _since_first(self, seq: int, sent_ns: int) -> int:
        if self._epoch_ns is None:
            self._epoch_ns = sent_ns
        pts = max(0, (sent_ns - self._epoch_ns) * CLOCK_HZ // _NS_PER_S)
        if seq == self._seq:
            return self._last
        if seq > self._seq:
            pts = max(pts, self._last + 1)
            self._seq, self._last = seq, pts
        return pts


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
