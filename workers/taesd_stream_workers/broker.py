"""The broker: takes latents in, keeps what must be kept, gives workers their jobs. One loop, no decoding, no torch."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections import Counter
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.config import Config
from taesd_stream.errors import ConfigError, WireError
from taesd_stream.folder_lock import FolderLock
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.messages import (
    Ack,
    Cursor,
    DemandUpdate,
    Done,
    Echo,
    End,
    Failed,
    Forget,
    Gap,
    Job,
    JobItem,
    Keyframe,
    Progress,
    PublisherHello,
    Record,
    Refused,
    State,
    Stats,
    StopRun,
    StopStream,
    StreamerHello,
    Watch,
    WorkerHello,
)
from taesd_stream.scheduling import Candidate, desired_workers, next_job
from taesd_stream.sockets import WakePipe, bind_router
from taesd_stream_workers.addresses import bound_address, workers_address
from taesd_stream_workers.crew import Crew, Worker
from taesd_stream_workers.lifecycle import Lifecycle
from taesd_stream_workers.log_writer import LogWriter
from taesd_stream_workers.registry import Registry
from taesd_stream_workers.runs import RECORD_STUCK_S, KeptRun, Run

logger = logging.getLogger(__name__)

MAX_DRAIN: Final = 64  # messages of one socket before the other has its turn
STATE_S: Final = 0.2
TICK_S: Final = 0.5
STREAMER_GONE_S: Final = 3.0
POISON_DEATHS: Final = 2
MAX_REFUSED_PER_S: Final = 100


class Broker:
    """One daemon's broker. `run` owns both sockets; everything happens in its thread but the log's writes."""

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self._config = config
        self._life = lifecycle
        self._wake = WakePipe()
        self._registry = Registry(config.recording.default, config.log_folder)
        self._crew = Crew(config.decoder.job_deadline_s)
        self._writer = LogWriter(self._wake.wake)
        self._counts: Counter[str] = Counter()
        self._streamer: bytes | None = None
        self._streamer_heard_s = 0.0
        self._packets_to = ""
        self._alerts: dict[str, str] = {}
        self._is_state_dirty = True
        self._next_state_s = 0.0
        self._next_tick_s = 0.0
        self._log_max_bytes = config.broker.log_max_bytes
        self._said: set[str] = set()

    def run(self) -> None:
        """Bind, work until told to stop, then close the logs."""
        self._registry.log_folder.mkdir(parents=True, exist_ok=True)
        if not self._log_max_bytes:
            self._log_max_bytes = shutil.disk_usage(self._registry.log_folder).free // 2
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.linger = 0
        with FolderLock(self._registry.log_folder):
            self._registry.load_logs()
            self._front = _bind(context, "broker.bind", self._config.broker.bind)
            self._inner = _bind(context, "broker.workers_bind", workers_address(self._config))
            self._life.on_stop(self._wake.wake)
            self._writer.start()
            self._life.ready(bind=bound_address(self._front), workers_bind=bound_address(self._inner))
            try:
                self._loop()
            finally:
                self._life.end()
                self._writer.close()
                self._log_results()
                context.destroy(linger=200)

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        poller.register(self._inner, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        while not self._life.stop.is_set():
            poller.poll(100)
            self._wake.drain()
            self._drain(self._inner, wire.FROM_INSIDE, self._on_inside)
            self._drain(self._front, wire.FROM_PUBLISHER, self._on_publisher)
            self._log_results()
            self._dispatch()
            self._send_state()
            self._tick()
            self._life.tick()

    # --- receiving ---

    def _drain(self, socket: zmq.Socket[bytes], allowed: tuple[type, ...], handle: Any) -> None:
        for _ in range(MAX_DRAIN):
            try:
                # id and header as bytes, the payload as a Frame that is forwarded uncopied
                peer = socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            parts: list[Any] = []
            while socket.getsockopt(zmq.RCVMORE):
                parts.append(socket.recv() if not parts else socket.recv(copy=False).buffer)
            try:
                handle(peer, wire.unpack(parts, allowed))
            except WireError as error:
                self._count_bad(peer, str(error))

    def _count_bad(self, peer: bytes, text: str) -> None:
        self._counts["bad_messages"] += 1
        key = f"{peer.hex()} {text[:40]}"
        if key not in self._said and len(self._said) < 1000:
            self._said.add(key)
            logger.warning("message_dropped peer=%s error=%s (said once)", peer.hex(), text)

    def _on_publisher(self, peer: bytes, message: Any) -> None:
        if isinstance(message, LatentFrame):
            self.route(peer, message)
        elif isinstance(message, PublisherHello):
            self._on_publisher_hello(peer, message)
        elif isinstance(message, StreamInfo):
            self._on_open(peer, message)
        elif isinstance(message, End):
            self._on_end(peer, message)

    def _on_open(self, peer: bytes, info: StreamInfo) -> None:
        known = self._registry.by_run.get(info.run)
        if known is not None:
            known.peer, known.heard_s = peer, time.monotonic()
            return self._tell_publisher(known, always=True)
        holder = self._registry.by_name.get(info.stream)
        if holder is not None and holder.is_alive and self._is_peer_there(holder):
            use = self._registry.free_name(info.stream)
            text = f"{info.stream}: another run of that name lives; {use} is free"
            return self._refuse(peer, info, "taken", text, use=use)
        alive = sum(run.is_alive for run in self._registry.by_run.values())
        if alive >= self._config.broker.max_streams:
            return self._refuse(peer, info, "limit", f"{alive} streams are open, broker.max_streams allows no more")
        if holder is not None and holder.end is None:
            self._lose(holder)
        run = Run(info, peer=peer, record=self._registry.record_mode(info))
        self._registry.add(run)
        logger.info("stream_opened stream=%s run=%s record=%s", info.stream, info.run, run.record)
        self._is_state_dirty = True
        return self._tell_publisher(run, always=True)

    def _is_peer_there(self, run: Run) -> bool:
        """Whether the publisher's connection still stands: one that was killed is found out by sending to it."""
        return run.peer is not None and self._send_front(run.peer, Ack(run=run.info.run, seq=self._logged(run)))

    def route(self, peer: bytes, frame: LatentFrame) -> None:
        """FRAME: the newest of its stream, and, where it is kept, into the log. When full: kept ones get no ack."""
        received_ns = time.monotonic_ns()
        run = self._registry.by_run.get(frame.run)
        if run is None or run.end is not None:
            return self._unknown_run(peer, frame.run)
        run.heard_s = time.monotonic()
        run.peer = peer
        if not self._is_shape_right(run, frame):
            return None
        if frame.kept:
            self._keep(run, frame)
        run.take(frame, received_ns)
        self._is_state_dirty = True
        return None

    def _is_shape_right(self, run: Run, frame: LatentFrame) -> bool:
        latent_format = LATENT_FORMATS.get(run.info.latent_format)
        try:
            if latent_format is not None:
                latent_format.check_shape(run.info.kind, frame.shape)
        except ValueError as error:
            self._count_bad(run.info.run.encode(), str(error))
            run.faults += 1
            run.note = str(error)
            if run.faults == 1 and run.peer is not None:
                self._refuse(run.peer, run.info, "format", str(error))
            return False
        return True

    def _unknown_run(self, peer: bytes, run_id: str) -> None:
        self._counts["unknown_runs"] += 1
        refused = Refused(stream="unknown", run=run_id, code="unknown_run", text="open it first")
        self._send_front(peer, refused)

    def _keep(self, run: Run, frame: LatentFrame) -> None:
        kept = run.kept
        if kept is None or (kept.is_over and frame.seq > kept.queued):
            if kept is not None:
                return  # its recording is being finished; the publisher asks again in 2 s
            kept = self._begin_keeping(run, frame)
        if frame.seq != kept.queued + 1:
            return  # already there, or one before it was dropped: the publisher sends it again
        if self._log_bytes() > self._log_max_bytes:
            self._alert(
                "log_full", "The latent log is full: recordings wait. Free space or raise broker.log_max_bytes."
            )
            return
        if self._writer.submit(kept.log, frame):
            kept.queued = frame.seq

    def _begin_keeping(self, run: Run, frame: LatentFrame) -> KeptRun:
        """Keep from this frame on, or from the newest one we hold if it is the one before (PROTOCOL 2)."""
        newest = run.newest
        if newest is None or newest.seq != frame.seq - 1 or newest.shape != frame.shape:
            return self._registry.keep_log(run, frame.seq)
        kept = self._registry.keep_log(run, newest.seq)
        if self._writer.submit(kept.log, newest):
            kept.queued = newest.seq
        return kept

    def _log_bytes(self) -> int:
        return sum(run.kept.log.nbytes for run in self._registry.by_run.values() if run.kept)

    def _on_end(self, peer: bytes, end: End) -> None:
        run = self._registry.by_run.get(end.run)
        if run is None:
            return self._unknown_run(peer, end.run)
        run.peer = peer
        if run.end is None:
            run.end, run.ended_unix = end, time.time()
            logger.info("stream_ended stream=%s run=%s reason=%s", run.info.stream, end.run, end.reason)
            if run.kept is not None:
                run.kept.is_over = True
                self._writer.submit(run.kept.log, end)
        self._is_state_dirty = True
        self._send_front(peer, Ack(run=end.run, seq=self._logged(run), ended=True))
        return None

    def _on_publisher_hello(self, peer: bytes, hello: PublisherHello) -> None:
        self._send_front(peer, Echo(echo_ns=hello.echo_ns, now_ns=time.monotonic_ns()))
        for run_id, row in hello.runs.items():
            run = self._registry.by_run.get(run_id)
            if run is None:
                self._unknown_run(peer, run_id)
                continue
            run.peer, run.heard_s, run.offset_ns = peer, time.monotonic(), hello.offset_ns
            if run.is_stoppable != row.stoppable:
                run.is_stoppable, self._is_state_dirty = row.stoppable, True
            if row.kept_from is None and run.record != "all" and run.kept is not None and not run.kept.is_over:
                run.kept.is_over, self._is_state_dirty = True, True
            self._send_front(peer, Ack(run=run_id, seq=self._logged(run)))
            self._tell_publisher(run, always=True)
            if run.stop_asked:
                self._send_front(peer, StopRun(run=run_id))

    def _on_inside(self, peer: bytes, message: Any) -> None:
        handlers: dict[type, Any] = {
            WorkerHello: self._on_worker_hello,
            Progress: lambda peer, message: self._crew.progress(peer, message.job),
            Done: self._on_done,
            Failed: self._on_failed,
            StreamerHello: self._on_streamer_hello,
            Watch: self._on_watch,
            Keyframe: self._on_keyframe,
            Record: self._on_record,
            StopStream: self._on_stop,
            Cursor: lambda _, message: self._on_cursor(message),
            Stats: lambda peer, _: self._send_inner(peer, self._state()),
        }
        handlers[type(message)](peer, message)

    # --- workers ---

    def _on_worker_hello(self, peer: bytes, hello: WorkerHello) -> None:
        if self._crew.hello(peer, hello):
            logger.info("worker_came worker=%s device=%s", peer.decode("ascii", "replace"), hello.device)
            for run in self._registry.by_run.values():
                if run.kept is not None:
                    run.kept.blocked = None
            self._is_state_dirty = True
        self._send_inner(peer, Echo(echo_ns=hello.echo_ns, now_ns=time.monotonic_ns()))

    def _on_done(self, peer: bytes, done: Done) -> None:
        held = self._crew.finish(peer, done.job, done.ms)
        for item in held.items if held else ():
            self._item_over(item)

    def _item_over(self, item: Candidate) -> Run | None:
        run = self._registry.by_run.get(item.run)
        if run is not None and item.renditions != ("record",):
            run.live_in_flight = max(0, run.live_in_flight - 1)
        return run

    def _on_failed(self, peer: bytes, failed: Failed) -> None:
        held = self._crew.finish(peer, failed.job)
        if held is None:
            return
        for place, item in enumerate(held.items):
            run = self._item_over(item)
            if run is not None and (not failed.items or place in failed.items):
                self._item_failed(run, item, failed)
        self._is_state_dirty = True

    def _item_failed(self, run: Run, item: Candidate, failed: Failed) -> None:
        run.note = failed.text
        self._counts[f"failed_{failed.code}"] += 1
        if self._counts[f"failed_{failed.code}"] == 1:
            logger.warning(
                "frame_failed stream=%s seq=%d code=%s %s", run.info.stream, item.seq, failed.code, failed.text
            )
        if not item.is_record or run.kept is None:
            return
        if failed.code == "no_decoder":
            run.kept.blocked = failed.text  # the frames stay in the log
            run.kept.restart(run.kept.written, run.kept.attempt + 1)
        elif failed.retry:
            self._count_failure(run.kept, item, run)
        else:
            self._pass_gap(run, run.kept, item.seq, failed.code)

    def _count_failure(self, kept: KeptRun, item: Candidate, run: Run) -> None:
        """A frame that ended a worker is tried again elsewhere; one that ended two is poison."""
        kept.failures[item.seq] = kept.failures.get(item.seq, 0) + 1
        if kept.failures[item.seq] >= POISON_DEATHS:
            self._pass_gap(run, kept, item.seq, "poison")
        else:
            kept.restart(kept.written, kept.attempt + 1)

    def _pass_gap(self, run: Run, kept: KeptRun, seq: int, code: str) -> None:
        self._counts["gaps"] += 1
        logger.warning("frame_not_recorded stream=%s seq=%d code=%s", run.info.stream, seq, code)
        kept.pass_gap(seq)
        self._tell_gap(run, kept)

    def _tell_gap(self, run: Run, kept: KeptRun) -> None:
        """Let the file pass its next frame, if that is a gap; said again at each tick until the cursor moves."""
        if kept.due_gap is not None and self._streamer is not None:
            gap = Gap(run=run.info.run, seq=kept.due_gap, attempt=kept.attempt, code="no_picture")
            self._send_inner(self._streamer, gap)

    def _worker_gone(self, peer: bytes) -> None:
        worker = self._crew.remove(peer)
        if worker is None:
            return
        logger.warning("worker_gone worker=%s jobs=%d", peer.decode("ascii", "replace"), len(worker.jobs))
        self._counts["workers_gone"] += 1
        guilty = [item for job in worker.jobs.values() for item in job.items]
        for run in self._registry.by_run.values():
            if run.worker == peer:
                run.drop_worker()
        for item in guilty:
            owner = self._registry.by_run.get(item.run)
            if owner is not None and item.is_record and owner.kept is not None:
                self._count_failure(owner.kept, item, owner)
        self._is_state_dirty = True

    # --- streamer ---

    def _on_streamer_hello(self, peer: bytes, hello: StreamerHello) -> None:
        is_new = peer != self._streamer or time.monotonic() - self._streamer_heard_s > STREAMER_GONE_S
        self._streamer, self._streamer_heard_s, self._packets_to = peer, time.monotonic(), hello.endpoint
        self._send_inner(peer, Echo(echo_ns=hello.echo_ns, now_ns=time.monotonic_ns()))
        if not is_new:
            return
        logger.info("streamer_came packets_to=%s", hello.endpoint)
        self._registry.viewers.clear()
        cursors = {cursor.run: cursor for cursor in hello.cursors}
        for run in self._registry.by_run.values():
            run.dispatched.clear()
            if run.kept is not None:
                cursor = cursors.get(run.info.run)
                attempt = max(run.kept.attempt, cursor.attempt if cursor else 0) + 1
                run.kept.restart(cursor.written if cursor else -1, attempt)
        self._is_state_dirty = True

    def _on_watch(self, _peer: bytes, watch: Watch) -> None:
        viewers = self._registry.viewers.setdefault(watch.stream, {})
        viewers[watch.rendition] = watch.viewers
        run = self._registry.by_name.get(watch.stream)
        if run is not None:
            run.live_since_ns = run.live_since_ns or time.monotonic_ns()
            self._tell_publisher(run)
            self._is_state_dirty = True

    def _on_keyframe(self, _peer: bytes, keyframe: Keyframe) -> None:
        run = self._registry.by_name.get(keyframe.stream)
        if run is not None:
            run.forced.add(keyframe.rendition)
            run.live_since_ns = run.live_since_ns or time.monotonic_ns()

    def _on_record(self, _peer: bytes, record: Record) -> None:
        run = self._registry.ask_record(record.stream, record.mode)
        if run is not None:
            run.record = record.mode
            self._tell_publisher(run, always=True)
            self._is_state_dirty = True

    def _on_stop(self, _peer: bytes, stop: StopStream) -> None:
        run = self._registry.by_name.get(stop.stream)
        if run is not None and run.end is None and run.peer is not None:
            run.stop_asked, self._is_state_dirty = True, True
            self._send_front(run.peer, StopRun(run=run.info.run))

    def _on_cursor(self, cursor: Cursor) -> None:
        run = self._registry.by_run.get(cursor.run)
        if run is None or run.kept is None:
            return
        if cursor.finished and run.kept.is_over:
            run.kept.log.delete()
            run.kept.log.close()
            run.kept, self._is_state_dirty = None, True
            self._forget(run)
            return
        run.kept.on_cursor(cursor.written)
        run.kept.log.release(cursor.synced + 1)
        self._tell_gap(run, run.kept)

    def _forget(self, run: Run) -> None:
        if run.worker is not None and not run.is_alive:
            self._send_inner(run.worker, Forget(run=run.info.run))

    # --- giving work ---

    def _dispatch(self) -> None:
        if self._streamer is None or time.monotonic() - self._streamer_heard_s > STREAMER_GONE_S:
            return  # nobody watches; recordings wait in the log
        free = [worker for worker in self._crew.workers.values() if worker.credits > 0]
        while free:
            candidates = self._candidates()
            given = [worker for worker in free if candidates and self._give_job(worker, candidates)]
            free = [worker for worker in given if worker.credits > 0]

    def _candidates(self) -> list[Candidate]:
        in_flight = sum(run.kept.in_flight_bytes for run in self._registry.by_run.values() if run.kept)
        room = self._config.recording.window_bytes - in_flight
        found: list[Candidate] = []
        for run in self._registry.by_run.values():
            if run.worker is not None and run.worker not in self._crew.workers:
                run.drop_worker()
            mine = run.candidates(self._registry.wanted(run), room)
            room -= sum(one.nbytes for one in mine if one.is_record)
            found += mine
        return found

    def _give_job(self, worker: Worker, candidates: list[Candidate]) -> bool:
        """Give a worker its next job, and take what it got out of `candidates`."""
        decoder = self._config.decoder
        items = next_job(candidates, worker.limits(decoder.max_batch_size, decoder.max_job_s))
        taken = [(item, run, frame) for item in items for run, frame in self._look_up(item)]
        if not taken:
            return False
        job = self._crew.assign(worker, tuple(item for item, _, _ in taken))
        rows = tuple(self._item(item, run, frame) for item, run, frame in taken)
        message = Job(
            job=job,
            latent_format=items[0].group[0],
            items=rows,
            packets_to=self._packets_to,
            payloads=tuple(frame.payload for _, _, frame in taken),
        )
        for item, run, frame in taken:
            self._note_dispatched(item, run, frame, worker)
            candidates.remove(item)
        if not self._send_inner(worker.id, message):
            self._worker_gone(worker.id)
            return False
        return True

    def _look_up(self, item: Candidate) -> list[tuple[Run, LatentFrame]]:
        run = self._registry.by_run.get(item.run)
        frame = run.frame_of(item) if run else None
        return [(run, frame)] if run is not None and frame is not None else []

    def _item(self, item: Candidate, run: Run, frame: LatentFrame) -> JobItem:
        return JobItem(
            stream=run.info.stream,
            run=item.run,
            seq=frame.seq,
            kind=run.info.kind,
            shape=frame.shape,
            dtype=frame.dtype,
            renditions=item.renditions,
            attempt=run.kept.attempt if run.kept and item.is_record else 0,
            keyframe=bool(run.forced),
            pts=run.pts(frame),
            picture_ticks=run.picture_ticks,
            step=frame.step,
            total_steps=frame.total_steps,
            sigma=frame.sigma,
            sent_ns=frame.sent_ns + run.offset_ns,
            received_ns=run.newest_received_ns if run.newest is frame else 0,
        )

    def _note_dispatched(self, item: Candidate, run: Run, frame: LatentFrame, worker: Worker) -> None:
        run.worker = worker.id
        for rendition in item.renditions:
            if rendition != "record":
                run.dispatched[rendition] = frame.seq
        if item.renditions != ("record",):
            run.live_in_flight += 1
            run.forced -= set(item.renditions)
            run.live_since_ns = 0
        if item.is_record and run.kept is not None:
            run.kept.in_flight.append((frame.seq, frame.nbytes))
            run.kept.next_seq = frame.seq + 1
            run.kept.moved_s = time.monotonic()

    # --- telling ---

    def _tell_publisher(self, run: Run, *, always: bool = False) -> None:
        watchers = sum(self._registry.wanted(run).values())
        told = (run.demand(watchers), run.record)
        if run.peer is None or run.end is not None or (told == run.told and not always):
            return
        run.told = told
        demand = DemandUpdate(run=run.info.run, level=told[0], max_fps=self._config.broker.max_fps, record=run.record)
        self._send_front(run.peer, demand)

    def _refuse(self, peer: bytes, info: StreamInfo, code: str, text: str, use: str | None = None) -> None:
        self._counts[f"refused_{code}"] += 1
        if self._counts[f"refused_{code}"] <= MAX_REFUSED_PER_S:
            logger.warning("stream_refused stream=%s code=%s %s", info.stream, code, text)
        self._send_front(peer, Refused(stream=info.stream, run=info.run, code=code, text=text, use=use))

    def _send_front(self, peer: bytes, message: Any) -> bool:
        return _send(self._front, peer, message)

    def _send_inner(self, peer: bytes, message: Any) -> bool:
        return _send(self._inner, peer, message)

    def _logged(self, run: Run) -> int:
        return run.kept.logged if run.kept is not None else -1

    def _log_results(self) -> None:
        for done in self._writer.results():
            run = self._registry.by_run.get(done.log.info.run)
            kept = run.kept if run else None
            if run is None or kept is None or kept.log is not done.log or isinstance(done.message, End):
                continue
            if done.error is not None:
                kept.queued = kept.logged  # not acked: the publisher sends it again
                self._alert("log_error", f"The latent log cannot be written: {done.error}")
                continue
            self._alerts.pop("log_error", None)
            kept.logged = done.message.seq
            if run.peer is not None:
                self._send_front(run.peer, Ack(run=run.info.run, seq=kept.logged))

    def _alert(self, code: str, text: str) -> None:
        if code not in self._alerts:
            logger.error("%s %s", code, text)
            self._is_state_dirty = True
        self._alerts[code] = text

    def _lose(self, run: Run) -> None:
        if run.kept is not None:
            run.kept.is_over = True

    def _tick(self) -> None:
        now = time.monotonic()
        if now < self._next_tick_s:
            return
        self._next_tick_s = now + TICK_S
        for peer in self._crew.gone():
            self._worker_gone(peer)
        lost_after_s = self._config.recording.lost_after_s
        for run in list(self._registry.by_run.values()):
            kept = run.kept
            if kept is None:
                continue
            if run.end is None and now - run.heard_s > lost_after_s:
                kept.is_over = True
            self._tell_gap(run, kept)
            if kept.in_flight and now - kept.moved_s > RECORD_STUCK_S:
                kept.restart(kept.written, kept.attempt + 1)
        for run in self._registry.forget_old():
            self._forget(run)
        if self._log_bytes() < 0.9 * self._log_max_bytes:
            self._alerts.pop("log_full", None)
        self._is_state_dirty = True

    def _send_state(self) -> None:
        now = time.monotonic()
        if self._streamer is None or not self._is_state_dirty or now < self._next_state_s:
            return
        self._is_state_dirty = False
        self._next_state_s = now + STATE_S
        self._send_inner(self._streamer, self._state())

    def _state(self) -> State:
        registry = self._registry
        loads = [
            self._crew.slowest_s_per_frame(run.info.latent_format, run.newest.nbytes) / run.interval_s
            for run in registry.by_run.values()
            if run.newest is not None and run.interval_s and run.state == "live"
        ]
        return State(
            streams=[run.to_state(registry.wanted(run)) for run in registry.by_name.values()],
            runs={run_id: run.to_recording_state() for run_id, run in registry.by_run.items() if run.kept},
            workers=[worker.to_state() for worker in self._crew.workers.values()],
            stats={"counts": dict(self._counts), "alerts": dict(self._alerts), "pid": os.getpid()},
            desired_workers=desired_workers(loads),
            now_ns=time.monotonic_ns(),
        )


def _send(socket: zmq.Socket[bytes], peer: bytes, message: Any) -> bool:
    """Send to one peer of a ROUTER; False when it is gone or takes no more."""
    try:
        socket.send_multipart([peer, *wire.pack(message)], zmq.NOBLOCK, copy=False)
    except zmq.ZMQError as error:
        if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
            return False
        raise
    return True


def _bind(context: zmq.Context[zmq.Socket[bytes]], key: str, address: str) -> zmq.Socket[bytes]:
    try:
        return bind_router(context, address)
    except zmq.ZMQError as error:
        way_out = (
            "another daemon may be running; choose another with --set" if error.errno == zmq.EADDRINUSE else "check"
        )
        raise ConfigError(f"{key} = {address}: {error.strerror}; {way_out} {key}=…") from error


def run_broker(config: Config, lifecycle: Lifecycle) -> None:
    """Run the broker in this thread until it is told to stop. Raises: ConfigError for an address in use."""
    Broker(config, lifecycle).run()
