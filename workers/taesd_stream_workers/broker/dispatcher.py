"""The broker's side to the decode workers: which job goes to whom, and what becomes of the jobs that fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Final

from taesd_stream.config import Config
from taesd_stream.frames import LatentFrame
from taesd_stream.messages import Degraded, Done, Drain, Echo, Failed, Forget, Gap, Job, Progress, WorkerHello
from taesd_stream.scaling import Scaling
from taesd_stream.scheduling import Candidate, first_due, next_job
from taesd_stream_workers.broker.crew import Crew, Worker
from taesd_stream_workers.broker.job_items import job_items_of
from taesd_stream_workers.broker.kept_run import KeptRun
from taesd_stream_workers.broker.links import Links
from taesd_stream_workers.broker.live_latents import LiveLatents
from taesd_stream_workers.broker.placer import Placer
from taesd_stream_workers.broker.registry import Registry
from taesd_stream_workers.broker.runs import Run
from taesd_stream_workers.broker.troubles import MAX_ENCODINGS, MAX_TRIES
from taesd_stream_workers.role.seldom import Seldom

logger = logging.getLogger(__name__)

STREAMER_GONE_S: Final = 3.0
RETRY_S: Final = 1.0
SETTLED_S: Final = 60.0  # so long after a start publishers still come back
LOOK_S: Final = 0.05  # of a turn of the loop, for what recordings read out of their logs


class StreamerLink:
    """The one streamer of this daemon: its id, where packets go, and whether it is there."""

    def __init__(self) -> None:
        self.peer: bytes | None = None
        self.packets_to = ""
        self.heard_s = float("-inf")

    @property
    def is_there(self) -> bool:
        """Without one nobody watches, and recordings wait in the log."""
        return self.peer is not None and time.monotonic() - self.heard_s <= STREAMER_GONE_S


class Dispatcher:
    """Used in the broker's loop alone."""

    def __init__(self, config: Config, registry: Registry, streamer: StreamerLink, links: Links) -> None:
        self._decoder = config.decoder
        self._window_bytes = config.recording.window_bytes
        self._registry = registry
        self._streamer = streamer
        self._links = links
        self._crew = Crew(config.decoder.job_deadline_s, config.decoder.max_batch_size)
        self._placer = Placer(registry, self._crew, links)
        self._scaling = Scaling()
        self._started_s = time.monotonic()
        self._offers: dict[str, list[Candidate]] = {}  # by run: what could be decoded now
        self._in_window: dict[str, int] = {}  # by run: bytes of its recording that are in them, or under way
        self._window_used = 0  # all of it
        self._seldom = Seldom()
        self.is_behind = False  # recordings wait to be looked at: the loop waits for no message first

    # --- what workers say ---

    def on_hello(self, peer: bytes, hello: WorkerHello) -> None:
        """A worker is there; a new one may have the decoder that a recording waits for: the next tick asks it."""
        self._links.to_inside(peer, Echo(echo_ns=hello.echo_ns, now_ns=time.monotonic_ns()))
        if hello.draining and self._drain(peer, hello):
            return
        if self._crew.hello(peer, hello):
            self._worker_lives(self._crew.workers[peer])
            self._placer.workers_changed()
            self._registry.touch_all()
            logger.info("worker_came worker=%s device=%s", _shown(peer), hello.device)
            for run in self._registry.by_run.values():
                run.refused_by.discard(peer)
            self._links.is_changed = True
        for run in self._registry.by_run.values():
            if run.live is not None:
                run.on_memory_told(peer, hello.memories.get(run.info.run))
        for run_id in self._moved_away(peer, hello):
            self._links.to_inside(peer, Forget(run=run_id))

    def _moved_away(self, peer: bytes, hello: WorkerHello) -> list[str]:
        """Runs whose encoders a worker still has, though another one shows them: it was silent when they moved.

        Of a run that is not known, nothing is said while its publisher may still come back to this broker.
        """
        is_settled = time.monotonic() - self._started_s > SETTLED_S
        found: list[str] = []
        for run_id in hello.encoders:
            run = self._registry.by_run.get(run_id)
            is_elsewhere = run is not None and run.worker not in (None, peer)
            if is_elsewhere or (run is None and is_settled):
                found.append(run_id)
        return found

    def _drain(self, peer: bytes, hello: WorkerHello) -> bool:
        """A worker wants to go: no more jobs. Returns whether it holds none any more, and so is let go."""
        worker = self._crew.workers.get(peer)
        if worker is not None:
            worker.hello, worker.heard_s = hello, time.monotonic()
            self._placer.workers_changed()
            self._registry.touch_all()  # its streams move
        mine = [run for run in self._registry.by_run.values() if run.worker == peer]
        if worker is not None and (worker.jobs or any(run.kept and run.kept.in_flight for run in mine)):
            return False
        self._links.to_inside(peer, Drain())
        if self._crew.let_go(peer):
            logger.info("worker_drained worker=%s", _shown(peer))
            for run in mine:
                run.drop_worker()
            self._links.is_changed = True
        return True

    def on_progress(self, peer: bytes, progress: Progress) -> None:
        """A slice of its job is done: the deadline counts from here."""
        self._crew.progress(peer, progress.job)

    def on_done(self, peer: bytes, done: Done) -> None:
        """A job's packets are on their way."""
        held = self._crew.finish(peer, done.job, done.ms)
        for item in held.items if held else ():
            run = self._item_over(item)
            if run is not None:
                run.troubles.succeeded(item.seq)
        for one in done.degraded if held else ():
            self._note_degraded(one)

    def _note_degraded(self, one: Degraded) -> None:
        run = self._registry.by_run.get(one.run)
        if run is None:
            return
        counts = self._links.counts
        counts[f"degraded_{one.code}"] += 1
        if counts[f"degraded_{one.code}"] == 1:
            fields = (run.info.stream, one.code, one.text)
            logger.warning("picture_degraded stream=%s code=%s %s (said once)", *fields)
        run.troubles.say(one.text)
        self._links.is_changed = True

    def on_failed(self, peer: bytes, failed: Failed) -> None:
        """Some items of a job gave no picture, or all of them."""
        held = self._crew.finish(peer, failed.job)
        if held is None:
            return
        for place, item in enumerate(held.items):
            run = self._item_over(item)
            if run is not None and (not failed.items or place in failed.items):
                self._item_failed(run, item, failed, peer)
        self._links.is_changed = True

    def _item_over(self, item: Candidate) -> Run | None:
        run = self._registry.by_run.get(item.run)
        if run is not None:
            run.on_answered(item)
            self._registry.touch(run)
        return run

    def _item_failed(self, run: Run, item: Candidate, failed: Failed, worker: bytes) -> None:
        counts = self._links.counts
        if run.is_late(item) and failed.code != "internal":
            return  # it goes again already
        if failed.code == "no_memory":
            counts["history_resent"] += 1
            run.show_again(item)
            if item.is_record and run.kept is not None:
                run.kept.restart(run.kept.written, run.kept.attempt + 1)
            return
        run.troubles.say(failed.text)
        counts[f"failed_{failed.code}"] += 1
        if counts[f"failed_{failed.code}"] == 1:
            fields = (run.info.stream, item.seq, failed.code, failed.text)
            logger.warning("frame_failed stream=%s seq=%d code=%s %s (said once)", *fields)
        kept = run.kept if item.is_record else None
        is_blocked = failed.code == "no_decoder" and not self._is_elsewhere(run, worker)
        if failed.code == "internal":
            if not self._blame(run, item):
                self._try_again(run, item)
        elif kept is None:
            if failed.code == "bad_frame" and run.live is not None:
                run.troubles.failed(item.seq, MAX_TRIES)
                run.show_again(item)  # what follows it, for the worker has stopped there
        elif failed.code == "no_decoder":
            kept.blocked = failed.text if is_blocked else None  # the frames stay in the log
            kept.restart(kept.written, kept.attempt + 1)
        elif failed.retry and (failed.code != "not_encoded" or run.troubles.not_encoded(item.seq) < MAX_ENCODINGS):
            kept.restart(kept.written, kept.attempt + 1)
            kept.not_before_s = time.monotonic() + RETRY_S  # memory comes back: a recording waits for it
        else:
            self._pass_gap(run, kept, item.seq, failed.code)

    def _is_elsewhere(self, run: Run, worker: bytes) -> bool:
        """A worker has no decoder for a run. Returns whether another one is asked."""
        run.refused_by.add(worker)
        return run.worker != worker or self._placer.try_another(run)

    def _blame(self, run: Run, item: Candidate) -> bool:
        """A frame ended a job. Returns whether it ended two: then it is poison, and nobody gets it any more."""
        is_poison = run.troubles.failed(item.seq) >= MAX_TRIES
        if is_poison:
            self._links.counts["frames_poisoned"] += 1
            run.troubles.say(f"frame {item.seq} ended {MAX_TRIES} decode jobs and is left out")
            if item.is_record and run.kept is not None:
                self._pass_gap(run, run.kept, item.seq, "poison")
        return is_poison

    def _try_again(self, run: Run, item: Candidate) -> None:
        if run.live is not None:
            run.show_again(item)
        if item.is_record and run.kept is not None:
            run.kept.restart(run.kept.written, run.kept.attempt + 1)

    def _pass_gap(self, run: Run, kept: KeptRun, seq: int, code: str) -> None:
        self._links.counts["gaps"] += 1
        if self._seldom.may_say((run.info.run, code)):  # the file names them all
            logger.warning("frame_not_recorded stream=%s seq=%d code=%s (once a minute)", run.info.stream, seq, code)
        kept.pass_gap(seq)
        self.tell_gap(run, kept)

    def tell_gap(self, run: Run, kept: KeptRun) -> None:
        """Let the file pass its next frame, if that is a gap; said again at each tick until the cursor moves."""
        if kept.due_gap is not None and self._streamer.peer is not None:
            gap = Gap(run=run.info.run, seq=kept.due_gap, attempt=kept.attempt, code="no_picture")
            self._links.to_inside(self._streamer.peer, gap)

    def forget(self, run: Run) -> None:
        """Its worker may drop the encoders of a run that is over."""
        if run.worker is not None and not run.is_alive:
            self._links.to_inside(run.worker, Forget(run=run.info.run))

    def was_away(self, away_s: float) -> None:
        """The broker itself stood still for so long."""
        self._crew.was_away(away_s)
        self._streamer.heard_s += away_s

    def tick(self) -> None:
        """Twice a second: workers that are gone, recordings that stand still."""
        for peer in self._crew.gone():
            self._worker_gone(peer)
        for worker in self._crew.dead():
            self._worker_died(worker)
        self._placer.tick()
        wait_s = self._placer.oldest_wait_s([one for offer in self._offers.values() for one in offer])
        self._scaling.update(time.monotonic(), self._placer.loads(), wait_s, len(self._crew.workers))
        for run in self._registry.by_run.values():
            self._links.is_changed |= run.troubles.drop_old_note()
            kept = run.kept
            if kept is None:
                continue
            self.tell_gap(run, kept)
            if kept.is_stuck:
                kept.try_again()
            elif kept.is_damaged:
                self._pass_gap(run, kept, kept.next_seq, "log_damaged")

    def _worker_gone(self, peer: bytes) -> None:
        """It is silent, or late with a job: all that it has goes to others, what it has at hand alone."""
        worker = self._crew.remove(peer)
        if worker is None:
            return
        self._placer.workers_changed()
        self._registry.touch_all()
        logger.warning("worker_gone worker=%s jobs=%d", _shown(peer), len(worker.overdue))
        self._links.counts["workers_gone"] += 1
        for run in self._registry.by_run.values():
            if run.worker == peer:
                run.drop_worker()
        for item in [item for job in worker.at_hand() for item in job.items]:
            owner = self._registry.by_run.get(item.run)
            if owner is not None:
                owner.troubles.failed(item.seq, 0)
        self._links.is_changed = True

    def _worker_died(self, worker: Worker) -> None:
        """It did not come back: what it had at hand may be why, unless another could do it."""
        for item in worker.died_of or ():
            run = self._registry.by_run.get(item.run)
            if run is not None and item.seq in run.troubles.failures:
                self._blame(run, item)

    def _worker_lives(self, worker: Worker) -> None:
        """One that was taken for dead is back: it had been stopped, or cut off, and no frame is to blame for that."""
        for item in worker.died_of or ():
            run = self._registry.by_run.get(item.run)
            if run is not None:
                run.troubles.absolve(item.seq)
        worker.died_of = None

    # --- giving work ---

    def give_jobs(self) -> None:
        """Give every worker that has credit the job that is due."""
        self.is_behind = False
        if not self._streamer.is_there:
            return
        until_s = time.monotonic() + LOOK_S
        free = [worker for worker in self._crew.workers.values() if worker.credits > 0]
        while free:
            candidates = self._candidates(until_s)
            given = [worker for worker in free if candidates and self._give_job(worker, candidates)]
            free = [worker for worker in given if worker.credits > 0]

    def _candidates(self, until_s: float) -> list[Candidate]:
        """What could be decoded now; only of runs that were touched it is found out anew.

        What is offered is read from the logs already: it counts in the window, as what is under way does. After
        `until_s` no log is read: a disk that takes long must not hold up acks, and the recordings left are first next.
        """
        runs = self._registry.by_run
        touched, self._registry.touched = self._registry.touched, {}
        for run_id, run in touched.items():
            self._offers.pop(run_id, None)
            self._hold(run, [])
        for run_id, run in touched.items():
            if run.kept is not None and time.monotonic() > until_s:
                self._registry.touch(run)
                self.is_behind = True
                continue
            offer = self._offer(run, self._window_bytes - self._window_used) if run_id in runs else []
            if run.kept is not None and not any(one.is_record for one in offer):
                run.kept.let_go()
            if run_id in runs and run.is_being_logged:
                self._registry.touch(run)  # a disk that takes long holds up no viewer: it is looked at again soon
            if offer:
                self._offers[run_id] = offer
            self._hold(run, offer)
        return [one for offer in self._offers.values() for one in offer]

    def _hold(self, run: Run, offer: Sequence[Candidate]) -> None:
        """Count in the window what of a run is under way into its file, or offered."""
        under_way = run.kept.in_flight_bytes if run.kept is not None else 0
        nbytes = under_way + sum(one.nbytes for one in offer if one.is_record)
        self._window_used += nbytes - self._in_window.pop(run.info.run, 0)
        if nbytes:
            self._in_window[run.info.run] = nbytes

    def _offer(self, run: Run, room: int) -> list[Candidate]:
        if run.live is not None:
            self._find_memory(run, run.live)
        if not self._placer.settle(run):
            return []
        return run.candidates(self._registry.wanted(run), room)

    def _find_memory(self, run: Run, live: LiveLatents) -> None:
        """Of a run that this broker has given to nobody yet, a worker may know from the time of a former one."""
        live.history = self._crew.history(run.info.latent_format)
        for worker in self._crew.workers.values() if run.worker is None else ():
            run.on_memory_told(worker.id, worker.hello.memories.get(run.info.run))

    def _give_job(self, worker: Worker, candidates: list[Candidate]) -> bool:
        """Give a worker its next job; the runs in it leave `candidates`, for they belong to that worker now."""
        offered = worker.takes_beside(candidates)
        first = first_due(offered, worker.id)
        if first is None:
            return False
        limits = worker.limits(first.group, self._decoder.max_batch_size, self._decoder.max_job_s)
        items = next_job(offered, limits)
        taken = [(item, run, frame) for item in items for run, frame in self._look_up(item)]
        if not taken:
            self._registry.touch_all()
            return False
        job_items, payloads = job_items_of(taken, worker.id)
        number = self._crew.assign(worker, tuple(item for item, _, _ in taken))
        message = Job(
            job=number,
            latent_format=first.group[0],
            items=job_items,
            packets_to=self._streamer.packets_to,
            payloads=payloads,
        )
        for item, run, frame in taken:
            run.on_dispatched(item, frame, worker.id)
            self._registry.touch(run)
        given = {item.run for item in items}
        candidates[:] = [one for one in candidates if one.run not in given]
        if not self._links.to_inside(worker.id, message):
            del worker.jobs[number]  # it never got it: its frames are not to blame
            self._worker_gone(worker.id)
            return False
        return True

    def _look_up(self, item: Candidate) -> list[tuple[Run, LatentFrame]]:
        run = self._registry.by_run.get(item.run)
        frame = run.frame_of(item) if run else None
        return [(run, frame)] if run is not None and frame is not None else []

    # --- what people see ---

    def workers_state(self) -> list[dict[str, object]]:
        """The workers' rows of STATE."""
        return [worker.to_state() for worker in self._crew.workers.values()]

    @property
    def desired_workers(self) -> int:
        """How many workers the offered load needs."""
        return self._scaling.desired


def _shown(peer: bytes) -> str:
    return peer.decode("ascii", "replace")
