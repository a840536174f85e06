"""The HTTP interface (PROTOCOL 6): JSON for programs, files for people, the page itself. All of it reads the hub."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import html
import re
from contextlib import AsyncExitStack
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import av
from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.routing import WebSocketRoute

from taesd_stream import __version__
from taesd_stream.errors import TaesdStreamError
from taesd_stream.fields import quoted
from taesd_stream.frames import NAME_RULE, Packet, is_stream_name
from taesd_stream.media.growing_file import PART_SUFFIX
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.library import thumbnail
from taesd_stream_workers.streamer.recorder import Recorder
from taesd_stream_workers.streamer.web import schema
from taesd_stream_workers.streamer.web.copies import Copies, CopyResponse
from taesd_stream_workers.streamer.web.docs import POLICY as DOCS_POLICY
from taesd_stream_workers.streamer.web.docs import docs_page
from taesd_stream_workers.streamer.web.errors import ERROR_RESPONSES, ApiError, answer_errors
from taesd_stream_workers.streamer.web.films import add_films, last_picture
from taesd_stream_workers.streamer.web.forwarding import Forwarding
from taesd_stream_workers.streamer.web.health import add_health
from taesd_stream_workers.streamer.web.latents import add_latents
from taesd_stream_workers.streamer.web.peers import Peers
from taesd_stream_workers.streamer.web.players import MJPEG_TYPE, TS_TYPE, PlayerResponse, motion_jpeg, transport_stream
from taesd_stream_workers.streamer.web.schema import content, endless, says
from taesd_stream_workers.streamer.web.sockets import serve_page

LATEST_WAIT_S: Final = 4.0
THUMB_PX: Final = 256
_JPEG: Final = content("image/jpeg")
_NO_STORE: Final = {"cache-control": "no-store"}
_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
}


FrameCount = Annotated[int | None, Query(ge=1, le=(1 << 53) - 1)]
Part = Annotated[int | None, Query(ge=1, le=1 << 20)]


class RecordRequest(BaseModel):
    """What to keep of a stream from now on."""

    mode: Literal["off", "last", "all"]


class Page:
    """The page's files, read once; index.html knows their version, and the policy the hash of its one inline script.

    settings: what a sampler's environment needs, as the page says it; "" for nothing.
    """

    def __init__(self, settings: str) -> None:
        folder = resources.files("taesd_stream_workers.streamer.web") / "page"
        self.files = {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(name.encode() + self.files[name])
        self.version = digest.hexdigest()[:12]
        self.packed = {name: gzip.compress(data, mtime=0) for name, data in self.files.items()}
        index = self.files["index.html"].replace(b"__PAGE_VERSION__", self.version.encode())
        self.index = index.replace(b"__SETTINGS__", html.escape(settings).encode())
        scripts = re.findall(rb"<script>(.*?)</script>", self.index, re.S)
        hashes = " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'" for script in scripts
        )
        self.policy = (
            f"default-src 'self'; script-src 'self' {hashes}; img-src 'self' blob: data:; media-src 'self' blob:; "
            "worker-src 'self'; connect-src 'self' ws: wss:; frame-ancestors 'none'"
        )


def make_app(hub: Hub, recorder: Recorder, peers: Peers, copies: Copies, *, settings: str) -> FastAPI:
    """The application, its routes bound to one hub, one recorder, and the daemons beside them.

    settings: as Page has it.
    """
    app = FastAPI(
        title="taesd-stream", version=__version__, responses={**ERROR_RESPONSES}, docs_url=None, redoc_url=None
    )
    answer_errors(app, hub.latency.http_errors)
    page = Page(settings)
    _add_page(app, page)
    _add_docs(app)
    _add_lists(app, peers)
    _add_streams(app, hub)
    _add_players(app, hub, recorder)
    _add_recordings(app, hub, recorder, copies)
    add_films(app, hub, recorder, peers)
    add_latents(app, recorder.log_folder)
    add_health(app, hub)
    socket = partial(serve_page, hub=hub, peers=peers, page_version=page.version)
    app.router.routes.append(WebSocketRoute("/ws", socket))
    app.add_middleware(Forwarding, peers=peers, errors=hub.latency.http_errors)
    return app


def _add_page(app: FastAPI, page: Page) -> None:
    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"content-security-policy": page.policy, "cache-control": "no-cache"}
        return Response(page.index, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in page.files:
            raise ApiError(404, "not_found", f"There is no page file {name}.")
        media_type = _MEDIA_TYPES.get(Path(name).suffix, "application/octet-stream")
        headers = {"cache-control": "no-cache", "vary": "accept-encoding", "etag": f'W/"{page.version}"'}
        if headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        if "gzip" not in request.headers.get("accept-encoding", ""):
            return Response(page.files[name], media_type=media_type, headers=headers)
        return Response(page.packed[name], media_type=media_type, headers={**headers, "content-encoding": "gzip"})

    @app.get("/streams/{name:path}/embed", include_in_schema=False)
    async def embed(name: str) -> Response:
        """A bare player, for an iframe, a notebook or OBS: it alone may be framed by other sites."""
        _check_name(name)
        policy = page.policy.replace("frame-ancestors 'none'", "frame-ancestors *")
        headers = {"content-security-policy": policy, "cache-control": "no-cache"}
        return Response(page.files["embed.html"], media_type="text/html; charset=utf-8", headers=headers)


def _add_docs(app: FastAPI) -> None:
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        headers = {"content-security-policy": DOCS_POLICY}
        return Response(docs_page(app.openapi()), media_type="text/html; charset=utf-8", headers=headers)


def _known(hub: Hub, name: str) -> dict[str, Any]:
    row = hub.row_of(name)
    if row is None:
        raise ApiError(404, "no_stream", f"There is no stream {name}.")
    return row


def _add_lists(app: FastAPI, peers: Peers) -> None:
    @app.get("/api/v1/streams", responses=says(schema.Streams))
    async def streams(request: Request) -> dict[str, Any]:
        """Every stream, its newest run."""
        return {"streams": peers.asked_by(request.headers).streams()}

    @app.get("/api/v1/recordings", responses=says(schema.Recordings))
    async def recordings(request: Request) -> dict[str, Any]:
        """Every recording, growing and finished."""
        return {"recordings": peers.asked_by(request.headers).recordings()}

    @app.get("/api/v1/runs/{run}", responses=says(schema.Run))
    async def one_run(run: str, request: Request) -> dict[str, Any]:
        """A run by its id: how it stands, and its recordings."""
        listed = peers.asked_by(request.headers)
        row = next((row for row in listed.streams() if row["run"] == run), None)
        recordings = [one for one in listed.recordings() if one["run"] == run]
        if row is None and not recordings:
            raise ApiError(404, "no_run", f"There is no run {run}.")
        name = row["name"] if row else recordings[0]["stream"]
        return {"run": run, "name": name, "stream": row, "recordings": recordings}


def _check_name(name: str) -> None:
    if not is_stream_name(name):
        raise ApiError(400, "bad_name", f"{quoted(name)} cannot name a stream: expected {NAME_RULE}.")


def _add_streams(app: FastAPI, hub: Hub) -> None:
    known = partial(_known, hub)

    @app.post("/api/v1/streams/{name:path}/record", responses=says(schema.Done))
    async def record(name: str, request: RecordRequest) -> dict[str, Any]:
        """Keep all of a stream from now on, or only its last frame, or no more. An unknown name means its next run.

        What somebody watched of the run before is in the file too, as its film has it: not every frame.
        """
        _check_name(name)
        hub.record(name, request.mode)
        return {}

    @app.post("/api/v1/streams/{name:path}/stop", responses=says(schema.Done))
    async def stop(name: str) -> dict[str, Any]:
        """Ask the sampler to stop."""
        if not known(name)["stoppable"]:
            raise ApiError(409, "not_stoppable", "This sampler cannot be stopped from here.")
        hub.stop(name)
        return {}

    @app.get("/api/v1/streams/{name:path}/snapshot", response_class=Response, responses=_JPEG)
    async def snapshot(name: str) -> Response:
        """The newest picture as a file to keep; waits up to 4 s for one."""
        packet = await _latest(hub, name, "jpeg")
        file = f"{name.replace('/', '-')}-{packet.run[:6]}-{packet.seq}.jpg"
        headers = {**_NO_STORE, "content-disposition": f'attachment; filename="{file}"'}
        return Response(bytes(packet.payload), media_type="image/jpeg", headers=headers)

    @app.get("/api/v1/workers", responses=says(schema.Workers))
    async def workers() -> dict[str, Any]:
        """The decode workers, and how many the load needs."""
        state = hub.state
        return {"desired_workers": state.desired_workers if state else 1, "workers": state.workers if state else []}


async def _latest(hub: Hub, name: str, rendition: Literal["jpeg", "thumb"]) -> Packet:
    """The newest picture of a stream's newest run, made for whoever asks. Raises: ApiError 404, 503."""
    row = _known(hub, name)
    with hub.watching(name, rendition):
        for _ in range(int(LATEST_WAIT_S / 0.05)):
            if hub.is_closing:
                raise ApiError(503, "stopping", "The daemon stops.")
            packet = hub.picture(name, rendition)
            least = row["seq"] or 0 if (run := _known(hub, name)["run"]) == row["run"] else 0
            if packet is not None and packet.run == run and packet.seq >= least:
                return packet
            await asyncio.sleep(0.05)
    raise ApiError(503, "no_picture", f"{name} gave no picture within {LATEST_WAIT_S:.0f} s.")


