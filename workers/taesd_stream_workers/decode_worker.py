"""The decode worker: latents in, packets out. It asks for jobs by credits; pixels are born and encoded here only."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import socket as os_socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import zmq
from torch import Tensor

from taesd_stream import wire
from taesd_stream.config import Config
from taesd_stream.decoding.engine import Engine, NoDecoderError, latents_from_payload, open_engine
from taesd_stream.errors import ConfigError, UnreachableError, WeightsError, WireError
from taesd_stream.frames import Packet, Stamps
from taesd_stream.media.encoder import EncodedPicture
from taesd_stream.messages import Done, Drain, Echo, Failed, Forget, Job, JobItem, Progress, WorkerHello
from taesd_stream.sockets import ClockOffset, WakePipe, connect_dealer, receive_parts
from taesd_stream_workers.addresses import workers_address
from taesd_stream_workers.encode_pool import EncodePool, EncodeTask
from taesd_stream_workers.lifecycle import HUNG_S, Lifecycle
from taesd_stream_workers.outgoing import Outgoing
from taesd_stream_workers.rendering import Sizes, as_pictures, finite, grid, render

logger = logging.getLogger(__name__)

CREDITS: Final = 2  # one job computes, the next waits beside it
HELLO_S: Final = 1.0
UNREACHABLE_S: Final = 10.0


@dataclass(slots=True)
class _JobRun:
    """A job in work: how many pictures are still to be encoded, and what went wrong."""

    job: Job
    started_s: float
    waiting: int = 1  # one for the decoding itself
    failed: Failed | None = None


class DecodeWorker:
    """One device. The main thread owns the sockets, a device thread decodes, a pool encodes."""

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self._config = config
        self._life = lifecycle
        self._wake = WakePipe()
        self._clock = ClockOffset()
        self._jobs: queue.SimpleQueue[_JobRun | None] = queue.SimpleQueue()
        self._ready: deque[Any] = deque()  # from the other threads: messages to the broker, packets with their endpoint
        self._held: list[_JobRun] = []  # done, but their credit waits for room
        self._engines: dict[tuple[str, str, bool], Engine] = {}
        self._pool = EncodePool(max(2, min(8, os.cpu_count() or 2)))
        self._sizes = Sizes(config.streamer.live_max_px, config.streamer.thumb_max_px)
        self._device, self._device_reason = choose_device(config.decoder.device, config.decoder.min_free_bytes)
        self._busy_since_s = float("inf")
        self._is_draining = False
        self._open_jobs = 0

    def run(self) -> None:
        """Work until told to stop. Raises: UnreachableError when none answers at the start."""
        folder = self._config.weights_folder
        if folder is not None and not folder.is_dir():
            raise WeightsError(f"weights.folder = {folder}: there is no such folder")
        if self._config.decoder.threads:
            torch.set_num_threads(self._config.decoder.threads)
        logger.info("decoder_device device=%s reason=%s", self._device, self._device_reason)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.linger = 0
        name = f"{os_socket.gethostname()}:{self._device}:{os.getpid()}:{secrets.token_hex(4)}"
        self._broker = connect_dealer(context, workers_address(self._config), identity=name.encode()[:200])
        self._outgoing = Outgoing(context)
        self._life.on_stop(self._wake.wake)
        device_thread = threading.Thread(target=self._decode_jobs, name="device")
        device_thread.start()
        self._pool.start()
        try:
            self._loop()
        finally:
            self._life.end()
            self._jobs.put(None)
            device_thread.join()
            self._pool.close()
            self._forward()
            self._outgoing.send()
            self._outgoing.close()
            context.destroy()

    # --- main thread: sockets ---

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._broker, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        started_s, next_hello_s, is_ready = time.monotonic(), 0.0, False
        while not self._life.stop.is_set() and not (self._is_draining and not self._open_jobs):
            now = time.monotonic()
            if now >= next_hello_s:
                self._say(self._hello())
                next_hello_s = now + HELLO_S
            poller.poll(50 if self._outgoing.held_bytes else 200)
            self._wake.drain()
            self._receive()
            self._forward()
            self._outgoing.send()
            if self._clock.offset_ns is None:
                if now - started_s > UNREACHABLE_S:
                    where = workers_address(self._config)
                    raise UnreachableError(f"no broker answers at {where}: start one with `taesd-stream broker`")
            elif not is_ready:
                is_ready = True
                self._life.ready(device=str(self._device), reason=self._device_reason)
            if time.monotonic() - self._busy_since_s < HUNG_S:  # a hung device thread must not look alive
                self._life.tick()

    def _hello(self) -> WorkerHello:
        engines = {
            latent_format: {"decoder": engine.decoder, "reason": engine.reason, "is_full": engine.is_full}
            for (latent_format, _, is_fast), engine in list(self._engines.items())
            if is_fast
        }
        return WorkerHello(
            device=f"{self._device} ({self._device_reason})",
            credits=0 if self._is_draining else CREDITS,
            engines=engines,
            echo_ns=time.monotonic_ns(),
            offset_ns=self._clock.offset_ns or 0,
        )

    def _receive(self) -> None:
        while True:
            try:
                parts = receive_parts(self._broker)
            except zmq.Again:
                return
            try:
                self._handle(wire.unpack(parts, wire.TO_WORKER))
            except WireError as error:
                logger.warning("broker_message_bad error=%s", error)

    def _handle(self, message: Any) -> None:
        if isinstance(message, Echo):
            self._clock.add(message.echo_ns, message.now_ns, time.monotonic_ns())
        elif isinstance(message, Job):
            self._open_jobs += 1
            self._jobs.put(_JobRun(message, time.monotonic()))
        elif isinstance(message, Forget):
            self._pool.forget(message.run)
        elif isinstance(message, Drain):
            self._is_draining = True

    def _forward(self) -> None:
        """Pass on what the other threads made; packets before the DONE that follows them."""
        while self._ready:
            item = self._ready.popleft()
            if isinstance(item, _JobRun):
                self._held.append(item)
            elif isinstance(item, tuple):
                self._outgoing.put(*item)
            else:
                self._say(item)
        while self._held and not self._outgoing.is_full:
            done = self._held.pop(0)
            self._open_jobs -= 1
            ms = (time.monotonic() - done.started_s) * 1000
            self._say(done.failed or Done(job=done.job.job, ms=ms))

    def _say(self, message: Any) -> None:
        try:
            self._broker.send_multipart(wire.pack(message), zmq.NOBLOCK)
        except zmq.Again:  # the broker is away: it learns all from the next HELLO
            logger.debug("broker_away message=%s", type(message).__name__)

    def _pass(self, item: Any) -> None:
        self._ready.append(item)
        self._wake.wake()

    # --- device thread ---

    def _decode_jobs(self) -> None:
        while (run := self._jobs.get()) is not None:
            self._busy_since_s = run.started_s = time.monotonic()
            try:
                self._decode(run)
            except NoDecoderError as error:
                run.failed = _failure(run.job, "no_decoder", error, retry=False)
            except torch.OutOfMemoryError as error:
                run.failed = _failure(run.job, "memory", error, retry=True)
            except Exception as error:  # the worker's outermost loop: this job is lost, the next may do
                logger.exception("job_failed job=%d", run.job.job)
                run.failed = _failure(run.job, "internal", error, retry=True)
            self._busy_since_s = float("inf")
            self._part_done(run)

    def _decode(self, run: _JobRun) -> None:
        job = run.job
        bad: list[int] = []
        good: list[tuple[JobItem, Tensor]] = []
        for place, (item, payload) in enumerate(zip(job.items, job.payloads, strict=True)):
            latents = as_pictures(latents_from_payload(payload, item.dtype, item.shape))
            if finite(latents):
                good.append((item, latents))
            else:
                bad.append(place)
        if bad:
            text = "latents hold NaN or infinite values: no picture can be made of them"
            run.failed = Failed(job=job.job, items=bad, code="bad_frame", text=text, retry=False)
        for for_record in (False, True):
            self._decode_with(run, good, for_record)

    def _decode_with(self, run: _JobRun, items: list[tuple[JobItem, Tensor]], for_record: bool) -> None:
        """Decode what one engine serves: live pictures by `decoder.choice`, recordings by the full decoder, exactly.

        Where both are the same network, an item that is recorded is decoded once, exactly, for all its renditions.
        """
        latent_format = run.job.latent_format
        if for_record and not any("record" in item.renditions for item, _ in items):
            return
        live = self._engine(latent_format, self._config.decoder.choice, is_fast=True)
        engine = self._engine(latent_format, "auto", is_fast=False) if for_record else live
        mine: list[tuple[JobItem, Tensor, Any]] = []
        for item, latents in items:
            is_recorded = "record" in item.renditions
            wanted = tuple(
                rendition
                for rendition in item.renditions
                if for_record == (is_recorded and (rendition == "record" or self._records_as_it_shows(live)))
            )
            if wanted:
                mine.append((item, latents, wanted))
        if mine:
            self._decode_batch(run, engine, mine)

    def _records_as_it_shows(self, live: Engine) -> bool:
        """Whether recordings of the format are decoded by the network that shows it live."""
        return self._engine(live.latent_format, "auto", is_fast=False).decoder == live.decoder

    def _decode_batch(self, run: _JobRun, engine: Engine, mine: list[tuple[JobItem, Tensor, Any]]) -> None:
        started_ns = self._now_ns()
        owners = [(place, index) for place, (_, latents, _) in enumerate(mine) for index in range(len(latents))]
        batch = torch.cat([latents for _, latents, _ in mine])
        waiting: dict[int, list[Tensor]] = {}
        for part, rgb in engine.decode(batch, budget_bytes=self._config.decoder.memory_bytes):
            decoded_ns = self._now_ns()
            for (place, index), picture in zip(owners[part], rgb, strict=True):
                item, latents, wanted = mine[place]
                show = _Shower(self, run, item, engine.decoder, wanted, started_ns, decoded_ns)
                if item.kind != "steps" or len(latents) == 1:
                    show(picture, index, len(latents))
                    continue
                sheet = waiting.setdefault(place, [])
                sheet.append(picture)
                if len(sheet) == len(latents):
                    show(grid(torch.stack(waiting.pop(place))), 0, 1)
            self._busy_since_s = time.monotonic()
            self._pass(Progress(job=run.job.job))

    def _engine(self, latent_format: str, choice: Any, *, is_fast: bool) -> Engine:
        key = (latent_format, choice, is_fast)
        if key not in self._engines:
            engine = open_engine(
                latent_format,
                weights_folder=self._config.weights_folder,
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

    def _now_ns(self) -> int:
        """This moment on the broker's clock."""
        return time.monotonic_ns() + (self._clock.offset_ns or 0)

    def _part_done(self, run: _JobRun) -> None:
        """One of the pictures, or the decoding, is over; the last gives the credit back. Any thread."""
        with _COUNTING:
            run.waiting -= 1
            is_last = run.waiting == 0
        if is_last:
            self._pass(run)

    def encode(self, run: _JobRun, task: EncodeTask) -> None:
        """Queue one picture of a job for encoding."""
        with _COUNTING:
            run.waiting += 1
        self._pool.submit(task)


