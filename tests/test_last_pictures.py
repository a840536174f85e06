"""What is held of pictures for viewers who come later."""

from __future__ import annotations

from dataclasses import replace

from taesd_stream_workers.streamer.last_pictures import Key, LastPictures
from tests.golden_messages import OTHER_RUN, PACKET

THUMB = replace(PACKET, rendition="thumb", payload=bytes(100))


def held(pictures: LastPictures, *streams: str) -> list[str]:
    """Those of the streams that have a picture."""
    return [stream for stream in streams if pictures.of(stream, "thumb")]


def test_over_the_bound_goes_first_what_nobody_watches() -> None:
    """The oldest of those; where all are watched the oldest; the newest stays, however large it is."""
    watched: set[Key] = {("a", "thumb"), ("d", "thumb"), ("e", "thumb")}
    pictures = LastPictures(watched.__contains__, max_bytes=300)
    for stream in "abc":
        pictures.put(replace(THUMB, stream=stream))
    pictures.put(replace(THUMB, stream="b", seq=8))
    pictures.put(replace(THUMB, stream="d"))
    assert held(pictures, *"abcd") == ["a", "b", "d"]
    pictures.put(replace(THUMB, stream="e"))
    assert held(pictures, *"abcde") == ["a", "d", "e"]
    pictures.put(replace(THUMB, stream="f"))
    assert held(pictures, *"abcdef") == ["d", "e", "f"]
    pictures.put(replace(THUMB, stream="g", payload=bytes(1000)))
    assert held(pictures, *"abcdefg") == ["g"]


def test_all_pictures_of_the_newest_clip_are_held_and_no_more() -> None:
    """A late viewer gets the clip whole; the one before it, and what has no name any more, takes no room."""
    pictures = LastPictures(lambda _: False, max_bytes=500)
    pictures.put(replace(THUMB, stream="other"))
    for seq in range(20):
        for index in range(4):
            pictures.put(replace(THUMB, seq=seq, index=index, count=4))
    assert [(one.seq, one.index) for one in pictures.of(THUMB.stream, "thumb")] == [(19, index) for index in range(4)]
    assert held(pictures, "other") == ["other"]
    pictures.keep_only({"other"})
    assert held(pictures, THUMB.stream, "other") == ["other"]
    for number in range(4):
        pictures.put(replace(THUMB, stream=f"new/{number}", run=OTHER_RUN))
    assert held(pictures, "other") == ["other"]
