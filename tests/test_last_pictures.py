"""What is held of pictures for viewers who come later."""

from __future__ import annotations

from dataclasses import replace

import pytest

from taesd_stream_workers.streamer import last_pictures
from taesd_stream_workers.streamer.last_pictures import Key, LastPictures
from tests.golden_messages import OTHER_RUN, PACKET

THUMB = replace(PACKET, rendition="thumb", payload=bytes(100))


def held(pictures: LastPictures, *streams: str) -> list[str]:
    """Those of the streams that have a picture."""
    return [stream for stream in streams if pictures.of(stream, "thumb")]


def test_over_the_bound_goes_first_what_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of those; where all are watched the oldest; the newest stays, however large it is."""
    watched: set[Key] = {("a", "thumb"), ("d", "thumb"), ("e", "thumb")}
    monkeypatch.setattr(last_pictures, "MAX_BYTES", 300)
    pictures = LastPictures(watched.__contains__)
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


def test_what_had_to_go_is_lacking_until_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late viewer's tile must not stay empty; the rest of a clip whose beginning is gone is no clip."""
    monkeypatch.setattr(last_pictures, "MAX_BYTES", 200)
    pictures = LastPictures(lambda _: False)
    for index in range(2):
        pictures.put(replace(THUMB, stream="clip", index=index, count=4))
    pictures.put(replace(THUMB, stream="other"))
    assert pictures.lacks("clip", "thumb")
    pictures.put(replace(THUMB, stream="clip", index=2, count=4))
    assert (held(pictures, "clip"), pictures.lacks("clip", "thumb")) == ([], True)
    pictures.put(replace(THUMB, stream="clip", index=0, count=4))
    assert (held(pictures, "clip"), pictures.lacks("clip", "thumb")) == (["clip"], False)
    pictures.put(replace(THUMB, stream="third"))
    pictures.put(replace(THUMB, stream="fourth"))
    pictures.keep_only({"other"})
    assert not pictures.lacks("clip", "thumb")


def test_all_pictures_of_the_newest_clip_are_held_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late viewer gets the clip whole; the one before it, and what has no name any more, takes no room."""
    monkeypatch.setattr(last_pictures, "MAX_BYTES", 500)
    pictures = LastPictures(lambda _: False)
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
