"""What a player reads from our MPEG-TS is every picture, as soon as it was sent."""

from __future__ import annotations

import io
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import IO

import av
import pytest

from taesd_stream.frames import Packet
from taesd_stream.media.encoder import VideoEncoder
from taesd_stream.media.mpegts import TransportStream
from tests.test_recording import chain, clip, number_in, packet, planes_of

LOW_DELAY = ["-flags", "low_delay", "-f", "mpegts", "-probesize", "4096", "-analyzeduration", "0"]


def mux(packets: list[Packet]) -> bytes:
    """One viewer's bytes, ended in order."""
    stream = TransportStream()
    return b"".join([stream.mux(one) for one in packets] + [stream.close()])


def decode(data: bytes, **options: str) -> list[av.VideoFrame]:
    """The pictures that PyAV reads."""
    with av.open(io.BytesIO(data), "r", format="mpegts", options=options) as container:
        return list(container.decode(video=0))


def read(data: bytes) -> list[tuple[int, int]]:
    """Number and pts of every picture, one a PES as it was sent."""
    return [(number_in(frame), frame.pts or 0) for frame in decode(data, fflags="noparse")]


def live(packets: list[Packet]) -> list[Packet]:
    """The packets as the view's rendition."""
    return [replace(one, rendition="live", attempt=0) for one in packets]


def test_all_pictures_arrive_in_order_at_their_times() -> None:
    """N pictures in, N out, uneven times exact, in whole transport packets."""
    encoder = VideoEncoder("live")
    times = [0, 1, 3000, 93_000, 93_001, 400_000]
    packets = []
    for seq, pts in enumerate(times):
        picture = encoder.encode(planes_of(seq), pts)
        packets.append(packet(seq, picture.payload, is_keyframe=picture.is_keyframe, pts=pts))
    data = mux(live(packets))
    assert len(data) % 188 == 0
    assert set(data[::188]) == {0x47}
    assert read(data) == list(enumerate(times))
    assert [number_in(frame) for frame in decode(data)] == list(range(6))


def test_ffprobe_counts_every_picture(tmp_path: Path) -> None:
    """Another program sees one H.264 track with 40 pictures in BT.709."""
    path = tmp_path / "a.ts"
    path.write_bytes(mux(live(list(chain(0, 39)))))
    command = ["ffprobe", "-v", "error", "-count_frames", "-of", "csv=p=0", str(path)]
    result = subprocess.run(
        [*command, "-show_entries", "stream=codec_name,color_space,nb_read_frames"], capture_output=True, check=True
    )
    assert result.stdout.decode().split()[0] == "h264,bt709,40"


def test_a_picture_is_shown_before_the_next_one_is_sent() -> None:
    """ffmpeg gives out each picture while nothing after it exists: nobody is a picture late."""
    command = ["ffmpeg", "-v", "error", *LOW_DELAY, "-i", "-"]
    command += ["-fps_mode", "passthrough", "-threads", "1", "-f", "rawvideo", "-flush_packets", "1", "-"]
    stream = TransportStream()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdin
        assert reader.stdout
        for count, one in enumerate(live(list(chain(0, 70))), start=1):
            reader.stdin.write(stream.mux(one))
            reader.stdin.flush()
            if count >= 60:  # what is sent before then, ffmpeg takes to find out what it is
                while (shown := number_of_next(reader.stdout)) < one.seq:
                    pass
                assert shown == one.seq
        reader.stdin.write(stream.close())
        reader.stdin.close()
        assert reader.stdout.read() == b""


def number_of_next(output: IO[bytes]) -> int:
    """The number in the next raw picture of 96x64."""
    raw = output.read(96 * 96)
    assert len(raw) == 96 * 96
    return sum((raw[10 * 96 + bit * 8 + 4] > 128) << bit for bit in range(10))


def test_a_viewer_begins_at_a_keyframe() -> None:
    """What comes before the first keyframe gives no bytes; from there on all pictures are read."""
    stream = TransportStream()
    packets = live(list(chain(0, 40)))
    sent = [stream.mux(one) for one in packets[20:]] + [stream.close()]
    assert sent[:10] == [b""] * 10
    assert [number for number, _ in read(b"".join(sent))] == list(range(30, 41))


def test_a_clip_can_loop() -> None:
    """The same clip three times is one timeline that goes on at its own pace."""
    frames = read(mux(live(clip(0, 4)) * 3))
    assert frames == [(i % 4, i * 3750) for i in range(12)]


def test_a_picture_sent_again_moves_on() -> None:
    """A repeated picture has a later time, and the next one its own."""
    encoder = VideoEncoder("live")
    made = [encoder.encode(planes_of(5), 0), encoder.encode(planes_of(5), 0, force_keyframe=True)]
    made.append(encoder.encode(planes_of(6), 90_000))
    packets = [
        packet(i, p.payload, is_keyframe=p.is_keyframe, pts=pts)
        for i, (p, pts) in enumerate(zip(made, (0, 0, 90_000), strict=True))
    ]
    frames = read(mux(live(packets)))
    assert [number for number, _ in frames] == [5, 5, 6]
    assert all(before < after for (_, before), (_, after) in pairwise(frames))
    assert frames[-1][1] == 90_000


def test_another_size_goes_through() -> None:
    """A keyframe of another size is read in its size."""
    big = VideoEncoder("live").encode(planes_of(9, 80, 112), 900_000)
    packets = [*chain(0, 3), packet(9, big.payload, is_keyframe=True, pts=900_000, width=112, height=80)]
    sizes = [(frame.width, frame.height) for frame in decode(mux(live(packets)))]
    assert sizes == [(96, 64)] * 4 + [(112, 80)]


def test_a_jpeg_is_no_transport_stream() -> None:
    """A rendition without H.264 is refused."""
    with pytest.raises(ValueError, match="thumb"):
        TransportStream().mux(replace(chain(0, 0)[0], rendition="thumb"))


def test_a_viewer_without_a_keyframe_gets_nothing() -> None:
    """Closed before it began, a stream has no bytes."""
    stream = TransportStream()
    assert stream.mux(live(list(chain(0, 1)))[1]) + stream.close() == b""
