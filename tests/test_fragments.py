"""Our own fragmented MP4 is what other programs take it for, and tells a new writer what it holds."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from taesd_stream.media.encoder import TIME_BASE, VideoEncoder
from taesd_stream.media.fragments import (
    FragmentError,
    Sample,
    fragment,
    init_segment,
    note,
    parameter_sets,
    read_head,
    read_index,
    read_on,
    sample_data,
    split_nals,
)

HEAD: dict[str, Any] = {"stream": "a/b", "run": "00000000000000aa", "meta": {"prompt": "café", "seed": 7}}


def samples(times: list[int]) -> list[Sample]:
    """Pictures of 96x64 whose luma is 20 + 2 n, as the recording's encoder makes them."""
    encoder = VideoEncoder("record")
    made = []
    for number, pts in enumerate(times):
        planes = np.full((96, 96), 128, np.uint8)
        planes[:64] = 20 + 2 * number
        picture = encoder.encode(planes, pts)
        made.append(Sample(pts=pts, is_keyframe=picture.is_keyframe, payload=picture.payload))
    return made


def head(first: Sample) -> bytes:
    """The init segment for a chain that starts with this picture."""
    sets = parameter_sets(first.payload)
    assert sets
    return init_segment(HEAD, width=96, height=64, sps=sets[0], pps=sets[1])


def ffprobe(path: Path, *options: str) -> dict[str, Any]:
    """What ffprobe reads; a single complaint is a failure."""
    command = ["ffprobe", "-v", "warning", "-of", "json", *options, str(path)]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    assert result.stderr == ""
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def luma(frame: av.VideoFrame) -> float:
    """Mean of the Y plane."""
    return float(frame.to_ndarray(format="yuv420p")[:64].mean())


def test_uneven_times_and_order_are_exact(tmp_path: Path) -> None:
    """Pictures one tick to minutes apart come back in order, at their exact 90 kHz times."""
    times = [0, 1, 2, 4500, 9000, 9001, 279_001, 5_679_001, 5_679_002]
    made = samples(times)
    path = tmp_path / "a.mp4"
    path.write_bytes(head(made[0]) + b"".join(fragment(seq, [one]) for seq, one in enumerate(made)))
    with av.open(path) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].time_base == TIME_BASE
    assert [frame.pts for frame in frames] == times
    assert [luma(frame) for frame in frames] == pytest.approx([20 + 2 * i for i in range(len(times))], abs=1)


def test_ffprobe_sees_one_tagged_track_and_its_keyframes(tmp_path: Path) -> None:
    """ffprobe reads size, clock, colours and sync samples, without a complaint."""
    times = [3000 * i for i in range(40)]
    made = samples(times)
    path = tmp_path / "a.mp4"
    path.write_bytes(head(made[0]) + b"".join(fragment(seq, [one]) for seq, one in enumerate(made)))
    told = ffprobe(path, "-show_streams", "-show_packets")
    (stream,) = told["streams"]
    assert (stream["codec_name"], stream["profile"], stream["time_base"]) == ("h264", "High", "1/90000")
    assert (stream["width"], stream["height"], stream["pix_fmt"]) == (96, 64, "yuv420p")
    assert {stream[key] for key in ("color_space", "color_transfer", "color_primaries")} == {"bt709"}
    assert stream["color_range"] == "tv"
    assert [packet["pts"] for packet in told["packets"]] == times
    assert [i for i, packet in enumerate(told["packets"]) if "K" in packet["flags"]] == [0, 30]


def test_all_pictures_of_a_frame_share_a_fragment(tmp_path: Path) -> None:
    """A clip is one fragment: its pictures keep their own times, and the index has it once."""
    times = [0, 3750, 7500, 11250, 15000, 22500]
    made = samples(times)
    path = tmp_path / "a.mp4"
    path.write_bytes(head(made[0]) + fragment(0, made[:4]) + fragment(1, made[4:]))
    with av.open(path) as container:
        assert [frame.pts for frame in container.decode(video=0)] == times
    entries = read_index(path).entries
    assert [(entry.seq, entry.tfdt, entry.last_pts, entry.ends_at) for entry in entries] == [
        (0, 0, 11250, 15000),
        (1, 15000, 22500, 30000),
    ]


def test_samples_hold_no_parameter_sets_and_no_start_codes() -> None:
    """What goes into the file are the slices, each behind its length; the head has the rest."""
    one = samples([0])[0]
    body = sample_data(b"\0\0\0\1\x09\xf0" + bytes(one.payload))
    types = []
    while body:
        length = int.from_bytes(body[:4], "big")
        types.append(body[4] & 31)
        body = body[4 + length :]
    assert types == [nal[0] & 31 for nal in split_nals(one.payload) if nal[0] & 31 in (5, 6)]
    assert types[-1] == 5


