"""What people and the streamer are told of a run: its rows in STATE."""

from __future__ import annotations

from typing import Any, Final

from taesd_stream.frames import Rendition
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream_workers.broker.runs import Run

TOLD_BYTES: Final = 500  # of what a sampler or a worker says: thousands of runs must fit into one STATE


def stream_row(run: Run, wanted: dict[Rendition, int]) -> dict[str, Any]:
    """The stream's row of STATE and of the HTTP interface."""
    newest = run.newest
    flags = [
        flag
        for flag, is_set in (
            ("stalled", run.is_stalled),
            ("degraded", run.troubles.note is not None),
            ("stopping", run.stop_asked and run.end is None),
        )
        if is_set
    ]
    width, height = _size_px(run)
    return {
        "name": run.info.stream,
        "run": run.info.run,
        "state": run.state,
        "flags": flags,
        "kind": run.info.kind,
        "latent_format": run.info.latent_format,
        "width": width,
        "height": height,
        "step": newest.step if newest else None,
        "total_steps": newest.total_steps if newest else None,
        "sigma": newest.sigma if newest else None,
        "seq": newest.seq if newest else None,
        "fps": round(1 / run.interval_s, 2) if run.interval_s and run.state == "live" else None,
        "viewers": max(wanted.values(), default=0),
        "record": run.record,
        "behind": run.frames_behind,
        "stoppable": run.is_stoppable and run.end is None,
        "meta": run.info.meta,
        "started": run.started_unix,
        "ended": run.ended_unix,
        "end_text": _cut(run.end.text) or None if run.end else None,
        "note": _cut(run.troubles.note) if run.troubles.note else None,
        "faults": run.faults,
    }


def _cut(text: str) -> str:
    return text.encode()[:TOLD_BYTES].decode(errors="ignore")


def _size_px(run: Run) -> tuple[int | None, int | None]:
    latent_format = LATENT_FORMATS.get(run.info.latent_format)
    if run.newest is None or latent_format is None:
        return None, None
    try:
        _, _, rows, columns = latent_format.check_shape(run.info.kind, run.newest.shape)
    except ValueError:  # out of a log that was written when its format was another one
        return None, None
    height, width = latent_format.picture_size(rows, columns)
    return width, height


def recording_row(run: Run, *, has_meta: bool) -> dict[str, Any]:
    """What the streamer must know of a kept run.

    has_meta: else `meta` is None: it is told once something of the run is on its way into its file.
    """
    kept = run.kept
    assert kept is not None
    return {
        "stream": run.info.stream,
        "meta": run.info.meta if has_meta else None,
        "kind": run.info.kind,
        "latent_format": run.info.latent_format,
        "started": run.started_unix,
        "takes_film": run.record == "all",
        "ended": kept.is_over and kept.queued == kept.logged,
        "last_seq": kept.logged,
        "kept_from": kept.log.first_seq,
        "attempt": kept.attempt,
        "blocked": _cut(kept.blocked) if kept.blocked else None,
    }