_COUNTING = threading.Lock()


@dataclass(frozen=True, slots=True)
class _Shower:
    """Brings one decoded picture of an item into its renditions, and their packets on their way."""

    worker: DecodeWorker
    run: _JobRun
    item: JobItem
    decoder: str
    renditions: tuple[Any, ...]
    started_ns: int
    decoded_ns: int

    def __call__(self, picture: Tensor, index: int, count: int) -> None:
        """picture: (3,H,W) in [0, 1]."""
        item = self.item
        for rendition, planes, size in render(picture, self.renditions, self.worker._sizes):
            task = EncodeTask(
                run=item.run,
                rendition=rendition,
                attempt=item.attempt if rendition == "record" else 0,
                keyframe=rendition == "live" and index == 0 and (item.keyframe or item.kind == "clip"),
                pts=item.pts + index * item.picture_ticks,
                planes=planes,
                size=size,
                on_done=self._sender(rendition, index, count),
            )
            self.worker.encode(self.run, task)

    def _sender(self, rendition: Any, index: int, count: int) -> Callable[[EncodedPicture | None], None]:
        def send(picture: EncodedPicture | None) -> None:
            if picture is not None:
                packet = self._packet(picture, rendition, index, count)
                self.worker._pass((self.run.job.packets_to, packet))
            elif rendition == "record":
                self.run.failed = _failure(self.run.job, "internal", RuntimeError("encoding failed"), retry=True)
            self.worker._part_done(self.run)

        return send

    def _packet(self, picture: EncodedPicture, rendition: Any, index: int, count: int) -> Packet:
        item = self.item
        return Packet(
            stream=item.stream,
            run=item.run,
            seq=item.seq,
            index=index,
            count=count,
            rendition=rendition,
            attempt=item.attempt if rendition == "record" else 0,
            is_keyframe=picture.is_keyframe,
            pts=item.pts + index * item.picture_ticks,
            width=picture.width,
            height=picture.height,
            decoder=self.decoder,
            step=item.step,
            total_steps=item.total_steps,
            sigma=item.sigma,
            stamps=Stamps(
                sent_ns=item.sent_ns,
                received_ns=item.received_ns,
                started_ns=self.started_ns,
                decoded_ns=self.decoded_ns,
                encoded_ns=self.worker._now_ns(),
            ),
            payload=picture.payload,
        )


