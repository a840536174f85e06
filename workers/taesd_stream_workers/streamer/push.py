"""One stream to an RTSP or RTMP server, by packet copy: what a player would get, sent on; for ever, whatever breaks.

It reads the daemon's own `live.ts` as any player does. So a receiver that is slow is a viewer that is slow: the daemon
drops to the next keyframe for it, and nobody else waits. After a break both ends begin anew, at a keyframe.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final
from urllib.parse import quote, urlsplit

import av
from av.container import InputContainer, OutputContainer

from taesd_stream.config import Config
from taesd_stream.errors import ConfigError, TaesdStreamError
from taesd_stream.frames import CLOCK_HZ
from taesd_stream.media.encoder import TIME_BASE
from taesd_stream.media.fragments import parameter_sets
from taesd_stream.media.mpegts import DELIMITER
from taesd_stream_workers.role.web_token import load_token

logger = logging.getLogger(__name__)

FORMATS: Final = {"rtsp": "rtsp", "rtmp": "flv", "rtmps": "flv"}
TIMEOUT_S: Final = 10.0
CLOSE_S: Final = 0.5
MIN_STEP_TICKS: Final = CLOCK_HZ // 1000  # FLV has milliseconds
PTS_WRAP: Final = 1 << 33  # MPEG-TS counts no further: 26.5 hours
WAITS_S: Final = (1.0, 2.0, 4.0, 8.0, 15.0)
# noparse: a packet a picture, with its own time. FFmpeg's parser gives each the time of the one before (see mpegts.py).
_READ: Final = {"probesize": "20000", "analyzeduration": "300000", "fpsprobesize": "0", "fflags": "noparse"}


class PushError(TaesdStreamError):
    """This connection is over; the next one begins anew."""


class NoPictureError(PushError):
    """There is nothing to push yet."""


class Push:
    """One stream on its way to one address. `run` in a thread of its own."""

    def __init__(
        self,
        source: str,
        url: str,
        *,
        token: str | None = None,
        say: Callable[[str], None],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        """source: the address of a live.ts. url: where it goes. say: is told what a person should know.

        on_failure: called when the receiver is not there, or is lost.

        Raises: ConfigError for an address that is none.
        """
        self.url = url
        self._format = format_of(url)
        self._source = source
        self._headers = f"Authorization: Bearer {token}\r\n" if token else ""
        self._say = say
        self._on_failure = on_failure
        self.sent = 0  # packets, since the start

    def run(self, stop: threading.Event) -> None:
        """Push until told to stop."""
        failures = 0
        while not stop.is_set():
            before = self.sent
            try:
                self._push_once(stop)
            except Exception as error:  # the thread's outermost loop: whatever it is, the next connection may do
                if not isinstance(error, (av.FFmpegError, OSError, PushError)):
                    logger.exception("push_failed url=%s", shown(self.url))
                if not isinstance(error, NoPictureError):
                    self._on_failure()
                failures = 0 if self.sent > before else failures
                wait_s = WAITS_S[min(failures, len(WAITS_S) - 1)]
                failures += 1
                self._say(f"{shown(self.url)}: {_text(error)}; again in {wait_s:.0f} s")
                stop.wait(wait_s)

    def _push_once(self, stop: threading.Event) -> None:
        options = {**_READ, **({"headers": self._headers} if self._headers else {})}
        try:
            reader = av.open(self._source, format="mpegts", options=options, timeout=TIMEOUT_S)
        except (av.FFmpegError, OSError) as error:
            raise NoPictureError(f"the daemon gives no picture yet ({_text(error)})") from error
        with reader:
            if not reader.streams.video:
                raise NoPictureError("the daemon gives no picture yet")
            self._copy(reader, stop)

    def _copy(self, reader: InputContainer, stop: threading.Event) -> None:
        options = {"rtsp_transport": "tcp"} if self._format == "rtsp" else {}
        writer: OutputContainer = av.open(self.url, "w", format=self._format, options=options, timeout=TIMEOUT_S)
        try:
            copy = writer.add_stream_from_template(reader.streams.video[0])
            sets, time, before, is_said = None, 0, None, False
            for picture, pts in _pictures(reader):
                if stop.is_set():
                    return
                found = parameter_sets(picture)
                if found is not None and sets is not None and found != sets:
                    raise PushError("the picture has another size")  # the receiver was told of the first one
                sets = found or sets
                if sets is None:
                    continue
                time += max(MIN_STEP_TICKS, (pts - before) % PTS_WRAP) if before is not None else 0
                before = pts
                packet = av.Packet(picture)
                packet.pts = packet.dts = time
                packet.time_base, packet.stream, packet.is_keyframe = TIME_BASE, copy, found is not None
                writer.mux(packet)
                self.sent += 1
                if not is_said:
                    self._say(f"{shown(self.url)}: pushing")
                    is_said = True
            raise PushError("the daemon ended the stream")
        finally:
            _close(writer)


def _pictures(reader: InputContainer) -> Iterator[tuple[bytes, int]]:
    """Each picture of a live.ts, whole, and its time in it."""
    data, pts = b"", 0
    for packet in reader.demux(reader.streams.video[0]):
        data, pts = (bytes(packet), packet.pts) if packet.pts is not None else (data + bytes(packet), pts)
        if data.endswith(DELIMITER):  # else the rest of a large one comes
            yield data.removesuffix(DELIMITER), pts
            data = b""


def source_of(web: str, stream: str) -> str:
    """The address of a stream's live.ts."""
    return f"{web}/streams/{quote(stream)}/live.ts"


