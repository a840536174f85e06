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
from taesd_stream.decoding.payloads import latents_from_payload, latents_from_words
from taesd_stream.decoding.slicing import Most
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.frames import RENDITIONS
from taesd_stream.latent_formats import DEFAULT_MAGNITUDE, LATENT_FORMATS
from taesd_stream.latent_formats import latent_format as format_named
from taesd_stream.media.encoder import VIDEO_RENDITIONS, EncodedPicture
from taesd_stream.messages import Failed, JobItem, Progress
from taesd_stream_workers.worker.chain_encoder import Order
from taesd_stream_workers.worker.degrading import Pace, is_out_of_memory, ways
from taesd_stream_workers.worker.encode_pool import LOOK_S, EncodePool, EncodeTask, Lanes
from taesd_stream_workers.worker.engines import Engines, Shape
from taesd_stream_workers.worker.job_pictures import Entry, Rows, can_be_planes, pictures_of, planes_of
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.job_turns import JobTurns
from taesd_stream_workers.worker.live_items import begin_anew, lacks_memory
from taesd_stream_workers.worker.rendering import Sizes, render
from taesd_stream_workers.worker.shower import Outlet, Shower
from taesd_stream_workers.worker.staging import Stager

logger = logging.getLogger(__name__)

LEAST_WORK_S: Final = 0.01  # of the processor, between two beats: less is no work
MAX_TRACKS: Final = 64  # pictures of a batch that are recorded singly: each takes an encoder of full size
MAX_ENCODERS: Final = 4096  # that one HELLO names
WARM_UP_FORMAT: Final = "sd1"  # any one with rgb factors
Wanted: TypeAlias = tuple[JobItem, Rows, Any]  # an item, its latents (n,C,h,w), and which renditions to make


