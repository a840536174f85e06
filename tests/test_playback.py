"""Playing a recording over HTTP: a player jumps about in the file by byte ranges (RFC 9110 14), as browsers do."""

from __future__ import annotations

import pytest

from taesd_stream import LatentPublisher
from tests.daemon import Daemon
from tests.pictures import PATCHES, sd1_latents_of
from tests.test_guard import Answer


@pytest.fixture(scope="module")
def played(daemon: Daemon) -> tuple[str, bytes]:
    """Path and bytes of a finished recording."""
    with LatentPublisher(daemon.broker, stream="playback", latent_format="sd1", record="all") as publisher:
        for step, colour in enumerate(PATCHES.values()):
            publisher.publish(sd1_latents_of(colour), step=step)
        assert publisher.wait_until_acked(20), publisher.error
    row = daemon.recording(publisher.run)
    return f"/api/v1/recordings/{row['id']}/file?inline=1", daemon.file(row["id"]).read_bytes()


def test_the_whole_file_says_that_it_can_be_had_in_ranges(daemon: Daemon, played: tuple[str, bytes]) -> None:
    """Without a range: all of it, as a picture in the page, and the word that ranges are served."""
    path, data = played
    answer = Answer(daemon, path)
    assert (answer.status, answer.body) == (200, data)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert answer.headers["Content-Type"] == "video/mp4"
    assert answer.headers["Content-Disposition"].startswith("inline")


@pytest.mark.parametrize(
    ("said", "first", "last"), [("0-99", 0, 99), ("500-", 500, -1), ("-70", -70, -1), ("9-9999999", 9, -1)]
)
def test_a_range_is_those_bytes(daemon: Daemon, played: tuple[str, bytes], said: str, first: int, last: int) -> None:
    """206 with exactly the bytes that were asked for, where they are, and of how many; past the end: to the end."""
    path, data = played
    first, last = first % len(data), last % len(data)
    answer = Answer(daemon, path, {"Range": f"bytes={said}"})
    assert (answer.status, answer.body) == (206, data[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(data)}"
    assert answer.headers["Content-Length"] == str(last + 1 - first)


def test_a_range_behind_the_end_is_416(daemon: Daemon, played: tuple[str, bytes]) -> None:
    """A range that the file has nothing of is refused with its size, so that the player can ask again."""
    path, data = played
    answer = Answer(daemon, path, {"Range": f"bytes={len(data)}-"})
    assert answer.status == 416
    assert answer.headers["Content-Range"] == f"bytes */{len(data)}"


def test_a_range_of_another_file_is_the_whole_one(daemon: Daemon, played: tuple[str, bytes]) -> None:
    """If-Range with the file's tag gives the range; with another tag, for the file is not that one, all of it."""
    path, data = played
    tag = Answer(daemon, path).headers["ETag"]
    same = Answer(daemon, path, {"Range": "bytes=10-19", "If-Range": tag})
    other = Answer(daemon, path, {"Range": "bytes=10-19", "If-Range": '"another"'})
    assert (same.status, same.body) == (206, data[10:20])
    assert (other.status, other.body) == (200, data)
