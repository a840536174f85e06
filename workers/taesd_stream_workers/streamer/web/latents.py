"""What a kept run has in the latent log, as one file: all there is of it while its recording waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse

from taesd_stream.latent_log import segment_paths
from taesd_stream_workers.streamer.web.errors import ApiError
from taesd_stream_workers.streamer.web.films import RunId
from taesd_stream_workers.streamer.web.schema import content

PIECE_BYTES: Final = 1 << 20
LATENTS_TYPE: Final = "application/octet-stream"


def add_latents(app: FastAPI, log_folder: Path) -> None:
    """Add the route. log_folder: the broker's, where it is on this host."""

    @app.get("/api/v1/runs/{run}/latents", response_class=Response, responses=content(LATENTS_TYPE))
    def latents(run: RunId) -> Response:
        """What waits to be recorded of a kept run, for `publish` and `export`. Nothing goes by being downloaded."""
        paths = segment_paths(log_folder, run)
        if not paths:
            raise ApiError(404, "no_latents", f"The log has nothing of run {run}.")
        headers = {"content-disposition": f'attachment; filename="{run}.latents"'}
        return StreamingResponse(_pieces(paths), media_type=LATENTS_TYPE, headers=headers)


def _pieces(paths: list[Path]) -> Iterator[bytes]:
    """Segments are whole files by themselves, and so are several in a row; one that is gone since was recorded."""
    for path in paths:
        with suppress(FileNotFoundError), path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