def format_of(url: str) -> str:
    """FFmpeg's name for what goes to an address. Raises: ConfigError for one that nothing can be pushed to."""
    try:
        parts = urlsplit(url)
        known = FORMATS.get(parts.scheme) if parts.hostname else None
    except ValueError:
        known = None
    if known is None:
        raise ConfigError(f"{shown(url)}: expected rtsp://host/name, rtmp://host/app/name or rtmps://…")
    return known


def shown(url: str) -> str:
    """An address without its password and what may hold a key: of RTMP the stream's name, which is the key of many."""
    head, _, _ = url.partition("?")
    scheme, between, rest = head.partition("://")
    host, *path = rest.rpartition("@")[2].split("/")
    if scheme.startswith("rtmp") and len(path) > 1:
        path[1:] = ["…"]
    return scheme + between + "/".join([host, *path])


def _text(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _close(writer: OutputContainer) -> None:
    """A receiver that is gone cannot be told goodbye."""
    try:
        writer.close()
    except (av.FFmpegError, OSError) as error:
        logger.debug("push_not_closed error=%s", error)


class Pushes:
    """The pushes that the configuration names, each in a thread, inside the streamer."""

    def __init__(self, config: Config, on_failure: Callable[[str], None]) -> None:
        """on_failure: called with a stream whose receiver is not there, or is lost; in its thread.

        Raises: ConfigError for an address that nothing can be pushed to.
        """
        self._config = config
        self._on_failure = on_failure
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        for one in config.pushes:
            format_of(one.url)

    def start(self, web: str) -> None:
        """web: where this daemon's page is."""
        token = load_token(self._config) if self._config.pushes else None
        for one in self._config.pushes:
            push = Push(
                source_of(web, one.stream),
                one.url,
                token=token,
                say=partial(_log, one.stream),
                on_failure=partial(self._on_failure, one.stream),
            )
            thread = threading.Thread(target=push.run, args=(self._stop,), name="push", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Tell all to end, and give them a moment; the web server must have ended their streams."""
        self._stop.set()
        for thread in self._threads:
            thread.join(CLOSE_S)


def _log(stream: str, text: str) -> None:
    logger.warning("push stream=%s %s", stream, text)
