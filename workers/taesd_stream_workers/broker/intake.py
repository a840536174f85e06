"""The broker's side to the samplers: who may open a stream, where each frame goes, what is acked and what is asked."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from typing import Any, Final

from taesd_stream.config import Config
from taesd_stream.frames import Kind, LatentFrame, StreamInfo
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.messages import Ack, DemandUpdate, Echo, End, PublisherHello, Refused, RefusedPeer, RunHello, StopRun
from taesd_stream_workers.broker.kept_run import KeptRun
from taesd_stream_workers.broker.limits import Limits
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.log_writer import LogWriter
from taesd_stream_workers.broker.registry import MAX_META_BYTES, Registry
from taesd_stream_workers.broker.runs import Run, meta_bytes

logger = logging.getLogger(__name__)

LOG_ROOM_AGAIN: Final = 0.9  # of the log's bytes: under it, the alert goes
RANKS: Final[dict[Kind, tuple[int, ...]]] = {"steps": (3, 4), "clip": (4,), "live": (3, 4)}  # axes of a frame
MAX_REFUSALS_LOGGED: Final = 100  # of one kind


class Intake:
    """Used in the broker's loop alone; the log's writes happen in the writer's thread."""

    def __init__(self, config: Config, registry: Registry, writer: LogWriter, links: Links) -> None:
        self._config = config
        self.limits = Limits(config.broker)
        self._registry = registry
        self._writer = writer
        self._links = links
        self._log_max_bytes = config.broker.log_max_bytes
        self._log_bytes = 0  # counted anew at each tick

    def open(self) -> None:
        """Find out how much the log holds, and may hold."""
        self._log_bytes = self._registry.log_bytes
        if not self._log_max_bytes:  # what it holds was free once: the bound is the same after each start
            free = shutil.disk_usage(self._registry.log_folder).free
            self._log_max_bytes = (free + self._log_bytes) // 2

    def take(self, peer: bytes, client: str, message: Any) -> None:
        """One message of a publisher. client: whose it is, as Door.client_of says."""
        owner = client if self._links.front.has_keys else None
        if isinstance(message, LatentFrame):
            self.route(peer, owner, message)
        elif isinstance(message, PublisherHello):
            self._on_hello(peer, client, owner, message)
        elif isinstance(message, StreamInfo):
            self._on_open(peer, client, dataclasses.replace(message, owner=owner))
        elif isinstance(message, End):
            self._on_end(peer, owner, message)

    def refuse(self, peer: bytes, message: Any, why: RefusedPeer) -> None:
        """Nothing of this message is taken, and its sender is told."""
        for run_id in message.runs if isinstance(message, PublisherHello) else [message.run]:
            self._links.to_publisher(peer, Refused(stream="unknown", run=run_id, code=why.code, text=why.text))

    def route(self, peer: bytes, owner: str | None, frame: LatentFrame) -> None:
        """FRAME: the newest of its stream, and, where it is kept, into the log. When full: kept ones get no ack."""
        received_ns = time.monotonic_ns()
        run = self._registry.by_run.get(frame.run)
        if run is None or run.end is not None:
            return self._unknown_run(peer, frame.run)
        if self._is_foreign(run, owner):
            return None
        run.heard_s = time.monotonic()
        run.peer = peer
        if not self._is_shape_right(run, frame) or not self._has_room(run, frame):
            return None
        if frame.kept:
            self._keep(run, frame)
        self._show(run, frame, received_ns)
        self._registry.touch(run)
        self._links.is_changed = True
        return None

    def _has_room(self, run: Run, frame: LatentFrame) -> bool:
        """Whether its bytes may take the place of the stream's newest frame, of `live` behind it; else refused."""
        if run.newest is not None and frame.seq <= run.newest.seq:
            return True  # one that was sent again takes no place
        text = self._memory_refusal(run, frame)
        if text is not None and run.live is not None:  # its history gives way: a late viewer's colours are approximate
            run.live.forget_history()
            text = self._memory_refusal(run, frame)
        if text is not None and run.peer is not None:
            self._refuse(run.peer, run.info, "limit", text)
        return text is None

    def _memory_refusal(self, run: Run, frame: LatentFrame) -> str | None:
        newest = run.newest
        is_history = newest is not None and run.live is not None and run.live.get(newest.seq) is not None
        replaced_bytes = newest.nbytes if newest is not None and not is_history else 0
        more_bytes = run.held_bytes - run.counted_bytes + frame.nbytes - replaced_bytes
        return self.limits.memory_refusal(run.client, more_bytes) if more_bytes > 0 else None

    def _show(self, run: Run, frame: LatentFrame, received_ns: int) -> None:
        """For viewers: of `live` latents that come faster than they are decoded the oldest go, as one cut."""
        share_bytes = self._registry.live_share_bytes if run.live is not None else 0
        is_watched = any(self._registry.wanted(run).values())
        if is_watched and run.live is None and run.is_newer(frame):
            self._links.counts["live_frames"] += 1
            self._links.counts["live_replaced"] += run.is_newest_waiting
        cut = run.take(frame, received_ns, is_watched=is_watched, share_bytes=share_bytes)
        self.limits.holds(run)
        if not cut:
            return
        if not self._links.counts["latents_cut"]:
            logger.warning(
                "latents_cut stream=%s latents=%d reason=decoders too slow (said once)", run.info.stream, cut
            )
        self._links.counts["latents_cut"] += cut
        run.say(f"Too slow: {cut} latents were left out.")

    def tell(self, run: Run, *, always: bool = False) -> None:
        """DEMAND: who wants this run, and what is kept; only when that changed, or `always`."""
        watchers = sum(self._registry.wanted(run).values())
        told = (run.demand(watchers), run.record)
        if run.peer is None or run.end is not None or (told == run.told and not always):
            return
        run.told = told
        asked = self._config.broker
        max_fps = 1 / asked.idle_interval_s if told[0] == "idle" else asked.max_fps
        demand = DemandUpdate(run=run.info.run, level=told[0], max_fps=max_fps, record=run.record)
        self._links.to_publisher(run.peer, demand)

    def stop(self, run: Run) -> None:
        """A person pressed stop; said again at each HELLO until the run ends."""
        if run.end is None and run.peer is not None:
            run.stop_asked = self._links.is_changed = True
            self._links.to_publisher(run.peer, StopRun(run=run.info.run))

    def ack_written(self) -> None:
        """ACK what the log has since the last call; what it could not take is not acked, and so sent again."""
        for done in self._writer.results():
            run = self._registry.by_run.get(done.log.info.run)
            if run is None:
                continue
            kept = run.kept if run.kept is not None and run.kept.log is done.log else None
            if isinstance(done.message, End):
                self._end_written(run, kept, done.error)
            elif kept is not None:
                self._frame_written(run, kept, done.message.seq, done.error)

    def _frame_written(self, run: Run, kept: KeptRun, seq: int, error: str | None) -> None:
        if error is not None and seq != kept.logged + 1:
            return  # it only followed one that failed, which was sent again since
        kept.error = error
        if error is not None:
            kept.queued = kept.logged
            self._say_error(error)
            return
        kept.logged = seq
        if kept.front is not None and kept.front.seq <= seq:
            kept.front = None
        self._registry.touch(run)
        if run.peer is not None:
            self._links.to_publisher(run.peer, Ack(run=run.info.run, seq=seq))

    def _end_written(self, run: Run, kept: KeptRun | None, error: str | None) -> None:
        if kept is None or error is None:
            self._ack_end(run)
        else:
            kept.is_end_queued, kept.error = False, error  # it is tried again
            self._say_error(error)

    def _say_error(self, error: str) -> None:
        self._links.counts["log_errors"] += 1
        self._links.alert("log_error", f"The latent log cannot be written: {error}")

    def tick(self) -> None:
        """Twice a second: what is over, what waits for a disk, and how much is held."""
        now = time.monotonic()
        for run in self._registry.by_run.values():
            is_lost = run.end is None and now - run.heard_s > self._config.recording.lost_after_s
            if is_lost and run.kept is None and run.record == "last":
                self._keep_newest(run)
            kept = run.kept
            if kept is None:
                continue
            kept.is_over |= is_lost
            if self._log_end(run) and kept.is_over:
                kept.error = None  # it waits for no disk
            if kept.is_over and kept.is_empty:
                self._forget_log(run)  # there is nothing to record
        self._say_of_disk()
        self.limits.recount(self._registry.by_run.values())
        self._drop_old_logs()
        self._log_bytes = self._registry.log_bytes
        if self._log_bytes < LOG_ROOM_AGAIN * self._log_max_bytes:
            self._links.resolve("log_full")

    def _say_of_disk(self) -> None:
        kept_runs = [run.kept for run in self._registry.by_run.values() if run.kept is not None]
        if not any(kept.error for kept in kept_runs):
            self._links.resolve("log_error")
        unreadable = next((kept.unreadable for kept in kept_runs if kept.unreadable), None)
        if unreadable is None:
            self._links.resolve("log_unreadable")
        else:
            self._links.alert("log_unreadable", f"The latent log cannot be read, recordings wait: {unreadable}")

    def _log_end(self, run: Run) -> bool:
        """Whether the END of a run is in its log, or need not be; else it goes there, again where the disk was full."""
        kept = run.kept
        if run.end is None or kept is None or kept.is_empty or kept.log.ended is not None:
            return True
        if not kept.is_end_queued:
            kept.is_end_queued = self._writer.submit(kept.log, run.end)
        return False

    def _forget_log(self, run: Run) -> None:
        self._writer.delete(run.finish_keeping())
        self._registry.touch(run)
        self._links.is_changed = True

    def _drop_old_logs(self) -> None:
        """What nobody could record for `broker.log_max_age_s` goes; never without that key."""
        max_age_s = self._config.broker.log_max_age_s
        if not max_age_s:
            return
        for run in self._registry.by_run.values():
            if run.kept is None or not run.kept.is_over or time.time() - run.kept.log.changed_unix < max_age_s:
                continue
            logger.error("log_expired stream=%s run=%s frames=%d", run.info.stream, run.info.run, run.frames_behind)
            self._links.counts["logs_expired"] += 1
            self._forget_log(run)

    # --- opening and ending ---

    def _on_open(self, peer: bytes, client: str, info: StreamInfo) -> None:
        known = self._registry.by_run.get(info.run)
        if known is not None:
            if self._is_foreign(known, info.owner):
                return self._refuse_foreign(peer, known)
            known.peer, known.client, known.heard_s = peer, client, time.monotonic()
            if known.is_reopened:  # the last word on keeping was said to a former broker
                known.is_reopened = False
                known.record = info.record or self._config.recording.default
                holder = self._registry.by_name.get(known.info.stream)
                if holder is None or not self._holds_name(holder, info.owner):
                    self._registry.add(known)
            return self.tell(known, always=True)
        holder = self._registry.by_name.get(info.stream)
        if holder is not None and self._holds_name(holder, info.owner):
            use = self._registry.free_name(info.stream, lambda run: self._holds_name(run, info.owner))
            text = f"{info.stream}: another run of that name lives; {use} is free"
            return self._refuse(peer, info, "taken", text, use=use)
        if self._registry.living_meta_bytes + meta_bytes(info) > MAX_META_BYTES:
            text = f"what living runs say of themselves (meta) is over {MAX_META_BYTES} bytes; say less, or end some"
            return self._refuse(peer, info, "limit", text)
        if (over := self.limits.stream_refusal(client)) is not None:
            return self._refuse(peer, info, "limit", over)
        if holder is not None and holder.end is None and holder.kept is not None:
            holder.kept.is_over = True
        film = self._config.rule_of(info.stream).film or self._config.recording.film
        run = Run(info, peer=peer, record=self._registry.record_mode(info), film=film)
        run.client = client
        self._registry.add(run)
        self.limits.opened(client)
        logger.info("stream_opened stream=%s run=%s record=%s", info.stream, info.run, run.record)
        self._links.is_changed = True
        return self.tell(run, always=True)

    def _holds_name(self, run: Run, owner: str | None) -> bool:
        """Whether a run keeps its name from a new one: from other keys also while its publisher is lost."""
        if run.info.owner not in (None, owner):
            return run.end is None and time.monotonic() - run.heard_s <= self._config.recording.lost_after_s
        return run.is_alive and self._is_peer_there(run)

    def _is_foreign(self, run: Run, owner: str | None) -> bool:
        """Whether a run was opened by another key: nobody takes over a run by knowing its id."""
        if owner is None or run.info.owner == owner:
            return False
        if run.info.owner is None:  # it was opened before keys were asked for
            run.info = dataclasses.replace(run.info, owner=owner)
            return False
        self._links.counts["refused_foreign"] += 1
        return True

    def _refuse_foreign(self, peer: bytes, run: Run) -> None:
        self._refuse(peer, run.info, "key", f"{run.info.stream}: this run was opened by another key")

    def _is_peer_there(self, run: Run) -> bool:
        """Whether the publisher's connection still stands: one that was killed is found out by sending to it."""
        ack = Ack(run=run.info.run, seq=_logged(run))
        return run.peer is not None and self._links.to_publisher(run.peer, ack)

    def _on_end(self, peer: bytes, owner: str | None, end: End) -> None:
        run = self._registry.by_run.get(end.run)
        if run is None:
            return self._unknown_run(peer, end.run)
        if self._is_foreign(run, owner):
            return None
        run.peer = peer
        if run.end is None:
            run.end, run.ended_unix = end, time.time()
            logger.info("stream_ended stream=%s run=%s reason=%s", run.info.stream, end.run, end.reason)
            if run.kept is not None:
                run.kept.is_over = True
        self._links.is_changed = True
        if self._log_end(run):  # else it is acked when it is there: a broker that dies then knows of it
            self._ack_end(run)
        return None

    def _ack_end(self, run: Run) -> None:
        if run.peer is not None:
            self._links.to_publisher(run.peer, Ack(run=run.info.run, seq=_logged(run), ended=True))

    def _on_hello(self, peer: bytes, client: str, owner: str | None, hello: PublisherHello) -> None:
        self._links.to_publisher(peer, Echo(echo_ns=hello.echo_ns, now_ns=time.monotonic_ns()))
        for run_id, row in hello.runs.items():
            run = self._registry.by_run.get(run_id)
            if run is None:
                self._unknown_run(peer, run_id)
                continue
            if self._is_foreign(run, owner):
                self._refuse_foreign(peer, run)
                continue
            run.peer, run.client, run.heard_s, run.offset_ns = peer, client, time.monotonic(), hello.offset_ns
            if run.is_reopened:  # its log does not tell what a person said last: OPEN does
                self._unknown_run(peer, run_id)
                continue
            run.unacked_from = row.kept_from
            if run.is_stoppable != row.stoppable:
                run.is_stoppable, self._links.is_changed = row.stoppable, True
            if run.kept is not None and not run.kept.is_over and _ends_keeping(run, run.kept, row):
                run.kept.is_over = self._links.is_changed = True
            self._links.to_publisher(peer, Ack(run=run_id, seq=_logged(run)))
            self.tell(run, always=True)
            if run.stop_asked:
                self._links.to_publisher(peer, StopRun(run=run_id))

    def _unknown_run(self, peer: bytes, run_id: str) -> None:
        self._links.counts["unknown_runs"] += 1
        refused = Refused(stream="unknown", run=run_id, code="unknown_run", text="open it first")
        self._links.to_publisher(peer, refused)

    def _refuse(self, peer: bytes, info: StreamInfo, code: str, text: str, use: str | None = None) -> None:
        counts = self._links.counts
        counts[f"refused_{code}"] += 1
        if counts[f"refused_{code}"] <= MAX_REFUSALS_LOGGED:
            logger.warning("stream_refused stream=%s code=%s %s", info.stream, code, text)
        self._links.to_publisher(peer, Refused(stream=info.stream, run=info.run, code=code, text=text, use=use))

    # --- frames ---

    def _is_shape_right(self, run: Run, frame: LatentFrame) -> bool:
        latent_format = LATENT_FORMATS.get(run.info.latent_format)
        try:
            if latent_format is not None:
                latent_format.check_shape(run.info.kind, frame.shape)
            elif len(frame.shape) not in RANKS[run.info.kind]:  # a format of a user's own: the worker knows it
                expected = " or ".join(str(rank) for rank in RANKS[run.info.kind])
                raise ValueError(f"{run.info.kind}: expected latents of {expected} axes, got {frame.shape}")
        except ValueError as error:
            self._links.counts["bad_shapes"] += 1
            run.faults += 1
            run.say(str(error))
            if run.faults == 1 and run.peer is not None:
                self._refuse(run.peer, run.info, "format", str(error))
            return False
        return True

    def _keep(self, run: Run, frame: LatentFrame) -> None:
        kept = run.kept
        if kept is None and (frame.seq <= run.recorded_until or _is_behind_a_lost_one(run, frame)):
            return  # HELLO's ACK says that it is in a file already, or that one before it is missing
        if kept is None:
            kept = self._begin_keeping(run, frame)
        for one in (kept.front, frame) if not kept.is_over else ():  # else its recording is being finished
            if one is not None and one.seq == kept.queued + 1:  # else it is there already, or one before it is not
                self._log(kept, one)

    def _log(self, kept: KeptRun, frame: LatentFrame) -> None:
        if self._log_bytes > self._log_max_bytes:
            text = "The latent log is full: recordings wait. Free space or raise broker.log_max_bytes."
            self._links.alert("log_full", text)
        elif self._writer.submit(kept.log, frame):
            kept.queued = frame.seq
            self._log_bytes += frame.nbytes

    def _keep_newest(self, run: Run) -> None:
        """A run of which only the last frame was to be kept is lost: its last one is the newest that is here."""
        newest = run.newest
        if newest is not None and newest.seq > run.recorded_until:
            kept = self._registry.keep_log(run, newest.seq)
            kept.front = newest
            self._log(kept, newest)

    def _begin_keeping(self, run: Run, frame: LatentFrame) -> KeptRun:
        """Keep from this frame on, or from the newest one we hold if it is the one before (PROTOCOL 2)."""
        newest = run.newest
        follows = newest is not None and newest.seq == frame.seq - 1 and newest.shape == frame.shape
        if newest is None or not follows or newest.kept or run.record != "all":
            return self._registry.keep_log(run, frame.seq)
        kept = self._registry.keep_log(run, newest.seq)
        kept.front = newest
        return kept


def _ends_keeping(run: Run, kept: KeptRun, row: RunHello) -> bool:
    """Whether nothing more comes for this recording: keeping is off, or was, and began again behind a hole."""
    if row.kept_from is None:
        return run.record != "all"
    return row.kept_from > kept.held_until + 1


def _is_behind_a_lost_one(run: Run, frame: LatentFrame) -> bool:
    """Whether an earlier kept frame did not come in: to begin here would ack it. Both are sent again."""
    return run.unacked_from is not None and frame.seq > max(run.unacked_from, run.recorded_until + 1)


def _logged(run: Run) -> int:
    return run.kept.logged if run.kept is not None else run.recorded_until
