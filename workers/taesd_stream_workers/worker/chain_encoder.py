"""The encoders of one chain: of one rendition of one run, a picture at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import EncodedPicture, JpegEncoder, Planes, VideoEncoder, encoder_for


class Order(NamedTuple):
    """How a picture is to be encoded.

    attempt, keyframe: where the chain begins anew. pts: 1/90000 s. width, height: as shown, pixels. track, tracks: of a
    chain that has an encoder for each of its tracks. is_clip: it is one of a whole video's.
    """

    attempt: int
    keyframe: bool
    pts: int
    width: int
    height: int
    track: int
    tracks: int
    is_clip: bool


@dataclass(slots=True)
class _Track:
    encoder: VideoEncoder | JpegEncoder
    last_pts: int = -1


class ChainEncoder:
    """Used by one thread at a time. is_one_of_many: see VideoEncoder."""

    def __init__(self, rendition: Rendition, *, is_one_of_many: bool) -> None:
        self._rendition, self._is_one_of_many = rendition, is_one_of_many
        self._tracks: list[_Track] = []
        self._attempt = 0

    def encode(self, planes: Planes, order: Order) -> EncodedPicture:
        """Encode one picture. Raises: whatever encoders do; the next picture then begins the chain anew."""
        try:
            return self._encode(planes, order)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Free the encoders; the next picture would open others."""
        for track in self._tracks:
            track.encoder.close()
        self._tracks = []

    def _encode(self, planes: Planes, order: Order) -> EncodedPicture:
        if len(self._tracks) != order.tracks or self._attempt != order.attempt:
            encoders = (
                encoder_for(self._rendition, is_one_of_many=self._is_one_of_many, is_clip=order.is_clip)
                for _ in range(order.tracks)
            )
            self._tracks, self._attempt = [_Track(encoder) for encoder in encoders], order.attempt
        track, size = self._tracks[order.track], (order.width, order.height)
        if isinstance(track.encoder, JpegEncoder):
            return track.encoder.encode(planes, size=size)
        is_new = order.keyframe or order.pts <= track.last_pts
        track.last_pts = order.pts
        return track.encoder.encode(planes, order.pts, force_keyframe=is_new, size=size)
