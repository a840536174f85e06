"""How the latents of a job become pictures: by which engines, for which renditions, in slices, worse if it must be."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch

from taesd_stream.config import Config, DecoderChoice
from taesd_stream.decoding.choice import NoDecoderError
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.keeping_up import Shape
from taesd_stream.decoding.payloads import latents_from_payload, latents_from_words
from taesd_stream.decoding.slicing import Most
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.latent_formats import magnitude_of, unfolded
from taesd_stream.media.encoder import VIDEO_RENDITIONS
from taesd_stream.messages import Failed, JobItem, Progress
from taesd_stream_workers.worker.degrading import Pace, is_out_of_memory, ways
from taesd_stream_workers.worker.engines import Engines
from taesd_stream_workers.worker.job_pictures import Entry, Rows, can_be_planes, pictures_of, planes_of
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.live_items import begin_anew, lacks_memory
from taesd_stream_workers.worker.shower import Outlet, Shower

MAX_TRACKS: Final = 64  # pictures of a batch that are recorded singly: each takes an encoder of full size
Wanted: TypeAlias = tuple[JobItem, Rows, Any]  # an item, its latents (n,C,h,w), and which renditions to make


class JobSlices:
    """The work of jobs, slice by slice; used by the thread that owns the device.

    A long job is decoded in slices of at most `decoder.max_job_s`, as far as was measured.
    is_waited_for: whether another job waits for the device.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        engines: Engines,
        outlet: Outlet,
        *,
        is_waited_for: Callable[[], bool],
    ) -> None:
        self._config = config
        self._device = device
        self._engines = engines
        self._outlet = outlet
        self._is_waited_for = is_waited_for
        self._pace = Pace()

    def of(self, run: JobRun) -> Iterator[None]:
        """Decode a job; each next one is a slice, or word of items that cannot be decoded here.

        Raises: NoDecoderError, torch.OutOfMemoryError, and what staging or a device raises: nothing of the job counts.
        """
        job = run.job
        parts = list(job.parts())
        words, bad = run.take_staged()
        if bad:
            text = "latents hold NaN or infinite values: no picture can be made of them"
            run.failed = Failed(job=job.job, items=bad, code="bad_frame", text=text, retry=False)
        magnitude = magnitude_of(job.latent_format)
        latents = unfolded(job.latent_format, latents_from_words(self._outlet.copies.upload(words), magnitude))
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
                # what was left out for NaN leaves no trace here
                run.histories[item.run] = torch.nan_to_num(unfolded(job.latent_format, before))
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
        return self._engines.of_view(run.job.latent_format, choice, _shape_of(items[0][1]))

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
        engine = self._engines.of_recordings(run.job.latent_format) if for_record or live is None else live
        mine: list[Wanted] = []
        films, is_busy = 0, self._is_waited_for()
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
        budget_s = self._config.decoder.latency_budget_s
        cells = len(mine[0][1]) * _cells_of(mine)
        is_still = not isinstance(best, VideoEngine)  # of a `live` run latents are left out instead
        is_late = is_still and not is_recorded and self._pace.is_over(_pace_of(best), cells, budget_s)
        shown: set[int] = set()  # places of those that have given their pictures
        reason = ""
        for way in ways(choice, self._engines.budget_bytes, is_recorded=is_recorded, is_late=is_late):
            places = [place for place in range(len(mine)) if place not in shown]
            left = [mine[place] for place in places]
            try:
                engine = best
                if way.choice is not None:
                    engine = self._engines.open(best.latent_format, way.choice, is_fast=True)
                    if engine.decoder == best.decoder:
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
            self._engines.shed_memories()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(f"no way to decode it fits the memory: {reason}")

    def _records_as_it_shows(self, live: Engine | None) -> bool:
        """Whether recordings of the format are decoded by the network that shows it live."""
        return live is not None and self._engines.of_recordings(live.latent_format).decoder == live.decoder

    def _decode_batch(self, run: JobRun, engine: Engine, mine: list[Wanted], budget_bytes: int) -> Iterator[list[int]]:
        """Decode for the renditions that are wanted of each; what is video in full size alone, straight to planes.

        Yields: after each slice the places of those that have given their last picture.
        """
        lacking = lacks_memory(engine, [item for item, _, _ in mine])
        if lacking:
            text = "the memory of a live stream is not here: its history is needed"
            for place in lacking:
                run.lose(mine[place][0], "no_memory", text)
            yield lacking
        kept_places = [place for place in range(len(mine)) if place not in lacking]
        mine = [mine[place] for place in kept_places]
        begin_anew(engine, [item for item, _, _ in mine])
        histories = {place: run.histories[item.run] for place, (item, _, _) in enumerate(mine) if item.history}
        straight: list[Entry] = []
        others: list[Entry] = []
        for place, (item, rows, wanted) in enumerate(mine):
            (straight if self._is_straight(engine, item, rows, wanted) else others).append((place, item, rows))
        most = self._most(run, engine, mine)
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
            self._outlet.pass_on(Progress(job=run.job.job))
            yield [kept_places[one.place] for one in shown.pictures if one.index == one.count - 1]
            started_s = time.monotonic()

    def _most(self, run: JobRun, engine: Engine, mine: list[Wanted]) -> Most | None:
        """How many latents of a long job the next slice may hold; None: of others, and of images on a GPU, any."""
        if not run.is_sliced or not self._is_paced(engine):
            return None
        cells = _cells_of(mine)
        return lambda: self._pace.latents_within(_pace_of(engine), cells, self._config.decoder.max_job_s)

    def _measure(self, run: JobRun, engine: Engine, cells: int, started_s: float) -> None:
        """A slice is done. An engine has one pace: a network of videos does other work for what is not sliced."""
        if run.is_sliced and self._is_paced(engine) and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # what is launched is not yet decoded
        if run.is_sliced or not isinstance(engine, VideoEngine):
            self._pace.measured(_pace_of(engine), cells, time.monotonic() - started_s)

    def _is_paced(self, engine: Engine) -> bool:
        """Whether slices go by time: a GPU is done with dozens of images before graphs of odd sizes are captured."""
        return isinstance(engine, VideoEngine) or self._device.type == "cpu"

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