def _add_players(app: FastAPI, hub: Hub, recorder: Recorder) -> None:
    known = partial(_known, hub)

    @app.get("/streams/{name:path}/latest.jpg", response_class=Response, responses=_JPEG)
    async def latest(name: str, rendition: Literal["jpeg", "thumb"] = "jpeg") -> Response:
        """The newest picture, `thumb`: as small as a tile; waits up to 4 s for one.

        Of a stream that is over and out of memory, the last one of its film or recording.
        """
        row = hub.row_of(name)
        if row is not None and (row["seq"] is not None or row["ended"] is None):
            picture = bytes((await _latest(hub, name, rendition)).payload)
        else:
            picture = await last_picture(recorder, name)
        return Response(picture, media_type="image/jpeg", headers=_NO_STORE)

    def admit(name: str) -> None:
        known(name)
        if hub.is_full:
            raise ApiError(503, "too_many_viewers", "web.max_viewers watch already; try again later.")

    @app.get("/streams/{name:path}/live.ts", response_class=Response, responses=endless(TS_TYPE))
    async def live_ts(name: str) -> Response:
        """The stream for players, as MPEG-TS without end."""
        admit(name)
        return PlayerResponse(transport_stream(hub, name), media_type=TS_TYPE, headers=_NO_STORE)

    @app.get("/streams/{name:path}/live.mjpeg", response_class=Response, responses=endless(MJPEG_TYPE))
    async def live_mjpeg(name: str) -> Response:
        """The stream as JPEG pictures without end."""
        admit(name)
        return PlayerResponse(motion_jpeg(hub, name), media_type=MJPEG_TYPE, headers=_NO_STORE)


