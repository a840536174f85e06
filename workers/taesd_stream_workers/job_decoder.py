"""The decoding half of a worker: one thread that owns the device, and turns jobs into pictures for the encoders."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.config import Config, DecoderChoice
from taesd_stream.decoding.choice import NoDecoderError, open_engine
from taesd_stream.decoding.engine import Engine, check_finite, latents_from_payload
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.frames import RENDITIONS, Packet, Rendition, Stamps
from taesd_stream.latent_formats import DEFAULT_MAGNITUDE, LATENT_FORMATS
from taesd_stream.latent_formats import latent_format as format_named
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream.messages import Degraded, Failed, Job, JobItem, Progress
from taesd_stream_workers.encode_pool import EncodePool, EncodeTask
from taesd_stream_workers.job_pictures import Picture, pictures_of
from taesd_stream_workers.live_items import begin_anew, lacks_memory
from taesd_stream_workers.rendering import Sizes, as_pictures, render

logger = logging.getLogger(__name__)

MAX_MEMORIES: Final = 4096  # that one HELLO holds
WARM_UP_FORMAT: Final = "sd1"  # any one with rgb factors


class JobRun:
    """A job in work: how many pictures are still to be encoded, and what went wrong. Any thread."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.started_s = time.monotonic()
        self.failed: Failed | None = None
        self.degraded: dict[tuple[str, str], Degraded] = {}
        self.histories: dict[str, Tensor] = {}  # by run: the latents (k,C,h,w) before its first item here
        self._waiting = 1  # one for the decoding itself
        self._lock = threading.Lock()

    def add(self) -> None:
        """One picture more goes to the encoders."""
        with self._lock:
            self._waiting += 1

    def is_last(self) -> bool:
        """One of the pictures, or the decoding, is over. Returns whether it was the last: the credit may go back."""
        with self._lock:
            self._waiting -= 1
            return self._waiting == 0

    def degrade(self, run: str, code: str, text: str) -> None:
        """A run's pictures are worse than they could be; the next job tries the better way again."""
        self.degraded[run, code] = Degraded(run=run, code=code, text=text)

    def fail(self, code: str, error: Exception, *, retry: bool) -> None:
        """Nothing of the job counts."""
        text = str(error)[:500] or type(error).__name__
        self.failed = Failed(job=self.job.job, items=[], code=code, text=text, retry=retry)


