"""Which files hold frames of a run: finished recordings, one that grows, a film. What the web asks; any thread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taesd_stream.frames import is_run_id
from taesd_stream.media.recording import Recording
from taesd_stream_workers.streamer.films import Films
from taesd_stream_workers.streamer.library import Library


class RunFiles:
    """A view of what the recorder's thread changes. growing: the recordings that are not finished, by run."""

    def __init__(self, growing: Mapping[str, Recording], films: Films, library: Library) -> None:
        self._open, self._films, self._library = growing, films, library

    def paths_of(self, run: str, part: int = 1) -> list[Path]:
        """All files that hold frames of a run, its film's among them, in the order of their frames.

        part: from 1, of a batch that is recorded in files of their own.
        """
        growing, film = self._open.get(run), self._films.films.get(run)
        return [*self._finished_of(run, part), *(_there(growing) if growing else ()), *(film.paths if film else ())]

    def about(self, run: str) -> dict[str, Any] | None:
        """Stream, start and meta of a run that has frames in files.

        film: whether nobody keeps it; parts: how many pictures a batch has in files of their own, 1: none.
        """
        growing, film = self._open.get(run), self._films.films.get(run)
        if growing is not None or film is not None:
            known = growing or film
            assert known is not None
            about = {"stream": known.stream, "started": known.started, "meta": known.meta}
            return {**about, "film": growing is None, "parts": growing.parts if growing else 1}
        rows = [row for row in self._library.rows() if row["run"] == run]
        about = {key: rows[0][key] for key in ("stream", "started", "meta")} if rows else {}
        return {**about, "film": False, "parts": max(row["parts"] for row in rows)} if rows else None

    def newest_run_of(self, stream: str) -> str | None:
        """The run of a stream that began last, of those that have frames in files."""
        known = [(one.started, one.run, one.stream) for one in list(self._open.values()) if one.paths]
        known += [(one.started, one.run, one.stream) for one in list(self._films.films.values())]
        known += [(row["started"], row["run"], row["stream"]) for row in self._library.rows()]
        return max((one for one in known if one[2] == stream), default=(0.0, None, stream))[1]

    def path_of_id(self, recording_id: str, part: int = 1, *, is_newest: bool = False) -> Path | None:
        """The file of an id that `rows` gave, growing or finished; one that grew is found by its run's id still.

        Where the size of its pictures has changed it is the first file, or the newest.
        part: from 1, of a batch, once it is finished in files of their own.
        """
        growing = self._open.get(recording_id)
        paths = _there(growing) if growing is not None else []
        if not paths and (finished := self._library.path_of(recording_id)) is not None:
            return finished
        if not paths and is_run_id(recording_id):
            paths = self._finished_of(recording_id, part)
        return paths[-1 if is_newest else 0] if paths else None

    def _finished_of(self, run: str, part: int) -> list[Path]:
        rows = [row for row in self._library.rows() if row["run"] == run and row["part"] in (None, part)]
        rows.sort(key=lambda row: int(row["first_seq"]))
        return [path for row in rows if (path := self._library.path_of(row["id"])) is not None]

    def is_growing(self, recording_id: str) -> bool:
        """Whether the id is of a recording that is not finished."""
        return recording_id in self._open


def _there(one: Recording) -> list[Path]:
    """Its growing files; of one that is being finished those that are still to be."""
    return [path for path in one.paths if path.exists()]
