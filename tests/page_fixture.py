"""A host for the page alone: it speaks the streamer's side of `/ws` and the JSON API, with a state that a test writes.

The real streamer needs samplers, a broker and a worker to bring about a stalled stream, a failed one, or a restart of
the daemon; here a test says so in one line and looks at what the page does with it. It is a real HTTP and WebSocket
server on a free port, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, FrameLocator, Page, sync_playwright
from playwright.sync_api import Error as PlaywrightError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

import taesd_stream_workers.streamer.web

SETTINGS = "TAESD_STREAM_ADDRESS=tcp://*:5999"  # of a sampler, as the page says them
PAGE = Path(taesd_stream_workers.streamer.web.__file__).parent / "page"
LONG_TASKS = """
  self.long_tasks = []
  new PerformanceObserver((list) => long_tasks.push(...list.getEntries().map(({duration}) => duration)))
    .observe({type: "longtask", buffered: true})"""  # ms each; of those below 50 a browser tells nothing
Json = dict[str, Any]
Colour = tuple[int, int, int]
Open = Callable[..., Page]
Film = Callable[[str, str], bytes | None]  # (run, seq, or seq with .jpg) -> H.264 from a keyframe on, or JPEG
# (stream, rendition, keyframe wanted) -> (header fields, bytes), or None while there is no picture
Source = Callable[[str, str, bool], tuple[Json, bytes] | None]


def stream(name: str, **fields: Any) -> Json:
    """One entry of the state's `streams`, with every field of the contract; `fields` overwrite."""
    entry: Json = {
        "name": name, "run": hashlib.sha256(name.encode()).hexdigest()[:16], "state": "live", "flags": [],
        "kind": "steps", "latent_format": "sdxl", "decoder": "taesdxl", "width": 512, "height": 512, "step": 16,
        "total_steps": 28, "seq": 16, "sigma": 3.42, "fps": 8.1, "latency_ms": 21.0, "viewers": 1, "record": "off",
        "stoppable": True, "meta": {}, "files": [], "started": time.time() - 3, "ended": None, "end_text": None,
        "note": None,
    }  # fmt: skip
    return entry | fields


def recording(name: str, **fields: Any) -> Json:
    """One entry of the state's `recordings`; `fields` overwrite."""
    run = hashlib.sha256(name.encode()).hexdigest()[:16]
    entry: Json = {
        "id": run, "stream": name, "run": run, "name": f"{name}.mp4", "state": "finished", "frames": 28,
        "first_seq": 0, "last_seq": 27, "gaps": [], "bytes": 1_240_000, "started": time.time() - 90,
        "duration_s": 3.5, "width": 512, "height": 512, "meta": {}, "error": None,
    }  # fmt: skip
    return entry | fields


def pack_picture(header: Json, payload: bytes) -> bytes:
    """The binary message of one picture: length of the header, header, payload."""
    head = json.dumps(header).encode()
    return struct.pack(">I", len(head)) + head + payload


@dataclass(eq=False)
class Viewer:
    """One open page: what it watches, and for which pictures it holds a credit."""

    socket: WebSocket
    watch: dict[str, str] = field(default_factory=dict)
    credits: set[tuple[str, str]] = field(default_factory=set)
    keys_wanted: set[str] = field(default_factory=set)
    finished: dict[str, Json] = field(default_factory=dict)  # recordings, as they were told last


