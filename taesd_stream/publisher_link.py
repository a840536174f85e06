"""The publisher's side thread: it owns the socket, and says OPEN, FRAME, HELLO and END in their order."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.errors import WireError
from taesd_stream.frames import EndReason, LatentFrame, StreamInfo
from taesd_stream.latent_log import LogError
from taesd_stream.messages import Ack, DemandUpdate, Echo, End, PublisherHello, Refused, RunHello, StopRun
from taesd_stream.outbox import Outbox
from taesd_stream.sockets import ClockOffset, WakePipe, connect_dealer

logger = logging.getLogger(__name__)

HELLO_S: Final = 1.0
RESEND_S: Final = 2.0
IDLE_INTERVAL_S: Final = 2.0  # of frames while nobody watches, where the broker does not say: a late viewer has one
REFUSED_RETRY_S: Final = 10.0
FIRST_ANSWER_S: Final = 0.5  # a daemon that is there has answered by then
MAX_UNACKED_BYTES: Final = 16 << 20  # on their way at once: past it, wait for acks


class PublisherLink:
    """One run's talk with the broker. Everything but the marked entry points runs in the side thread."""

    def __init__(self, address: str, info: StreamInfo, outbox: Outbox) -> None:
        self.info = info
        self.error: str | None = None
        self.is_stopped = False
        self.is_stoppable = False
        self._address = address
        self._outbox = outbox
        self._wake = WakePipe()
        self._thread = threading.Thread(target=self._run, name=f"taesd-stream {info.stream}", daemon=True)
        self._is_open = False  # OPEN went out on this connection
        self._is_refused = False
        self._next_kept: int | None = None  # seq to send next
        self._acked = -1
        self._ack_changed_s = time.monotonic()
        self._demand = "every" if info.record == "all" else "watched"
        self._interval_s = 0.0
        self._next_hello_s = 0.0
        self._next_send_s = 0.0
        self._clock = ClockOffset()
        self._end: End | None = None
        self._end_sent = False
        self._end_acked = threading.Event()
        self._give_up_s = float("inf")
        self._started_s = time.monotonic()

    # --- entry points of the sampler's thread ---

    def start(self) -> None:
        """Start the side thread."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new in the outbox."""
        self._wake.wake()

    def wait_until_acked(self, timeout_s: float) -> bool:
        """Wait until nothing kept is unacked."""
        self.wake()
        outbox = self._outbox
        with outbox.changed:
            outbox.changed.wait_for(lambda: self._is_all_acked() or self._is_refused, timeout_s)
            return self._is_all_acked()

    def close(self, timeout_s: float, reason: EndReason, text: str) -> None:
        """Send what is left, then END, and stop the thread."""
        self._give_up_s = time.monotonic() + timeout_s
        self._end = End(run=self.info.run, last_seq=self._outbox.next_seq - 1, reason=reason, text=text)
        self.wake()
        self._thread.join(timeout_s + 5)

    # --- side thread ---

    def _is_all_acked(self) -> bool:
        outbox = self._outbox
        undecided = outbox.mode is None and outbox.next_seq > 0
        return not outbox.kept and not undecided and not (outbox.mode == "all" and outbox.pending)

    def _run(self) -> None:
        context = zmq.Context()
        context.linger = 0
        try:
            socket = connect_dealer(context, self._address)
        except zmq.ZMQError as error:
            self.error = f"{self._address}: {error}"
            logger.error("publisher_address_bad address=%s error=%s", self._address, error)
            self._leave_log()
            return
        try:
            self._loop(socket)
        finally:
            self._leave_log()
            socket.close(linger=0)
            context.term()
            self._wake.close()

    def _loop(self, socket: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(self._wake.fileno(), zmq.POLLIN)
        while not self._is_finished():
            blocked = not self._send_all(socket)
            poller.register(socket, zmq.POLLIN | (zmq.POLLOUT if blocked else 0))
            poller.poll(self._timeout_ms())
            self._wake.drain()
            self._outbox.collect()
            self._outbox.spill_if_full(self.info)
            self._receive_all(socket)
            self._rearm()

    def _is_finished(self) -> bool:
        if self._end is None:
            return False
        now = time.monotonic()
        # no daemon ever answered and nothing is to be kept: the end of the run must not wait for one
        nobody = self._clock.offset_ns is None and not self._outbox.kept and now - self._started_s > FIRST_ANSWER_S
        return nobody or self._end_acked.is_set() or now >= self._give_up_s

    def _timeout_ms(self) -> int:
        now = time.monotonic()
        until = min(self._next_hello_s, self._give_up_s)
        if self._end is not None:
            until = min(until, now + 0.05)
        if self._outbox.slot is not None or not self._outbox.wanted:
            until = min(until, max(self._next_send_s, now + 0.001))
        return max(0, math.ceil((until - now) * 1000))

    def _rearm(self) -> None:
        if not self._outbox.wanted and time.monotonic() >= self._next_send_s:
            self._outbox.wanted = True

    def _send_all(self, socket: zmq.Socket[bytes]) -> bool:
        """Send what can be sent now. Returns False when the socket takes no more."""
        now = time.monotonic()
        if self._is_refused and now < self._next_hello_s:
            return True
        try:
            if not self._is_open:
                _send(socket, self.info)
                self._is_open, self._is_refused = True, False
                self._next_kept, self._next_hello_s = self._outbox.kept.first_seq, now
            if now >= self._next_hello_s:
                _send(socket, self._hello())
                self._next_hello_s = now + HELLO_S
            self._send_kept(socket, now)
            self._send_slot(socket, now)
            self._send_end(socket)
        except zmq.Again:
            self._next_hello_s = max(self._next_hello_s, now + 0.1)
            return False
        return True

    def _hello(self) -> PublisherHello:
        run = RunHello(next_seq=self._outbox.next_seq, kept_from=self._outbox.kept_from, stoppable=self.is_stoppable)
        return PublisherHello(
            runs={self.info.run: run}, echo_ns=time.monotonic_ns(), offset_ns=self._clock.offset_ns or 0
        )

    def _send_kept(self, socket: zmq.Socket[bytes], now: float) -> None:
        kept = self._outbox.kept
        if not kept:
            return
        if now - self._ack_changed_s > RESEND_S:  # the broker dropped some, or is a new one
            self._next_kept, self._ack_changed_s = kept.first_seq, now
        if self._next_kept is None or (kept.first_seq is not None and self._next_kept < kept.first_seq):
            self._next_kept = kept.first_seq
        sent_bytes = 0
        while self._next_kept is not None and self._next_kept < kept.next_seq and sent_bytes < MAX_UNACKED_BYTES:
            frame = kept.read(self._next_kept)
            if frame is None:
                return
            _send(socket, frame)
            self._next_kept = frame.seq + 1
            sent_bytes += frame.nbytes

    def _send_slot(self, socket: zmq.Socket[bytes], now: float) -> None:
        frame = self._outbox.slot
        if frame is None or (now < self._next_send_s and not _is_final(frame) and self._end is None):
            return
        _send(socket, frame)
        self._outbox.slot = None
        self._next_send_s = now + self._interval_s
        if self._demand == "idle" and self._outbox.mode == "off":
            self._outbox.wanted = False

    def _send_end(self, socket: zmq.Socket[bytes]) -> None:
        if self._end is None or self._end_sent:
            return
        self._outbox.collect()
        if self._outbox.mode == "last":
            self._outbox.keep_last()
            self._send_kept(socket, time.monotonic())
        undecided = self._outbox.mode is None and self._outbox.next_seq > 0
        if not undecided and not self._outbox.kept:
            _send(socket, self._end)
            self._end_sent = True

    def _receive_all(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handle(wire.unpack(parts, wire.TO_PUBLISHER))
            except WireError as error:
                logger.warning("broker_message_bad stream=%s error=%s", self.info.stream, error)

    def _handle(self, message: Any) -> None:
        if isinstance(message, Echo):
            self._clock.add(message.echo_ns, message.now_ns, time.monotonic_ns())
        elif message.run != self.info.run:
            return
        elif isinstance(message, Ack):
            self._on_ack(message)
        elif isinstance(message, DemandUpdate):
            self._on_demand(message)
        elif isinstance(message, StopRun):
            self.is_stopped = True
        elif isinstance(message, Refused):
            self._on_refused(message)

    def _on_ack(self, ack: Ack) -> None:
        if ack.seq > self._acked:
            self._acked, self._ack_changed_s = ack.seq, time.monotonic()
        with self._outbox.changed:
            self._outbox.kept.ack(ack.seq)
            self._outbox.changed.notify_all()
        if ack.ended:
            self._end_acked.set()

    def _on_demand(self, demand: DemandUpdate) -> None:
        self._demand = demand.level
        asked_s = 1 / demand.max_fps if demand.max_fps else None
        if demand.level == "idle":
            self._interval_s = asked_s or IDLE_INTERVAL_S
        else:
            self._interval_s = 0.0 if demand.level == "every" else asked_s or 0.0
            self._next_send_s = min(self._next_send_s, time.monotonic() + self._interval_s)
        if self._end is None or self._outbox.mode is None:
            self._outbox.settle(demand.record)
        self._outbox.wanted = self._outbox.wanted or demand.level != "idle" or demand.record != "off"
        with self._outbox.changed:
            self._outbox.changed.notify_all()

    def _on_refused(self, refused: Refused) -> None:
        self._is_open = False
        if refused.code == "unknown_run":  # the broker was restarted: say all of it again
            self._end_sent = False
            return
        if refused.code == "taken" and refused.use:
            logger.warning("stream_name_taken stream=%s now=%s", refused.stream, refused.use)
            self.info = dataclasses.replace(self.info, stream=refused.use)
            return
        if not self._is_refused:
            logger.error("stream_refused stream=%s code=%s %s", refused.stream, refused.code, refused.text)
        self.error = refused.text
        self._is_refused = True
        self._next_hello_s = time.monotonic() + REFUSED_RETRY_S
        with self._outbox.changed:
            self._outbox.changed.notify_all()

    def _leave_log(self) -> None:
        """What no broker took is not thrown away."""
        end = self._end or End(run=self.info.run, last_seq=self._outbox.next_seq - 1, reason="failed")
        with contextlib.suppress(LogError, OSError):
            self._outbox.collect()
            if not self._end_sent:
                self._outbox.keep_last()
            path = self._outbox.kept.close(self.info, end)
            if path is not None:
                self.error = f"kept frames were not taken; they are in {path}"
                logger.error(
                    "frames_not_sent stream=%s kept_in=%s (taesd-stream publish %s)", self.info.stream, path, path
                )
        with self._outbox.changed:
            self._outbox.changed.notify_all()


def _is_final(frame: LatentFrame) -> bool:
    return frame.total_steps is not None and frame.step >= frame.total_steps - 1


def _send(socket: zmq.Socket[bytes], message: Any) -> None:
    socket.send_multipart(wire.pack(message), zmq.NOBLOCK, copy=False)
