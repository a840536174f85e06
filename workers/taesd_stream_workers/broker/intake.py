"""The broker's side to the samplers: who may open a stream, where each frame goes, what is asked of them."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from typing import Any, Final

from taesd_stream.config import Config
from taesd_stream.frames import Kind, LatentFrame, StreamInfo
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.messages import Ack, DemandUpdate, Echo, End, PublisherHello, Refused, RefusedPeer, StopRun
from taesd_stream_workers.broker.keeping import Keeping, ends_keeping, logged_seq
from taesd_stream_workers.broker.limits import Limits
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.registry import MAX_META_BYTES, Registry
from taesd_stream_workers.broker.runs import Run, meta_bytes

logger = logging.getLogger(__name__)

RANKS: Final[dict[Kind, tuple[int, ...]]] = {"steps": (3, 4), "clip": (4,), "live": (3, 4)}  # axes of a frame
USUAL_FACTOR: Final = 8  # pixels a cell
MAX_REFUSALS_LOGGED: Final = 100  # of one kind


class Intake:
    """Used in the broker's loop alone."""

    def __init__(self, config: Config, registry: Registry, keeping: Keeping, links: Links) -> None:
        self._config = config
        self.limits = Limits(config.broker)
        self._registry = registry
        self._keeping = keeping
        self._links = links

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
            self._keeping.keep(run, frame)
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
        run.troubles.say(f"Too slow: {cut} latents were left out.")

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
        ack = Ack(run=run.info.run, seq=logged_seq(run))
        return run.peer is not None and self._links.to_publisher(run.peer, ack)

    def _on_end(self, peer: bytes, owner: str | None, end: End) -> None:
        run = self._registry.by_run.get(end.run)
        if run is None:
            return self._unknown_run(peer, end.run)
        if self._is_foreign(run, owner):
            return None
        run.peer = peer
        if run.end is None:
            if run.is_alive:
                self.limits.ended(run.client)
            run.end, run.ended_unix = end, time.time()
            logger.info("stream_ended stream=%s run=%s reason=%s", run.info.stream, end.run, end.reason)
            if run.kept is not None:
                run.kept.is_over = True
        self._links.is_changed = True
        if self._keeping.log_end(run):  # else it is acked when it is there: a broker that dies then knows of it
            self._keeping.ack_end(run)
        return None

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
            if run.kept is not None and not run.kept.is_over and ends_keeping(run, run.kept, row):
                run.kept.is_over = self._links.is_changed = True
            self._links.to_publisher(peer, Ack(run=run_id, seq=logged_seq(run)))
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
        try:
            self._check_shape(run.info, frame.shape)
        except ValueError as error:
            self._links.counts["bad_shapes"] += 1
            run.faults += 1
            run.troubles.say(str(error))
            if run.faults == 1 and run.peer is not None:
                self._refuse(run.peer, run.info, "format", str(error))
            return False
        return True

    def _check_shape(self, info: StreamInfo, shape: Sequence[int]) -> None:
        """Raises: ValueError that says what is wrong."""
        known = LATENT_FORMATS.get(info.latent_format)
        if known is not None:
            count, _, height, width = known.check_shape(info.kind, tuple(shape))
            height, width = known.picture_size(height, width)
        elif len(shape) not in RANKS[info.kind]:
            expected = " or ".join(str(rank) for rank in RANKS[info.kind])
            raise ValueError(f"{info.kind}: expected latents of {expected} axes, got {shape}")
        else:  # a format of a user's own: the worker knows it
            count, height, width = math.prod(shape[:-3]), USUAL_FACTOR * shape[-2], USUAL_FACTOR * shape[-1]
        pictures, most_px = count if info.kind == "steps" else 1, self._config.broker.max_picture_px
        if pictures * height * width > most_px:
            size = f"{pictures} of {width}x{height} px" if pictures > 1 else f"{width}x{height} px"
            raise ValueError(f"a picture of {size}: broker.max_picture_px = {most_px} allows no more")