@dataclass
class PageHost:
    """The state that pages see, and what they asked for; a change is sent by `push`, a picture by `draw`.

    requests: (method, path, JSON body or None) of every API call, in order. refuse: path ending -> (status, text).
    messages: every text message of every page.
    steps: of each run's film, [seq, step, of, sigma, ms]; film: its pictures.
    full, silent: no more viewers are taken; nothing is answered though nothing is closed, as through a dead network.
    token_wanted: nothing is given without a token. dials: how often a page asked for a socket.
    """

    streams: list[Json] = field(default_factory=list)
    recordings: list[Json] = field(default_factory=list)
    films: list[Json] = field(default_factory=list)
    stats: Json = field(default_factory=lambda: {"pictures_per_s": 118.0, "latency_ms": 21.0, "workers": 1})
    alerts: list[Json] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    source: Source = lambda _name, _rendition, _key: None
    daemon: str = "first"
    page: str = "1"
    answers: bool = True  # False: new sockets are refused, as while the daemon is gone
    full: bool = False
    silent: bool = False
    token_wanted: bool = False
    steps: dict[str, list[list[Any]]] = field(default_factory=dict)
    film: Film = lambda _run, _seq: None
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    requests: list[tuple[str, str, Json | None]] = field(default_factory=list)
    messages: list[Json] = field(default_factory=list)
    thumbs: dict[str, bytes] = field(default_factory=dict)
    port: int = 0

    def __post_init__(self) -> None:
        self.viewers: list[Viewer] = []
        self.dials = 0
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    # --- called by tests, from any thread ---

    def push(self) -> None:
        """Send the state as it is now to every page."""
        assert self.loop is not None
        for viewer in list(self.viewers):
            text = json.dumps(self.state_message(viewer))
            asyncio.run_coroutine_threadsafe(viewer.socket.send_text(text), self.loop)

    def draw(self, name: str) -> None:
        """A new picture of the stream is there: each page gets it, if it watches and (but for `live`) has a credit."""
        assert self.loop is not None
        for viewer in list(self.viewers):
            asyncio.run_coroutine_threadsafe(self.offer(viewer, name), self.loop)

    def hang_up(self) -> None:
        """Close every page's socket, as a daemon that stops does."""
        assert self.loop is not None
        for viewer in list(self.viewers):
            asyncio.run_coroutine_threadsafe(viewer.socket.close(), self.loop)

    # --- the server's side ---

    def state_message(self, viewer: Viewer) -> Json:
        """As a daemon tells it: finished recordings that have changed since this page was told, and which are gone."""
        message = {"type": "state"} | {key: getattr(self, key) for key in ("streams", "stats", "alerts")}
        finished = {row["id"]: dict(row) for row in self.recordings if row["state"] == "finished"}
        message["growing"] = [row for row in self.recordings if row["state"] != "finished"]
        before, viewer.finished = viewer.finished, finished
        message["recordings"] = [row for row in finished.values() if row != before.get(row["id"])]
        return message | {"gone": list(before.keys() - finished.keys())}

    async def offer(self, viewer: Viewer, name: str) -> None:
        rendition = viewer.watch.get(name)
        if rendition is None or (rendition != "live" and (name, rendition) not in viewer.credits):
            return
        found = self.source(name, rendition, name in viewer.keys_wanted)
        if found is None:
            return
        viewer.keys_wanted.discard(name)
        viewer.credits.discard((name, rendition))
        entry = next(entry for entry in self.streams if entry["name"] == name)
        now_us = time.monotonic_ns() // 1000
        spans = {"sent": 17000, "received": 15000, "started": 12000, "decoded": 5000, "encoded": 2000, "streamed": 500}
        stamps = {f"{key}_us": now_us - age for key, age in spans.items()}
        copied = ("run", "seq", "step", "total_steps", "sigma", "width", "height", "decoder")
        header = {key: entry[key] for key in copied} | {"stream": name, "rendition": rendition, "stamps": stamps}
        await viewer.socket.send_bytes(
            pack_picture(header | {"index": 0, "count": 1, "pts": 0, "keyframe": True} | found[0], found[1])
        )

    async def serve_socket(self, websocket: WebSocket) -> None:
        self.dials += 1
        while self.silent:
            await asyncio.sleep(0.05)
        if not self.answers or self.token_wanted:
            await websocket.close()
            return
        await websocket.accept()
        if self.full:
            await websocket.close(1013, "too many viewers")
            return
        viewer = Viewer(websocket)
        hello = {"type": "hello", "version": "0.1.0", "daemon": self.daemon, "page": self.page, "workers": 1}
        self.viewers.append(viewer)  # from here on nothing that is pushed passes it by
        try:
            await websocket.send_json(hello)
            await websocket.send_json(self.state_message(viewer))
            while True:
                await self.take(viewer, await websocket.receive_json())
        except (WebSocketDisconnect, RuntimeError, KeyError):
            pass  # the page, or hang_up, closed it
        finally:
            self.viewers.remove(viewer)

    async def take(self, viewer: Viewer, message: Json) -> None:
        self.messages.append(message)
        if self.silent:
            return
        match message["type"]:
            case "ping":
                now_us = time.monotonic_ns() // 1000
                await viewer.socket.send_json({"type": "pong", "t": message["t"], "now_us": now_us})
            case "watch":
                new = {key: value for key, value in message["streams"].items() if viewer.watch.get(key) != value}
                viewer.watch = message["streams"]
                viewer.credits = {key for key in viewer.credits if viewer.watch.get(key[0]) == key[1]}
                viewer.credits |= set(new.items())
                viewer.keys_wanted |= set(new)
                for name in new:
                    await self.offer(viewer, name)
            case "credit":
                viewer.credits.add((message["stream"], message["rendition"]))
            case "keyframe":
                viewer.keys_wanted.add(message["stream"])

    async def index(self, _request: Request) -> Response:
        html = (PAGE / "index.html").read_text().replace("__PAGE_VERSION__", "1").replace("__SETTINGS__", SETTINGS)
        inline = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
        assert inline is not None
        digest = base64.b64encode(hashlib.sha256(inline.group(1).encode()).digest()).decode()
        policy = (
            f"default-src 'self'; script-src 'self' 'sha256-{digest}'; img-src 'self' blob: data:;"
            " media-src 'self' blob:; worker-src 'self'; connect-src 'self' ws: wss:"
        )
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": policy})

    async def page_file(self, request: Request) -> Response:
        if self.token_wanted:
            return Response(status_code=401)
        return FileResponse(PAGE / request.path_params["file"], headers={"Cache-Control": "no-cache"})

    async def api(self, request: Request) -> Response:
        path = request.path_params["path"]
        body = await request.body()
        if request.method == "GET" and path in ("streams", "recordings", "films"):
            return JSONResponse({path: getattr(self, path)})
        self.requests.append((request.method, path, json.loads(body) if body else None))
        for ending, (status, text) in self.refuse.items():
            if path.endswith(ending):
                return JSONResponse({"code": "refused", "text": text}, status)
        if path.startswith("runs/") and request.method == "GET":
            return self.film_answer(*path.split("/")[1:], after=int(request.query_params.get("after", -1)))
        if path.startswith("recordings/"):
            return self.recording_file(request.method, *path.split("/")[1:])
        return JSONResponse({})

    def film_answer(self, run: str, _film: str, seq: str = "", *, after: int) -> Response:
        if not seq and run in self.steps:
            about = {"run": run, "stream": run, "started": time.time(), "meta": {}, "film": True, "parts": 1}
            return JSONResponse({**about, "steps": [row for row in self.steps[run] if row[0] > after]})
        picture = self.film(run, seq) if seq else None
        if picture is None:
            return JSONResponse({"code": "no_film", "text": "no such step"}, 404)
        if seq.endswith(".jpg"):
            return Response(picture, media_type="image/jpeg")
        row = {"seq": int(seq), "index": 0, "keyframe": True, "pts": 0, "bytes": len(picture)}
        return Response(pack_picture({"pictures": [row]}, picture))

    def recording_file(self, method: str, identity: str, part: str = "") -> Response:
        if method == "DELETE":
            self.recordings = [entry for entry in self.recordings if entry["id"] != identity]
            self.push()
            return JSONResponse({})
        if part == "file" and identity in self.files:
            return FileResponse(self.files[identity], filename=self.files[identity].name)
        if part == "thumb" and identity in self.thumbs:
            return Response(self.thumbs[identity], media_type="image/jpeg")
        return JSONResponse({"code": "unknown", "text": "no such recording"}, 404)

    def app(self) -> Starlette:
        routes = [
            Route("/", self.index),
            Route("/page/{file}", self.page_file),
            Route("/api/v1/{path:path}", self.api, methods=["GET", "POST", "DELETE"]),
            WebSocketRoute("/ws", self.serve_socket),
        ]
        return Starlette(routes=routes)


