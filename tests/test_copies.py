"""Copies of recordings that grow: made once for however many requests, and gone when nobody needs them."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
import urllib.request
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from taesd_stream import LatentPublisher
from taesd_stream.media.recording import Recording, find_unfinished
from taesd_stream_workers.streamer.library import Library, first_frames
from taesd_stream_workers.streamer.web.copies import FOLDER, Copies
from tests.daemon import Daemon, wait_for
from tests.pictures import sd1_latents_of
from tests.test_recorder import large
from tests.test_recording import META, RUN, chain, expect, read, start


def copies_in(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("*.mp4"))


def growing(folder: Path, frames: int, run: str = RUN) -> Path:
    """A recording that grows, with so many frames."""
    one = Recording.open(folder, stream="demo/a", run=run, meta=META)
    for packet in chain(0, frames - 1):
        one.write(replace(packet, run=run))
    (path,) = one.paths
    one.close()
    return path


def wait_in_loop(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


def test_one_copy_serves_all_until_the_file_has_grown(tmp_path: Path) -> None:
    """Who asks while nothing is written gets the same copy; after a frame another, and the old goes with its reader."""
    recording = start(tmp_path)

    async def ask() -> None:
        copies = Copies(tmp_path, keep_s=0.0)
        recording.write(chain(0, 9)[0])
        async with copies.of(recording.paths[0], None, 1) as first:
            async with copies.of(recording.paths[0], None, 1) as second:
                assert second == first
            recording.write(chain(0, 9)[1])
            async with copies.of(recording.paths[0], None, 1) as third:
                assert third != first
                assert len(copies_in(tmp_path)) == 2
                assert [read(path) for path in (first, third)] == [expect(0, 0), expect(0, 1)]
        while copies_in(tmp_path):
            await asyncio.sleep(0)

    wait_in_loop(ask)
    recording.close()


def test_copies_are_made_in_a_folder_that_was_tidied_away(tmp_path: Path) -> None:
    """Somebody removes the folder of copies: the next download makes it again, for this user alone."""

    async def ask() -> None:
        copies, path = Copies(tmp_path), growing(tmp_path, 2)
        for _ in range(2):
            async with copies.of(path, None, 1) as copy:
                assert read(copy) == expect(0, 1)
            shutil.rmtree(tmp_path / FOLDER)
        async with copies.of(path, 1, 1) as copy:
            assert copy.parent.stat().st_mode & 0o777 == 0o700

    wait_in_loop(ask)


def test_copies_are_no_recordings(tmp_path: Path) -> None:
    """What is copied is in no list of recordings, finished or unfinished."""

    async def ask() -> None:
        path = growing(tmp_path, 3)
        async with Copies(tmp_path).of(path, 2, 1):
            assert len(copies_in(tmp_path)) == 1
            assert Library(tmp_path).rows() == []
            assert [one.paths for one in find_unfinished(tmp_path)] == [(path,)]

    wait_in_loop(ask)


def test_what_nobody_uses_goes_before_too_much_is_held(tmp_path: Path) -> None:
    """With a bound below two copies the oldest unused one goes before another is made; one in use stays."""

    async def ask() -> None:
        path = growing(tmp_path, 6)
        copies = Copies(tmp_path, keep_bytes=1)
        async with copies.of(path, 1, 1) as used:
            for count in (2, 3, 4):
                async with copies.of(path, count, 1) as copy:
                    assert copies_in(tmp_path) == sorted([used, copy])

    wait_in_loop(ask)


def test_more_frames_than_there_are_is_all_of_it(tmp_path: Path) -> None:
    """Any count from the last frame on shares one copy of a growing file, and is a finished one itself."""
    finished = start(tmp_path / "other")
    for packet in chain(0, 2):
        finished.write(packet)
    (mp4,) = finished.finish()

    async def ask() -> None:
        copies, path = Copies(tmp_path), growing(tmp_path, 3)
        for count in (3, 4, 1000, None):
            async with copies.of(path, count, 1) as copy:
                assert read(copy) == expect(0, 2)
            async with copies.of(mp4, count, 1) as copy:
                assert copy == mp4
        assert len(copies_in(tmp_path)) == 1

    wait_in_loop(ask)


def test_a_disk_without_room_is_asked_first(tmp_path: Path) -> None:
    """A recording larger than what the disk has free is not begun to be copied: the error says that it is full."""

    async def ask() -> None:
        path = growing(tmp_path, 2)
        os.truncate(path, shutil.disk_usage(tmp_path).free + (1 << 40))  # a hole: it takes no room itself
        with pytest.raises(OSError, match="No space left"):
            async with Copies(tmp_path).of(path, None, 1):
                pass
        assert copies_in(tmp_path) == []

    wait_in_loop(ask)


def test_a_large_copy_holds_up_no_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While 80 MiB of one recording are copied, a copy of another's first frames is made and read."""
    is_small_read = threading.Event()
    recording = start(tmp_path / "large")
    for packet in chain(0, 19):
        recording.write(large(packet))

    def slow_disk(path: Path, *words: Any, **options: Any) -> Path:
        made = first_frames(path, *words, **options)
        if path == recording.paths[0]:
            is_small_read.wait(30)
        return made

    monkeypatch.setattr("taesd_stream_workers.streamer.web.copies.first_frames", slow_disk)

    async def ask() -> None:
        copies, path = Copies(tmp_path), growing(tmp_path / "small", 3)

        async def copied() -> Path:
            async with copies.of(recording.paths[0], None, 1) as copy:
                return copy

        waits = asyncio.create_task(copied())
        while not copies_in(tmp_path):
            await asyncio.sleep(0.001)
        try:
            async with copies.of(path, 2, 1) as copy:
                assert read(copy) == expect(0, 1)
                assert not waits.done()
        finally:
            is_small_read.set()
        assert len(read(await waits)) == 20

    wait_in_loop(ask)
    recording.close()


@pytest.mark.slow
def test_pieces_of_a_growing_recording_come_from_one_copy(tmp_path: Path) -> None:
    """Ten requests for ranges of a recording that stands still are pieces of one file; the daemon leaves none."""
    left = tmp_path / "recordings" / FOLDER / "left.mp4"  # by a process that was killed
    left.parent.mkdir(parents=True)
    left.touch()
    with (
        Daemon(tmp_path) as own,
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
        (copy,) = copies_in(tmp_path / "recordings")
        assert copy.read_bytes()[: len(body)] == body
    assert not left.parent.exists()
