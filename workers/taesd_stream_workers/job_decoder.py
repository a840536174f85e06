"""The decoding half of a worker: one thread that owns the device, and turns jobs into pictures for the encoders."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch

from taesd_stream.config import Config, DecoderChoice
from taesd_stream.decoding.choice import NoDecoderError, open_engine
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.payloads import (
    copy_payloads,
    latents_from_payload,
    latents_from_words,
    rows_not_finite,
    torch_dtype,
)
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.frames import RENDITIONS
from taesd_stream.latent_formats import DEFAULT_MAGNITUDE, LATENT_FORMATS
from taesd_stream.latent_formats import latent_format as format_named
from taesd_stream.media.encoder import VIDEO_RENDITIONS
from taesd_stream.messages import Failed, JobItem, Progress
from taesd_stream_workers.degrading import Pace, is_out_of_memory, ways
from taesd_stream_workers.encode_pool import EncodePool, EncodeTask
from taesd_stream_workers.job_pictures import Entry, Rows, can_be_planes, pictures_of, planes_of
from taesd_stream_workers.job_run import JobRun
from taesd_stream_workers.live_items import begin_anew, lacks_memory
from taesd_stream_workers.rendering import Sizes, render
from taesd_stream_workers.shower import Outlet, Shower

logger = logging.getLogger(__name__)

MAX_MEMORIES: Final = 4096  # that one HELLO holds
WARM_UP_FORMAT: Final = "sd1"  # any one with rgb factors
Wanted: TypeAlias = tuple[JobItem, Rows, Any]  # an item, its latents (n,C,h,w), and which renditions to make


class JobDecoder:
    """A device and its thread; an EncodePool takes what it decodes.

    pass_on: called in any thread with PROGRESS, with (endpoint, packet), and with a JobRun that is over.
    error: why it could not even begin.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        now_ns: Callable[[], int],
        pass_on: Callable[[Any], None],
        *,
        threads: int,
    ) -> None:
        self.is_warm = False
        self.error: Exception | None = None
        self._config, self._weights_folder, self._decoder = config, config.weights_folder, config.decoder
        self._device = device
        sizes = Sizes(config.streamer.live_max_px, config.streamer.thumb_max_px)
        self._outlet = Outlet(sizes, HostCopies(device), EncodePool(threads), now_ns, pass_on)
        self._slice_since_s = float("inf")
        self._jobs: queue.SimpleQueue[JobRun | None] = queue.SimpleQueue()
        self._engines: dict[tuple[str, str, bool], Engine] = {}
        self._pace = Pace()
        self._thread = threading.Thread(target=self._run, name="device")

    @property
    def busy_since_s(self) -> float:
        """When the slice at hand began, or, later, to come to the host; a hung device shows here. Any one thread.

        Raises: RuntimeError when the device failed: nothing in this process can use it any more.
        """
        return min(self._slice_since_s, self._outlet.copies.waiting_since_s)

    def start(self) -> None:
        """Start the threads."""
        self._outlet.pool.start()
        self._thread.start()

    def submit(self, run: JobRun) -> None:
        """Queue a job."""
        self._jobs.put(run)

    def forget(self, run: str) -> None:
        """Drop the encoders and memories of a run."""
        self._outlet.pool.forget(run)
        for engine in list(self._engines.values()):
            engine.forget(run)
        for rendition in RENDITIONS:
            self._outlet.last.pop((run, rendition), None)

    def close(self) -> None:
        """Finish the job at hand and its pictures, then join the threads; what is queued is for another worker."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self._thread.join()
        self._outlet.pool.close()

    def engines(self) -> dict[str, dict[str, Any]]:
        """What decodes each latent format, and why: the live view's engine, else the recordings'. Any thread."""
        chosen = (self._decoder.choice, "auto")  # not the cheaper ones that stood in
        engines = sorted(
            (entry for entry in self._engines.items() if entry[0][1] in chosen), key=lambda entry: entry[0][2]
        )
        history: dict[str, int] = {}
        for (latent_format, _, _), engine in engines:
            history[latent_format] = max(engine.history, history.get(latent_format, 0))
        return {
            latent_format: {
                "decoder": engine.decoder,
                "reason": engine.reason,
                "is_full": engine.is_full,
                "history": history[latent_format],
            }
            for (latent_format, _, _), engine in engines
        }

    def memories(self) -> dict[str, int]:
        """Where each `live` run would go on. Any thread."""
        found: dict[str, int] = {}
        for engine in list(self._engines.values()):
            if isinstance(engine, VideoEngine):
                for run, index in engine.memories.next_indices().items():
                    found[run] = max(index, found.get(run, 0))
        return dict(list(found.items())[-MAX_MEMORIES:])

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # noqa: BLE001 the worker ends with it
            self.error = error
            return
        while (run := self._jobs.get()) is not None:
            self._slice_since_s = run.started_s = time.monotonic()
            try:
                self._decode(run)
            except NoDecoderError as error:
                run.fail("no_decoder", error, retry=False)
            except torch.OutOfMemoryError as error:
                run.fail("memory", error, retry=True)
            except Exception as error:  # the worker's outermost loop: this job is lost, the next may do
                logger.exception("job_failed job=%d", run.job.job)
                run.fail("internal", error, retry=True)
            self._slice_since_s = float("inf")
            self._outlet.part_done(run)

    def _warm_up(self) -> None:
        """Make every kind of picture once: what torch and FFmpeg load at first use would hold up the first stream."""
        engine = open_engine(WARM_UP_FORMAT, weights_folder=None, choice="linear", device=str(self._device))
        latents = torch.zeros(1, format_named(WARM_UP_FORMAT).channels, 8, 8)
        for _, rgb in engine.decode(latents, budget_bytes=self._decoder.memory_bytes):
            self._outlet.pool.submit(
                [
                    EncodeTask(
                        run="",
                        rendition=one.rendition,
                        attempt=0,
                        keyframe=True,
                        pts=0,
                        planes=one.planes,
                        size=one.size,
                        copy=one.copy,
                        on_done=lambda _: None,
                    )
                    for one in render([rgb[0]], [RENDITIONS], self._outlet.sizes, self._outlet.copies)
                ]
            )
        self._outlet.pool.forget("")
        self.is_warm = True

    def _decode(self, run: JobRun) -> None:
        job = run.job
        parts = list(job.parts())
        first = job.items[0]
        words = self._outlet.copies.staging((len(parts), *first.shape), torch_dtype(first.dtype))
        copy_payloads([payload for _, payload, _ in parts], words)
        bad = rows_not_finite(words)
        if bad:
            text = "latents hold NaN or infinite values: no picture can be made of them"
            run.failed = Failed(job=job.job, items=bad, code="bad_frame", text=text, retry=False)
        known = LATENT_FORMATS.get(job.latent_format)
        magnitude = known.magnitude if known else DEFAULT_MAGNITUDE
        latents = latents_from_words(self._outlet.copies.upload(words), magnitude)
        batch = latents.flatten(0, 1) if latents.ndim == 5 else latents
        each = len(batch) // len(parts)
        good: list[tuple[JobItem, Rows]] = []
        broken: set[str] = set()  # `live` runs with a hole: the broker sends what follows again, with its history
        for place, (item, _, history) in enumerate(parts):
            if place in bad or item.run in broken:
                broken |= {item.run} if item.kind == "live" else set()
                continue
            if history is not None:
                before = latents_from_payload(history, item.dtype, (item.history, *item.shape[-3:]), magnitude)
                run.histories[item.run] = torch.nan_to_num(before)  # what was left out for NaN leaves no trace here
            if not (item.is_repeat and self._repeat(run, item)):
                good.append((item, Rows(batch, place * each, each, is_each=self._is_each(item))))
        choices = {self._choice_for(item.stream) for item, _ in good}
        for for_record, choice in itertools.product((False, True), sorted(choices)):
            items = [(item, rows) for item, rows in good if self._choice_for(item.stream) == choice]
            self._decode_with(run, items, choice, for_record)

    def _choice_for(self, stream: str) -> DecoderChoice:
        """The decoder of a stream's live view, as rules and `decoder.choice` say."""
        return self._config.rule_of(stream).decoder or self._config.decoder.choice

    def _is_each(self, item: JobItem) -> bool:
        """Whether a batch is recorded picture by picture, as rules and `recording.batch` say."""
        if item.kind != "steps" or len(item.shape) < 4 or item.shape[0] == 1 or "record" not in item.renditions:
            return False
        return (self._config.rule_of(item.stream).batch or self._config.recording.batch) == "each"

    def _repeat(self, run: JobRun, item: JobItem) -> bool:
        """Show a `live` frame once more from its last planes, where all of what is wanted is here."""
        last = [self._outlet.last.get((item.run, rendition)) for rendition in item.renditions]
        found = [one for one in last if one is not None and one.seq == item.seq]
        if len(found) < len(last):
            return False
        for one in found:
            Shower(self._outlet, run, one.decoder, [(item, item.renditions)]).show_again(one)
        return True

    def _decode_with(
        self, run: JobRun, items: list[tuple[JobItem, Rows]], choice: DecoderChoice, for_record: bool
    ) -> None:
        """Decode what one engine serves: live pictures by `choice`, recordings by the full decoder, exactly.

        Where both are the same network, an item that is recorded is decoded once, exactly, for all its renditions.
        """
        latent_format = run.job.latent_format
        if for_record and not any("record" in item.renditions for item, _ in items):
            return
        is_shown = any(item.renditions != ("record",) for item, _ in items)
        if not (for_record or is_shown):
            return
        live = self._engine(latent_format, choice, is_fast=True) if is_shown else None
        engine = self._engine(latent_format, "auto", is_fast=False) if for_record or live is None else live
        mine: list[Wanted] = []
        for item, rows in items:
            is_recorded = "record" in item.renditions
            wanted = tuple(
                rendition
                for rendition in item.renditions
                if for_record == (is_recorded and (rendition == "record" or self._records_as_it_shows(live)))
                and (rendition != "film" or self._outlet.pool.takes_films)
            )
            if wanted:
                mine.append((item, rows, wanted))
        if mine:
            self._decode_somehow(run, engine, mine, choice, is_recorded=for_record)

    def _decode_somehow(
        self, run: JobRun, best: Engine, mine: list[Wanted], choice: DecoderChoice, *, is_recorded: bool
    ) -> None:
        """Decode the best way that memory and time allow. Raises: torch.OutOfMemoryError where none does."""
        settings = self._decoder
        cells = _cells_of(mine[0][1])
        is_still = not isinstance(best, VideoEngine)  # of a `live` run latents are left out instead
        is_late = is_still and not is_recorded and self._pace.is_over(best.decoder, cells, settings.latency_budget_s)
        shown: set[int] = set()  # places of those that have given their pictures
        reason = ""
        for way in ways(choice, settings.memory_bytes, is_recorded=is_recorded, is_late=is_late):
            places = [place for place in range(len(mine)) if place not in shown]
            left = [mine[place] for place in places]
            try:
                engine = best if way.choice is None else self._engine(best.latent_format, way.choice, is_fast=True)
                if way.choice is not None and engine.decoder == best.decoder:
                    continue
                started_s = time.monotonic()
                for place in self._decode_batch(run, engine, left, way.budget_bytes):
                    shown.add(places[place])
            except NoDecoderError:
                continue
            except Exception as error:
                if not is_out_of_memory(error) or (is_recorded and shown):
                    raise  # what is in the file already must not come again in this attempt
                reason = str(error)[:300]  # the error itself would keep the tensors of its frames
            else:
                self._pace.measured(engine.decoder, cells * len(left), time.monotonic() - started_s)
                for item, _, _ in left if way.code else ():
                    run.degrade(item.run, way.code, way.text)
                return
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(f"no way to decode it fits the memory: {reason}")

    def _records_as_it_shows(self, live: Engine | None) -> bool:
        """Whether recordings of the format are decoded by the network that shows it live."""
        return live is not None and self._engine(live.latent_format, "auto", is_fast=False).decoder == live.decoder

    def _decode_batch(self, run: JobRun, engine: Engine, mine: list[Wanted], budget_bytes: int) -> Iterator[int]:
        """Decode for the renditions that are wanted of each; what is video in full size alone, straight to planes.

        Yields: the place of each that has given its last picture.
        """
        lacking = lacks_memory(engine, [item for item, _, _ in mine])
        if lacking:
            places = [run.job.items.index(mine[place][0]) for place in lacking]
            text = "the memory of a live stream is not here: its history is needed"
            bad = run.failed.items if run.failed else []
            run.failed = Failed(job=run.job.job, items=[*bad, *places], code="no_memory", text=text, retry=True)
            yield from lacking
            kept_places = [place for place in range(len(mine)) if place not in lacking]
            mine = [mine[place] for place in kept_places]
        else:
            kept_places = list(range(len(mine)))
        begin_anew(engine, [item for item, _, _ in mine])
        histories = {place: run.histories[item.run] for place, (item, _, _) in enumerate(mine) if item.history}
        straight: list[Entry] = []
        others: list[Entry] = []
        for place, (item, rows, wanted) in enumerate(mine):
            (straight if self._is_straight(engine, item, rows, wanted) else others).append((place, item, rows))
        sources = [
            planes_of(engine, straight, budget_bytes) if straight else iter(()),
            pictures_of(engine, others, budget_bytes, histories) if others else iter(()),
        ]
        shower = Shower(self._outlet, run, engine.decoder, [(item, wanted) for item, _, wanted in mine])
        for shown in itertools.chain.from_iterable(sources):
            for picture in shown.pictures:
                if picture.is_approximate:
                    run.degrade(mine[picture.place][0].run, "approximate", "Colours approximate.")
            shower.show(shown)
            self._slice_since_s = time.monotonic()
            self._outlet.pass_on(Progress(job=run.job.job))
            for picture in shown.pictures:
                if picture.index == picture.count - 1:
                    yield kept_places[picture.place]

    def _is_straight(self, engine: Engine, item: JobItem, rows: Rows, wanted: Any) -> bool:
        height, width = engine.picture_size(rows.batch)
        return can_be_planes(engine, item, rows, wanted) and all(
            rendition in VIDEO_RENDITIONS and not self._outlet.sizes.limit(rendition, height, width)
            for rendition in wanted
        )

    def _engine(self, latent_format: str, choice: Any, *, is_fast: bool) -> Engine:
        key = (latent_format, choice, is_fast)
        if key not in self._engines:
            engine = open_engine(
                latent_format,
                weights_folder=self._weights_folder,
                choice=choice,
                device=str(self._device),
                is_fast=is_fast,
            )
            same = next((one for one in self._engines.values() if _is_same(one, engine)), engine)
            self._engines[key] = same
            if same is engine:
                what = f"format={latent_format} decoder={engine.decoder} dtype={engine.dtype}"
                logger.info("engine_opened %s %s", what, engine.reason)
        return self._engines[key]


def _cells_of(rows: Rows) -> int:
    height, width = rows.batch.shape[-2:]
    return len(rows) * int(height) * int(width)


def _is_same(one: Engine, other: Engine) -> bool:
    return (one.latent_format, one.decoder, one.dtype) == (other.latent_format, other.decoder, other.dtype)
