"""The decode worker: latents in, packets out. It asks for jobs by credits; pixels are born and encoded here only."""

from __future__ import annotations

import logging
import os
import secrets
import socket as os_socket
import time
from collections import deque
from typing import Any, Final

import torch
import zmq

from taesd_stream import wire
from taesd_stream.config import Config
from taesd_stream.errors import UnreachableError, WeightsError, WireError
from taesd_stream.keys import load_keys
from taesd_stream.messages import Done, Drain, Echo, Forget, Job, Keyframe, RefusedPeer, WorkerHello
from taesd_stream.sockets import ClockOffset, WakePipe, receive_parts
from taesd_stream_workers.role.addresses import dialled, workers_address
from taesd_stream_workers.role.gpus import stay_near
from taesd_stream_workers.role.lifecycle import HUNG_S, Lifecycle
from taesd_stream_workers.role.line import RoleLine
from taesd_stream_workers.worker.devices import choose_device
from taesd_stream_workers.worker.encode_pool import Lanes
from taesd_stream_workers.worker.encode_processes import EncodeProcesses
from taesd_stream_workers.worker.encode_threads import EncodeThreads
from taesd_stream_workers.worker.job_decoder import JobDecoder
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.outgoing import Outgoing
from taesd_stream_workers.worker.priority import give_way

logger = logging.getLogger(__name__)

CREDITS: Final = 2  # one job computes, the next waits beside it
GPU_CREDITS: Final = 3  # one comes over, one computes, one is encoded; a fourth makes each picture 8 ms later
HELLO_S: Final = 1.0
UNREACHABLE_S: Final = 10.0
DEAF_S: Final = 3.0  # a broker that answers no HELLO for so long is not there
DRAIN_S: Final = 30.0
# Of live pictures at full load: twice as many threads wait for the GIL more than they encode; beside a GPU 12 processes
# of a thread each made 3 % more pictures than 8.
MAX_AT_ONCE: Final = 8