def _failure(job: Job, code: str, error: Exception, *, retry: bool) -> Failed:
    return Failed(job=job.job, items=[], code=code, text=str(error)[:500] or type(error).__name__, retry=retry)


def _is_same(one: Engine, other: Engine) -> bool:
    return (one.latent_format, one.decoder, one.dtype) == (other.latent_format, other.decoder, other.dtype)


def choose_device(wanted: str, min_free_bytes: int) -> tuple[torch.device, str]:
    """The device to decode on, and why: `auto` takes a GPU only where the sampler has left it enough memory.

    Raises: ConfigError when a named device is not there.
    """
    if wanted != "auto":
        try:
            device = torch.device(wanted)
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
            reason = next(iter(str(error).splitlines()), "torch sees no such device")
            raise ConfigError(f"decoder.device = {wanted}: {reason[:200]}; auto takes what is here") from error
        return device, "as decoder.device says"
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no CUDA device"
    free_bytes, _ = torch.cuda.mem_get_info()
    if free_bytes < min_free_bytes:
        return torch.device("cpu"), f"the GPU has {free_bytes >> 20} MiB free, under decoder.min_free_bytes"
    return torch.device("cuda"), f"the GPU has {free_bytes >> 20} MiB free"


def run_worker(config: Config, lifecycle: Lifecycle) -> None:
    """Run one decode worker in this thread until it is told to stop."""
    DecodeWorker(config, lifecycle).run()
