"""Rows of recordings that grow, as people see them, and cursors, for the broker; finished ones are the library's."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taesd_stream.latent_log import segment_paths
from taesd_stream.media.recording import Recording
from taesd_stream.messages import Cursor


def growing_row(one: Recording, log_folder: Path, *, error: str | None, is_ended: bool) -> dict[str, Any]:
    """Of a recording that is not finished. error: why it stands still. is_ended: whether its run is over."""
    return {
        "id": one.run,
        "name": one.stream,
        "stream": one.stream,
        "run": one.run,
        "state": "failed" if error else "finishing" if is_ended else "recording",
        "frames": one.frames,
        "first_seq": one.first_seq,
        "last_seq": one.written,
        "gaps": one.missing,
        "part": None,
        "parts": one.parts,
        "bytes": one.nbytes,
        "started": one.started,
        "duration_s": None,
        "width": None,
        "height": None,
        "meta": one.meta,
        "error": error,
        "latents": _log_bytes(log_folder, one.run) if error else None,
    }


def _log_bytes(log_folder: Path, run: str) -> int | None:
    """What the log has of a run; None: nothing, or it is on another host."""
    with contextlib.suppress(OSError):
        return sum(path.stat().st_size for path in segment_paths(log_folder, run)) or None
    return None


def stuck_row(folder: Path, log_folder: Path, run: str, said: Mapping[str, Any], error: str) -> dict[str, Any]:
    """Of a run that has no file, for none could be opened. said: the broker's row of it."""
    one = Recording(folder, stream=said["stream"], run=run, meta=meta_of(said))
    one.started = said["started"]
    return growing_row(one, log_folder, error=error, is_ended=bool(said["ended"]))


def cursor_of(one: Recording) -> Cursor:
    """How far a recording is."""
    return Cursor(run=one.run, attempt=max(0, one.attempt), written=one.written, synced=one.synced)


def meta_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a file keeps of a run. said: the broker's row of it."""
    return {**(said["meta"] or {}), "latent_format": said["latent_format"], "kind": said["kind"]}
