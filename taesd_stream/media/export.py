"""Pictures of a recording, or fresh ones, into another kind of file: other codecs, lossless, WebM, WebP, GIF.

Times stay as they are, down to the clock of the new kind. Every kind is written under a name of its own until it is
whole: an export that ends early leaves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final

import av
from av.container import OutputContainer
from av.filter import Graph
from av.video.stream import VideoStream

from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import CLOCK_HZ
from taesd_stream.media.clock import PROVISIONAL_TICKS
from taesd_stream.media.encoder import TIME_BASE
from taesd_stream.media.file_names import MAKING_SUFFIX
from taesd_stream.media.finished import tags_of

_NO_OPTIONS: Final[Mapping[str, str]] = MappingProxyType({})


class ExportError(TaesdStreamError):
    """This file cannot be made: its name, its codec, its size of picture."""


@dataclass(frozen=True, slots=True)
class Quality:
    """The option of an encoder that trades size for truth: its value where none is asked, its best and its worst one.

    They are the encoders' own, as measured: past them libx264 takes the nearest in silence, the others open with an
    error that names no option, and of libsvtav1 crf 0 is none at all: it takes its own default.
    """

    option: str
    usual: int
    best: int
    worst: int


@dataclass(frozen=True, slots=True)
class Codec:
    """How pictures are coded. quality: None where there is nothing to choose."""

    encoder: str
    pix_fmt: str
    suffixes: tuple[str, ...]
    quality: Quality | None = None
    options: Mapping[str, str] = field(default_factory=lambda: _NO_OPTIONS)
    tag: str | None = None
    is_rgb: bool = False
    time_base: Fraction = TIME_BASE
    max_rate: int = 1000  # pictures a second that its encoder is told of at the most


CODECS: Final[Mapping[str, Codec]] = {
    "h264": Codec(
        "libx264", "yuv420p", (".mp4", ".mkv", ".mov"), Quality("crf", 18, 0, 51), {"preset": "medium"}
    ),
    # Apple's players take HEVC only under this tag. No B frames: of fewer than three pictures libx265 makes up the dts.
    "h265": Codec(
        "libx265", "yuv420p", (".mp4", ".mkv", ".mov"), Quality("crf", 20, 0, 51),
        {"preset": "medium", "x265-params": "log-level=error:bframes=0"}, "hvc1",
    ),
    "av1": Codec(
        "libsvtav1", "yuv420p", (".mp4", ".mkv", ".webm"), Quality("crf", 28, 1, 63), {"preset": "8"}, max_rate=240
    ),
    "vp9": Codec("libvpx-vp9", "yuv420p", (".webm", ".mkv"), Quality("crf", 24, 0, 63), {"b": "0", "row-mt": "1"}),
    "lossless": Codec("ffv1", "bgr0", (".mkv",), None, {"level": "3", "slicecrc": "1"}, is_rgb=True),
    # from RGB: WebP's own YUV is BT.601
    "webp": Codec(
        "libwebp_anim", "bgra", (".webp",), Quality("quality", 80, 100, 0), is_rgb=True, time_base=Fraction(1, 1000)
    ),
    "gif": Codec("gif", "pal8", (".gif",), is_rgb=True, time_base=Fraction(1, 100)),
}  # fmt: skip
DEFAULTS: Final[Mapping[str, str]] = {
    ".mp4": "h264", ".mov": "h264", ".mkv": "lossless", ".webm": "vp9", ".webp": "webp", ".gif": "gif",
}  # fmt: skip
_FORMATS: Final = {".mkv": "matroska"}
_MIN_RATE: Final = 0.01
_OPTIONS: Final = {
    ".mp4": {"movflags": "faststart+use_metadata_tags", "video_track_timescale": str(CLOCK_HZ)},
    ".mov": {"movflags": "faststart+use_metadata_tags", "video_track_timescale": str(CLOCK_HZ)},
    ".gif": {"loop": "0"},
    ".webp": {"loop": "0"},
}


def codec_for(path: Path, name: str | None) -> Codec:
    """The codec of a file that is to be written. Raises: ExportError for a name or a pair that there is not."""
    suffix = path.suffix.lower()
    if suffix not in DEFAULTS:
        raise ExportError(f"{path}: expected a name that ends in {', '.join(DEFAULTS)}")
    codec = CODECS.get(name or DEFAULTS[suffix])
    if codec is None:
        raise ExportError(f"codec {name}: expected one of {', '.join(CODECS)}")
    if suffix not in codec.suffixes:
        raise ExportError(f"{path}: {name} goes into {' or '.join(codec.suffixes)}")
    return codec


def _check_quality(path: Path, codec: Codec, asked: int) -> None:
    """Raises: ExportError for a quality that is not on the codec's scale, or where it has none."""
    scale = codec.quality
    if scale is None:
        raise ExportError(f"{path}: {codec.encoder} has no quality to choose")
    if not min(scale.best, scale.worst) <= asked <= max(scale.best, scale.worst):
        expected = f"{scale.option} from {scale.best} (best) to {scale.worst} (smallest file)"
        raise ExportError(f"--quality {asked}: {codec.encoder} takes {expected}")


