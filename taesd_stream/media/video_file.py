"""Pictures straight into an ordinary MP4, all at hand and evenly spaced: what `taesd-stream decode` writes."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Final

import av
from av.container import OutputContainer

from taesd_stream.frames import CLOCK_HZ
from taesd_stream.media.encoder import TIME_BASE, Planes, VideoEncoder, size_of
from taesd_stream.media.file_names import MAKING_SUFFIX

_OPTIONS: Final = {"movflags": "faststart", "video_track_timescale": str(CLOCK_HZ)}


class VideoFile:
    """A `with` block that writes `path`; when it raises, no file is left.

    The pictures are encoded as a recording's are (H.264, crf 14) and must all have one size.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path = path
        self._part = path.with_name(path.name + MAKING_SUFFIX)
        self._ticks = CLOCK_HZ / fps
        self._encoder = VideoEncoder("record")
        self._count = 0

    def __enter__(self) -> VideoFile:
        self._container: OutputContainer = av.open(self._part, "w", format="mp4", options=_OPTIONS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._encoder.close()
        try:
            self._container.close()
            if kind is None and self._count:
                self._part.replace(self._path)
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, planes: Planes) -> None:
        """Append a picture: (H*3//2, W) uint8 I420, BT.709 limited range. Raises: ValueError for another size."""
        pts = round(self._count * self._ticks)
        if not self._count:
            self._size = size_of(planes)
            self._stream = self._container.add_stream("h264", time_base=TIME_BASE)
        elif size_of(planes) != self._size:
            raise ValueError(f"picture {self._count}: expected {self._size}, got {size_of(planes)}")
        picture = self._encoder.encode(planes, pts)
        packet = av.Packet(picture.payload)
        packet.pts = packet.dts = pts
        packet.duration = round((self._count + 1) * self._ticks) - pts  # else the last one would stand for 1/24 s
        packet.time_base, packet.is_keyframe, packet.stream = TIME_BASE, picture.is_keyframe, self._stream
        self._container.mux(packet)
        self._count += 1
