"""The broker's side of placement: which run is on which worker, and how one moves without losing a picture."""

from __future__ import annotations

import logging
import time
from typing import Final

from taesd_stream.messages import Forget
from taesd_stream.placement import BASE_LOAD, StreamLoad, least_loaded, loads_of, next_move
from taesd_stream.scheduling import Candidate
from taesd_stream_workers.broker.crew import Crew
from taesd_stream_workers.broker.kept_run import KeptRun
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.registry import Registry
from taesd_stream_workers.broker.runs import Run

logger = logging.getLogger(__name__)

SETTLE_S: Final = 10.0  # a run that was moved stays so long
PATIENCE_S: Final = 2.0  # a move waits no longer for a file that does not grow
BACKLOG_FRAMES: Final = 16  # a recording so far behind takes all of a worker that it gets


class Placer:
    """Used in the broker's loop alone."""

    def __init__(self, registry: Registry, crew: Crew, links: Links) -> None:
        self._registry = registry
        self._crew = crew
        self._links = links
        self._loads: dict[bytes, float] = {}

    def settle(self, run: Run) -> bool:
        """See to it that a run has a worker that takes jobs. Returns whether it may be given any now.

        One that moves first waits until nothing of it is under way: what it has been given reaches its file.
        """
        if run.worker is not None and run.worker not in self._crew.workers:
            run.drop_worker()
        if run.worker is None:
            run.worker = least_loaded(self._untried(run) or self._loads)
            if run.worker is not None:
                self._loads[run.worker] += max(BASE_LOAD, self._load(run))
        elif run.moves_to is None and run.worker not in self._loads:
            run.moves_to = least_loaded(self._untried(run) or self._loads)
        if run.moves_to is not None:
            self._go_on(run)
        return run.moves_to is None

    def _go_on(self, run: Run) -> None:
        """Move it, if nothing of it is under way."""
        if run.moves_to not in self._loads:
            run.moves_to = None
        elif not run.items_out and self._is_written(run.kept):
            assert run.worker is not None
            self._links.to_inside(run.worker, Forget(run=run.info.run))
            self._links.counts["streams_moved"] += 1
            run.move()

    def _is_written(self, kept: KeptRun | None) -> bool:
        """Whether what was decoded of a recording is in its file, or does not get there: then it is done again."""
        if kept is None or not kept.in_flight:
            return True
        if time.monotonic() - kept.moved_s < PATIENCE_S:
            return False
        kept.restart(kept.written, kept.attempt)  # the move begins a new attempt
        return True

    def tick(self) -> None:
        """Twice a second, with all runs touched: what every worker has to do, and at most one move."""
        workers = self._takers()
        streams = [one for run in self._registry.by_run.values() if (one := self._stream_load(run)) is not None]
        self._loads = loads_of(streams, workers)
        for run in self._registry.by_run.values():
            if run.kept is not None and run.kept.blocked is not None and self.try_another(run):
                run.kept.blocked = None  # a worker came, or owes no answer any more, that was not asked yet
        move = next_move(streams, workers)
        if move is not None:
            run = self._registry.by_run[move[0]]
            run.moves_to = move[1]
            logger.info("stream_moves stream=%s to=%s", run.info.stream, move[1].decode("ascii", "replace"))
            self._registry.touch(run)

    def workers_changed(self) -> None:
        """One came, and may be given streams at once, or takes no more."""
        self._loads = {worker: self._loads.get(worker, 0.0) for worker in self._takers()}

    def _takers(self) -> list[bytes]:
        """Workers that streams go to: one that owes an answer may hang, and is taken only where there is no other."""
        staying = [worker for worker in self._crew.workers.values() if not worker.hello.draining]
        return [worker.id for worker in staying if not worker.overdue] or [worker.id for worker in staying]

    def try_another(self, run: Run) -> bool:
        """Its worker has no decoder for it. Returns whether it goes to one that has not said so yet."""
        run.moves_to = least_loaded(self._untried(run))
        return run.moves_to is not None

    def _untried(self, run: Run) -> dict[bytes, float]:
        return {worker: load for worker, load in self._loads.items() if worker not in run.refused_by}

    def loads(self) -> list[float]:
        """Every stream's share of one worker: what is watched or kept."""
        return [load for run in self._registry.by_run.values() if (load := self._load(run)) > 0]

    def oldest_wait_s(self, candidates: list[Candidate]) -> float:
        """Of what could be decoded, how long the oldest has waited past its due time."""
        now_ns = time.monotonic_ns()
        return max((now_ns - one.due_ns for one in candidates), default=0) / 1e9

    def _stream_load(self, run: Run) -> StreamLoad | None:
        load = self._load(run)
        if run.worker is None or load <= 0:
            return None
        is_settled = run.moves_to is None and time.monotonic() - run.moved_s > SETTLE_S
        may_move = is_settled and run.refused_by.isdisjoint(self._crew.workers)  # no worker refuses it
        return StreamLoad(run.info.run, run.moves_to or run.worker, load, may_move=may_move)

    def _load(self, run: Run) -> float:
        """Its share of one worker, 0 where nothing of it is decoded."""
        kept = run.kept
        if kept is not None and kept.logged - kept.written > BACKLOG_FRAMES and kept.blocked is None:
            return 1.0
        is_wanted = kept is not None or any(self._registry.wanted(run).values())
        if not is_wanted or run.newest is None or run.state != "live":
            return 0.0
        seconds = self._crew.slowest_s_per_frame(run.info.latent_format, run.newest.nbytes)
        return max(BASE_LOAD, seconds / run.interval_s if run.interval_s else 0.0)
