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
from taesd_stream.messages import Done, Drain, Echo, Forget, Job, Keyframe, WorkerHello
from taesd_stream.sockets import ClockOffset, WakePipe, connect_dealer, receive_parts
from taesd_stream_workers.addresses import workers_address
from taesd_stream_workers.devices import choose_device
from taesd_stream_workers.job_decoder import JobDecoder, JobRun
from taesd_stream_workers.lifecycle import HUNG_S, Lifecycle
from taesd_stream_workers.outgoing import Outgoing

logger = logging.getLogger(__name__)

CREDITS: Final = 2  # one job computes, the next waits beside it
HELLO_S: Final = 1.0
UNREACHABLE_S: Final = 10.0
MAX_ENCODE_THREADS: Final = 8


class DecodeWorker:
    """One device. This thread owns the sockets; the decoder has threads of its own."""

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self._config = config
        self._life = lifecycle
        self._wake = WakePipe()
        self._clock = ClockOffset()
        self._ready: deque[Any] = deque()  # from the decoder: see JobDecoder.pass_on
        self._held: list[JobRun] = []  # done, but their credit waits for room
        self._device, self._device_reason = choose_device(config.decoder.device, config.decoder.min_free_bytes)
        threads = max(2, min(MAX_ENCODE_THREADS, os.cpu_count() or 2))
        self._decoder = JobDecoder(config, self._device, self._now_ns, self._pass, threads=threads)
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
        self._outgoing = Outgoing(context, lambda stream: self._say(Keyframe(stream=stream, rendition="live")))
        self._life.on_stop(self._wake.wake)
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
            if self._decoder.error is not None:
                raise self._decoder.error
            if self._clock.offset_ns is None:
                if now - started_s > UNREACHABLE_S:
                    where = workers_address(self._config)
                    raise UnreachableError(f"no broker answers at {where}: start one with `taesd-stream broker`")
            elif self._decoder.is_warm and not is_ready:
                is_ready = True
                self._life.ready(device=str(self._device), reason=self._device_reason)
            if time.monotonic() - self._decoder.busy_since_s < HUNG_S:  # a hung device thread must not look alive
                self._life.tick()

    def _hello(self) -> WorkerHello:
        return WorkerHello(
            device=f"{self._device} ({self._device_reason})",
            credits=0 if self._is_draining else CREDITS,
            engines=self._decoder.engines(),
            memories=self._decoder.memories(),
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
            self._decoder.submit(JobRun(message))
        elif isinstance(message, Forget):
            self._decoder.forget(message.run)
        elif isinstance(message, Drain):
            self._is_draining = True

    def _forward(self) -> None:
        """Pass on what the other threads made; packets before the DONE that follows them."""
        while self._ready:
            item = self._ready.popleft()
            if isinstance(item, JobRun):
                self._held.append(item)
            elif isinstance(item, tuple):
                self._outgoing.put(*item)
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
            self._broker.send_multipart(wire.pack(message), zmq.NOBLOCK)
        except zmq.Again:  # the broker is away: it learns all from the next HELLO
            logger.debug("broker_away message=%s", type(message).__name__)

    def _pass(self, item: Any) -> None:
        self._ready.append(item)
        self._wake.wake()

    def _now_ns(self) -> int:
        """This moment on the broker's clock. Any thread."""
        return time.monotonic_ns() + (self._clock.offset_ns or 0)


def run_worker(config: Config, lifecycle: Lifecycle) -> None:
    """Run one decode worker in this thread until it is told to stop."""
    DecodeWorker(config, lifecycle).run()
