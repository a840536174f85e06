"""Who watches what: pictures from the streamer's thread to every page, wishes of the pages to the broker.

All methods but the marked ones run in the web thread's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from taesd_stream.frames import END_REASONS, Packet, Rendition
from taesd_stream.messages import Forget, Keyframe, State, StopStream, Watch
from taesd_stream_workers.streamer.inbox import Inbox
from taesd_stream_workers.streamer.last_pictures import LastPictures
from taesd_stream_workers.streamer.latency import Latency
from taesd_stream_workers.streamer.record_wishes import RecordWishes
from taesd_stream_workers.streamer.viewer import Viewer

SIGNAL_AGE_S: Final = 2.0
RATE_S: Final = 2.0
NO_WORKER_S: Final = 10.0  # one that is restarted is back sooner
NO_WORKER: Final = "No decode worker."
MAX_FOLLOWERS: Final = 64
MAX_STOPS: Final = 1000
LEFT_S: Final = 10.0  # how long it is said again that nobody watches: a broker is away for less, or forgets all
MAX_LEFT: Final = 2000  # with a wall of a thousand still few enough for the line to the broker, each second
KEYFRAMES_S: Final = 0.5
MAX_KEYFRAMES: Final = 3  # of a stream in that time: a player of `live.ts` asks so often before it opens


class Rate:
    """How often something happened in the last RATE_S."""

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._times_s: deque[float] = deque()

    def add(self) -> None:
        """It happened now."""
        self._times_s.append(self._clock_s())
        self._forget()

    @property
    def per_s(self) -> float:
        """Times a second."""
        self._forget()
        return len(self._times_s) / RATE_S

    def _forget(self) -> None:
        since_s = self._clock_s() - RATE_S
        while self._times_s and self._times_s[0] < since_s:
            self._times_s.popleft()


class Lasting:
    """Something that counts once it has lasted for a while: what mends itself soon alarms nobody."""

    def __init__(self, for_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._for_s = for_s
        self._clock_s = clock_s
        self._since_s: float | None = None

    def note(self, is_so: bool) -> None:
        """Whether it is so at this moment."""
        if not is_so:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = self._clock_s()

    @property
    def is_due(self) -> bool:
        """Whether it has lasted."""
        return self._since_s is not None and self._clock_s() - self._since_s >= self._for_s


class Hub:
    """The meeting point of two threads: the streamer's, with the sockets, and the web's, with the viewers."""

    def __init__(
        self,
        latency: Latency,
        tell_broker: Callable[[Any], None],
        clock_s: Callable[[], float] = time.monotonic,
        *,
        max_viewers: int = 200,
    ) -> None:
        self.latency = latency
        self.is_closing = False
        self.changes = 0  # how often viewers were told that there is something new
        self._viewers: set[Viewer] = set()
        self._max_viewers = max_viewers
        self.state: State | None = None
        self.state_at_s = 0.0
        self.recordings: list[dict[str, Any]] = []
        self.films: dict[str, int] = {}  # by run: last seq
        self.clock_ns: Callable[[], int] = time.monotonic_ns
        self._tell_broker, self._clock_s = tell_broker, clock_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox = Inbox(
            lambda stream: self.call(self.keyframe, stream),
            lambda packet: latency.dropped.labels(packet.rendition).inc(),
        )
        self._pictures = LastPictures(lambda key: key in self._counts)
        self._newest: dict[str, Packet] = {}  # newest packet of any rendition, by run
        self._latency_ms: dict[str, float] = {}
        self._counts: defaultdict[tuple[str, Rendition], int] = defaultdict(int)
        self._left_s: dict[tuple[str, Rendition], float] = {}  # what nobody watches any more, and since when
        self._asked: dict[str, int] = {}  # by stream: wishes for a keyframe since its KEYFRAMES_S began
        self._wishes = RecordWishes(tell_broker)
        self._stops: dict[str, str] = {}  # by stream: the run that a person wants stopped
        self.rate = Rate(clock_s)
        self._no_worker = Lasting(NO_WORKER_S, clock_s)

    # --- the streamer's thread ---

    def offer_packet(self, packet: Packet, streamed_ns: int) -> None:
        """Bring a live packet to the viewers; over the bound some are dropped."""
        if self._inbox.put(packet, streamed_ns):
            self.call(self._take_packets)

    def offer_state(self, state: State) -> None:
        """The broker's newest STATE."""
        self._inbox.on_state(state)
        self.call(self._take_state, state)

    def offer_recordings(self, rows: list[dict[str, Any]], films: dict[str, int]) -> None:
        """The recordings' newest rows; and the last seq of each run's film."""
        self.call(self._take_recordings, rows, films)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run it in the web thread's loop, soon. Any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, *arguments)

    # --- the web thread ---

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on things are delivered in this loop."""
        self._loop = loop
        loop.call_soon(self._take_packets)

    @property
    def is_full(self) -> bool:
        """Whether one more page or player is one too many."""
        return self._count() >= self._max_viewers

    @property
    def is_followed_enough(self) -> bool:
        """Whether one more daemon that keeps up with this one is one too many."""
        return len(self._viewers) - self._count() >= MAX_FOLLOWERS

    def _count(self) -> int:
        return sum(not viewer.is_follower for viewer in self._viewers)

    def join(self, viewer: Viewer) -> None:
        """A viewer is there: pictures and news go to it too."""
        self._viewers.add(viewer)
        self.latency.viewers.set(self._count())

    def leave(self, viewer: Viewer) -> None:
        """A viewer is gone."""
        self._viewers.discard(viewer)
        self.latency.viewers.set(self._count())

    def close(self) -> None:
        """The daemon stops: endless answers end."""
        self.is_closing = True
        self._tell_viewers()

    def _take_packets(self) -> None:
        for packet, streamed_ns in self._inbox.take_all():
            self._newest[packet.run] = packet
            self._latency_ms[packet.run] = max(0, streamed_ns - packet.stamps.sent_ns) / 1e6
            self.rate.add()
            if packet.rendition != "live":
                self._pictures.put(packet)
            for viewer in self._viewers:
                viewer.offer(packet, streamed_ns)

    def _take_state(self, state: State) -> None:
        self.state, self.state_at_s = state, time.monotonic()
        self._no_worker.note(not state.workers)
        alive = {row["run"] for row in state.streams}
        for run in [run for run in self._newest if run not in alive]:
            del self._newest[run]
            self._latency_ms.pop(run, None)
        self._pictures.keep_only({row["name"] for row in state.streams})
        self._stop_again(state)
        self._wishes.on_state(state)
        self.latency.desired_workers.set(state.desired_workers)
        for name, count in state.stats.get("counts", {}).items():
            self.latency.broker.labels(name).set(count)
        self._tell_viewers()

    def _stop_again(self, state: State) -> None:
        """A broker that was away when a person pressed stop does not know of it."""
        rows = {row["name"]: row for row in state.streams}
        for stream, run in list(self._stops.items()):
            row = rows.get(stream)
            if row is None:
                continue  # the broker was restarted, and its publisher has not opened it again
            if row["run"] != run or row["state"] in END_REASONS or "stopping" in row["flags"]:
                del self._stops[stream]
            else:
                self._tell_broker(StopStream(stream=stream))

    def _take_recordings(self, rows: list[dict[str, Any]], films: dict[str, int]) -> None:
        self.recordings, self.films = rows, films
        self._tell_viewers()

    def _tell_viewers(self) -> None:
        self.changes += 1
        for viewer in self._viewers:
            viewer.state_changed()

    @property
    def is_ready(self) -> bool:
        """Whether broker, a worker and this streamer work together."""
        fresh = self.state is not None and time.monotonic() - self.state_at_s < SIGNAL_AGE_S + 1
        return fresh and self.state is not None and bool(self.state.workers)

    def row_of(self, stream: str) -> dict[str, Any] | None:
        """What the broker says of a stream, None where it knows none of that name."""
        rows = self.state.streams if self.state else []
        return next((row for row in rows if row["name"] == stream), None)

    def streams(self) -> list[dict[str, Any]]:
        """The rows of GET /api/v1/streams."""
        rows = []
        files = defaultdict(list)
        last_seqs = dict(self.films)
        for recording in self.recordings:
            files[recording["run"]].append(recording["id"])
            last_seqs[recording["run"]] = max(last_seqs.get(recording["run"], -1), recording["last_seq"])
        for row in self.state.streams if self.state else []:
            packet = self._newest.get(row["run"])
            if row["width"] is None and packet is not None:  # of a format that the broker does not know
                row = {**row, "width": packet.width, "height": packet.height}
            latency_ms = self._latency_ms.get(row["run"])
            engine = self._engine_of(row["latent_format"])
            decoder = packet.decoder if packet else engine.get("decoder")
            extra = {
                "note": row.get("note")
                or (NO_WORKER if self.has_no_worker and row["state"] in ("waiting", "live") else None),
                "decoder": decoder,
                "decoder_reason": engine.get("reason") if decoder == engine.get("decoder") else None,
                "latency_ms": round(latency_ms, 1) if latency_ms is not None and row["state"] == "live" else None,
                "files": files[row["run"]],
                "film": last_seqs.get(row["run"]),
            }
            rows.append({**row, **extra})
        return rows

    def alerts(self) -> list[dict[str, str]]:
        """What everybody must know now."""
        found = [{"code": code, "text": text} for code, text in self._broker_alerts().items()]
        stuck = [row for row in self.recordings if row["state"] == "failed"]
        if stuck:
            text = f"{len(stuck)} recording{'s wait' if len(stuck) > 1 else ' waits'}: {stuck[0]['error']}"
            found.append({"code": "recording_failed", "text": text})
        if self.state is not None and time.monotonic() - self.state_at_s > SIGNAL_AGE_S + 1:
            found.append({"code": "no_broker", "text": "The broker does not answer; it is being restarted."})
        elif self.has_no_worker:
            found.append({"code": "no_worker", "text": NO_WORKER})
        return found

    def _broker_alerts(self) -> dict[str, str]:
        return self.state.stats.get("alerts", {}) if self.state else {}

    def _engine_of(self, latent_format: str) -> dict[str, Any]:
        """What a worker says of the engine that shows the format; {} where none has one."""
        engines = (
            worker.get("engines", {}).get(latent_format) for worker in (self.state.workers if self.state else [])
        )
        return next((engine for engine in engines if engine), {})

    @property
    def has_no_worker(self) -> bool:
        """Whether nobody decodes, and has not for a while."""
        return self.state is not None and self._no_worker.is_due

    def stats(self) -> dict[str, Any]:
        """What the page's header shows."""
        workers = len(self.state.workers) if self.state else 0
        return {
            "pictures_per_s": round(self.rate.per_s, 1),
            "latency_ms": self.latency.recent_ms,
            "workers": workers,
        }

    def picture(self, stream: str, rendition: Rendition) -> Packet | None:
        """The newest whole picture of a stream, if one was made."""
        frame = self._pictures.of(stream, rendition)
        return frame[-1] if frame else None

    def watch(self, viewer: Viewer, before: dict[str, Rendition], after: dict[str, Rendition]) -> None:
        """A viewer wants other streams than before."""
        for stream, rendition in before.items():
            if after.get(stream) != rendition:
                self._change(stream, rendition, -1)
        for stream, rendition in after.items():
            if before.get(stream) == rendition:
                continue
            self._change(stream, rendition, +1)
            if rendition == "live":
                self.keyframe(stream)
            for packet in self._pictures.of(stream, rendition) if rendition != "live" else ():
                if self._is_newest_run(packet):
                    viewer.offer(packet, self.clock_ns())

    def _is_newest_run(self, packet: Packet) -> bool:
        """Whether a name still means the run of this picture: a late viewer must not see a former one's."""
        rows = self.state.streams if self.state else []
        return any(row["run"] == packet.run for row in rows)

    @contextlib.contextmanager
    def watching(self, stream: str, rendition: Rendition) -> Iterator[None]:
        """Watch a stream as one more viewer, for the time of a `with`."""
        self._change(stream, rendition, +1)
        try:
            yield
        finally:
            self._change(stream, rendition, -1)

    def _change(self, stream: str, rendition: Rendition, by: int) -> None:
        self._counts[stream, rendition] += by
        viewers = self._counts[stream, rendition]
        if viewers:
            self._left_s.pop((stream, rendition), None)
        else:
            del self._counts[stream, rendition]
            self._left_s[stream, rendition] = self._clock_s()
            if len(self._left_s) > MAX_LEFT:
                for oldest in list(self._left_s)[:-MAX_LEFT]:  # a copy: `watches` forgets some in the other thread
                    self._left_s.pop(oldest, None)
        self._tell_broker(Watch(stream=stream, rendition=rendition, viewers=viewers))
        if by > 0 and self._pictures.lacks(stream, rendition):
            self._tell_broker(Keyframe(stream=stream, rendition=rendition))

    def watches(self) -> list[Watch]:
        """All that is watched now, or was of late: said again to a broker that was away. The streamer's thread."""
        over_s = self._clock_s() - LEFT_S
        for key, left_s in list(self._left_s.items()):
            if left_s < over_s:
                self._left_s.pop(key, None)
        watched = dict.fromkeys(self._left_s, 0) | dict(self._counts)
        return [
            Watch(stream=stream, rendition=rendition, viewers=viewers)
            for (stream, rendition), viewers in watched.items()
        ]

    def keyframe(self, stream: str) -> None:
        """A viewer of `live` needs a picture to begin with: all get it, so few are asked for, the last one late."""
        asked = self._asked[stream] = self._asked.get(stream, 0) + 1
        if asked == 1:
            assert self._loop is not None
            self._loop.call_later(KEYFRAMES_S, self._keyframe_late, stream)
        if asked <= MAX_KEYFRAMES:
            self._tell_broker(Keyframe(stream=stream, rendition="live"))

    def _keyframe_late(self, stream: str) -> None:
        if self._asked.pop(stream) > MAX_KEYFRAMES:
            self.keyframe(stream)

    def give_up(self, run: str) -> bool:
        """What waits of a run is not recorded any more. Returns: False where it goes on, or can be decoded."""
        row = self.state.runs.get(run, {}) if self.state is not None else {}
        may_go = bool(row.get("ended") and row.get("blocked"))
        if may_go:
            self._tell_broker(Forget(run=run))
        return may_go

    def why_stuck(self, recording_id: str) -> str | None:
        """Why a recording stands still; None of others."""
        rows = (row for row in self.recordings if row["id"] == recording_id and row["state"] == "failed")
        return next((str(row["error"]) for row in rows), None)

    def record(self, stream: str, mode: Any) -> None:
        """Keep a stream, or not any more; said again to a broker that was killed before it could."""
        self._wishes.add(stream, mode, self.state)

    def stop(self, stream: str) -> None:
        """Ask a sampler to stop; said again until the broker says that it is asked."""
        row = self.row_of(stream)
        if row is not None:
            self._stops[stream] = row["run"]
        while len(self._stops) > MAX_STOPS:
            del self._stops[next(iter(self._stops))]
        self._tell_broker(StopStream(stream=stream))
