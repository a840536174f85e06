"""YUV planes in, encoded pictures out: H.264 for `live`, `record` and `film`, JPEG for `thumb` and `jpeg`.

Options and their speeds were measured with PyAV 18 (FFmpeg 8.1): `encode()` lets go of the GIL, one thread an encoder
loses nothing, and without a global header each IDR brings its own SPS and PPS.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final, Literal, TypeAlias

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from numpy.typing import NDArray

from taesd_stream.frames import CLOCK_HZ, Rendition
from taesd_stream.media.parameter_sets import has_level, level_for

Planes: TypeAlias = NDArray[np.uint8]
VideoRendition: TypeAlias = Literal["live", "record", "film"]
JpegRendition: TypeAlias = Literal["thumb", "jpeg"]

VIDEO_RENDITIONS: Final[tuple[VideoRendition, ...]] = ("live", "record", "film")
TIME_BASE: Final = Fraction(1, CLOCK_HZ)

# zerolatency: one packet out for each picture in, no B frames, so dts = pts. scenecut=0: keyframes only where asked.
# weightp=0: to look for fades takes 5 to 8 % of the time, and saved nothing of previews, nor of a real video's bytes.
_COMMON: Final = {"tune": "zerolatency", "forced-idr": "1", "x264-params": "scenecut=0:weightp=0"}
# `record`: crf 14, for chroma at half size alone leaves 36.5 dB of real previews, crf 18 32.8.
_RECORD: Final = {**_COMMON, "preset": "veryfast", "crf": "14", "g": "30"}
# For what is shown, 1.7 ms at 512x512: previews melt and do not move, so that a search between pixels finds nothing and
# small partitions save nothing. Without both superfast takes 10 to 25 % less time; real video takes 3 % more bytes.
_SHOWN: Final = {**_COMMON, "preset": "superfast", "x264-params": f"{_COMMON['x264-params']}:partitions=i8x8:subme=0"}
_H264: Final[dict[VideoRendition, dict[str, str]]] = {
    "live": {**_SHOWN, "crf": "23", "g": "600"},
    "record": _RECORD,
    # Made for every picture that somebody watches: half of the time for 1.03 to 1.19 of the bytes. It may become a
    # recording and go on in the same file: that wants the same parameter sets, which hold crf, and as many keyframes.
    "film": {**_RECORD, **_SHOWN},
}
# Of previews that change with every picture, 512x512: superfast 3.7 ms and 8.4 KiB, ultrafast 1.6 and 11.2, both 35 dB.
# ipratio: keyframes as coarse as what is predicted, a late viewer's too: their sizes tell which way is cheaper.
_MANY: Final = {"preset": "ultrafast", "x264-params": f"{_COMMON['x264-params']}:ipratio=1"}
# Of the previews that `benchmarks/encoding.py` melts, ultrafast on another host: predicted 1.7 ms and 9.7 KiB, as
# keyframes 1.1 and 9.9, both 36 dB. A picture that stays takes 0.1 KiB or 12.
MOST_COST: Final = 1.5  # bytes of keyframes for those of predicted pictures
FIRST_TRY: Final = 8  # pictures
MAX_PAUSE: Final = 64  # pictures
_JPEG_QUANTISER: Final[dict[JpegRendition, int]] = {"jpeg": 4, "thumb": 6}  # MPEG's scale, 2 best to 31


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedPicture:
    """One encoded picture, and its size as shown (pixels)."""

    payload: bytes
    is_keyframe: bool
    width: int
    height: int


def size_of(planes: Planes) -> tuple[int, int]:
    """Width and height of the picture in I420 planes.

    planes: (H*3//2, W) uint8, C order: H rows of Y, then U, then V at half size. Raises: ValueError otherwise.
    """
    if planes.ndim != 2 or planes.dtype != np.uint8 or not planes.flags.c_contiguous:
        raise ValueError(f"planes: expected contiguous (H*3//2, W) uint8, got {planes.shape} {planes.dtype}")
    rows, width = planes.shape
    if rows == 0 or rows % 3 or width == 0 or width % 2:
        raise ValueError(f"planes: expected even height and width above 0, got shape {planes.shape}")
    return width, rows // 3 * 2


def _frame(planes: Planes, pix_fmt: str, pts: int) -> av.VideoFrame:
    # PyAV 18 wraps without a copy, but takes rows // 6 * 4 as the height: two rows too few when it is 2 modulo 4.
    wrap = av.VideoFrame.from_numpy_buffer if planes.shape[0] % 6 == 0 else av.VideoFrame.from_ndarray
    frame = wrap(planes, pix_fmt)
    frame.pts, frame.time_base = pts, TIME_BASE
    return frame


def _open(codec: str, pix_fmt: str, size: tuple[int, int]) -> VideoCodecContext:
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, VideoCodecContext)
    context.width, context.height = size
    context.pix_fmt, context.time_base, context.thread_count = pix_fmt, TIME_BASE, 1
    return context


def _encode_one(context: VideoCodecContext, frame: av.VideoFrame) -> av.Packet[VideoStream]:
    # not encode(), which asks for another one, in vain: in a worker each such call waits to get the GIL back
    packet = next(context.encode_lazy(frame), None)
    if packet is None or packet.pts != frame.pts:
        raise RuntimeError(f"{context.name}: expected a packet at {frame.pts}, got {packet}")
    return packet


class _Prediction:
    """Whether predicting pictures from those before saves bytes worth its time; the other way is tried now and then."""

    def __init__(self) -> None:
        self._pays = True
        self._pause = self._left = FIRST_TRY  # pictures until the next try
        self._bytes = {True: 0.0, False: 0.0}  # of late, of a keyframe and of a predicted picture

    @property
    def wants_keyframe(self) -> bool:
        """Of the next picture."""
        is_try = self._left == 0
        return self._pays == is_try

    def learn(self, picture: EncodedPicture) -> None:
        """What became of it."""
        before, nbytes = self._bytes[picture.is_keyframe], len(picture.payload)
        if picture.is_keyframe and not self._bytes[False]:
            return  # the first of all, whose size the rate control had to guess
        self._bytes[picture.is_keyframe] = (before + nbytes) / 2 if before else nbytes
        if self._left or picture.is_keyframe is not self._pays:
            self._left = max(0, self._left - 1)  # a try that somebody's keyframe has spoilt is the next one's
            return
        did_pay, self._pays = self._pays, self._bytes[True] > MOST_COST * self._bytes[False]
        self._pause = min(2 * self._pause, MAX_PAUSE) if did_pay and self._pays else FIRST_TRY
        self._left = self._pause


class VideoEncoder:
    """H.264, Annex B, BT.709 limited range, said so in the VUI. Used by one thread.

    The planes may be written again as soon as `encode` has returned.
    """

    def __init__(self, rendition: VideoRendition, *, is_one_of_many: bool = False, is_clip: bool = False) -> None:
        """Store the choice; the encoder opens with the first picture, whose size it takes.

        is_one_of_many: many `live` pictures are made at once: less than half the work for a third more bytes, and
        keyframes alone where they take little more. is_clip: but never within a clip, which is entered at its start.
        """
        is_quick = is_one_of_many and rendition == "live"
        self._options = _H264[rendition] | (_MANY if is_quick else {})
        self._may_add_keyframes = is_quick and not is_clip
        self._prediction: _Prediction | None = None
        self._context: VideoCodecContext | None = None
        self._last_pts: int | None = None
        self._shift = 0  # from the caller's time to the encoder's, which must never go back

    def encode(
        self, planes: Planes, pts: int, *, force_keyframe: bool = False, size: tuple[int, int] | None = None
    ) -> EncodedPicture:
        """Encode one picture; exactly one packet comes out.

        planes: (H*3//2, W) uint8 I420, BT.709 limited range; another size than before begins a new chain (a keyframe).
        pts: ticks of 1/90000 s, more than the last one; only a forced keyframe may begin again at any time, as each
        clip and each repeated picture does. size: width and height as shown, where the planes were padded to even.
        Raises: ValueError for planes that are no I420 picture, or a pts that does not go on.
        """
        coded = size_of(planes)
        if self._last_pts is not None and pts <= self._last_pts:
            if not force_keyframe:
                raise ValueError(f"pts: expected more than {self._last_pts}, got {pts}")
            self._shift += self._last_pts - pts + 1
        context = self._context_for(coded)
        frame = _frame(planes, "yuv420p", pts + self._shift)
        if force_keyframe or (self._prediction is not None and self._prediction.wants_keyframe):
            frame.pict_type = PictureType.I
        packet = _encode_one(context, frame)
        self._last_pts = pts
        width, height = size or coded
        picture = EncodedPicture(payload=bytes(packet), is_keyframe=packet.is_keyframe, width=width, height=height)
        if self._prediction is not None:
            self._prediction.learn(picture)
        return picture

    def close(self) -> None:
        """Free the encoder; the next picture would open another one."""
        self._context = None

    def _context_for(self, size: tuple[int, int]) -> VideoCodecContext:
        # PyAV would rescale a picture of another size without a word.
        if self._context is None or (self._context.width, self._context.height) != size:
            context = _open("libx264", "yuv420p", size)
            context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            # x264 would say a level for 90000 pictures/s, the clock's ticks: above what many hardware decoders take
            level = {"level": f"{level_for(*size) / 10}"} if has_level(*size) else {}
            context.options = self._options | level
            self._context = context
            self._prediction = _Prediction() if self._may_add_keyframes else None
        return self._context


class JpegEncoder:
    """JPEG as JFIF means it: full-range BT.601 (T.871). Used by one thread."""

    def __init__(self, rendition: JpegRendition) -> None:
        """Store the choice; the encoder opens with the first picture, whose size it takes."""
        self._quantiser = _JPEG_QUANTISER[rendition]
        self._context: VideoCodecContext | None = None
        self._count = 0

    def encode(self, planes: Planes, *, size: tuple[int, int] | None = None) -> EncodedPicture:
        """Encode one picture.

        planes: (H*3//2, W) uint8 I420, full-range BT.601. size: width and height as shown, where the planes were padded
        to even. Raises: ValueError for planes that are no I420 picture.
        """
        coded = size_of(planes)
        if self._context is None or (self._context.width, self._context.height) != coded:
            self._context = _open("mjpeg", "yuvj420p", coded)
            self._context.qmin = self._context.qmax = self._quantiser
            self._context.sample_aspect_ratio = Fraction(1)  # without it FFmpeg writes no JFIF header
        packet = _encode_one(self._context, _frame(planes, "yuvj420p", self._count))
        self._count += 1
        width, height = size or coded
        return EncodedPicture(payload=bytes(packet), is_keyframe=True, width=width, height=height)

    def close(self) -> None:
        """Free the encoder; the next picture would open another one."""
        self._context = None


def encoder_for(
    rendition: Rendition, *, is_one_of_many: bool = False, is_clip: bool = False
) -> VideoEncoder | JpegEncoder:
    """A new encoder for one rendition of one stream; see VideoEncoder."""
    if rendition == "thumb" or rendition == "jpeg":
        return JpegEncoder(rendition)
    return VideoEncoder(rendition, is_one_of_many=is_one_of_many, is_clip=is_clip)