class JobDecoder:
    """A device and its thread; an EncodePool takes what it decodes.

    A clip is decoded in slices of at most `decoder.max_job_s`, as far as was measured; other jobs go between them.
    lanes: where pictures are encoded.
    pass_on: called in any thread with PROGRESS, with (endpoint, packet), and with a JobRun that is over.
    engines: what decodes.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        now_ns: Callable[[], int],
        pass_on: Callable[[Any], None],
        *,
        lanes: Lanes,
    ) -> None:
        self.is_warm = False
        self._error: Exception | None = None
        self.engines = Engines(config, device)
        self._config, self._decoder = config, config.decoder
        self._device = device
        sizes = Sizes(config.streamer.live_max_px, config.streamer.thumb_max_px)
        self._outlet = Outlet(sizes, HostCopies(device), EncodePool(lanes), now_ns, pass_on)
        self._slice_since_s = float("inf")
        self._at_hand: JobRun | None = None
        self._worked_s = 0.0  # of the processor, by its thread
        self._worked_at_s = 0.0  # when that was seen to grow
        self._turns = JobTurns()
        self._stager = Stager(self._outlet.copies)
        self._pace = Pace()
        self._thread = threading.Thread(target=self._run, name="device")

    @property
    def error(self) -> Exception | None:
        """Why it could not even begin, or nothing is encoded any more. Any thread."""
        return self._error or self._outlet.pool.error

    @property
    def busy_since_s(self) -> float:
        """When the slice at hand began or, on a processor, last went on, or began to come to the host. Any one thread.

        A hung device shows here.

        Raises: RuntimeError when the device failed: nothing in this process can use it any more.
        """
        return min(max(self._slice_since_s, self._worked_at_s), self._outlet.copies.waiting_since_s)

    def beat(self) -> None:
        """See whether a slice goes on, and say so: one picture may take minutes. Now and then, any one thread.

        Where the processor decodes its time tells that; what a GPU does, nobody can see from here.
        """
        run = self._at_hand
        if run is None or self._device.type != "cpu" or not hasattr(time, "pthread_getcpuclockid"):
            return
        assert self._thread.ident is not None
        worked_s = time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))
        if worked_s - self._worked_s > LEAST_WORK_S:
            self._worked_s, self._worked_at_s = worked_s, time.monotonic()
            self._outlet.pass_on(Progress(job=run.job.job))

    def start(self) -> None:
        """Start the threads."""
        self._outlet.pool.start()
        self._thread.start()

    def submit(self, run: JobRun) -> None:
        """Queue a job."""
        run.staged = self._stager.stage(run.job)
        self._turns.put(run)

    def forget(self, run: str) -> None:
        """Drop the encoders and memories of a run."""
        self._outlet.pool.forget(run)
        self.engines.forget(run)
        for rendition in RENDITIONS:
            self._outlet.last.pop((run, rendition), None)

    def encoders(self) -> tuple[str, ...]:
        """Runs whose encoders are open. Any thread."""
        return tuple(self._outlet.pool.runs()[-MAX_ENCODERS:])

    def close(self) -> None:
        """Finish the job at hand, or of a clip the slice, then join the threads; the rest is for another worker."""
        self._turns.close()
        self._thread.join()
        self._stager.close()
        self._outlet.pool.close()

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # noqa: BLE001 the worker ends with it
            self._error = error
            return
        while (run := self._turns.next()) is not None:
            self._slice_since_s, self._at_hand = time.monotonic(), run
            is_over = self._go_on(run)
            self._slice_since_s, self._at_hand = float("inf"), None
            if is_over:
                self._turns.over(run)
                self._outlet.part_done(run)

    def _go_on(self, run: JobRun) -> bool:
        """Decode the next slice of a clip, or the whole of another job. Returns whether the job is over."""
        run.goes_on()
        if run.slices is None:
            run.slices = self._decode(run)
        try:
            for _ in run.slices:
                if run.is_clip:
                    run.pauses()
                    return False
        except NoDecoderError as error:
            run.fail("no_decoder", error, retry=False)
        except torch.OutOfMemoryError as error:
            run.fail("memory", error, retry=True)
        except Exception as error:  # the worker's outermost loop: this job is lost, the next may do
            logger.exception("job_failed job=%d", run.job.job)
            run.fail("internal", error, retry=True)
        return True

    def _warm_up(self) -> None:
        """Make every kind of picture once: what torch and FFmpeg load at first use would hold up the first stream.

        Raises: RuntimeError where one cannot be made.
        """
        engine = open_engine(WARM_UP_FORMAT, weights_folder=None, choice="linear", device=str(self._device))
        latents = torch.zeros(1, format_named(WARM_UP_FORMAT).channels, 8, 8)
        made: queue.SimpleQueue[EncodedPicture | None] = queue.SimpleQueue()
        tasks = [
            EncodeTask(
                run="",
                rendition=one.rendition,
                order=Order(0, True, 0, *one.size, track=0, tracks=1, is_clip=False),
                planes=one.planes,
                copy=one.copy,
                on_done=made.put,
            )
            for _, rgb in engine.decode(latents, budget_bytes=self.engines.budget_bytes)
            for one in render([rgb[0]], [RENDITIONS], self._outlet.sizes, self._outlet.copies)
        ]
        self._outlet.pool.submit(tasks)
        self._outlet.pool.forget("")
        for _ in tasks:
            if self._next(made) is None:
                raise RuntimeError("a picture could not be encoded: see the log")
        self.is_warm = True

    def _next(self, made: queue.SimpleQueue[EncodedPicture | None]) -> EncodedPicture | None:
        """Wait for a picture; None: it could not be made."""
        while self._outlet.pool.error is None:
            with contextlib.suppress(queue.Empty):
                return made.get(timeout=LOOK_S)
        return None

    def _decode(self, run: JobRun) -> Iterator[None]:
        """Each next one is a slice."""
        job = run.job
        parts = list(job.parts())
        words, bad = run.take_staged()
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
                good.append((item, Rows(batch, place * each, each, is_each=self._is_each(run, item))))
        by_choice: dict[DecoderChoice, list[tuple[JobItem, Rows]]] = {}
        for item, rows in good:
            by_choice.setdefault(self._choice_for(item.stream), []).append((item, rows))
        # found once: a choice that is measured anew between two slices must not show a picture twice, or not at all
        views = {choice: self._view_of(run, choice, items) for choice, items in by_choice.items()}
        for for_record, choice in itertools.product((False, True), sorted(by_choice)):
            yield from self._decode_with(run, by_choice[choice], choice, views[choice], for_record)

    def _view_of(self, run: JobRun, choice: DecoderChoice, items: list[tuple[JobItem, Rows]]) -> Engine | None:
        """What shows these items to viewers; None where they are only recorded."""
        if all(item.renditions == ("record",) for item, _ in items):
            return None
        return self.engines.of_view(run.job.latent_format, choice, _shape_of(items[0][1]))

    def _choice_for(self, stream: str) -> DecoderChoice:
        """The decoder of a stream's live view, as rules and `decoder.choice` say."""
        return self._config.rule_of(stream).decoder or self._config.decoder.choice

    def _is_each(self, run: JobRun, item: JobItem) -> bool:
        """Whether a batch is recorded picture by picture, as rules and `recording.batch` say; a large one never is."""
        if item.kind != "steps" or len(item.shape) < 4 or item.shape[0] == 1 or "record" not in item.renditions:
            return False
        is_each = (self._config.rule_of(item.stream).batch or self._config.recording.batch) == "each"
        if is_each and item.shape[0] > MAX_TRACKS:
            text = f"{item.shape[0]} pictures at once are recorded as one: at most {MAX_TRACKS} get a file each."
            run.degrade(item.run, "one_sheet", text)
            return False
        return is_each

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
        self,
        run: JobRun,
        items: list[tuple[JobItem, Rows]],
        choice: DecoderChoice,
        live: Engine | None,
        for_record: bool,
    ) -> Iterator[None]:
        """Decode what one engine serves: live pictures by `live`, recordings by the full decoder, exactly.

        Where both are the same network, an item that is recorded is decoded once, exactly, for all its renditions.
        """
        if for_record and not any("record" in item.renditions for item, _ in items):
            return
        if not for_record and live is None:
            return
        engine = self.engines.of_recordings(run.job.latent_format) if for_record or live is None else live
        mine: list[Wanted] = []
        films, is_busy = 0, self._turns.is_waited_for
        for item, rows in items:
            is_recorded = "record" in item.renditions
            wanted = tuple(
                rendition
                for rendition in item.renditions
                if for_record == (is_recorded and (rendition == "record" or self._records_as_it_shows(live)))
            )
            if "film" in wanted:
                takes = self._outlet.pool.takes_film(item.run, granted=films, is_busy=is_busy)
                films += takes
                wanted = wanted if takes else tuple(rendition for rendition in wanted if rendition != "film")
            if wanted:
                mine.append((item, rows, wanted))
        if mine:
            yield from self._decode_somehow(run, engine, mine, choice, is_recorded=for_record)

    def _decode_somehow(
        self, run: JobRun, best: Engine, mine: list[Wanted], choice: DecoderChoice, *, is_recorded: bool
    ) -> Iterator[None]:
        """Decode the best way that memory and time allow. Raises: torch.OutOfMemoryError where none does."""
        settings = self._decoder
        cells = len(mine[0][1]) * _cells_of(mine)
        is_still = not isinstance(best, VideoEngine)  # of a `live` run latents are left out instead
        is_late = is_still and not is_recorded and self._pace.is_over(_pace_of(best), cells, settings.latency_budget_s)
        shown: set[int] = set()  # places of those that have given their pictures
        reason = ""
        for way in ways(choice, self.engines.budget_bytes, is_recorded=is_recorded, is_late=is_late):
            places = [place for place in range(len(mine)) if place not in shown]
            left = [mine[place] for place in places]
            try:
                engine = best if way.choice is None else self.engines.open(best.latent_format, way.choice, is_fast=True)
                if way.choice is not None and engine.decoder == best.decoder:
                    continue
                for finished in self._decode_batch(run, engine, left, way.budget_bytes):
                    shown.update(places[place] for place in finished)
                    yield
            except NoDecoderError:
                continue
            except Exception as error:
                if not is_out_of_memory(error) or (is_recorded and shown):
                    raise  # what is in the file already must not come again in this attempt
                reason = str(error)[:300]  # the error itself would keep the tensors of its frames
            else:
                for item, _, _ in left if way.code else ():
                    run.degrade(item.run, way.code, way.text)
                return
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(f"no way to decode it fits the memory: {reason}")

    def _records_as_it_shows(self, live: Engine | None) -> bool:
        """Whether recordings of the format are decoded by the network that shows it live."""
        return live is not None and self.engines.of_recordings(live.latent_format).decoder == live.decoder

    def _decode_batch(self, run: JobRun, engine: Engine, mine: list[Wanted], budget_bytes: int) -> Iterator[list[int]]:
        """Decode for the renditions that are wanted of each; what is video in full size alone, straight to planes.

        Yields: after each slice the places of those that have given their last picture.
        """
        lacking = lacks_memory(engine, [item for item, _, _ in mine])
        if lacking:
            places = [run.job.items.index(mine[place][0]) for place in lacking]
            text = "the memory of a live stream is not here: its history is needed"
            bad = run.failed.items if run.failed else []
            run.failed = Failed(job=run.job.job, items=[*bad, *places], code="no_memory", text=text, retry=True)
            yield lacking
        kept_places = [place for place in range(len(mine)) if place not in lacking]
        mine = [mine[place] for place in kept_places]
        begin_anew(engine, [item for item, _, _ in mine])
        histories = {place: run.histories[item.run] for place, (item, _, _) in enumerate(mine) if item.history}
        straight: list[Entry] = []
        others: list[Entry] = []
        for place, (item, rows, wanted) in enumerate(mine):
            (straight if self._is_straight(engine, item, rows, wanted) else others).append((place, item, rows))
        most = self._most(engine, mine) if run.is_clip else None
        sources = [
            planes_of(engine, straight, budget_bytes, most) if straight else iter(()),
            pictures_of(engine, others, budget_bytes, histories, most) if others else iter(()),
        ]
        shower = Shower(self._outlet, run, engine.decoder, [(item, wanted) for item, _, wanted in mine])
        started_s = time.monotonic()
        for shown in itertools.chain.from_iterable(sources):
            for picture in shown.pictures:
                if picture.is_approximate:
                    run.degrade(mine[picture.place][0].run, "approximate", "Colours approximate.")
            shower.show(shown)
            self._measure(run, engine, shown.latents * _cells_of(mine), started_s)
            self._slice_since_s = time.monotonic()
            self._outlet.pass_on(Progress(job=run.job.job))
            yield [kept_places[one.place] for one in shown.pictures if one.index == one.count - 1]
            started_s = time.monotonic()

    def _most(self, engine: Engine, mine: list[Wanted]) -> Most:
        """How many latents of a clip the next slice may hold."""
        cells = _cells_of(mine)
        return lambda: self._pace.latents_within(_pace_of(engine), cells, self._decoder.max_job_s)

    def _measure(self, run: JobRun, engine: Engine, cells: int, started_s: float) -> None:
        """A slice is done. An engine has one pace: a network of videos does other work for what is no clip."""
        if run.is_clip and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # what is launched is not yet decoded
        if run.is_clip or not isinstance(engine, VideoEngine):
            self._pace.measured(_pace_of(engine), cells, time.monotonic() - started_s)

    def _is_straight(self, engine: Engine, item: JobItem, rows: Rows, wanted: Any) -> bool:
        height, width = engine.picture_size(rows.batch)
        return can_be_planes(engine, item, rows, wanted) and all(
            rendition in VIDEO_RENDITIONS and not self._outlet.sizes.limit(rendition, height, width)
            for rendition in wanted
        )


def _pace_of(engine: Engine) -> str:
    """What a network computes in decides how fast it is: recordings are slower."""
    return f"{engine.decoder} {engine.dtype}"


def _cells_of(mine: list[Wanted]) -> int:
    """Of one latent."""
    height, width = mine[0][1].batch.shape[-2:]
    return int(height) * int(width)


def _shape_of(rows: Rows) -> Shape:
    channels, height, width = rows.batch.shape[-3:]
    return int(channels), int(height), int(width)
