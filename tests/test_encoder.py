"""Planes become packets that other programs decode to the same picture at the same time."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image

from taesd_stream.media.encoder import FIRST_TRY, VIDEO_RENDITIONS, JpegEncoder, VideoEncoder, VideoRendition

PATCHES = [
    (255, 255, 255),
    (0, 0, 0),
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 0),
    (0, 255, 255),
    (255, 0, 255),
]


def patches() -> NDArray[np.uint8]:
    """Eight flat columns of 32x64 pixels."""
    return np.repeat(np.repeat(np.array([PATCHES], np.uint8), 32, axis=1), 64, axis=0)


def to_planes(rgb: NDArray[np.uint8], *, full_range: bool = False) -> NDArray[np.uint8]:
    """I420 of an (H, W, 3) picture by the matrix of its standard: BT.601 full range, or BT.709 limited."""
    kr, kb = (0.299, 0.114) if full_range else (0.2126, 0.0722)
    red, green, blue = np.moveaxis(rgb.astype(np.float64) / 255, -1, 0)
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = [(blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)]
    scale, offset, chroma_scale = (255, 0, 255) if full_range else (219, 16, 224)
    rows = [luma * scale + offset]
    for plane in chroma:
        height, width = plane.shape
        small = plane.reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3))
        rows.append((small * chroma_scale + 128).reshape(-1, width))
    planes: NDArray[np.uint8] = np.clip(np.rint(np.concatenate(rows)), 0, 255).astype(np.uint8)
    return planes


def moving(number: int, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """Planes of a picture whose mean luma tells its number."""
    ramp = np.arange(width, dtype=np.uint8)[None] % 16
    luma = np.broadcast_to(ramp + (20 + 3 * number), (height, width))
    return np.concatenate([luma, np.full((height // 2, width), 128)]).astype(np.uint8)


def decode(payloads: list[bytes]) -> list[VideoFrame]:
    """What a decoder makes of the access units."""
    context = av.CodecContext.create("h264", "r")
    frames: list[VideoFrame] = []
    for payload in payloads:
        frames += context.decode(av.Packet(payload))
    return frames + context.decode(None)


def nal_types(payload: bytes) -> list[int]:
    """Types of the NAL units of an Annex B access unit."""
    return [part[0] & 31 for part in payload.split(b"\0\0\1")[1:]]


@pytest.mark.parametrize("rendition", ["live", "record"])
def test_each_picture_gives_one_packet_that_decodes_to_it(rendition: VideoRendition) -> None:
    """Ten pictures give ten access units, and each decodes to its own picture."""
    encoder = VideoEncoder(rendition)
    pictures = [encoder.encode(moving(i), i * 9000) for i in range(10)]
    frames = decode([picture.payload for picture in pictures])
    assert [picture.is_keyframe for picture in pictures] == [True] + [False] * 9
    for number, frame in enumerate(frames):
        difference = frame.to_ndarray(format="yuv420p").astype(int) - moving(number)
        assert np.abs(difference).mean() < 2
    assert len(frames) == 10


def test_every_keyframe_can_start_a_decoder() -> None:
    """A keyframe on demand is an IDR that brings SPS and PPS; a later decoder starts there."""
    encoder = VideoEncoder("live")
    pictures = [encoder.encode(moving(i), i + 1, force_keyframe=i == 3) for i in range(6)]
    assert [picture.is_keyframe for picture in pictures] == [True, False, False, True, False, False]
    types = nal_types(pictures[3].payload)
    assert types[:2] == [7, 8]
    assert types[-1] == 5
    assert len(decode([picture.payload for picture in pictures[3:]])) == 3


def test_record_has_a_keyframe_every_30_pictures() -> None:
    """The recording's chain can be entered every 30 pictures, and nowhere else by itself."""
    encoder = VideoEncoder("record")
    noise = np.random.default_rng(1)
    pictures = [encoder.encode(noise.integers(16, 235, (48, 32), np.uint8), i) for i in range(61)]
    assert [i for i, picture in enumerate(pictures) if picture.is_keyframe] == [0, 30, 60]


def test_a_film_may_go_on_as_a_recording() -> None:
    """In one file they have one header: the parameter sets of both are the same bytes."""
    film, record = (
        {unit[0] & 31: unit.rstrip(b"\0") for unit in encoder.encode(moving(0), 0).payload.split(b"\0\0\1")[1:]}
        for encoder in (VideoEncoder("film"), VideoEncoder("record"))
    )
    assert (film[7], film[8]) == (record[7], record[8])


