"""All runs that the broker knows, by name and by run; who may take a name; what is remembered of the ended ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from taesd_stream.config import Config
from taesd_stream.frames import RecordMode, Rendition, StreamInfo
from taesd_stream.latent_log import RunLog, runs_in
from taesd_stream_workers.kept_run import KeptRun
from taesd_stream_workers.runs import Run

logger = logging.getLogger(__name__)

ENDED_RUNS: Final = 64
ENDED_BYTES: Final = 256 << 20
PENDING_RECORD_S: Final = 3600.0
LIVE_BYTES: Final = 256 << 20  # of latents of `live` runs that wait for a worker, all runs together


class Registry:
    """The broker's runs. A name means its newest run; older ones stay while their recording is not finished."""

    def __init__(self, config: Config) -> None:
        self.by_run: dict[str, Run] = {}
        self.by_name: dict[str, Run] = {}
        self.viewers: dict[str, dict[Rendition, int]] = {}
        self.touched: dict[str, Run] = {}  # what of them could be decoded may have changed
        self._pending_record: dict[str, tuple[RecordMode, float]] = {}
        self._config = config
        self.log_folder = config.log_folder

    def load_logs(self, goes_on: Callable[[], None]) -> None:
        """Know again the kept runs that a former broker left. goes_on: called after each."""
        for run_id in runs_in(self.log_folder):
            log = RunLog.reopen(self.log_folder, run_id)
            goes_on()
            if log is None:
                continue
            run = Run(log.info, peer=None, record="all")
            run.is_reopened = True
            if log.damaged:
                logger.error("log_damaged stream=%s run=%s records=%d", log.info.stream, run_id, log.damaged)
            last = (log.next_seq or 0) - 1
            first = log.first_seq if log.first_seq is not None else 0
            run.kept = KeptRun(
                log=log, queued=last, logged=last, next_seq=first, written=first - 1, moved_s=time.monotonic()
            )
            run.heard_s = time.monotonic()  # its publisher has a while to say HELLO again
            if log.ended is not None:
                run.end, run.kept.is_over = log.ended, True
                run.ended_unix = time.time()
            run.newest = log.read(last) if last >= first else None
            self.add(run)
            logger.info("log_reopened stream=%s run=%s frames=%d", log.info.stream, run_id, last - first + 1)

    def add(self, run: Run) -> None:
        """Know a run; it becomes what its name means."""
        self.by_run[run.info.run] = run
        self.touch(run)
        self.by_name[run.info.stream] = run

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
        if pending is not None and time.monotonic() < pending[1]:
            return pending[0]
        return self._config.rule_of(info.stream).record or info.record or self._config.recording.default

    def ask_record(self, stream: str, mode: RecordMode) -> Run | None:
        """The living run that a RECORD means; None: it waits for the name's next run."""
        run = self.by_name.get(stream)
        if run is None or not run.is_alive:  # a lost one may come back, or be run again
            self._pending_record[stream] = (mode, time.monotonic() + PENDING_RECORD_S)
        return run if run is not None and run.end is None else None

    def watch(self, stream: str, rendition: Rendition, viewers: int) -> None:
        """So many viewers of a rendition."""
        renditions = self.viewers.setdefault(stream, {})
        renditions[rendition] = viewers
        if not any(renditions.values()):
            del self.viewers[stream]

    @property
    def live_share_bytes(self) -> int:
        """How much of one `live` run may wait for a worker."""
        return LIVE_BYTES // max(1, sum(run.live is not None and run.is_alive for run in self.by_name.values()))

    @property
    def meta_bytes(self) -> int:
        """Bytes of what all runs say of themselves."""
        return sum(run.meta_bytes for run in self.by_run.values())

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
        self.log_folder.mkdir(parents=True, exist_ok=True)
        run.kept = KeptRun(
            log=RunLog(self.log_folder, run.info, first_seq=first_seq),
            queued=first_seq - 1,
            logged=first_seq - 1,
            next_seq=first_seq,
            written=first_seq - 1,
            attempt=run.attempts + 1,
            moved_s=time.monotonic(),
        )
        return run.kept

    def forget_old(self) -> list[Run]:
        """Drop what is no longer shown nor kept: replaced runs, the oldest ended ones over the bound, old wishes."""
        now = time.monotonic()
        self._pending_record = {name: wish for name, wish in self._pending_record.items() if wish[1] > now}
        over = [run for run in self.by_run.values() if run.kept is None and not run.is_alive]
        replaced = [run for run in over if self.by_name.get(run.info.stream) is not run]
        shown = sorted((run for run in over if run not in replaced), key=lambda run: run.heard_s, reverse=True)
        held = 0
        dropped = replaced
        for place, run in enumerate(shown):
            held += run.held_bytes
            if place >= ENDED_RUNS or held > ENDED_BYTES:
                dropped.append(run)
        for run in dropped:
            del self.by_run[run.info.run]
            if self.by_name.get(run.info.stream) is run:
                del self.by_name[run.info.stream]
        return dropped