class DecodeWorker:
    """One device. This thread owns the sockets; the decoder has threads of its own."""

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self._config = config
        self._life = lifecycle
        self._wake = WakePipe()
        self._clock = ClockOffset()
        self._ready: deque[Any] = deque()  # from the decoder: see JobDecoder.pass_on
        self._is_woken = False  # it will look at them without another word
        self._held: list[JobRun] = []  # done, but their credit waits for room
        self._device, self._device_reason = choose_device(config.decoder.device, config.decoder.min_free_bytes)
        self._near = stay_near(self._device.index or 0) if self._device.type == "cuda" else None
        self._decoder = JobDecoder(config, self._device, self._now_ns, self._pass, lanes=lanes_for(self._device))
        self._drains_since_s: float | None = None  # told to go; the broker moves its streams first
        self._is_let_go = False
        self._has_news = False  # for the next HELLO, at once
        self._heard_s = time.monotonic()
        self._open_jobs = 0

    def run(self) -> None:
        """Work until told to stop. Raises: UnreachableError when none answers at the start."""
        folder = self._config.weights_folder
        if folder is not None and not folder.is_dir():
            raise WeightsError(f"weights.folder = {folder}: there is no such folder")
        if self._config.decoder.threads:
            torch.set_num_threads(self._config.decoder.threads)
        logger.info("decoder_device device=%s reason=%s", self._device, self._device_reason)
        if self._near is not None:
            logger.info("decoder_processors %s", self._near)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.linger = 0
        name = f"{os_socket.gethostname()}:{self._device}:{os.getpid()}:{secrets.token_hex(4)}"
        where = dialled(workers_address(self._config))
        folder = self._config.keys_folder
        keys = load_keys(folder) if folder is not None else None
        self._line = RoleLine(context, zmq.DEALER, where, keys=keys, identity=name.encode()[:200])
        self._outgoing = Outgoing(context, lambda stream: self._say(Keyframe(stream=stream, rendition="live")), keys)
        self._life.on_stop(self._wake.wake)
        self._life.on_drain(self._drain)
        self._decoder.start()
        try:
            self._loop()
        finally:
            self._life.end()
            self._decoder.close()
            self._forward()
            self._outgoing.send()
            self._outgoing.close()
            context.destroy()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._line.socket, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        started_s, next_hello_s, is_ready = time.monotonic(), 0.0, False
        while not self._life.stop.is_set() and not self._is_drained():
            now = time.monotonic()
            self._line.attend(poller)
            if now >= next_hello_s or self._has_news:
                self._has_news = False
                self._say(self._hello())
                self._decoder.beat()
                next_hello_s = now + HELLO_S
            due = dict(poller.poll(50 if self._outgoing.held_bytes else 200))
            # whatever lets go of the GIL waits to get it back behind the encoders: nothing is asked for nothing
            if self._wake.fileno() in due:
                self._wake.drain()
            if self._line.socket in due:
                self._receive()
            self._is_woken = False  # before it looks: what comes later wakes it again
            self._forward()
            self._outgoing.send()
            if self._decoder.error is not None:
                raise self._decoder.error
            if self._clock.offset_ns is None:
                if now - started_s > UNREACHABLE_S:
                    silent = f"no broker answers at {self._line.address}: start one with `taesd-stream broker`"
                    raise UnreachableError(self._line.error or silent)
            elif self._decoder.is_warm and not is_ready:
                is_ready = True
                self._life.ready(device=str(self._device), reason=self._device_reason)
            if time.monotonic() - self._decoder.busy_since_s < HUNG_S:  # a hung device thread must not look alive
                self._life.tick()

    def _drain(self) -> None:
        """SIGTERM: take no more, send what is done, then go. In the main thread, between two of its instructions."""
        self._drains_since_s, self._has_news = time.monotonic(), True
        self._wake.wake()

    def _is_drained(self) -> bool:
        """Whether it may go: nothing is left to do, and the broker knows, or is not there; or it waited too long."""
        if self._drains_since_s is None:
            return False
        now = time.monotonic()
        is_idle = not self._open_jobs and not self._outgoing.held_bytes
        is_free = self._is_let_go or now - self._heard_s > DEAF_S
        return (is_idle and is_free) or now - self._drains_since_s > DRAIN_S

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            device=f"{self._device} ({self._device_reason})",
            credits=GPU_CREDITS if self._device.type == "cuda" else CREDITS,
            draining=self._drains_since_s is not None,
            engines=self._decoder.engines.told(),
            memories=self._decoder.engines.memories(),
            encoders=self._decoder.encoders(),
            echo_ns=time.monotonic_ns(),
            offset_ns=self._clock.offset_ns or 0,
        )

    def _receive(self) -> None:
        while True:
            try:
                parts = receive_parts(self._line.socket)
            except zmq.Again:
                return
            self._heard_s = time.monotonic()
            try:
                self._handle(wire.unpack(parts, wire.TO_WORKER))
            except WireError as error:
                logger.warning("broker_message_bad error=%s", error)

    def _handle(self, message: Any) -> None:
        if isinstance(message, Echo):
            self._clock.add(message.echo_ns, message.now_ns, time.monotonic_ns())
        elif isinstance(message, Job):
            self._open_jobs += 1
            self._decoder.submit(JobRun(message))
        elif isinstance(message, Forget):
            self._decoder.forget(message.run)
        elif isinstance(message, Drain):
            self._is_let_go = True
        elif isinstance(message, RefusedPeer):
            self._line.refused(message.text)

    def _forward(self) -> None:
        """Pass on what the other threads made; packets before the DONE that follows them."""
        while self._ready:
            item = self._ready.popleft()
            if isinstance(item, JobRun):
                self._held.append(item)
            elif isinstance(item, tuple):
                endpoint, packet = item
                self._outgoing.put(dialled(endpoint, beside=self._line.address), packet)
            else:
                self._say(item)
        while self._held and not self._outgoing.is_full:
            done = self._held.pop(0)
            self._open_jobs -= 1
            ms = (time.monotonic() - done.started_s) * 1000
            degraded = tuple(done.degraded.values())
            self._say(done.failed or Done(job=done.job.job, ms=ms, degraded=degraded))

    def _say(self, message: Any) -> None:
        try:
            self._line.socket.send_multipart(wire.pack(message), zmq.NOBLOCK)
        except zmq.Again:  # the broker is away: it learns all from the next HELLO
            logger.debug("broker_away message=%s", type(message).__name__)

    def _pass(self, item: Any) -> None:
        self._ready.append(item)
        if not self._is_woken:
            self._is_woken = True
            self._wake.wake()

    def _now_ns(self) -> int:
        """This moment on the broker's clock. Any thread."""
        return time.monotonic_ns() + (self._clock.offset_ns or 0)


def encoders_at_once() -> int:
    """How many pictures a worker encodes at once, films' not counted."""
    return max(2, min(MAX_AT_ONCE, processors()))


def lanes_for(device: torch.device) -> Lanes:
    """Where a worker of this device encodes: beside a GPU in processes, where it is all that is done on the host."""
    live = encoders_at_once()
    films = max(1, live // 4)
    if device.type == "cuda" and EncodeProcesses.are_possible():
        return EncodeProcesses(live, films)
    return EncodeThreads(live, films)


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_worker(config: Config, lifecycle: Lifecycle) -> None:
    """Run one decode worker in this thread until it is told to stop."""
    give_way()
    DecodeWorker(config, lifecycle).run()