def _add_recordings(app: FastAPI, hub: Hub, recorder: Recorder, copies: Copies) -> None:
    def path_of(recording_id: str, part: int | None = None, *, is_newest: bool = False) -> Path:
        """Looks at every file of the folder: not for the loop's thread."""
        path = recorder.files.path_of_id(recording_id, part or 1, is_newest=is_newest)
        if path is None:
            raise ApiError(404, "no_recording", f"There is no recording {recording_id}.")
        return path

    @app.get("/api/v1/recordings/{recording_id:path}/file", response_class=Response, responses=content("video/mp4"))
    async def file(recording_id: str, frames: FrameCount = None, part: Part = None, inline: bool = False) -> Response:
        """The MP4; of its first `frames` frames only, each one published step, or of what is there now while it grows.

        `part`: of a growing one that will be several files, the picture of the batch, from 1. The id of a growing one
        stands for its first file, where the size of its pictures has changed, also when it is finished.
        """
        path = await asyncio.to_thread(path_of, recording_id, part)
        kind: Literal["inline", "attachment"] = "inline" if inline else "attachment"
        name = path.relative_to(recorder.folder).as_posix().replace("/", "-").removesuffix(".part")
        is_growing = path.name.endswith(PART_SUFFIX)  # as it was found: it may be finished by now
        if frames is None and not is_growing:
            return FileResponse(path, media_type="video/mp4", filename=name, content_disposition_type=kind)
        if is_growing and part is not None:
            name = f"{name.removesuffix('.mp4')}.{part}.mp4"
        held = AsyncExitStack()
        try:
            copy = await held.enter_async_context(copies.of(path, frames, part or 1 if is_growing else 1))
        except IndexError as error:
            raise ApiError(404, "no_part", f"{recording_id} has no part {part}.") from error
        except (OSError, av.FFmpegError, TaesdStreamError) as error:
            raise ApiError(503, "not_readable", f"{recording_id}: {error}") from error
        return CopyResponse(copy, held, media_type="video/mp4", filename=name, content_disposition_type=kind)

    @app.get("/api/v1/recordings/{recording_id:path}/thumb", response_class=Response, responses=_JPEG)
    async def thumb(recording_id: str) -> Response:
        """The last picture, small."""
        try:
            picture = await asyncio.to_thread(lambda: thumbnail(path_of(recording_id, is_newest=True), THUMB_PX))
        except (OSError, av.FFmpegError, AssertionError) as error:
            raise ApiError(404, "no_picture", f"{recording_id}: {error}") from error
        is_growing = recorder.files.is_growing(recording_id)  # then its last picture is soon another one
        headers = {"cache-control": "no-store" if is_growing else "max-age=3600"}
        return Response(picture, media_type="image/jpeg", headers=headers)

    @app.delete("/api/v1/recordings/{recording_id:path}", responses=says(schema.Done))
    async def delete(recording_id: str) -> dict[str, Any]:
        """Remove a finished recording for good; of one that is over and has no decoder, give up what waits of it."""
        if hub.give_up(recording_id):
            return {}
        if (why := hub.why_stuck(recording_id)) is not None:
            raise ApiError(409, "growing", f"It waits, and goes on when it can: {why}")
        if recorder.files.is_growing(recording_id):
            raise ApiError(409, "growing", "It is being recorded; stop recording first.")
        if not await asyncio.to_thread(recorder.library.delete, recording_id):
            raise ApiError(404, "no_recording", f"There is no recording {recording_id}.")
        return {}