@contextmanager
def serving(host: PageHost, port: int = 0) -> Iterator[PageHost]:
    """Serve the page on 127.0.0.1 (a free port by default) until the block ends."""
    listener = socket.create_server(("127.0.0.1", port))
    host.port = listener.getsockname()[1]
    config = uvicorn.Config(host.app(), log_level="warning", ws="websockets-sansio", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    ready = threading.Event()

    async def run() -> None:
        host.loop = asyncio.get_running_loop()
        host.loop.call_soon(ready.set)
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="page host")
    thread.start()
    ready.wait()
    try:
        yield host
    finally:
        server.should_exit = True
        thread.join()


def chromium_path() -> str | None:
    """The system's Chromium, or None: Playwright then looks for its own."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium; the test skips, with the reason, where there is none."""
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        except PlaywrightError as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opening(browser: Browser, url: str) -> Iterator[Open]:
    """Opens the page at a hash, in a context of its own; errors of its scripts and blocked resources fail the test."""
    wrong: list[str] = []
    with ExitStack() as contexts:

        def open_page(at: str = "", *, script: str = "", clock: bool = False, **options: Any) -> Page:
            context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
            contexts.callback(context.close)
            page = context.new_page()
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda message: wrong.append(message.text) if "Security" in message.text else None)
            if clock:
                page.clock.install()
            if script:
                page.add_init_script(script)
            page.goto(f"{url.rstrip('/')}/{at}")
            return page

        yield open_page
    assert wrong == []


PIXEL = """canvas => {
  const copy = document.createElement("canvas")
  copy.width = copy.height = 8
  const context = copy.getContext("2d")
  context.drawImage(canvas, 0, 0, 8, 8)
  return [...context.getImageData(4, 4, 1, 1).data].slice(0, 3)
}"""


def middle_of(page: Page | FrameLocator, selector: str) -> Colour:
    """Red, green and blue in the middle of a canvas, whose pixels its worker alone may read directly."""
    red, green, blue = page.locator(selector).evaluate(PIXEL)
    return red, green, blue


def await_colour(page: Page | FrameLocator, canvas: str, colour: Colour) -> None:
    """Wait until the middle of a canvas is the colour; what a worker draws is seen a moment after it says so."""
    deadline_s = time.monotonic() + 20
    while max(abs(one - other) for one, other in zip(middle_of(page, canvas), colour, strict=True)) > 8:
        assert time.monotonic() < deadline_s, f"{canvas}: {middle_of(page, canvas)}, expected {colour}"
        page.locator(canvas).evaluate("() => new Promise(requestAnimationFrame)")