class ExportFile:
    """A `with` block that writes `path`; when it raises, or no picture came, nothing is left."""

    def __init__(
        self, path: Path, codec: Codec, summary: Mapping[str, Any], quality: int | None = None, fps: float | None = None
    ) -> None:
        """summary: as `tags_of` takes it. quality: of the codec's own scale. Raises: ExportError for none of it.

        fps: pictures a second, on average: what Matroska and WebM say of themselves (a default duration), and how long
        the last picture stands; None: nobody knows. The times of the pictures are what `add` is told.
        """
        if quality is not None:
            _check_quality(path, codec, quality)
        self._path, self._codec = path, codec
        self._part = path.with_name(path.name + MAKING_SUFFIX)
        self._tags = tags_of(summary)
        self._options = dict(codec.options)
        if codec.quality is not None:
            self._options[codec.quality.option] = str(codec.quality.usual if quality is None else quality)
        self._rate = Fraction(CLOCK_HZ, PROVISIONAL_TICKS)  # a guess for rate control
        if fps is not None:
            self._rate = Fraction(min(max(fps, _MIN_RATE), codec.max_rate)).limit_denominator(1001)
        self._size: tuple[int, int] | None = None
        self._last = -1
        self._palette: Graph | None = None

    def __enter__(self) -> ExportFile:
        suffix = self._path.suffix.lower()
        self._container: OutputContainer = av.open(
            self._part, "w", format=_FORMATS.get(suffix, suffix[1:]), options=_OPTIONS.get(suffix, {})
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None and self._size is not None:
                self._mux(None)
                self._container.close()
                self._part.replace(self._path)
            else:
                self._container.close()
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, frame: av.VideoFrame, pts: int) -> None:
        """Append a picture, BT.709 limited range or RGB. pts: ticks of 1/90000 s; at the latest the next tick is taken.

        Raises: ExportError for another size than the first one's, or what the encoder does not take.
        """
        if self._size is None:
            self._open(frame)
        elif self._size != (frame.width, frame.height):
            size = f"{frame.width}x{frame.height}"
            raise ExportError(f"{self._path}: pictures of one size only, {self._size} and then {size} came")
        pixels = self._converted(frame)
        time = round(pts * self._codec.time_base.denominator / CLOCK_HZ)
        self._last = max(time, self._last + 1)
        pixels.pts, pixels.time_base = self._last, self._codec.time_base
        pixels.pict_type = 0  # what the recording's encoder made of it is nothing to this one
        self._mux(pixels)

    def _open(self, frame: av.VideoFrame) -> None:
        width, height = self._size = frame.width, frame.height
        codec = self._codec
        try:
            stream = self._container.add_stream(codec.encoder, rate=self._rate, options=self._options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, codec.pix_fmt
            stream.time_base = stream.codec_context.time_base = codec.time_base
            if codec.tag:
                stream.codec_context.codec_tag = codec.tag
            if not codec.is_rgb:
                stream.codec_context.color_range = 1  # limited
                stream.codec_context.colorspace = stream.codec_context.color_primaries = 1  # BT.709
                stream.codec_context.color_trc = 1
            stream.codec_context.open()
        except (av.FFmpegError, ValueError) as error:
            raise ExportError(f"{self._path}: {codec.encoder} does not take {width}x{height}: {error}") from error
        self._container.metadata.update(self._tags)
        self._stream = stream
        if codec.encoder == "gif":
            self._palette = _palette_graph(width, height)

    def _converted(self, frame: av.VideoFrame) -> av.VideoFrame:
        if not self._codec.is_rgb:
            if frame.format.name == self._codec.pix_fmt:
                return frame
            return frame.reformat(
                format=self._codec.pix_fmt, src_color_range="JPEG", dst_color_range="MPEG", dst_colorspace="ITU709"
            )
        rgb = (
            frame
            if frame.format.name == "rgb24"
            else frame.reformat(format="rgb24", src_colorspace="ITU709", src_color_range="MPEG", dst_color_range="JPEG")
        )
        if self._palette is None:
            return rgb.reformat(format=self._codec.pix_fmt)
        rgb.pts, rgb.time_base = 0, self._codec.time_base
        self._palette.push(rgb)
        pulled = self._palette.pull()
        assert isinstance(pulled, av.VideoFrame)
        return pulled

    def _mux(self, frame: av.VideoFrame | None) -> None:
        try:
            for packet in self._stream.encode(frame):
                self._container.mux(packet)
        except av.FFmpegError as error:
            raise ExportError(f"{self._path}: {error}") from error


def _palette_graph(width: int, height: int) -> Graph:
    """256 colours of its own for each picture: a film of noise that becomes a picture has no palette for all."""
    graph = Graph()
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 100))
    split, palette = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1:dither=sierra2_4a"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


def pictures_of_file(path: Path, part: int = 1) -> Iterator[tuple[av.VideoFrame, int]]:
    """Every picture of a recording, growing or finished, and its time from the first one, ticks of 1/90000 s.

    part: from 1, of a batch that grows in tracks.
    Raises: OSError, av.FFmpegError.
    """
    with av.open(path) as container:
        first: int | None = None
        for frame in container.decode(video=part - 1):
            if frame.pts is None or frame.time_base is None:
                continue
            pts = round(frame.pts * frame.time_base * CLOCK_HZ)
            first = pts if first is None else first
            yield frame, pts - first
