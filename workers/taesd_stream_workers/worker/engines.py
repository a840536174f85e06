"""The engines of a decode worker: opened at first use, and for each size of a live view the best one that keeps up."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import torch

from taesd_stream.config import Config, DecoderChoice
from taesd_stream.decoding.choice import NoDecoderError, decoder_files, open_engine
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.keeping_up import Shape, best_that_keeps_up, probe_of, seconds_a_picture
from taesd_stream.decoding.slicing import decode_budget
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.errors import WeightsError
from taesd_stream_workers.worker.degrading import CHEAPER, is_out_of_memory

logger = logging.getLogger(__name__)

MAX_MEMORIES: Final = 4096  # that one HELLO holds
MAX_SIZES: Final = 256  # of live views that are remembered
BESIDE_NANO: Final = 0.25  # of decoder.max_job_s
AGAIN_S: Final = 10.0  # so soon a choice that is not the best is measured again, then after twice that
LOOK_S: Final = 10.0  # so often the weights of a format are looked for

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class _View:
    """The automatic choice for one size, and why. until_s: when it is measured again, after so long a wait."""

    engine: Engine
    reason: str
    wait_s: float
    until_s: float


@dataclass(frozen=True, slots=True)
class _Probe:
    """What an engine took for one picture. enough_s: it was measured no more once it was as fast."""

    seconds: float
    enough_s: float
    until_s: float


class Engines:
    """Used by the thread that owns the device; `told`, `memories` and `forget` by any.

    A live view by choice "auto" takes the best decoder that gives a picture within `decoder.max_job_s`: so no stream
    waits longer for another one's picture than is promised. A full decoder has a quarter of that where nano is there,
    which shows nearly as much and four times as many streams. It is measured at the first picture of a size; where that
    was not the best decoder, again, ever more seldom: the machine may have been busy.
    budget_bytes: what decoding may take at once, as it was found before anything was loaded.
    """

    def __init__(self, config: Config, device: torch.device, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._weights_folder, self._decoder = config.weights_folder, config.decoder
        self._device = str(device)
        self.budget_bytes = decode_budget(config.decoder, device)
        self._opened: dict[tuple[str, DecoderChoice, bool], Engine] = {}
        self._clock_s = clock_s
        self._views: dict[tuple[str, Shape], _View] = {}
        self._probed: dict[tuple[Engine, Shape], _Probe] = {}
        self._told: dict[str, tuple[Engine, str]] = {}  # by format: what shows it, else what records it
        self._files: dict[str, tuple[float, list[Any]]] = {}  # by format: when they were looked for, what was there

    def told(self) -> dict[str, dict[str, Any]]:
        """What decodes each latent format, and why: the live view's engine, else the recordings'."""
        told = dict(self._told)  # before the engines: each that it names is among them
        history: dict[str, int] = {}
        for (latent_format, _, _), engine in list(self._opened.items()):
            history[latent_format] = max(engine.history, history.get(latent_format, 0))
        return {
            latent_format: {
                "decoder": engine.decoder,
                "reason": reason,
                "is_full": engine.is_full,
                "history": history.get(latent_format, engine.history),
            }
            for latent_format, (engine, reason) in told.items()
        }

    def memories(self) -> dict[str, int]:
        """Where each `live` run would go on."""
        found: dict[str, int] = {}
        for engine in list(self._opened.values()):
            if isinstance(engine, VideoEngine):
                for run, index in engine.memories.next_indices().items():
                    found[run] = max(index, found.get(run, 0))
        return dict(list(found.items())[-MAX_MEMORIES:])

    def forget(self, run: str) -> None:
        """Drop the memories of a run."""
        for engine in list(self._opened.values()):
            engine.forget(run)

    def shed_memories(self) -> None:
        """Memory is short: half of the live streams give theirs, and are sent their history again."""
        for engine in set(self._opened.values()):
            if isinstance(engine, VideoEngine):
                engine.memories.shed()

    def of_recordings(self, latent_format: str) -> Engine:
        """The best decoder there is, exact. Raises: NoDecoderError."""
        engine = self.open(latent_format, "auto", is_fast=False)
        self._told.setdefault(latent_format, (engine, engine.reason))
        return engine

    def of_view(self, latent_format: str, choice: DecoderChoice, shape: Shape) -> Engine:
        """What shows latents of that shape to viewers. Raises: NoDecoderError."""
        if choice == "auto":
            engine, reason = self._automatic(latent_format, shape)
        else:
            engine = self.open(latent_format, choice, is_fast=True)
            reason = engine.reason
        if choice == self._decoder.choice:  # not what a rule says of one stream
            self._told[latent_format] = (engine, reason)
        return engine

    def open(self, latent_format: str, choice: DecoderChoice, *, is_fast: bool) -> Engine:
        """An engine as `choice.open_engine` gives it, till its files change. Raises: NoDecoderError."""
        key = (latent_format, choice, is_fast)
        self._look_for_files(latent_format)
        if key not in self._opened:
            try:
                engine = open_engine(
                    latent_format,
                    weights_folder=self._weights_folder,
                    choice=choice,
                    device=self._device,
                    is_fast=is_fast,
                    is_float8=is_fast and self._decoder.float8,
                )
            except WeightsError as error:  # the folder went: what is kept waits for it
                raise NoDecoderError(f"No decoder for {latent_format}: {error}") from error
            same = next((one for one in self._opened.values() if _is_same(one, engine)), engine)
            self._opened[key] = same
            if same is engine:
                what = f"format={latent_format} decoder={engine.decoder} dtype={engine.dtype}"
                logger.info("engine_opened %s %s", what, engine.reason)
        return self._opened[key]

    def _look_for_files(self, latent_format: str) -> None:
        """Close a format's engines where other weights are there than they were opened with, as after a fetch."""
        looked_s, before = self._files.get(latent_format, (float("-inf"), []))
        now_s = self._clock_s()
        if now_s < looked_s + LOOK_S:
            return
        try:
            files = decoder_files(latent_format, self._weights_folder)
        except WeightsError:
            files = []
        _keep(self._files, latent_format, (now_s, files or before))
        if files and files != before:
            self._told.pop(latent_format, None)
            self._opened = {key: one for key, one in self._opened.items() if key[0] != latent_format}
            self._views = {key: one for key, one in self._views.items() if key[0] != latent_format}
            self._probed = {key: one for key, one in self._probed.items() if key[0].latent_format != latent_format}

    def _automatic(self, latent_format: str, shape: Shape) -> tuple[Engine, str]:
        """The best one that keeps up with a live view of that shape, and why."""
        self._look_for_files(latent_format)
        key = (latent_format, shape)
        view = self._views.get(key)
        if view is None or self._clock_s() >= view.until_s:
            try:
                engine, reason = self._measured(latent_format, shape)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                engine = view.engine if view is not None else self.open(latent_format, "auto", is_fast=True)
                reason = view.reason if view is not None else engine.reason
                # what was chosen stays, and is measured when there may be memory again
                view = _keep(self._views, key, _View(engine, reason, AGAIN_S, self._clock_s() + AGAIN_S))
                return view.engine, view.reason
            is_best = engine is self.open(latent_format, "auto", is_fast=True)
            wait_s = float("inf") if is_best else AGAIN_S if view is None else 2 * view.wait_s
            view = _keep(self._views, key, _View(engine, reason, wait_s, self._clock_s() + wait_s))
        return view.engine, view.reason

    def _measured(self, latent_format: str, shape: Shape) -> tuple[Engine, str]:
        engines = self._best_first(latent_format)
        if len(engines) == 1:
            return engines[0], engines[0].reason
        most_s, seconds = self._most_s(engines), []
        for engine, most in zip(engines, most_s, strict=True):
            seconds.append(self._seconds(engine, shape, most))
            if seconds[-1] <= most:
                break
        chosen = engines[best_that_keeps_up(seconds, most_s[: len(seconds)])]
        rows = zip(engines, seconds, most_s, strict=False)  # behind the first that keeps up none is measured
        figures = [f"{engine.decoder} {one:.2g} of {most:.2g} s" for engine, one, most in rows]
        measured = f"a picture of this size takes {', '.join(figures)} that it may take in a live view here"
        reason = "; ".join(filter(None, (engines[0].reason, measured)))
        logger.info("view_chosen format=%s shape=%s decoder=%s %s", latent_format, shape, chosen.decoder, reason)
        return chosen, reason

    def _seconds(self, engine: Engine, shape: Shape, most_s: float) -> float:
        """What a picture takes, measured lately or now: many sizes are measured by the same one."""
        probe, larger = probe_of(shape)
        key, enough_s, now_s = (engine, probe), most_s / larger, self._clock_s()
        known = self._probed.get(key)
        if known is None or now_s >= known.until_s or enough_s < known.seconds <= known.enough_s:
            seconds = seconds_a_picture(engine, probe, enough_s=enough_s, budget_bytes=self.budget_bytes)
            known = _keep(self._probed, key, _Probe(seconds, enough_s, now_s + AGAIN_S))
        return known.seconds * larger

    def _most_s(self, engines: list[Engine]) -> list[float]:
        """What a picture may take, by each decoder."""
        before_nano = [engine.decoder == "nano" for engine in engines[1:]] + [False]
        return [self._decoder.max_job_s * (BESIDE_NANO if is_before else 1) for is_before in before_nano]

    def _best_first(self, latent_format: str) -> list[Engine]:
        """The decoders of a format; the first one's reason says why there is no better. Raises: NoDecoderError."""
        engines = [self.open(latent_format, "auto", is_fast=True)]
        for choice in CHEAPER:
            with contextlib.suppress(NoDecoderError):
                engine = self.open(latent_format, choice, is_fast=True)
                if engine not in engines:
                    engines.append(engine)
        return engines


def _is_same(one: Engine, other: Engine) -> bool:
    return _facts(one) == _facts(other)


def _facts(engine: Engine) -> tuple[object, ...]:
    return engine.latent_format, engine.decoder, engine.dtype, engine.is_float8


def _keep(kept: dict[K, V], key: K, value: V) -> V:
    """Remember it, and of all the newest MAX_SIZES."""
    kept[key] = value
    if len(kept) > MAX_SIZES:
        del kept[next(iter(kept))]
    return value