class JobDecoder:
    """A device and its thread; an EncodePool takes what it decodes.

    pass_on: called in any thread with PROGRESS, with (endpoint, packet), and with a JobRun that is over.
    busy_since_s: when the slice at hand began; a hung device shows here. error: why it could not even begin.
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
        self.busy_since_s = float("inf")
        self._config, self._weights_folder, self._decoder = config, config.weights_folder, config.decoder
        self._device = device
        self._now_ns = now_ns
        self._pass_on = pass_on
        self._sizes = Sizes(config.streamer.live_max_px, config.streamer.thumb_max_px)
        self._jobs: queue.SimpleQueue[JobRun | None] = queue.SimpleQueue()
        self._pool = EncodePool(threads)
        self._engines: dict[tuple[str, str, bool], Engine] = {}
        self._last: dict[tuple[str, Rendition], tuple[_Shower, EncodeTask]] = {}  # of `live` runs, for late viewers
        self._thread = threading.Thread(target=self._run, name="device")

    def start(self) -> None:
        """Start the threads."""
        self._pool.start()
        self._thread.start()

    def submit(self, run: JobRun) -> None:
        """Queue a job."""
        self._jobs.put(run)

    def forget(self, run: str) -> None:
        """Drop the encoders and memories of a run."""
        self._pool.forget(run)
        for engine in list(self._engines.values()):
            engine.forget(run)
        for rendition in RENDITIONS:
            self._last.pop((run, rendition), None)

    def close(self) -> None:
        """Finish the job at hand and its pictures, then join the threads; what is queued is for another worker."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self._thread.join()
        self._pool.close()

    def engines(self) -> dict[str, dict[str, Any]]:
        """What decodes each latent format, and why: the live view's engine, else the recordings'. Any thread."""
        engines = sorted(self._engines.items(), key=lambda entry: entry[0][2])
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
            self.busy_since_s = run.started_s = time.monotonic()
            try:
                self._decode(run)
            except NoDecoderError as error:
                run.fail("no_decoder", error, retry=False)
            except torch.OutOfMemoryError as error:
                run.fail("memory", error, retry=True)
            except Exception as error:  # the worker's outermost loop: this job is lost, the next may do
                logger.exception("job_failed job=%d", run.job.job)
                run.fail("internal", error, retry=True)
            self.busy_since_s = float("inf")
            self._part_done(run)

    def _warm_up(self) -> None:
        """Make every kind of picture once: what torch and FFmpeg load at first use would hold up the first stream."""
        engine = open_engine(WARM_UP_FORMAT, weights_folder=None, choice="linear", device=str(self._device))
        latents = torch.zeros(1, format_named(WARM_UP_FORMAT).channels, 8, 8)
        for _, rgb in engine.decode(latents, budget_bytes=self._decoder.memory_bytes):
            for rendition, planes, size in render(rgb[0], RENDITIONS, self._sizes):
                task = EncodeTask(
                    run="",
                    rendition=rendition,
                    attempt=0,
                    keyframe=True,
                    pts=0,
                    planes=planes,
                    size=size,
                    on_done=lambda _: None,
                )
                self._pool.submit(task)
        self._pool.forget("")
        self.is_warm = True

    def _decode(self, run: JobRun) -> None:
        job = run.job
        bad: list[int] = []
        good: list[tuple[JobItem, Tensor]] = []
        known = LATENT_FORMATS.get(job.latent_format)
        magnitude = known.magnitude if known else DEFAULT_MAGNITUDE
        for place, (item, payload, history) in enumerate(job.parts()):
            latents = as_pictures(latents_from_payload(payload, item.dtype, item.shape, magnitude))
            if check_finite(latents):
                bad.append(place)
                continue
            if history is not None:
                shape = (item.history, *item.shape[-3:])
                before = latents_from_payload(history, item.dtype, shape, magnitude)
                run.histories[item.run] = torch.nan_to_num(before)  # what was left out for NaN leaves no trace here
            if not (item.is_repeat and self._repeat(run, item)):
                good.append((item, latents))
        if bad:
            text = "latents hold NaN or infinite values: no picture can be made of them"
            run.failed = Failed(job=job.job, items=bad, code="bad_frame", text=text, retry=False)
        choices = {self._choice_for(item.stream) for item, _ in good}
        for for_record, choice in itertools.product((False, True), sorted(choices)):
            items = [(item, latents) for item, latents in good if self._choice_for(item.stream) == choice]
            self._decode_with(run, items, choice, for_record)

    def _choice_for(self, stream: str) -> DecoderChoice:
        """The decoder of a stream's live view, as rules and `decoder.choice` say."""
        return self._config.rule_of(stream).decoder or self._config.decoder.choice

    def _repeat(self, run: JobRun, item: JobItem) -> bool:
        """Show a `live` frame once more from its last planes, where all of what is wanted is here."""
        last = [self._last.get((item.run, rendition)) for rendition in item.renditions]
        found = [one for one in last if one is not None and one[0].item.seq == item.seq]
        if len(found) < len(last):
            return False
        for shower, task in found:
            replace(shower, run=run, item=item).show_again(task)
        return True

    def _decode_with(
        self, run: JobRun, items: list[tuple[JobItem, Tensor]], choice: DecoderChoice, for_record: bool
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
        mine: list[tuple[JobItem, Tensor, Any]] = []
        for item, latents in items:
            is_recorded = "record" in item.renditions
            wanted = tuple(
                rendition
                for rendition in item.renditions
                if for_record == (is_recorded and (rendition == "record" or self._records_as_it_shows(live)))
                and not (rendition == "film" and self._pool.is_busy(item.run))
            )
            if wanted:
                mine.append((item, latents, wanted))
        if mine:
            self._decode_batch(run, engine, mine)

    def _records_as_it_shows(self, live: Engine | None) -> bool:
        """Whether recordings of the format are decoded by the network that shows it live."""
        return live is not None and self._engine(live.latent_format, "auto", is_fast=False).decoder == live.decoder

    def _decode_batch(self, run: JobRun, engine: Engine, mine: list[tuple[JobItem, Tensor, Any]]) -> None:
        lacking = lacks_memory(engine, [item for item, _, _ in mine])
        if lacking:
            places = [run.job.items.index(mine[place][0]) for place in lacking]
            text = "the memory of a live stream is not here: its history is needed"
            bad = run.failed.items if run.failed else []
            run.failed = Failed(job=run.job.job, items=[*bad, *places], code="no_memory", text=text, retry=True)
            mine = [one for place, one in enumerate(mine) if place not in lacking]
        begin_anew(engine, [item for item, _, _ in mine])
        started_ns = self._now_ns()
        entries = [(place, item, latents) for place, (item, latents, _) in enumerate(mine)]
        histories = {place: run.histories[item.run] for place, (item, _, _) in enumerate(mine) if item.history}
        for pictures in pictures_of(engine, entries, self._decoder.memory_bytes, histories):
            decoded_ns = self._now_ns()
            for picture in pictures:
                item, _, wanted = mine[picture.place]
                if picture.is_approximate:
                    run.degrade(item.run, "approximate", "Colours approximate.")
                _Shower(self, run, item, engine.decoder, wanted, started_ns, decoded_ns).show(picture)
            self.busy_since_s = time.monotonic()
            self._pass_on(Progress(job=run.job.job))

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

    def _part_done(self, run: JobRun) -> None:
        if run.is_last():
            self._pass_on(run)


@dataclass(frozen=True, slots=True)
class _Shower:
    """Brings one decoded picture of an item into its renditions, and their packets on their way."""

    decoder: JobDecoder
    run: JobRun
    item: JobItem
    decoder_name: str
    renditions: tuple[Any, ...]
    started_ns: int
    decoded_ns: int

    def show(self, picture: Picture) -> None:
        """Queue it for every rendition that is wanted."""
        item = self.item
        for rendition, planes, size in render(picture.rgb, self.renditions, self.decoder._sizes):
            task = EncodeTask(
                run=item.run,
                rendition=rendition,
                attempt=self._attempt(rendition),
                keyframe=rendition == "live" and picture.index == 0 and (item.keyframe or item.kind == "clip"),
                pts=picture.pts,
                planes=planes,
                size=size,
                on_done=self._sender(rendition, picture.index, picture.count, picture.pts),
            )
            self.run.add()
            self.decoder._pool.submit(task)
            if item.kind == "live" and picture.index == picture.count - 1:
                self.decoder._last[item.run, rendition] = (self, task)

    def show_again(self, task: EncodeTask) -> None:
        """Queue the planes of an earlier job once more, as a keyframe."""
        self.run.add()
        on_done = self._sender(task.rendition, 0, 1, task.pts)
        self.decoder._pool.submit(replace(task, keyframe=True, on_done=on_done))

    def _attempt(self, rendition: Rendition) -> int:
        return self.item.attempt if rendition in ("record", "film") else 0

    def _sender(
        self, rendition: Rendition, index: int, count: int, pts: int
    ) -> Callable[[EncodedPicture | None], None]:
        def send(picture: EncodedPicture | None) -> None:
            if picture is not None:
                packet = self._packet(picture, rendition, index, count, pts)
                self.decoder._pass_on((self.run.job.packets_to, packet))
            elif rendition == "record":
                self.run.fail("internal", RuntimeError("encoding failed"), retry=True)
            self.decoder._part_done(self.run)

        return send

    def _packet(self, picture: EncodedPicture, rendition: Rendition, index: int, count: int, pts: int) -> Packet:
        item = self.item
        return Packet(
            stream=item.stream,
            run=item.run,
            seq=item.seq,
            index=index,
            count=count,
            rendition=rendition,
            attempt=self._attempt(rendition),
            is_keyframe=picture.is_keyframe,
            pts=pts,
            width=picture.width,
            height=picture.height,
            decoder=self.decoder_name,
            step=item.step,
            total_steps=item.total_steps,
            sigma=item.sigma,
            stamps=Stamps(
                sent_ns=item.sent_ns,
                received_ns=item.received_ns,
                started_ns=self.started_ns,
                decoded_ns=self.decoded_ns,
                encoded_ns=self.decoder._now_ns(),
            ),
            payload=picture.payload,
        )


def _is_same(one: Engine, other: Engine) -> bool:
    return (one.latent_format, one.decoder, one.dtype) == (other.latent_format, other.decoder, other.dtype)
