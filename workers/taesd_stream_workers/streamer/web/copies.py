"""Ordinary MP4s of what grows, or of the first frames of a recording: made once, for however many ask for pieces."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias
from weakref import WeakValueDictionary

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from taesd_stream.media.growing_file import PART_SUFFIX
from taesd_stream.media.steps import steps_of
from taesd_stream_workers.streamer.library import first_frames

FOLDER: Final = ".copies"  # in the recordings' own: hidden from the library, on a disk with room for one more of them
KEEP_S: Final = 60.0  # a player that seeks asks for the next piece within it
KEEP_BYTES: Final = 4 << 30  # with more than it, those that nobody uses go before another is made
MAX_MAKING: Final = 4  # a long one does not hold up a short one

_Key: TypeAlias = tuple[Path, int | None, int]


@dataclass(slots=True)
class _Copy:
    path: Path
    stamp: tuple[int, int]  # size and time of what it was made of
    nbytes: int
    users: int = 0
    goes: asyncio.TimerHandle | None = None


class Copies:
    """Of each recording, count of frames and part the newest copy, while it is used and KEEP_S more. One loop's."""

    def __init__(self, recordings: Path, *, keep_s: float = KEEP_S, keep_bytes: int = KEEP_BYTES) -> None:
        """recordings: their folder; nothing is made in it before the first copy."""
        self._folder = recordings / FOLDER
        self._keep_s, self._keep_bytes = keep_s, keep_bytes
        self._copies: dict[_Key, _Copy] = {}  # the one that was used last is the last
        self._locks: WeakValueDictionary[_Key, asyncio.Lock] = WeakValueDictionary()  # of those that are being made
        self._threads = ThreadPoolExecutor(MAX_MAKING, thread_name_prefix="copies")
        self._making_bytes = 0

    @asynccontextmanager
    async def of(self, path: Path, count: int | None, part: int) -> AsyncIterator[Path]:
        """A copy as `first_frames` makes it, which stays for the time of a `with`; of all of a finished file itself.

        Raises: as `first_frames`; OSError where the disk has no room for it.
        """
        share = 1.0
        if count is not None:
            there = len(await asyncio.to_thread(steps_of, path))
            count, share = (count, count / there) if count < there else (None, 1.0)
        if count is None and not path.name.endswith(PART_SUFFIX):
            yield path
            return
        key = (path, count, part)
        async with self._locks.setdefault(key, asyncio.Lock()):
            copy = await self._newest(key, share)
        copy.users += 1
        if copy.goes is not None:
            copy.goes.cancel()
        try:
            yield copy.path
        finally:
            copy.users -= 1
            if self._copies.get(key) is not copy:
                self._drop(key, copy)
            elif not copy.users:
                self._copies[key] = self._copies.pop(key)
                copy.goes = asyncio.get_running_loop().call_later(self._keep_s, self._drop, key, copy)

    def clear(self) -> None:
        """Remove all of them, also what a killed process left. Any thread, while the loop does not run."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _newest(self, key: _Key, share: float) -> _Copy:
        path, count, part = key
        stat = await asyncio.to_thread(path.stat)
        old, stamp = self._copies.get(key), (stat.st_size, stat.st_mtime_ns)
        if old is not None and old.stamp == stamp and old.path.exists():
            return old
        expected_bytes = int(stat.st_size * share)
        await self._make_room(expected_bytes)
        self._making_bytes += expected_bytes
        try:
            made = await asyncio.get_running_loop().run_in_executor(
                self._threads, lambda: first_frames(path, count, part, folder=self._folder)
            )
        finally:
            self._making_bytes -= expected_bytes
        copy = self._copies[key] = _Copy(made, stamp, made.stat().st_size)
        if old is not None:
            self._drop(key, old)
        return copy

    async def _make_room(self, nbytes: int) -> None:
        """Drop what nobody uses, oldest first, as far as needed. Raises: OSError where the disk is too full even so."""
        free_bytes = await asyncio.to_thread(self._free_bytes)
        wanted = nbytes + self._making_bytes
        held = sum(copy.nbytes for copy in self._copies.values())
        for key, copy in [item for item in self._copies.items() if not item[1].users]:
            if held + wanted <= self._keep_bytes and wanted <= free_bytes:
                return
            self._drop(key, copy)
            held, free_bytes = held - copy.nbytes, free_bytes + copy.nbytes
        if 0 < free_bytes < wanted:  # some file systems say 0 for unknown
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._folder))

    def _free_bytes(self) -> int:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # again: somebody may have tidied up
        return shutil.disk_usage(self._folder).free

    def _drop(self, key: _Key, copy: _Copy) -> None:
        if copy.users:
            return
        copy.path.unlink(missing_ok=True)
        if self._copies.get(key) is copy:
            del self._copies[key]


class CopyResponse(FileResponse):
    """A copy, or pieces of it. held: what gives it back once it is sent."""

    def __init__(self, path: Path, held: AsyncExitStack, **options: Any) -> None:
        super().__init__(path, **options)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        async with self._held:
            await super().__call__(scope, receive, send)
