"""The broker: takes latents in, keeps what must be kept, gives workers their jobs. One loop, no decoding, no torch.

The samplers' side is intake.py and keeping.py, the workers' side dispatcher.py; here are the loop, and the streamer's.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.config import Config
from taesd_stream.errors import WireError
from taesd_stream.folder_lock import FolderLock
from taesd_stream.messages import (
    Cursor,
    Done,
    Echo,
    Failed,
    Forget,
    Keyframe,
    Progress,
    PublisherHello,
    Record,
    RefusedPeer,
    State,
    Stats,
    StopStream,
    StreamerHello,
    Watch,
    WorkerHello,
)
from taesd_stream.sockets import WakePipe
from taesd_stream_workers.broker.dispatcher import Dispatcher, StreamerLink
from taesd_stream_workers.broker.intake import Intake
from taesd_stream_workers.broker.keeping import Keeping
from taesd_stream_workers.broker.links import Context, Links
from taesd_stream_workers.broker.log_writer import LogWriter
from taesd_stream_workers.broker.registry import Registry
from taesd_stream_workers.broker.run_rows import recording_row, stream_row
from taesd_stream_workers.role.addresses import bound_address, workers_address
from taesd_stream_workers.role.gate import OWN_NAME, Door, Gate
from taesd_stream_workers.role.lifecycle import Lifecycle
from taesd_stream_workers.role.open_files import allow_many
from taesd_stream_workers.role.seldom import Seldom

logger = logging.getLogger(__name__)

MAX_PARTS: Final = 3  # of a message to a broker, which has a header and one payload at most: one too many tells
MAX_PASSED: Final = 1000  # parts of a message with too many: 2 ms
MAX_DRAIN: Final = 64  # messages of one socket before the other has its turn
STATE_S: Final = 0.2
TICK_S: Final = 0.5
AWAY_S: Final = 2.0  # our own loop stood for so long (Ctrl-Z, a machine that was paused): nobody was silent meanwhile
SWITCH_S: Final = 0.0005
REVOKED: Final = RefusedPeer(code="key", text="this key was revoked: the daemon takes nothing from it")

Handler = Callable[[bytes, Any], None]
Taker = Callable[[bytes, str, Any], None]
Refuser = Callable[[bytes, Any, RefusedPeer], None]


class Broker:
    """One daemon's broker. `run` owns both sockets; everything happens in its thread but the log's writes."""

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self._config = config
        self._life = lifecycle
        self._wake = WakePipe()
        self._gate = Gate(config)
        self._links = Links()
        self._registry = Registry(config)
        self._streamer = StreamerLink()
        self._writer = LogWriter(self._wake.wake)
        self._keeping = Keeping(config, self._registry, self._writer, self._links)
        self._intake = Intake(config, self._registry, self._keeping, self._links)
        self._dispatcher = Dispatcher(config, self._registry, self._streamer, self._links)
        self._next_state_s = 0.0
        self._next_tick_s = 0.0
        self._seldom = Seldom()
        self._inside: dict[type, Handler] = {
            WorkerHello: self._dispatcher.on_hello,
            Progress: self._dispatcher.on_progress,
            Done: self._dispatcher.on_done,
            Failed: self._dispatcher.on_failed,
            StreamerHello: self._on_streamer_hello,
            Watch: self._on_watch,
            Keyframe: self._on_keyframe,
            Record: self._on_record,
            StopStream: self._on_stop,
            Cursor: self._on_cursor,
            Forget: self._on_forget,
            Stats: lambda peer, _: self._tell_state(peer),
        }

    def run(self) -> None:
        """Bind, work until told to stop, then write what is still to be logged.

        Raises: ConfigError for an address in use, or a log folder that another daemon uses.
        """
        context: Context = zmq.Context()
        context.linger = 0
        with FolderLock(self._registry.log_folder):
            self._registry.load_logs(self._life.tick)
            self._keeping.open()
            self._links.bind(self._gate, context, self._config.broker.bind, workers_address(self._config))
            self._life.on_stop(self._wake.wake)
            self._writer.start()
            front, inner = self._links.front.socket, self._links.inner.socket
            self._life.ready(bind=bound_address(front), workers_bind=bound_address(inner))
            try:
                self._loop()
            finally:
                self._life.end()
                self._writer.close()
                self._keeping.ack_written()
                context.destroy(linger=200)

    def _loop(self) -> None:
        poller = zmq.Poller()
        for waited in (self._links.front.socket, self._links.inner.socket, *self._gate.waited_for()):
            poller.register(waited, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        looked_s = time.monotonic()
        while not self._life.stop.is_set():
            due = dict(poller.poll(0 if self._dispatcher.is_behind else 100))
            now_s = time.monotonic()
            away_s, looked_s = now_s - looked_s, now_s
            if away_s > AWAY_S:
                self._registry.was_away(away_s)
                self._dispatcher.was_away(away_s)
            if self._wake.fileno() in due:
                self._wake.drain()
            self._gate.attend()
            if self._links.inner.socket in due:
                self._drain(self._links.inner, wire.FROM_INSIDE, self._take_inside, self._refuse_inside)
            if self._links.front.socket in due:
                self._drain(self._links.front, wire.FROM_PUBLISHER, self._intake.take, self._intake.refuse)
            if self._writer.error is not None:
                raise self._writer.error
            self._keeping.ack_written()
            self._dispatcher.give_jobs()
            self._send_state()
            self._tick()
            self._life.tick()

    def _drain(self, door: Door, allowed: tuple[type, ...], take: Taker, refuse: Refuser) -> None:
        socket, is_limited = door.socket, door is self._links.front
        for _ in range(MAX_DRAIN):
            if not door.pass_over(MAX_PASSED):
                return  # however many parts a message has, the other door has its turn between them
            try:
                # id and header as bytes, the payload as a view of its Frame, which is forwarded uncopied
                part = head = socket.recv(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            peer, client = head.bytes, door.client_of(head)
            parts: list[Any] = []
            while part.more and len(parts) < MAX_PARTS:
                part = socket.recv(copy=False)
                parts.append(part.buffer if parts else part.bytes)
            door.is_amid = part.more
            why = REVOKED if client is None else None
            speaker = client if door.has_keys else peer  # a host's samplers are not one another's keepers
            if speaker is not None and is_limited and not self._intake.limits.may_speak(speaker):
                self._links.counts["refused_speed"] += 1
                text = self._intake.limits.speed_refusal(speaker)
                if text is None:
                    continue  # it was told a moment ago: not even unpacked
                logger.warning("client_too_fast client=%s %s", client, text)
                why = RefusedPeer(code="limit", text=text)
            try:
                message = wire.unpack(parts, allowed)
            except WireError as error:
                self._count_bad(peer, str(error))
                continue
            if why is not None:
                refuse(peer, message, why)
                continue
            if isinstance(message, PublisherHello) and speaker is not None:
                self._intake.limits.charge(speaker, len(message.runs))  # each of them is answered
            if client is not None:
                take(peer, client, message)

    def _take_inside(self, peer: bytes, client: str, message: Any) -> None:
        is_workers = self._links.inner.has_keys and client != OWN_NAME
        if is_workers and not isinstance(message, wire.FROM_WORKER):
            text = f"key={client} is a decode worker's: only the streamer may say {type(message).__name__}"
            self._gate.count("refused_role", client, text)
            return
        self._inside[type(message)](peer, message)

    def _refuse_inside(self, peer: bytes, message: Any, why: RefusedPeer) -> None:
        """Nothing of this message is taken, and whoever says HELLO is told."""
        if isinstance(message, WorkerHello | StreamerHello):
            self._links.to_inside(peer, why)

    def _count_bad(self, peer: bytes, text: str) -> None:
        self._links.counts["bad_messages"] += 1
        if self._seldom.may_say((peer, text[:40])):
            logger.warning("message_dropped peer=%s error=%s (said once a minute)", peer.hex(), text)

    # --- the streamer's side ---

    def _on_streamer_hello(self, peer: bytes, hello: StreamerHello) -> None:
        streamer = self._streamer
        is_new = peer != streamer.peer or not streamer.is_there
        streamer.peer, streamer.packets_to, streamer.heard_s = peer, hello.endpoint, time.monotonic()
        self._links.to_inside(peer, Echo(echo_ns=hello.echo_ns, now_ns=time.monotonic_ns()))
        if not is_new:
            return
        logger.info("streamer_came packets_to=%s", hello.endpoint)
        self._registry.viewers.clear()
        cursors = {cursor.run: cursor for cursor in hello.cursors}
        for run in self._registry.by_run.values():
            run.dispatched.clear()
            run.attempts += 1  # what went to the former streamer is missing in the film's chain
            if run.kept is not None:
                cursor = cursors.get(run.info.run)
                attempt = max(run.kept.attempt, cursor.attempt if cursor else 0) + 1
                run.kept.told = cursor.written if cursor else -1
                run.kept.restart(run.kept.told, attempt)
        self._registry.touch_all()
        self._links.is_changed = True

    def _on_watch(self, _peer: bytes, watch: Watch) -> None:
        if not self._registry.watch(watch.stream, watch.rendition, watch.viewers):
            return  # said again, for a broker that was restarted
        run = self._registry.by_name.get(watch.stream)
        if run is not None:
            run.live_since_ns = run.live_since_ns or time.monotonic_ns()
            self._registry.touch(run)
            self._intake.tell(run)
            self._links.is_changed = True

    def _on_keyframe(self, _peer: bytes, keyframe: Keyframe) -> None:
        run = self._registry.by_name.get(keyframe.stream)
        if run is not None:
            run.forced.add(keyframe.rendition)
            self._registry.touch(run)
            run.live_since_ns = run.live_since_ns or time.monotonic_ns()

    def _on_record(self, _peer: bytes, record: Record) -> None:
        run = self._registry.ask_record(record.stream, record.mode)
        if run is not None:
            run.record = record.mode
            run.is_reopened = False  # what its publisher knows of a former broker is older than this
            self._registry.touch(run)
            self._intake.tell(run, always=True)
            self._links.is_changed = True

    def _on_stop(self, _peer: bytes, stop: StopStream) -> None:
        run = self._registry.by_name.get(stop.stream)
        if run is not None:
            self._intake.stop(run)

    def _on_cursor(self, _peer: bytes, cursor: Cursor) -> None:
        run = self._registry.by_run.get(cursor.run)
        if run is None or run.kept is None:
            return
        if cursor.finished:
            if run.kept.is_over and cursor.attempt >= run.kept.first_attempt:  # else it is about a former recording
                self._writer.delete(run.finish_keeping())
                self._registry.touch(run)
                self._links.is_changed = True
                self._dispatcher.forget(run)
            return
        run.kept.told = cursor.written
        self._registry.touch(run)
        if cursor.attempt < run.kept.attempt:
            return  # of an attempt that the newer one cuts back
        run.kept.on_cursor(cursor.written)
        run.kept.log.release(cursor.synced + 1 - run.history)  # the next frame may need what is before it
        self._dispatcher.tell_gap(run, run.kept)

    def _on_forget(self, _peer: bytes, forget: Forget) -> None:
        run = self._registry.by_run.get(forget.run)
        if run is not None and run.kept is not None and run.kept.is_over and run.kept.blocked:
            self._keeping.give_up(run, "a person's wish")
            self._dispatcher.forget(run)

    def _send_state(self) -> None:
        now = time.monotonic()
        if self._streamer.peer is not None and self._links.is_changed and now >= self._next_state_s:
            self._links.is_changed = False
            self._next_state_s = now + STATE_S
            self._tell_state(self._streamer.peer)

    def _tell_state(self, peer: bytes) -> None:
        """STATE, whole: to the streamer, and to whoever says STATS."""
        registry, links = self._registry, self._links
        untold = registry.untold()
        rows = [stream_row(run, registry.wanted(run)) for run in registry.rows()]
        state = State(
            streams=[{**row, "meta": {}} if row["run"] in untold else row for row in rows],
            runs={
                run_id: recording_row(run, has_meta=run_id not in untold)
                for run_id, run in registry.by_run.items()
                if run.kept
            },
            workers=self._dispatcher.workers_state(),
            stats={"counts": dict(links.counts + self._gate.counts), "alerts": dict(links.alerts), "pid": os.getpid()},
            desired_workers=self._dispatcher.desired_workers,
            now_ns=time.monotonic_ns(),
        )
        links.to_inside(peer, state)

    def _tick(self) -> None:
        now = time.monotonic()
        if now < self._next_tick_s:
            return
        self._next_tick_s = now + TICK_S
        self._keeping.tick()
        self._intake.limits.recount(self._registry.by_run.values())
        self._registry.give_turns()
        self._registry.touch_all()  # what waits for a turn, a time, or for room that others had
        self._dispatcher.tick()
        for run in self._registry.forget_old():
            self._dispatcher.forget(run)
        self._links.is_changed = True


def run_broker(config: Config, lifecycle: Lifecycle) -> None:
    """Run the broker in this thread until it is told to stop. Raises: ConfigError for an address in use."""
    # The log's thread lets go of the GIL at each write and CRC; the loop, when busy, would hold it 5 ms each time.
    sys.setswitchinterval(SWITCH_S)
    allow_many()
    Broker(config, lifecycle).run()
