"""Ordinary MP4s of what grows, or of the first frames of a recording: made once, for however many ask for pieces."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from taesd_stream_workers.streamer.library import first_frames

KEEP_S: Final = 60.0  # a player that seeks asks for the next piece within it

_Key: TypeAlias = tuple[Path, int | None, int]


@dataclass(slots=True)
class _Copy:
    path: Path
    stamp: tuple[int, int]  # size and time of what it was made of
    users: int = 0
    goes: asyncio.TimerHandle | None = None


class Copies:
    """Of each recording, count of frames and part the newest copy, while it is used and KEEP_S more. One event loop's.

    They are made one at a time: each is as large as its recording, in the folder for temporary files.
    """

    def __init__(self, keep_s: float = KEEP_S) -> None:
        self._keep_s = keep_s
        self._folder: Path | None = None  # made with the first copy
        self._copies: dict[_Key, _Copy] = {}
        self._making = asyncio.Lock()

    @asynccontextmanager
    async def of(self, path: Path, count: int | None, part: int) -> AsyncIterator[Path]:
        """A copy as `first_frames` makes it, which stays for the time of a `with`. Raises: as `first_frames`."""
        key = (path, count, part)
        async with self._making:
            copy = await self._newest(key)
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
                copy.goes = asyncio.get_running_loop().call_later(self._keep_s, self._drop, key, copy)

    def close(self) -> None:
        """Remove all of them. Any thread, once the loop has ended."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _newest(self, key: _Key) -> _Copy:
        path, count, part = key
        stat = await asyncio.to_thread(path.stat)
        old, stamp = self._copies.get(key), (stat.st_size, stat.st_mtime_ns)
        if old is not None and old.stamp == stamp:
            return old
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="taesd-stream-copies-"))
        made = await asyncio.to_thread(first_frames, path, count, part, folder=self._folder)
        copy = self._copies[key] = _Copy(made, stamp)
        if old is not None:
            self._drop(key, old)
        return copy

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