def test_both_start_codes_and_trailing_zeros_are_understood() -> None:
    """NAL units are found behind three and four byte start codes, and lose the zeros behind them."""
    stream = b"\0\0\0\1\x67\x42" + b"\0\0\1\x68\x01\0\0\0" + b"\0\0\0\1\x65\x88\0\0\3\1\0"
    assert split_nals(stream) == [b"\x67\x42", b"\x68\x01", b"\x65\x88\0\0\3\1"]
    assert parameter_sets(stream) == (b"\x67\x42", b"\x68\x01")
    assert parameter_sets(b"\0\0\1\x65\x88") is None
    assert split_nals(b"no start code") == []


def test_the_index_tells_what_was_written(tmp_path: Path) -> None:
    """Head, frames, gaps and the newest attempt come back with the exact offsets of their bytes."""
    made = samples([0, 9000, 18000, 27000])
    path = tmp_path / "a.mp4"
    start = head(made[0])
    parts = [
        note({"attempt": 2}) + fragment(5, made[:1]),
        fragment(6, made[1:2]),
        note({"missing": 7, "attempt": 3}),
        note({"attempt": 4}) + fragment(8, made[2:3]),
    ]
    path.write_bytes(start + b"".join(parts))
    index = read_index(path)
    ends = np.cumsum([len(start), *map(len, parts)]).tolist()
    assert index.head == read_head(path) == HEAD
    assert (index.head_end, index.end, index.attempt) == (len(start), ends[-1], 4)
    assert [(e.seq, e.offset, e.end, e.tfdt) for e in index.entries] == list(
        zip([5, 6, 7, 8], ends[:-1], ends[1:], [0, 9000, None, 18000], strict=True)
    )
    with av.open(path) as container:
        assert [frame.pts for frame in container.decode(video=0)] == [0, 9000, 18000]


def test_a_file_cut_anywhere_tells_its_whole_frames(tmp_path: Path) -> None:
    """At every length the index lists exactly the frames that are wholly there, or says that the head is torn."""
    made = samples([0, 9000, 18000])
    start = head(made[0])
    parts = [note({"attempt": seq}) + fragment(seq, [one]) for seq, one in enumerate(made)]
    whole = start + b"".join(parts)
    ends = np.cumsum([len(start), *map(len, parts)]).tolist()
    path = tmp_path / "a.mp4"
    for length in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:length])
        if length < len(start):
            with pytest.raises(FragmentError):
                read_index(path)
            continue
        index = read_index(path)
        count = sum(end <= length for end in ends[1:])
        assert [entry.seq for entry in index.entries] == list(range(count))
        assert (index.end, index.attempt) == (ends[count], count - 1)


def test_what_has_come_since_is_read_on(tmp_path: Path) -> None:
    """After each write, a tear, a cut and other frames in its place, reading on gives what reading anew does."""
    made = samples([0, 9000, 18000, 27000])
    parts = [head(made[0]), *(note({"attempt": 1}) + fragment(seq, [one]) for seq, one in enumerate(made))]
    parts.insert(3, note({"missing": 2, "attempt": 2}))
    parts[4:] = [note({"attempt": 2}) + fragment(3, made[2:3]), note({"attempt": 2}) + fragment(4, made[3:])]
    other = note({"attempt": 3}) + fragment(1, made[3:]) + note({"attempt": 3}) + fragment(2, made[2:3])
    grown = [b"".join(parts[:count]) for count in range(1, len(parts) + 1)]
    path = tmp_path / "a.mp4"
    path.write_bytes(grown[0])
    known = read_index(path)
    for data in (*grown, grown[-1][:-5], grown[2], grown[3] + other[:-7], grown[2] + other, parts[0], grown[-1] + b"x"):
        path.write_bytes(data)
        known = read_on(path, known)
        assert known == read_index(path)
    assert known.missing == [2]


@pytest.mark.parametrize("seed", range(100))
def test_a_damaged_file_never_raises_anything_else(seed: int, tmp_path: Path) -> None:
    """Flipped bytes give an index of what is left or a FragmentError."""
    rng = np.random.default_rng(seed)
    made = samples([0, 9000])
    data = bytearray(head(made[0]) + b"".join(note({"attempt": 1}) + fragment(i, [s]) for i, s in enumerate(made)))
    for place in rng.integers(len(data), size=rng.integers(1, 12)):
        data[place] = rng.integers(256)
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with contextlib.suppress(FragmentError):
        assert len(read_index(path).entries) <= 2


def test_another_programs_file_is_not_ours(tmp_path: Path) -> None:
    """An MP4 that FFmpeg wrote is refused by name, as is text."""
    path = tmp_path / "other.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", 10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")) + stream.encode(None))
    (tmp_path / "text.mp4").write_text("hello")
    for name in ("other.mp4", "text.mp4"):
        with pytest.raises(FragmentError, match=name):
            read_index(tmp_path / name)
