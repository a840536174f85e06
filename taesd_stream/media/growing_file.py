"""A file of fragments that is being written: one write a frame, cut to what is whole, found again after a crash."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from taesd_stream.frames import is_run_id, is_stream_name
from taesd_stream.media.fragments import Entry, FileIndex, FragmentError, read_head, read_index

FINISHED_SUFFIX: Final = ".mp4"
PART_SUFFIX: Final = ".mp4.part"
_HEAD_KEYS: Final = {"stream", "run", "segment", "started", "meta", "missing", "sps", "pps"}
_FLAGS: Final = os.O_RDWR | getattr(os, "O_BINARY", 0)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder last. Windows cannot, and need not."""
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _sync_up_to(folder: Path, path: Path) -> None:
    """Make a new file's name last, and those of the folders between it and `folder`, which may be new too."""
    for parent in path.parents:
        sync_folder(parent)
        if parent == folder:
            return


def is_free(folder: Path, name: str) -> bool:
    """Whether neither a growing nor a finished file bears this name."""
    return not any((folder / (name + suffix)).exists() for suffix in (FINISHED_SUFFIX, PART_SUFFIX))


def free_name(folder: Path, name: str) -> str:
    """`name`, or `name-2`, `name-3`… : the first one that no file bears."""
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(candidate for candidate in numbered if is_free(folder, candidate))


def files_in(folder: Path, suffix: str) -> Iterator[Path]:
    """Files whose name ends so, in a folder and the folders in it; hidden ones are others', links are not followed."""
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(here, name) for name in names if name.endswith(suffix))


class GrowingFile:
    """One `NAME.mp4.part`: it always holds its head and at least one frame. `index` tells what is whole."""

    def __init__(self, path: Path, fd: int, index: FileIndex) -> None:
        """Take over an open file; `create` and `reopen` are how to get one."""
        self.path = path
        self.fd = fd  # -1: at rest
        self.index = index

    @classmethod
    def create(cls, folder: Path, name: str, head: Mapping[str, Any], init: bytes) -> GrowingFile:
        """A new file under a name that is free, empty: `init`, which holds `head`, goes out with the first frame.

        name: may have folders in it. Raises: OSError.
        """
        path = folder / (free_name(folder, name) + PART_SUFFIX)
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o644)
        file = cls(path, fd, FileIndex(head=dict(head), head_end=0, end=0))
        try:
            file._write(init)
            _sync_up_to(folder, path)
        except OSError:
            file.remove()
            raise
        file.index.head_end = file.index.end
        return file

    @classmethod
    def reopen(cls, path: Path) -> GrowingFile | None:
        """Go on in a file; its torn tail is cut. None for one that was torn within its first frame: it is removed.

        Raises: OSError, FragmentError.
        """
        index = read_index(path)
        file = cls(path, os.open(path, _FLAGS), index)
        if not index.entries:
            file.remove()
            return None
        try:
            file._cut(index.end)
        except OSError:
            file.close()
            raise
        return file

    def append(
        self,
        seq: int,
        data: bytes,
        *,
        attempt: int,
        times: tuple[int, int, int] | None,
        shown: tuple[int, int | None, float | None] = (-1, None, None),
    ) -> None:
        """One write behind what is whole. times: of the first picture, of the last, its end; None: a frame is missing.

        shown: step, of how many, sigma. Raises: OSError, with the file as it was.
        """
        start = self.index.end
        self._write(data)
        placed: tuple[int | None, int, int] = (None, -1, 0) if times is None else times
        self.index.add(Entry(seq, start, self.index.end, *placed, *shown), attempt)

    def move_to(self, folder: Path, name: str) -> None:
        """Go on under this name, or the first free one like it, in another folder of the same disk. Raises: OSError."""
        target = folder / (free_name(folder, name) + PART_SUFFIX)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path.rename(target)
        self.path = target
        _sync_up_to(folder, target)

    @property
    def is_there(self) -> bool:
        """Whether its name still leads to it."""
        if self.fd < 0:
            return self.path.exists()
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.stat())
        except OSError:
            return False

    def cut_before(self, seq: int) -> bool:
        """Drop frame `seq` and all behind it; False (and nothing is done) when none would be left. Raises: OSError."""
        kept = next((entry for entry in reversed(self.index.entries) if entry.seq < seq), None)
        if kept is None:
            return False
        self._cut(kept.end)
        self.index.cut_before(seq)
        return True

    def rest(self) -> None:
        """Force it to the disk, and hold no descriptor until it is changed again. Raises: OSError."""
        if self.fd >= 0:
            os.fsync(self.fd)
            self.close()

    def close(self) -> None:
        """Let go of the file as it is; a second time it does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def remove(self) -> None:
        """Close and delete the file. Raises: OSError, with the file empty: nobody will go on in it."""
        try:
            os.ftruncate(self._opened(), 0)
        finally:
            self.close()
            self.path.unlink()

    def _opened(self) -> int:
        if self.fd < 0:
            self.fd = os.open(self.path, _FLAGS)
        return self.fd

    def _write(self, data: bytes) -> None:
        end = self.index.end
        try:
            self._cut(end)  # a former failure may have left a tail
            os.lseek(self.fd, end, os.SEEK_SET)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self.fd, rest) :]  # a disk that fills up takes a part, and says nothing
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, end)
            raise
        self.index.end = end + len(data)

    def _cut(self, end: int) -> None:
        if os.fstat(self._opened()).st_size != end:
            os.ftruncate(self.fd, end)
        self.index.end = end


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """A run whose files grow, or were left by a process that died. Its first three fields reopen it."""

    stream: str
    run: str
    meta: dict[str, Any]
    started: float  # time.time()
    paths: tuple[Path, ...]  # in the order of their frames


def find_unfinished(folder: Path) -> list[Unfinished]:
    """The runs that have growing files in a folder, oldest first; files that are not ours are left alone."""
    heads: dict[str, list[tuple[dict[str, Any], Path]]] = {}
    for path in files_in(folder, PART_SUFFIX):
        with contextlib.suppress(FragmentError, OSError):
            head = read_head(path)
            if head.keys() >= _HEAD_KEYS and is_stream_name(head["stream"]) and is_run_id(head["run"]):
                heads.setdefault(head["run"], []).append((head, path))
    found = []
    for run, segments in heads.items():
        segments.sort(key=lambda segment: int(segment[0]["segment"]))
        head = segments[0][0]
        paths = tuple(path for _, path in segments)
        found.append(
            Unfinished(stream=head["stream"], run=run, meta=head["meta"], started=head["started"], paths=paths)
        )
    return sorted(found, key=lambda one: one.started)
