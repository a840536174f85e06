"""The newest whole picture of each stream and rendition, for viewers who come later: bounded in bytes."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Final

from taesd_stream.frames import Packet, Rendition

MAX_BYTES: Final = 256 << 20  # a clip is many pictures, and a name stays for as long as the broker lists it
Key = tuple[str, Rendition]


class LastPictures:
    """One thread's. Over the bound the oldest goes that nobody watches, then the oldest; never the newest of all."""

    def __init__(self, is_watched: Callable[[Key], bool]) -> None:
        self._is_watched = is_watched
        self._frames: dict[Key, list[Packet]] = {}  # the one that changed last is last
        self._held_bytes = 0
        self._lacking: set[Key] = set()  # what came, and is not held whole

    def put(self, packet: Packet) -> None:
        """A picture: the first of a newer frame, or one more of a clip's."""
        key = packet.stream, packet.rendition
        frame = self._frames.pop(key, [])
        if packet.index and not frame:  # those before it had to go, or were lost
            self._lacking.add(key)
            return
        self._lacking.discard(key)
        if frame and (packet.index == 0 or (frame[0].run, frame[0].seq) != (packet.run, packet.seq)):
            self._held_bytes -= _size(frame)
            frame = []
        frame.append(packet)
        self._held_bytes += len(packet.payload)
        self._drop_over()
        self._frames[key] = frame

    def of(self, stream: str, rendition: Rendition) -> Sequence[Packet]:
        """All pictures of the newest frame; none where there was none, or it had to go."""
        return self._frames.get((stream, rendition), ())

    def lacks(self, stream: str, rendition: Rendition) -> bool:
        """Whether there was a picture that is not held any more: the broker must be asked for it."""
        return (stream, rendition) in self._lacking

    def keep_only(self, streams: Container[str]) -> None:
        """Forget all others."""
        for key in [key for key in self._frames if key[0] not in streams]:
            self._drop(key)
        self._lacking = {key for key in self._lacking if key[0] in streams}

    def _drop_over(self) -> None:
        while self._held_bytes > MAX_BYTES and self._frames:
            unwatched = (key for key in self._frames if not self._is_watched(key))
            self._drop(next(unwatched, next(iter(self._frames))))

    def _drop(self, key: Key) -> None:
        self._held_bytes -= _size(self._frames.pop(key))
        self._lacking.add(key)


def _size(frame: Sequence[Packet]) -> int:
    return sum(len(packet.payload) for packet in frame)
