"""One daemon a folder: two that write the same recordings, or the same latent log, would ruin both."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

from taesd_stream.errors import ConfigError

LOCK_NAME: Final = ".taesd-stream.lock"
_LOCK_OFFSET: Final = 1 << 30  # Windows forbids others to read a locked byte, so it is not one of the text


class FolderLock:
    """The right to write in a folder, for one holder at a time; the system takes it back when the holder dies.

    The file stays when the lock is gone: removing it would let two holders lock two files of one name.
    """

    def __init__(self, folder: Path, key: str = "") -> None:
        """Store only; `acquire` or `with` takes the lock. key: the setting that names the folder, for messages."""
        self.folder = folder
        self._said = f"{key} = {folder}" if key else str(folder)
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take the lock; the folder is made where it is missing.

        Raises: ConfigError when another process, or another FolderLock, holds it, or the folder cannot be written.
        """
        path = self.folder / LOCK_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            _lock(fd)
        except OSError as error:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise ConfigError(
                f"{self._said}: in use by another taesd-stream (process {holder}); stop it, or choose another folder"
            ) from error
        try:
            os.ftruncate(fd, 0)
            os.write(fd, f"{os.getpid()}\n".encode())
        except OSError as error:
            os.close(fd)
            raise self._unusable(error) from error
        self._fd = fd

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self._said}: cannot be used: {error.strerror}; choose another folder")

    def release(self) -> None:
        """Give the lock back; without it, nothing happens."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


if sys.platform == "win32":
    import msvcrt

    def _lock(fd: int) -> None:
        os.lseek(fd, _LOCK_OFFSET, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(fd, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
