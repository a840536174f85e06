"""What this machine can do, measured part by part with the daemon's own parts: broker, decoders, encoders, a worker.

A `Bench` is a list of steps; each puts its figures into the report, so that one that is broken off has those so far.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from taesd_stream.capacity import LOAD_FACTOR, bottleneck, held_per_s, streams_held, wait_s
from taesd_stream.config import Config
from taesd_stream.decoding.choice import Kind, NoDecoderError, open_engine
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.host_copies import HostCopies
from taesd_stream.decoding.slicing import decode_budget
from taesd_stream.frames import Rendition
from taesd_stream.media.encoder import JpegEncoder, Planes, encoder_for
from taesd_stream_workers.bench.broker_load import BrokerLoad, running_broker
from taesd_stream_workers.bench.worker_load import PICTURES, Case, melting_latents, worker_frame_s
from taesd_stream_workers.worker.decode_worker import encoders_at_once, processors
from taesd_stream_workers.worker.devices import choose_device
from taesd_stream_workers.worker.rendering import Sizes, render

Row: TypeAlias = dict[str, Any]
Step: TypeAlias = tuple[str, Callable[[], None]]  # what it measures, in words

BATCHES: Final = (1, 4, 16)
LEAST_RUNS: Final = 3  # of whatever is slow
PACES_PER_S: Final = (2, 5)  # of samplers: a typical one of pictures, and a quick one


class Bench:
    """`steps` are to be called in their order, by one thread; `report()` is right after any of them."""

    def __init__(self, config: Config, formats: list[str], sizes_px: list[int], seconds: float) -> None:
        """Open the device. Raises: ConfigError when it is not there."""
        self._seconds = seconds
        self._formats, self._sizes_px = formats, sizes_px
        self._device, self._why_device = choose_device(config.decoder.device, config.decoder.min_free_bytes)
        budget = {"memory_bytes": decode_budget(config.decoder, self._device)}  # before our own decoders take of it
        # a rule could choose another decoder than is measured
        self._config = config.with_values(decoder=budget).model_copy(update={"rules": ()})
        if config.decoder.threads:
            torch.set_num_threads(config.decoder.threads)
        self._sizes = Sizes(config.streamer.live_max_px, config.streamer.thumb_max_px)
        self._engines: dict[tuple[str, Kind], Engine] = {}
        self._broker: list[Row] = []
        self._hellos: list[Row] = []
        self._decode: list[Row] = []
        self._encode: list[Row] = []
        self._worker: list[Row] = []

    def steps(self, stack: ExitStack) -> list[Step]:
        """All that is to be measured; decoders are opened here. stack: closes what the steps start."""
        cases = [
            Case(name, size_px, kind)
            for name in self._formats
            for kind in self._kinds(name)
            for size_px in self._sizes_px
        ]
        found: list[Step] = list(self._broker_steps(stack, sorted({case.nbytes for case in cases})))
        for case in cases:
            what = f"{case.latent_format} {case.size_px} px, {self._engine(case).decoder}"
            found.append((f"decode {what}", partial(self._measure_decode, case)))
            found.append((f"encode {what}", partial(self._measure_encode, case)))
            found.append((f"worker {what}", partial(self._measure_worker, case)))
        return found

    def report(self) -> Row:
        """What was measured so far, and what it means: `held` has a row a case whose every part is there."""
        return {
            "machine": {
                "processors": processors(),
                "device": f"{self._device} ({self._why_device})",
                "decode_threads": torch.get_num_threads() if self._device.type == "cpu" else None,
                "encoders_at_once": encoders_at_once(),
                "torch": torch.__version__,
            },
            "broker": self._broker,
            "hellos": self._hellos,
            "decode": self._decode,
            "encode": self._encode,
            "worker": self._worker,
            "load_factor": LOAD_FACTOR,
            "held": [row for worker in self._worker if (row := self._held(worker)) is not None],
        }

    def _held(self, worker: Row) -> Row | None:
        """How many frames a second, and streams, the parts hold together."""
        case = {key: worker[key] for key in ("format", "size_px", "decoder")}
        broker = next((row["frames_s"] for row in self._broker if row["bytes"] == worker["bytes"]), None)
        decode = [row["frames_s"] for row in self._decode if row.items() >= case.items()]
        encode = [row["frames_s"] for row in self._encode if row.items() >= (case | {"rendition": "live"}).items()]
        if broker is None or not decode or not encode:
            return None
        rates = {"broker": broker, "decode": max(decode), "encode": encode[0]}
        whole = {"broker": broker, "worker": min(worker["frames_s"], rates["decode"], rates["encode"])}
        held = held_per_s(whole)
        limit = bottleneck(whole)
        streams = {f"streams_at_{pace}_s": streams_held(held, pace) for pace in PACES_PER_S}
        return {
            **case,
            **{f"{stage}_s": rate for stage, rate in rates.items()},
            "worker_s": worker["frames_s"],
            "held_s": round(held, 2),
            "wait_p99_ms": round(1000 * wait_s(held, 1 / whole[limit]), 2),
            **streams,
            "limit": "broker" if limit == "broker" else min(("decode", "encode"), key=lambda stage: rates[stage]),
        }

    # --- broker ---

    def _broker_steps(self, stack: ExitStack, sizes: list[int]) -> Iterator[Step]:
        loads: list[BrokerLoad] = []

        def start() -> None:
            loads.append(stack.enter_context(BrokerLoad(stack.enter_context(running_broker()))))

        def hellos() -> None:
            rate = loads[0].hellos(self._seconds / 2)
            self._hellos.append({"per_s": round(rate.per_s, 1), "thread_ms": _rounded(rate.thread_ms)})

        def frames(nbytes: int) -> None:
            rates = loads[0].measure(nbytes, 2 * self._seconds)
            self._broker.append(
                {
                    "bytes": nbytes,
                    "frames_s": round(rates.frames.per_s, 1),
                    "thread_ms": _rounded(rates.frames.thread_ms),
                    "waiting_s": round(rates.waiting.per_s, 1),
                    "waiting_thread_ms": _rounded(rates.waiting.thread_ms),
                    **_percentiles([age / 1000 for age in rates.ages_ms]),
                }
            )

        yield "start a broker", start
        yield "broker, HELLO", hellos
        for nbytes in sizes:
            yield f"broker, {nbytes >> 10} KiB", partial(frames, nbytes)
        yield "stop the broker", stack.close

    # --- decode ---

    def _kinds(self, name: str) -> list[Kind]:
        """The kinds of decoders of a format that are to be had here, the best first."""
        found: list[Kind] = []
        kinds: tuple[Kind, ...] = ("tiny", "nano", "linear")
        for kind in kinds:
            try:
                self._engines[name, kind] = open_engine(
                    name,
                    weights_folder=self._config.weights_folder,
                    choice=kind,
                    device=str(self._device),
                    is_fast=True,
                    is_float8=self._config.decoder.float8,
                )
            except NoDecoderError:
                continue
            found.append(kind)
        return found

    def _engine(self, case: Case) -> Engine:
        return self._engines[case.latent_format, case.kind]

    def _words(self, case: Case) -> Row:
        return {"format": case.latent_format, "size_px": case.size_px, "decoder": self._engine(case).decoder}

    def _measure_decode(self, case: Case) -> None:
        """Batches that the broker would give: those of more than one frame within `decoder.max_job_s`."""
        engine = self._engine(case)
        frame_s = 0.0
        for batch in BATCHES:
            if batch > 1 and (batch * frame_s > self._config.decoder.max_job_s or batch > self._most):
                return
            latents = melting_latents(case.shape, batch).to(self._device)
            times_s = self._timed(partial(self._decode_once, engine, latents))
            frame_s = float(np.median(times_s)) / batch
            self._decode.append({**self._words(case), "batch": batch, **_percentiles(times_s), **_rate(frame_s)})

    @property
    def _most(self) -> int:
        return self._config.decoder.max_batch_size

    def _decode_once(self, engine: Engine, latents: Tensor) -> None:
        for _ in engine.decode_planes(latents, budget_bytes=self._config.decoder.memory_bytes):
            pass
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    # --- encode ---

    def _measure_encode(self, case: Case) -> None:
        """Pictures of this decoder, each unlike the one before, through one encoder; all threads do so side by side."""
        for rendition, planes in self._planes(case).items():
            times_s, kib = self._encode_all(rendition, planes)
            rate = _rate(float(np.median(times_s)) / encoders_at_once())
            words = {**self._words(case), "rendition": rendition, "kib": kib}
            self._encode.append({**words, **_percentiles(times_s), **rate})

    def _encode_all(self, rendition: Rendition, planes: list[Planes]) -> tuple[list[float], float]:
        """Seconds of each picture, and KiB of the middle one."""
        encoder = encoder_for(rendition, is_one_of_many=True)
        turn = itertools.count()
        nbytes: list[int] = []

        def encode() -> None:
            number = next(turn)
            picture = planes[number % len(planes)]
            if isinstance(encoder, JpegEncoder):
                encoded = encoder.encode(picture)
            else:
                encoded = encoder.encode(picture, 9000 * number)
            nbytes.append(len(encoded.payload))

        times_s = self._timed(encode, self._seconds / 2)
        encoder.close()
        return times_s, round(float(np.median(nbytes)) / 1024, 1)

    def _planes(self, case: Case) -> dict[Rendition, list[Planes]]:
        """Pictures as the encoders get them, forth and back so that each is like its neighbours."""
        found: dict[Rendition, list[Planes]] = {"live": [], "thumb": []}
        copies = HostCopies(self._device)
        engine = self._engine(case)
        frame_s = next(row["p50_ms"] for row in self._decode if row.items() >= self._words(case).items()) / 1000
        count = max(LEAST_RUNS, min(PICTURES, round(2 * self._seconds / frame_s)))  # no minute for a slow decoder's
        for latent in melting_latents(case.shape, count):
            for _, rgb in engine.decode(latent[None], budget_bytes=self._config.decoder.memory_bytes):
                for one in render(list(rgb), [tuple(found)], self._sizes, copies):
                    one.copy.wait()
                    found[one.rendition].append(np.array(one.planes))
        return {rendition: planes + planes[-2:0:-1] for rendition, planes in found.items()}

    # --- a whole worker: what decoding and encoding do side by side, and Python between them ---

    def _measure_worker(self, case: Case) -> None:
        """In the largest batches that were worth measuring: `_measure_decode`."""
        rows = [row for row in self._decode if row.items() >= self._words(case).items()]
        batch = max((row["batch"] for row in rows), default=1)
        frame_s = worker_frame_s(self._config, self._device, case, batch, self._seconds)
        self._worker.append({**self._words(case), "bytes": case.nbytes, "batch": batch, **_rate(frame_s)})

    def _timed(self, work: Callable[[], None], seconds: float | None = None) -> list[float]:
        """Seconds of each run of `work`, for so long and at least a few times; warmed up before."""
        seconds = self._seconds if seconds is None else seconds
        until_s = time.perf_counter() + seconds / 5
        work()
        while time.perf_counter() < until_s:
            work()
        times_s: list[float] = []
        began_s = time.perf_counter()
        while len(times_s) < LEAST_RUNS or time.perf_counter() - began_s < seconds:
            before_s = time.perf_counter()
            work()
            times_s.append(time.perf_counter() - before_s)
        return times_s


def _rounded(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else round(milliseconds, 4)


def _percentiles(times_s: list[float]) -> Row:
    p50, p95 = np.percentile(times_s, [50, 95])
    return {"p50_ms": round(1000 * float(p50), 3), "p95_ms": round(1000 * float(p95), 3)}


def _rate(frame_s: float) -> Row:
    return {"ms_per_frame": round(1000 * frame_s, 3), "frames_s": round(1 / frame_s, 2)}