@pytest.mark.parametrize(("size", "level"), [((64, 64), 10), ((512, 512), 31), ((1920, 1080), 42), ((3840, 2160), 52)])
def test_video_says_the_level_that_it_needs(size: tuple[int, int], level: int) -> None:
    """Hardware decoders refuse what is above theirs: it is the least for 60 pictures/s, of each rendition."""
    for rendition in VIDEO_RENDITIONS:
        payload = VideoEncoder(rendition).encode(np.full((size[1] * 3 // 2, size[0]), 128, np.uint8), 0).payload
        (sps,) = (unit for unit in payload.split(b"\0\0\1") if unit and unit[0] & 31 == 7)
        assert sps[3] == level


def test_video_carries_its_colours() -> None:
    """White, black and six patches come back within 4 of 255 by the tags that the stream itself carries."""
    frame = decode([VideoEncoder("record").encode(to_planes(patches()), 0).payload])[0]
    assert (frame.color_range, frame.colorspace, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    rgb = frame.to_ndarray(format="rgb24", src_colorspace=frame.colorspace, src_color_range=frame.color_range)
    for i, colour in enumerate(PATCHES):
        assert np.abs(rgb[32, i * 32 + 16].astype(int) - colour).max() <= 4


@pytest.mark.parametrize("rendition", ["thumb", "jpeg"])
def test_jpeg_carries_its_colours(rendition: str) -> None:
    """White, black and six patches come back within 4 of 255 from a JPEG as Pillow reads it."""
    encoder = JpegEncoder("jpeg" if rendition == "jpeg" else "thumb")
    picture = encoder.encode(to_planes(patches(), full_range=True))
    image = Image.open(io.BytesIO(picture.payload))
    assert "jfif" in image.info
    assert image.size == (picture.width, picture.height) == (256, 64)
    for i, colour in enumerate(PATCHES):
        assert np.abs(np.asarray(image)[32, i * 32 + 16].astype(int) - colour).max() <= 4


def test_a_thumb_is_coarser_than_a_jpeg() -> None:
    """The same picture takes fewer bytes as a thumb."""
    noise = np.random.default_rng(1).integers(0, 255, (96, 64), np.uint8)
    assert len(JpegEncoder("thumb").encode(noise).payload) < len(JpegEncoder("jpeg").encode(noise).payload)


def test_a_new_size_begins_a_new_chain() -> None:
    """Pictures of another size are never rescaled: a keyframe of the new size comes out."""
    encoder, jpeg = VideoEncoder("live"), JpegEncoder("jpeg")
    sizes = [(64, 96), (64, 96), (32, 48), (64, 96)]
    pictures = [encoder.encode(moving(1, *size), i) for i, size in enumerate(sizes)]
    assert [picture.is_keyframe for picture in pictures] == [True, False, True, True]
    assert [(picture.height, picture.width) for picture in pictures] == sizes
    assert [
        (f.height, f.width) for p in (pictures[:2], pictures[2:3], pictures[3:]) for f in decode([x.payload for x in p])
    ] == sizes
    assert [Image.open(io.BytesIO(jpeg.encode(moving(1, *size)).payload)).size for size in sizes] == [
        s[::-1] for s in sizes
    ]


@pytest.mark.parametrize("size", [(2, 2), (6, 10), (50, 64), (66, 34), (128, 18)])
def test_every_even_size_keeps_all_its_rows(size: tuple[int, int]) -> None:
    """Heights that are no multiple of 4 keep their last rows, in both codecs."""
    height, width = size
    planes = np.full((height * 3 // 2, width), 128, np.uint8)
    planes[:height] = np.linspace(40, 200, height).astype(np.uint8)[:, None]
    frame = decode([VideoEncoder("record").encode(planes, 0).payload])[0]
    assert (frame.height, frame.width) == size
    assert np.abs(frame.to_ndarray(format="yuv420p")[:height].astype(int) - planes[:height]).max() < 12
    grey = np.asarray(Image.open(io.BytesIO(JpegEncoder("jpeg").encode(planes).payload)).convert("L")).astype(int)
    assert np.abs(grey - planes[:height]).max() < 12


def test_an_odd_picture_keeps_its_true_size_beside_it() -> None:
    """The caller's size before padding is what the picture says."""
    picture = VideoEncoder("live").encode(moving(1, 64, 96), 0, size=(95, 63))
    assert (picture.width, picture.height) == (95, 63)


def test_time_must_go_on() -> None:
    """A pts that does not grow is refused, and the chain goes on as if it had not been tried."""
    encoder = VideoEncoder("live")
    encoder.encode(moving(0), 100)
    for pts in (100, 99):
        with pytest.raises(ValueError, match="more than 100"):
            encoder.encode(moving(1), pts)
    assert not encoder.encode(moving(1), 101).is_keyframe


def test_a_forced_keyframe_may_begin_again_in_time() -> None:
    """Clip after clip starts at 0 with a keyframe; all pictures decode, in order."""
    encoder = VideoEncoder("live")
    pictures = [encoder.encode(moving(4 * c + i), i * 3750, force_keyframe=i == 0) for c in range(3) for i in range(4)]
    assert [picture.is_keyframe for picture in pictures] == [True, False, False, False] * 3
    means = [float(f.to_ndarray(format="yuv420p")[:64].mean()) for f in decode([p.payload for p in pictures])]
    assert len(means) == 12
    assert means == sorted(means)


def test_one_of_many_predicts_only_where_that_saves_something() -> None:
    """Pictures that share nothing with each other become keyframes, but for tries; where one stays, it is predicted."""
    encoder = VideoEncoder("live", is_one_of_many=True)
    noise = np.random.default_rng(1).integers(16, 235, (50, 96, 64), np.uint8)
    new = [encoder.encode(planes, number) for number, planes in enumerate(noise)]
    still = [encoder.encode(noise[-1], len(new) + number) for number in range(50)]
    assert sum(picture.is_keyframe for picture in new[-32:]) >= 26
    assert sum(picture.is_keyframe for picture in still[-32:]) <= 4
    assert len(decode([picture.payload for picture in (*new, *still)])) == 100


def test_one_of_many_tries_again_though_viewers_ask_for_keyframes() -> None:
    """Where each try falls on a keyframe that somebody asked for, the next picture is one: it is predicted again."""
    encoder = VideoEncoder("live", is_one_of_many=True)
    noise = np.random.default_rng(2).integers(16, 235, (50, 96, 64), np.uint8)
    for number, planes in enumerate(noise):
        encoder.encode(planes, number)
    still = [encoder.encode(noise[-1], 50 + n, force_keyframe=n % (FIRST_TRY + 1) == 0) for n in range(72)]
    assert sum(picture.is_keyframe for picture in still[-36:]) <= 8


def test_one_of_many_predicts_a_new_size_whatever_the_last_one_was() -> None:
    """What is learnt of pictures that share nothing says nothing of the size that follows: it begins as any chain."""
    encoder = VideoEncoder("live", is_one_of_many=True)
    noise = np.random.default_rng(4).integers(16, 235, (50, 96, 64), np.uint8)
    last = [encoder.encode(planes, number).is_keyframe for number, planes in enumerate(noise)][-4:]
    still = [encoder.encode(noise[-1][:48, :32].copy(), 50 + n).is_keyframe for n in range(FIRST_TRY)]
    assert sum(last) >= 3
    assert still == [True] + [False] * (FIRST_TRY - 1)


def test_one_of_many_makes_no_keyframes_within_a_clip() -> None:
    """A clip is entered at its first picture alone, however little its pictures share."""
    encoder = VideoEncoder("live", is_one_of_many=True, is_clip=True)
    noise = np.random.default_rng(3).integers(16, 235, (40, 96, 64), np.uint8)
    pictures = [encoder.encode(planes, number) for number, planes in enumerate(noise)]
    assert [number for number, picture in enumerate(pictures) if picture.is_keyframe] == [0]


def test_the_callers_buffer_is_free_after_encode() -> None:
    """Writing over the planes once encode() has returned changes nothing in the stream."""
    kept, reused = VideoEncoder("live"), VideoEncoder("live")
    buffer = moving(0)
    for i in range(8):
        buffer[:] = moving(i)
        one = reused.encode(buffer, i)
        buffer[:] = 255
        assert one.payload == kept.encode(moving(i), i).payload


@pytest.mark.parametrize(
    "planes",
    [
        np.zeros((97, 64), np.uint8),
        np.zeros((96, 63), np.uint8),
        np.zeros((0, 64), np.uint8),
        np.zeros((96, 64, 1), np.uint8),
        np.zeros((96, 64), np.float32),
        np.zeros((96, 128), np.uint8)[:, ::2],
    ],
)
def test_what_is_no_i420_is_refused(planes: NDArray[np.uint8]) -> None:
    """Planes of a wrong shape, type or layout are a ValueError that says what came."""
    for encoder in (VideoEncoder("live"), JpegEncoder("jpeg")):
        with pytest.raises(ValueError, match="planes"):
            encoder.encode(planes, 0) if isinstance(encoder, VideoEncoder) else encoder.encode(planes)
