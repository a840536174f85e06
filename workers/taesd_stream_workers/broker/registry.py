"""All runs that the broker knows, by name and by run; who may take a name; what is remembered of the ended ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from taesd_stream.config import Config
from taesd_stream.frames import RecordMode, Rendition, StreamInfo
from taesd_stream.latent_log import RunLog, runs_in
from taesd_stream_workers.broker.kept_run import KeptRun
from taesd_stream_workers.broker.runs import Run

logger = logging.getLogger(__name__)

ENDED_RUNS: Final = 64
ENDED_BYTES: Final = 256 << 20
ENDED_AT_ONCE: Final = 8  # recordings of ended runs, oldest first, that go on also where the window is full
PENDING_RECORD_S: Final = 3600.0
MAX_PENDING: Final = 1000  # names that wait for a run to record
MAX_META_BYTES: Final = 5 << 20  # of living runs: STATE tells it to the streamer, twice where a run is kept
FORMER: Final = "(of a former broker)"  # no client's: it has brackets
LIVE_BYTES: Final = 256 << 20  # of latents of `live` runs that wait for a worker, all runs together


class Registry:
    """The broker's runs. A name means its newest run; older ones stay while their recording is not finished."""

    def __init__(self, config: Config, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self.by_run: dict[str, Run] = {}
        self.by_name: dict[str, Run] = {}
        self.viewers: dict[str, dict[Rendition, int]] = {}
        self.touched: dict[str, Run] = {}  # what of them could be decoded may have changed
        self._live_runs = 0  # counted anew at each tick
        self._pending_record: dict[str, tuple[RecordMode, float]] = {}
        self._config = config
        self.log_folder = config.log_folder

    def load_logs(self, goes_on: Callable[[], None]) -> None:
        """Know again the kept runs that a former broker left. goes_on: called after each."""
        logs: list[RunLog] = []
        for run_id in runs_in(self.log_folder):
            try:
                log = RunLog.reopen(self.log_folder, run_id)
            except OSError as error:
                logger.error("log_not_read run=%s error=%s (its files stay)", run_id, error)
                log = None
            logs += [log] if log is not None else []
            goes_on()
        # of one name's runs the newest was written to last: when it came, nothing more was kept of the one before
        held = 0
        runs = [_known_again(log) for log in sorted(logs, key=lambda one: (one.changed_unix, one.ended is None))]
        for run in runs:
            self.add(run)
        for run, kept in [(run, run.kept) for run in reversed(runs[-ENDED_RUNS:]) if run.kept is not None]:
            held += kept.log.size_of(kept.logged)
            run.newest = kept.read(kept.logged) if held <= ENDED_BYTES else None

    def add(self, run: Run) -> None:
        """Know a run; it becomes what its name means."""
        self.by_run[run.info.run] = self.by_name[run.info.stream] = run
        self._live_runs += run.live is not None
        self.touch(run)

    def touch(self, run: Run) -> None:
        """What of it could be decoded may have changed."""
        self.touched[run.info.run] = run

    def touch_all(self) -> None:
        """It may have of every run."""
        self.touched.update(self.by_run)

    def record_mode(self, info: StreamInfo) -> RecordMode:
        """What is kept of a new run: a waiting RECORD for its name, then a rule, then its own word, then the default.

        A person's word beats a program's, and of two persons' the later one.
        """
        pending = self._pending_record.pop(info.stream, None)
        if pending is not None and self._clock_s() < pending[1]:
            return pending[0]
        return self._config.rule_of(info.stream).record or info.record or self._config.recording.default

    def ask_record(self, stream: str, mode: RecordMode) -> Run | None:
        """The living run that a RECORD means; None: it waits for the name's next run."""
        run = self.by_name.get(stream)
        if run is None or not run.is_alive:  # a lost one may come back, or be run again
            self._pending_record.pop(stream, None)
            self._pending_record[stream] = (mode, self._clock_s() + PENDING_RECORD_S)
            if len(self._pending_record) > MAX_PENDING:
                del self._pending_record[next(iter(self._pending_record))]
        return run if run is not None and run.end is None else None

    def watch(self, stream: str, rendition: Rendition, viewers: int) -> bool:
        """So many viewers of a rendition. Returns: whether there were not as many before."""
        renditions = self.viewers.setdefault(stream, {})
        before = renditions.get(rendition, 0)
        renditions[rendition] = viewers
        if not any(renditions.values()):
            del self.viewers[stream]
        return viewers != before

    @property
    def live_share_bytes(self) -> int:
        """How much of one `live` run may wait for a worker."""
        return LIVE_BYTES // max(1, self._live_runs)

    @property
    def living_meta_bytes(self) -> int:
        """Bytes of what living runs say of themselves."""
        return sum(run.meta_bytes for run in self.by_run.values() if run.is_alive)

    def untold(self) -> set[str]:
        """Runs that say more of themselves than STATE has room for: none, or all that wait for their recording."""
        if sum(run.meta_bytes for run in self.by_run.values()) <= MAX_META_BYTES:
            return set()
        return {run_id for run_id, run in self.by_run.items() if not run.is_alive and not run.is_being_recorded}

    def rows(self) -> list[Run]:
        """What people are shown: what each name means, but for old runs whose recording alone goes on."""
        return [run for run in self.by_name.values() if run.is_shown or run.is_alive]

    def free_name(self, stream: str, is_held: Callable[[Run], bool]) -> str:
        """A name like `stream` that no run holds."""
        base = stream.partition("~")[0]
        number = 2
        while (taken := self.by_name.get(f"{base}~{number}")) is not None and is_held(taken):
            number += 1
        return f"{base}~{number}"

    def wanted(self, run: Run) -> dict[Rendition, int]:
        """Viewers of a run by rendition: none for one that is no longer what its name means."""
        if self.by_name.get(run.info.stream) is not run:
            return {}
        return self.viewers.get(run.info.stream, {})

    def keep_log(self, run: Run, first_seq: int) -> KeptRun:
        """Begin to keep a run from `first_seq`."""
        run.kept = KeptRun(
            log=RunLog(self.log_folder, run.info, first_seq=first_seq),
            queued=first_seq - 1,
            logged=first_seq - 1,
            next_seq=first_seq,
            written=first_seq - 1,
            attempt=run.attempts + 1,
            first_attempt=run.attempts + 1,
            moved_s=time.monotonic(),
        )
        return run.kept

    def give_turns(self) -> None:
        """Living runs are recorded all at once, ended ones by turns; living `live` ones share what may wait."""
        ended = 0
        for kept in [run.kept for run in self.by_run.values() if run.kept is not None]:
            ended += kept.is_over and kept.blocked is None and kept.written < kept.logged
            kept.has_turn = ended <= ENDED_AT_ONCE
        self._live_runs = sum(run.live is not None and run.is_alive for run in self.by_name.values())

    def forget_old(self) -> list[Run]:
        """Drop what is no longer shown nor kept: replaced runs, the oldest ended ones over the bound, old wishes.

        What waits for its recording is in its log: over the bound it is held there alone; a frame that is owed to it
        stays until it is there. Returns: the runs that went.
        """
        now = self._clock_s()
        self._pending_record = {name: wish for name, wish in self._pending_record.items() if wish[1] > now}
        for run in self.by_run.values():
            run.is_shown = run.is_alive
        over = [run for run in self.by_run.values() if not run.is_shown]
        shown = [run for run in over if self.by_name.get(run.info.stream) is run]
        shown.sort(key=lambda run: run.heard_s, reverse=True)
        held, stays = 0, set[str]()
        for run in shown[:ENDED_RUNS]:
            held += run.held_bytes
            if held <= ENDED_BYTES:
                stays.add(run.info.run)
        dropped = []
        for run in over:
            run.is_shown = run.info.run in stays or run.owed_frame is not None
            if run.is_shown:
                continue
            if run.kept is not None:
                run.let_go()
                continue
            dropped.append(run)
            del self.by_run[run.info.run]
            if self.by_name.get(run.info.stream) is run:
                del self.by_name[run.info.stream]
        return dropped

    def was_away(self, away_s: float) -> None:
        """The broker itself stood still for so long: what publishers said meanwhile is still to be read."""
        for run in self.by_run.values():
            run.heard_s += away_s


def _known_again(log: RunLog) -> Run:
    """The run of a log that a former broker left."""
    run = Run(log.info, peer=None, record="all")
    run.is_reopened, run.client = True, log.info.owner or FORMER
    if log.damaged:
        logger.error("log_damaged stream=%s run=%s records=%d", log.info.stream, log.info.run, log.damaged)
    last = (log.next_seq or 0) - 1
    first = log.first_seq if log.first_seq is not None else 0
    now_s = time.monotonic()
    run.kept = KeptRun(log=log, queued=last, logged=last, next_seq=first, written=first - 1, moved_s=now_s)
    run.heard_s = now_s  # its publisher has a while to say HELLO again
    if log.ended is not None:
        run.end, run.kept.is_over = log.ended, True
        run.ended_unix = time.time()
    logger.info("log_reopened stream=%s run=%s frames=%d", log.info.stream, log.info.run, last - first + 1)
    return run
