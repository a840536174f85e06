"""Films: what was shown of runs that nobody asked to keep, in files of their own; the oldest go."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from taesd_stream.config import RecordingConfig
from taesd_stream.frames import Packet
from taesd_stream.media.recording import Recording, RecordingError, find_unfinished
from taesd_stream_workers.role.broken_chains import BrokenChains

logger = logging.getLogger(__name__)

PRUNE_S: Final = 10.0
MAX_OPEN: Final = 128  # files; a film that grows again is opened again


@dataclass(slots=True, kw_only=True)
class Film:
    """One film as people see it. last_seq: at the least, of one that an earlier process wrote."""

    run: str
    stream: str
    started: float  # time.time()
    meta: Mapping[str, Any]
    paths: tuple[Path, ...]
    nbytes: int
    grown: float  # time.time()
    last_seq: int = 0


class Films:
    """Used in the recorder's thread; `films` may be looked at by any, for its entries are replaced as a whole."""

    def __init__(self, folder: Path, config: RecordingConfig, on_error: Callable[[], None] = lambda: None) -> None:
        """on_error: called for each frame that the disk did not take."""
        self.films: dict[str, Film] = {}
        self._folder = folder
        self._max_bytes, self._max_age_s = config.film_max_bytes, config.film_max_age_s
        self._open: dict[str, Recording] = {}  # the one that grew last is the last
        self._broken = BrokenChains(lambda _stream: None)
        self._next_prune_s = 0.0
        self._has_failed = False
        self._on_error = on_error

    def load(self) -> None:
        """Know the films that are there already; none is opened."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for one in find_unfinished(self._folder):
            with contextlib.suppress(OSError):
                stats = [path.stat() for path in one.paths]
                self.films[one.run] = Film(
                    run=one.run, stream=one.stream, started=one.started, meta=one.meta, paths=one.paths,
                    nbytes=sum(stat.st_size for stat in stats), grown=max(stat.st_mtime for stat in stats),
                )  # fmt: skip

    def write(self, packet: Packet, meta: Mapping[str, Any]) -> bool:
        """Append a packet. Returns whether a frame is whole with it. A disk that takes nothing costs only the film."""
        if not self._broken.takes(packet):
            return False
        try:
            one = self._recording(packet, meta)
            if not one.write(packet):
                return False
        except RecordingError as error:
            if not self._has_failed:
                logger.warning("film_not_written stream=%s error=%s (said once)", packet.stream, error)
            self._has_failed = True
            self._on_error()
            self._broken.lose(packet)
            return False
        self._note(one)
        return True

    def move(self, run: str, folder: Path, name: str) -> Recording | None:
        """Move the film of a run to the recordings, None for none. Raises: RecordingError, and it is a film still.

        name: the template of recordings' names.
        """
        film = self.take(run)
        if film is None or not film.paths:
            return None
        try:
            film.keep(folder, name)
        except RecordingError:
            self.take_back(film)
            raise
        return film

    def take(self, run: str) -> Recording | None:
        """Hand over the film of a run, to become a recording; None where there is none, or it cannot be read."""
        film = self.films.pop(run, None)
        one = self._open.pop(run, None)
        if one is not None or film is None:
            return one
        paths = _there(film)
        try:
            return Recording.open(self._folder, stream=film.stream, run=run, meta={}, is_film=True, paths=paths)
        except RecordingError as error:
            logger.warning("film_not_readable run=%s error=%s", run, error)
            return None

    def take_back(self, one: Recording) -> None:
        """What could not become a recording is a film still, as far as it has not moved."""
        self._note(one)
        film = self.films[one.run]
        film.paths = tuple(path for path in film.paths if path.parent == self._folder)
        one.close()
        if not film.paths:
            del self.films[one.run]

    def tick(self, alive: Iterable[str]) -> None:
        """Now and then: close the films of runs that are over, remove what is too old or too much."""
        now_s = time.monotonic()
        if now_s < self._next_prune_s:
            return
        self._next_prune_s = now_s + PRUNE_S
        living = set(alive)
        for run in [run for run in self._open if run not in living]:
            self._open.pop(run).close()
        self._prune(time.time())

    def give_way(self) -> None:
        """The disk is full: the film that has not grown for longest goes, for what was asked to be kept."""
        oldest = min(self.films.values(), key=lambda film: film.grown, default=None)
        if oldest is not None:
            logger.warning("film_removed stream=%s run=%s reason=the disk is full", oldest.stream, oldest.run)
            self._remove(oldest)

    def close(self) -> None:
        """Let go of all files."""
        for one in self._open.values():
            one.close()
        self._open.clear()

    def _recording(self, packet: Packet, meta: Mapping[str, Any]) -> Recording:
        one = self._open.pop(packet.run, None)
        if one is None:
            film = self.films.get(packet.run)
            one = Recording.open(
                self._folder,
                stream=packet.stream,
                run=packet.run,
                meta=meta,
                is_film=True,
                name="{run}",
                paths=_there(film) if film else (),
            )
        self._open[packet.run] = one
        if len(self._open) > MAX_OPEN:
            self._open.pop(next(iter(self._open))).close()
        return one

    def _note(self, one: Recording) -> None:
        self.films[one.run] = Film(
            run=one.run, stream=one.stream, started=one.started, meta=one.meta, paths=tuple(one.paths),
            nbytes=one.nbytes, grown=time.time(), last_seq=one.written,
        )  # fmt: skip

    def _prune(self, now: float) -> None:
        held = sum(film.nbytes for film in self.films.values())
        for film in sorted(self.films.values(), key=lambda film: film.grown):
            if held <= self._max_bytes and now - film.grown <= self._max_age_s:
                return
            held -= film.nbytes
            self._remove(film)

    def _remove(self, film: Film) -> None:
        del self.films[film.run]
        if (one := self._open.pop(film.run, None)) is not None:
            one.close()
        for path in film.paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _there(film: Film) -> list[Path]:
    """Its files, without those that a person has removed."""
    return [path for path in film.paths if path.exists()]
