"""Films by HTTP: which there are, the steps of one, the coded pictures around a step, and keeping it."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import av
from fastapi import FastAPI, Query, Request, Response
from fastapi import Path as PathParameter

from taesd_stream.errors import TaesdStreamError
from taesd_stream.frames import CLOCK_HZ
from taesd_stream.media.steps import StepPicture, pictures_around, steps_of
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.library import picture_of_step
from taesd_stream_workers.streamer.recorder import Recorder
from taesd_stream_workers.streamer.web.errors import ApiError
from taesd_stream_workers.streamer.web.peers import Peers

PICTURES_TYPE: Final = "application/octet-stream"
MAX_SEQ: Final = (1 << 53) - 1
_NO_STORE: Final = {"cache-control": "no-store"}

T = TypeVar("T")
RunId = Annotated[str, PathParameter(pattern="^[0-9a-f]{16}$")]
Seq = Annotated[int, PathParameter(ge=0, le=MAX_SEQ)]
Part = Annotated[int, Query(ge=1, le=1 << 20)]


def add_films(app: FastAPI, hub: Hub, recorder: Recorder, peers: Peers) -> None:
    """Add the routes."""

    @app.get("/api/v1/films")
    async def films(request: Request) -> dict[str, Any]:
        """Every film: what was shown of runs that nobody recorded, newest first."""
        rows = [
            {"run": one.run, "stream": one.stream, "started": one.started, "bytes": one.nbytes, "meta": one.meta}
            for one in recorder.films.films.values()
        ]
        rows += await peers.asked_by(request.headers).films()
        return {"films": sorted(rows, key=lambda film: film["started"], reverse=True)}

    @app.get("/api/v1/runs/{run}/film")
    async def film(run: RunId, after: int = -1) -> dict[str, Any]:
        """The steps of a run that can be shown again, behind `after`: [seq, step, of, sigma, ms]."""
        return await _read(lambda: _film(recorder, run, after), f"run {run}")

    @app.get("/api/v1/runs/{run}/film/{seq}.jpg", response_class=Response)
    async def step_as_jpeg(run: RunId, seq: Seq, part: Part = 1) -> Response:
        """The picture of one step; `part`: of a batch that is recorded in files of their own, which one, from 1."""
        picture = await _read(lambda: picture_of_step(_around(recorder, run, seq, part), seq), f"step {seq}")
        return Response(picture, media_type="image/jpeg", headers=_NO_STORE)

    @app.get("/api/v1/runs/{run}/film/{seq}", response_class=Response)
    async def step(run: RunId, seq: Seq, part: Part = 1) -> Response:
        """The H.264 pictures around a step, from one keyframe to the next.

        uint32 length (big-endian), JSON {"pictures": [{seq, index, keyframe, pts, bytes}]}, then the pictures' bytes.
        """
        pictures = await _read(lambda: _around(recorder, run, seq, part), f"step {seq}")
        return Response(_packed(pictures), media_type=PICTURES_TYPE, headers=_NO_STORE)

    @app.post("/api/v1/runs/{run}/keep")
    async def keep(run: RunId) -> dict[str, Any]:
        """Keep the film of a run that has ended as a recording; a run that goes on is recorded from now on."""
        row = next((row for row in hub.streams() if row["run"] == run and row["ended"] is None), None)
        if row is not None:
            hub.record(row["name"], "all")
            return {"id": None}
        try:
            return {"id": await asyncio.wrap_future(recorder.keep_film(run))}
        except KeyError as error:
            raise ApiError(404, "no_film", f"There is no film of run {run}.") from error
        except TaesdStreamError as error:
            raise ApiError(503, "not_kept", str(error)) from error


async def last_picture(recorder: Recorder, stream: str) -> bytes:
    """The last picture of a stream's newest run that files remember, as JPEG. Raises: ApiError 404, 503."""
    run = await asyncio.to_thread(recorder.files.newest_run_of, stream)
    if run is None:
        raise ApiError(404, "no_stream", f"There is no stream {stream}.")

    def read() -> bytes:
        seqs = [one.seq for path in recorder.files.paths_of(run) for one in steps_of(path)]
        return picture_of_step(_around(recorder, run, max(seqs), 1), max(seqs)) if seqs else b""

    return await _read(read, f"run {run}")


async def _read(read: Callable[[], T], what: str) -> T:
    """Read files beside the loop. A file may move while it is read: then once more. Raises: ApiError."""
    for is_last in (False, True):
        try:
            found = await asyncio.to_thread(read)
        except (OSError, av.FFmpegError, TaesdStreamError) as error:
            if is_last:
                raise ApiError(503, "not_readable", f"{what}: {error}") from error
            continue
        if found:
            return found
        break
    raise ApiError(404, "no_film", f"No film has {what}.")


def _film(recorder: Recorder, run: str, after: int) -> dict[str, Any]:
    about = recorder.files.about(run)
    if about is None:
        return {}
    steps = {one.seq: one for path in recorder.files.paths_of(run) for one in steps_of(path, after)}
    rows = [
        [one.seq, one.step, one.of, one.sigma, round(one.pts * 1000 / CLOCK_HZ)] for _, one in sorted(steps.items())
    ]
    return {**about, "steps": rows}


def _around(recorder: Recorder, run: str, seq: int, part: int) -> list[StepPicture]:
    paths = recorder.files.paths_of(run, part)
    return next((found for path in reversed(paths) if (found := pictures_around(path, seq, part))), [])


def _packed(pictures: list[StepPicture]) -> bytes:
    rows = [
        {"seq": one.seq, "index": one.index, "keyframe": one.is_keyframe, "pts": one.pts, "bytes": len(one.payload)}
        for one in pictures
    ]
    head = json.dumps({"pictures": rows}, separators=(",", ":")).encode()
    return b"".join([struct.pack(">I", len(head)), head, *(one.payload for one in pictures)])
