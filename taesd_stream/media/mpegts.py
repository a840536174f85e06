"""`live` packets as an MPEG-TS that a player shows at once, not one or two pictures late."""

from __future__ import annotations

from fractions import Fraction
from typing import Final

import av

from taesd_stream.frames import CLOCK_HZ, Packet
from taesd_stream.media.clock import ForwardPts

# Measured with FFmpeg's readers: without any one of the two and the delimiter they are a picture late, without all two.
# The price: their parser counts the delimiter to the next picture, which so gets the time of the one before.
_OPTIONS: Final = {"flush_packets": "1", "omit_video_pes_length": "0"}
DELIMITER: Final = b"\0\0\0\1\x09\xf0"  # access unit delimiter (ISO/IEC 14496-10 7.3.2.4): the picture before it ends
_END: Final = b"\0\0\0\1\x0a"  # end of sequence; a last delimiter alone is an error to decoders


class _Taken:
    """The file that the muxer writes into: it is emptied after each packet."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


class TransportStream:
    """The MPEG-TS of one viewer: packets in, bytes out, to be sent at once. Used by one thread.

    It begins at a keyframe. Times that begin again (a clip once more, a picture sent again) go on behind the last one;
    pictures may be left out up to a keyframe, which may have another size.
    """

    def __init__(self) -> None:
        """Begin an empty stream."""
        self._taken = _Taken()
        self._container = av.open(self._taken, "w", format="mpegts", options=_OPTIONS)
        self._stream = self._container.add_mux_stream("h264", time_base=Fraction(1, CLOCK_HZ))
        self._forward = ForwardPts()
        self._started = False

    def mux(self, packet: Packet) -> bytes:
        """The bytes of one packet, with the tables that begin the stream where they are due; b"" before a keyframe.

        Raises: ValueError for a rendition that is no H.264.
        """
        if packet.rendition not in ("live", "record"):
            raise ValueError(f"packet: expected live or record, got {packet.rendition}")
        if not self._started and not packet.is_keyframe:
            return b""
        self._started = True
        pts = self._forward.stamp(packet.pts, index=packet.index)
        return self._mux(b"".join((packet.payload, DELIMITER)), pts, is_keyframe=packet.is_keyframe)

    def close(self) -> bytes:
        """The bytes that end the stream in order, for a viewer that is still there. The muxer is freed."""
        last = self._mux(_END, self._forward.stamp(0, index=0)) if self._started else b""
        self._container.close()
        return last + self._taken.take()

    def _mux(self, data: bytes, pts: int, *, is_keyframe: bool = False) -> bytes:
        coded = av.Packet(data)
        coded.pts = coded.dts = pts
        coded.time_base, coded.stream, coded.is_keyframe = Fraction(1, CLOCK_HZ), self._stream, is_keyframe
        self._container.mux_one(coded)
        return self._taken.take()
