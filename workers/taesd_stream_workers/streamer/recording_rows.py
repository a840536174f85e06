"""Rows of recordings that grow, as people see them, and cursors, for the broker; finished ones are the library's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taesd_stream.media.recording import Recording
from taesd_stream.messages import Cursor


def growing_row(one: Recording, *, error: str | None, is_ended: bool, log_bytes: int | None) -> dict[str, Any]:
    """Of a recording that is not finished.

    error: why it stands still. is_ended: whether its run is over. log_bytes: what the latent log has of it; None:
    nothing, or it is on another host.
    """
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
        "latents": log_bytes if error else None,
    }


def stuck_row(folder: Path, run: str, said: Mapping[str, Any], *, error: str, log_bytes: int | None) -> dict[str, Any]:
    """Of a run that has no file, for none could be opened. said: the broker's row of it."""
    one = Recording(folder, stream=said["stream"], run=run, meta=meta_of(said))
    one.started = said["started"]
    return growing_row(one, error=error, is_ended=bool(said["ended"]), log_bytes=log_bytes)


def cursor_of(one: Recording) -> Cursor:
    """How far a recording is."""
    return Cursor(run=one.run, attempt=max(0, one.attempt), written=one.written, synced=one.synced)


def meta_of(said: Mapping[str, Any]) -> dict[str, Any]:
    """What a file keeps of a run. said: the broker's row of it."""
    return {**(said["meta"] or {}), "latent_format": said["latent_format"], "kind": said["kind"]}
