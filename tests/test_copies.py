"""Copies of recordings that grow: made once for however many requests, and gone when nobody needs them."""

from __future__ import annotations

import asyncio
import urllib.request
from pathlib import Path

import pytest

from taesd_stream import LatentPublisher
from taesd_stream_workers.streamer.web.copies import Copies
from tests.daemon import Daemon, wait_for
from tests.pictures import sd1_latents_of
from tests.test_recording import chain, expect, read, start


def test_one_copy_serves_all_until_the_file_has_grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks while nothing is written gets the same copy; after a frame another, and the old goes with its reader."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    recording = start(tmp_path)

    def there() -> list[Path]:
        return list((tmp_path / "temporary").rglob("*.mp4"))

    async def ask() -> None:
        copies = Copies(keep_s=0.0)
        recording.write(chain(0, 9)[0])
        async with copies.of(recording.paths[0], None, 1) as first:
            async with copies.of(recording.paths[0], None, 1) as second:
                assert second == first
            recording.write(chain(0, 9)[1])
            async with copies.of(recording.paths[0], None, 1) as third:
                assert third != first
                assert len(there()) == 2
                assert [read(path) for path in (first, third)] == [expect(0, 0), expect(0, 1)]
        while there():
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(ask(), 20))
    recording.close()


@pytest.mark.slow
def test_pieces_of_a_growing_recording_come_from_one_copy(tmp_path: Path) -> None:
    """Ten requests for ranges of a recording that stands still are pieces of one file; the daemon leaves none."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with (
        Daemon(tmp_path, environment={"TMPDIR": str(temporary)}) as own,
        LatentPublisher(own.broker, stream="pieces", latent_format="sd1", record="all") as publisher,
    ):
        for step in range(3):
            publisher.publish(sd1_latents_of((60, 170, 60)), step=step)
        rows = "/api/v1/recordings"
        wait_for(lambda: [row for row in own.json(rows)["recordings"] if row["frames"] == 3], of="3 frames")
        address, tags, body = f"{own.web}{rows}/{publisher.run}/file?inline=true", set(), b""
        for number in range(10):
            asked = urllib.request.Request(address, headers={"range": f"bytes={200 * number}-{200 * number + 199}"})  # noqa: S310
            with urllib.request.urlopen(asked, timeout=30) as answer:  # noqa: S310 our own daemon
                assert answer.status == 206
                tags.add(answer.headers["etag"])
                body += answer.read()
        assert len(tags) == 1
        (copy,) = temporary.rglob("*.mp4")
        assert copy.read_bytes()[: len(body)] == body
    assert not list(temporary.glob("taesd-stream-copies-*"))
