"""The streamer: packets in, viewers and files out. One thread for the sockets, one for the web, one for the files."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterator
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.config import Config
from taesd_stream.errors import ConfigError, WireError
from taesd_stream.folder_lock import FolderLock
from taesd_stream.frames import Packet
from taesd_stream.messages import Echo, Gap, RefusedPeer, State, StreamerHello
from taesd_stream.sockets import ClockOffset, WakePipe
from taesd_stream_workers.role.addresses import bound_address, dialled, packets_address, workers_address
from taesd_stream_workers.role.gate import Door, Gate
from taesd_stream_workers.role.lifecycle import Lifecycle
from taesd_stream_workers.role.line import RoleLine
from taesd_stream_workers.role.open_files import allow_many
from taesd_stream_workers.role.seldom import Seldom
from taesd_stream_workers.streamer.broker_outbox import BrokerOutbox
from taesd_stream_workers.streamer.hub import Hub
from taesd_stream_workers.streamer.latency import Latency
from taesd_stream_workers.streamer.push import Pushes
from taesd_stream_workers.streamer.recorder import Recorder
from taesd_stream_workers.streamer.web.server import WebServer

logger = logging.getLogger(__name__)

MAX_DRAIN: Final = 256
TO_BROKER_HWM: Final = 4096  # a page that opens says that it watches a thousand streams, all at once


class Streamer:
    """One daemon's streamer. `run` owns the two ZeroMQ sockets; other threads speak through `tell_broker`."""

    def __init__(self, config: Config, lifecycle: Lifecycle) -> None:
        self._config = config
        self._life = lifecycle
        self._wake = WakePipe()
        self._clock = ClockOffset()
        self._to_broker = BrokerOutbox(self._greeting)
        self._latency = Latency()
        self._gate = Gate(config)
        self._hub = Hub(self._latency, self.tell_broker, max_viewers=config.web.max_viewers)
        self._hub.clock_ns = self.now_ns
        self._recorder = Recorder(
            config,
            self.tell_broker,
            self._hub.offer_recordings,
            self._latency.recording_errors.inc,
            self._latency.film_errors.inc,
        )
        self._web = WebServer(config, self._hub, self._recorder)
        self._pushes = Pushes(config, lambda stream: self._latency.push_failures.labels(stream).inc())
        self._bad = 0
        self._seldom = Seldom()

    def now_ns(self) -> int:
        """This moment on the broker's clock. Any thread."""
        return time.monotonic_ns() + (self._clock.offset_ns or 0)

    def tell_broker(self, message: Any) -> None:
        """Say something to the broker. Any thread."""
        self._to_broker.put(message)
        self._wake.wake()

    def run(self) -> None:
        """Bind, work until told to stop, then close every file playable.

        Raises: ConfigError for an address in use, or a recording folder that another daemon uses.
        """
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.linger = 0
        self._config.recording_folder.mkdir(parents=True, exist_ok=True)
        with FolderLock(self._config.recording_folder):
            web_address = self._web.bind()
            self._gate.open(context)
            self._packets = _bind_pull(self._gate, context, packets_address(self._config))
            where, name = dialled(workers_address(self._config)), f"streamer-{secrets.token_hex(8)}"
            self._line = RoleLine(
                context, zmq.DEALER, where, keys=self._gate.keys, identity=name.encode(), hwm=TO_BROKER_HWM
            )
            self._endpoint = bound_address(self._packets.socket)
            self._life.on_stop(self._wake.wake)
            self._recorder.start()
            self._web.start()
            self._pushes.start(web_address)
            self._life.ready(web=web_address, web_port=self._web.port, packets_bind=self._endpoint)
            try:
                self._loop()
            finally:
                self._life.end()
                self._web.stop()
                self._pushes.close()
                self._receive_packets()  # what workers have sent goes into the files
                self._recorder.close()
                context.destroy()

    def _loop(self) -> None:
        poller = zmq.Poller()
        for waited in (self._packets.socket, self._line.socket, *self._gate.waited_for()):
            poller.register(waited, zmq.POLLIN)
        poller.register(self._wake.fileno(), zmq.POLLIN)
        while not self._life.stop.is_set():
            self._line.attend(poller)
            due = dict(poller.poll(200))
            if self._wake.fileno() in due:
                self._wake.drain()
            self._gate.attend()
            self._latency.take_gate(self._gate.counts)
            if self._packets.socket in due:
                self._receive_packets()
            if self._line.socket in due:
                self._receive_broker()
            self._to_broker.send(self._line.socket)
            self._web.check()
            self._life.tick()

    def _greeting(self) -> Iterator[Any]:
        yield StreamerHello(endpoint=self._endpoint, cursors=self._recorder.cursors(), echo_ns=time.monotonic_ns())
        yield from self._hub.watches()

    def _receive_packets(self) -> None:
        for _ in range(MAX_DRAIN):
            try:
                head, *payloads = self._packets.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            if self._packets.client_of(head) is None:
                continue  # its key was revoked
            parts: list[Any] = [head.bytes, *(payload.buffer for payload in payloads)]
            streamed_ns = self.now_ns()
            try:
                packet: Packet = wire.unpack(parts, wire.FROM_WORKER_TO_STREAMER)
            except WireError as error:
                self._bad += 1
                if self._bad == 1:
                    logger.warning("packet_dropped error=%s (said once)", error)
                continue
            self._latency.on_packet(packet, streamed_ns)
            if packet.rendition in ("record", "film"):
                self._recorder.put(packet)
            else:
                self._hub.offer_packet(packet, streamed_ns)

    def _receive_broker(self) -> None:
        for _ in range(MAX_DRAIN):
            try:
                parts = self._line.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.unpack(parts, wire.TO_STREAMER)
            except WireError as error:
                if self._seldom.may_say(str(error)):
                    logger.warning("broker_message_bad error=%s (said once a minute)", error)
                continue
            if isinstance(message, Echo):
                self._clock.add(message.echo_ns, message.now_ns, time.monotonic_ns())
            elif isinstance(message, State):
                self._hub.offer_state(message)
                self._recorder.put(message)
            elif isinstance(message, Gap):
                self._recorder.put(message)
            elif isinstance(message, RefusedPeer):
                self._line.refused(message.text)


def _bind_pull(gate: Gate, context: zmq.Context[zmq.Socket[bytes]], address: str) -> Door:
    try:
        return gate.bind(context, zmq.PULL, address, "workers", hwm=256)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"streamer.packets_bind = {address}: {error.strerror}; choose another with --set streamer.packets_bind=…"
        ) from error


def run_streamer(config: Config, lifecycle: Lifecycle) -> None:
    """Run the streamer in this thread until it is told to stop. Raises: ConfigError for an address in use."""
    allow_many()
    Streamer(config, lifecycle).run()
