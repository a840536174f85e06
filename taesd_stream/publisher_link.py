"""The publisher's side thread: it owns the socket, and says OPEN, FRAME, HELLO and END in their order."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.errors import WireError
from taesd_stream.frames import EndReason, StreamInfo
from taesd_stream.keys import Keys
from taesd_stream.latent_log import LogError
from taesd_stream.line import Line
from taesd_stream.message_fields import MAX_TEXT_CHARS
from taesd_stream.messages import Ack, DemandUpdate, Echo, End, PublisherHello, Refused, RunHello, StopRun
from taesd_stream.outbox import Outbox, is_final
from taesd_stream.pace import Pace
from taesd_stream.send_window import SendWindow
from taesd_stream.sockets import ClockOffset, WakePipe

logger = logging.getLogger(__name__)

HELLO_S: Final = 1.0
RETRY_S: Final = 0.1  # the socket took nothing: it says itself when it does, this is for the rest
REFUSED_RETRY_S: Final = 10.0
KNOCK_S: Final = 0.5  # how often a line that is not let in is looked after
FIRST_ANSWER_S: Final = 0.5  # a daemon that is there has been reached by then
SILENT_S: Final = 2.0  # a broker that leaves HELLO unanswered so long hangs, or is behind a hole: it gets no frames
MAX_UNHEARD_BYTES: Final = 64 << 20  # of frames sent since it was heard last, all of which may lie in our memory
JOIN_SPARE_S: Final = 5.0  # for a last write to disk


class PublisherLink:
    """One run's talk with the broker. Everything but the marked entry points runs in the side thread."""

    def __init__(self, address: str, info: StreamInfo, outbox: Outbox, keys: Keys | None = None) -> None:
        self.info = info
        self.error: str | None = None
        self.is_stopped = False
        self.is_stoppable = False
        self.is_over = False  # the thread has ended
        self._address = address
        self._keys = keys
        self._address_fault: zmq.ZMQError | None = None
        self._is_connecting = threading.Event()
        self._outbox = outbox
        self.wakes = WakePipe()  # told when there is something new in the outbox
        self._thread = threading.Thread(target=self._run, name=f"taesd-stream {info.stream}", daemon=True)
        self._is_open = False  # OPEN went out, and nobody denied it
        self._opens = 0
        self._is_refused = False
        self._not_let_in: str | None = None  # why nobody takes our key
        self._blocked_since_s: float | None = None  # when the socket took nothing for the first time
        self._asked_s: float | None = None  # when the oldest HELLO went that is not answered
        self._unheard_bytes = 0
        self._window = SendWindow(outbox.kept)
        self._pace = Pace()
        self._next_hello_s = 0.0
        self._clock = ClockOffset()
        self._bad_messages = 0
        self._end: End | None = None
        self._is_end_sent = False
        self._is_end_acked = False
        self._give_up_s = math.inf

    # --- entry points of the sampler's thread ---

    def start(self) -> None:
        """Start the side thread. Raises: ValueError for an address that is none."""
        self._thread.start()
        self._is_connecting.wait()
        if self._address_fault is not None:
            self._thread.join()
            expected = f"address: expected one such as {wire.DEFAULT_ADDRESS}"
            raise ValueError(f"{expected}, got {self._address!r}: {self._address_fault}") from self._address_fault

    def wait_until_acked(self, timeout_s: float) -> bool:
        """Wait until nothing kept is unacked."""
        outbox = self._outbox
        with outbox.changed:
            outbox.changed.wait_for(lambda: outbox.is_all_acked or self._is_refused or self.is_over, timeout_s)
            return outbox.is_all_acked

    def end_soon(self, timeout_s: float, reason: EndReason, text: str) -> None:
        """Send what is left, then END, and stop the thread; do not wait for it."""
        if self._end is None:
            self._give_up_s = time.monotonic() + timeout_s
            text = text.encode("utf-8", "replace").decode()[:MAX_TEXT_CHARS]  # text from outside may be no UTF-8
            self._end = End(run=self.info.run, last_seq=self._outbox.close(), reason=reason, text=text)
            self.wakes.wake()

    def forget(self) -> None:
        """In a forked child: the run is the parent's. No lock is taken here or later, for it may be held for ever."""
        self._end = self._end or End(run=self.info.run, last_seq=-1, reason="done")
        self.wakes.close()
        self._outbox.is_closed = self._outbox.wanted = True

    def join(self) -> None:
        """Wait for the end that end_soon() asked for."""
        self._thread.join(max(0.0, self._give_up_s - time.monotonic()) + JOIN_SPARE_S)

    # --- side thread ---

    def _run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.linger = 0
        line: Line | None = None
        try:
            line = Line(context, zmq.DEALER, self._address, keys=self._keys)
            self._is_connecting.set()
            self._loop(line)
        except Exception as error:  # the outermost loop: the sampler goes on
            if line is None and isinstance(error, zmq.ZMQError):
                self._address_fault = error
            else:
                self.error = "the publisher failed: see its log"
                logger.exception("publisher_failed stream=%s (the run goes on, unseen)", self.info.stream)
        finally:
            self._finish()
            if line is not None:
                line.close()
            context.term()
            self.wakes.close()
            self._is_connecting.set()

    def _loop(self, line: Line) -> None:
        poller = zmq.Poller()
        poller.register(self.wakes.fileno(), zmq.POLLIN)
        while not self._is_finished():
            self._watch(line, poller)
            socket = line.socket
            end = self._end  # before collect(): what was published before close() is said before END
            self._outbox.collect()
            self._outbox.spill_if_full(self.info)
            self._send_all(socket, end)
            is_blocked = self._blocked_since_s is not None
            poller.register(socket, zmq.POLLIN | (zmq.POLLOUT if is_blocked else 0))
            poller.poll(self._timeout_ms())
            self.wakes.drain()
            self._receive_all(socket)
            self._rest()

    def _watch(self, line: Line, poller: zmq.Poller) -> None:
        """Where the socket takes nothing, learn why."""
        if self._blocked_since_s is None and line.error is None:
            return
        before, old = line.error, line.socket
        if line.look():
            poller.unregister(old)
        self._not_let_in = line.error
        if line.error is not None and line.error != before:
            self._on_refused(Refused(stream=self.info.stream, run=self.info.run, code="key", text=line.error))
        elif line.error is None and before is not None:
            self._next_hello_s = 0.0  # it is open now

    def _is_finished(self) -> bool:
        if self._end is None:
            return False
        now = time.monotonic()
        return self._is_end_acked or now >= self._give_up_s or self._is_hopeless(now)

    def _is_hopeless(self, now: float) -> bool:
        """Whether waiting is in vain: the end of a run must not wait for a broker that is not there."""
        if self._is_refused and self._next_hello_s >= self._give_up_s:
            return True
        is_gone = self._blocked_since_s is not None and now - self._blocked_since_s >= FIRST_ANSWER_S
        if not is_gone and not self._is_silent(now):
            return False
        return not self._outbox.pending and not self._outbox.kept.count and self._outbox.kept_from is None

    def _timeout_ms(self) -> int:
        now = time.monotonic()
        until = min(self._next_hello_s, self._give_up_s, self._outbox.ask_device_s)
        if self._blocked_since_s is None and not self._is_refused and not self._is_silent(now):
            if self._outbox.slot or not self._outbox.wanted:
                until = min(until, self._pace.next_s)
            until = min(until, self._window.resend_s)
        if self._end is not None:
            until = min(until, now + RETRY_S)
        if self._not_let_in is not None:
            until = min(until, now + KNOCK_S)
        return max(0, math.ceil((until - now) * 1000))

    def _send_all(self, socket: zmq.Socket[bytes], end: End | None) -> None:
        """Send what can be sent now."""
        now = time.monotonic()
        if self._is_refused and now < self._next_hello_s:
            return
        if end is not None and not self._outbox.pending and self._outbox.keep_last():
            self._next_hello_s = now  # say kept_from before it is sent
        try:
            self._send_open(socket)
            self._send_hello(socket, now)
            if not self._is_silent(now):
                self._send_slot(socket, now, is_ending=end is not None)
                self._send_kept(socket, now)
                self._send_end(socket, end)
            self._blocked_since_s = None
        except zmq.Again:
            self._next_hello_s = max(self._next_hello_s, now + RETRY_S)
            self._blocked_since_s = self._blocked_since_s or now

    def _send_open(self, socket: zmq.Socket[bytes]) -> None:
        if self._is_open:
            return
        # the last word on keeping wins, also where a new broker has not heard it
        _send(socket, dataclasses.replace(self.info, record=self._outbox.mode))
        self._is_open, self._is_refused = True, False
        self._next_hello_s = 0.0
        self._window.rewind()
        if self._opens:
            self._outbox.show_again()
        self._opens += 1

    def _send_hello(self, socket: zmq.Socket[bytes], now: float) -> None:
        if now < self._next_hello_s:
            return
        outbox, offset_ns = self._outbox, self._clock.offset_ns or 0
        # the oldest unacked one first: a broker that sees it jump knows that what it has before is whole
        kept_from = outbox.kept.first_seq if outbox.kept.count else outbox.kept_from
        row = RunHello(next_seq=outbox.next_seq, kept_from=kept_from, stoppable=self.is_stoppable)
        _send(socket, PublisherHello(runs={self.info.run: row}, echo_ns=time.monotonic_ns(), offset_ns=offset_ns))
        self._next_hello_s = now + HELLO_S
        self._asked_s = self._asked_s or now

    def _is_silent(self, now: float) -> bool:
        """Whether the broker does not read what it gets: what were sent would grow old in our memory."""
        is_late = self._asked_s is not None and now - self._asked_s > SILENT_S
        return is_late or self._unheard_bytes > MAX_UNHEARD_BYTES

    def _send_slot(self, socket: zmq.Socket[bytes], now: float, *, is_ending: bool) -> None:
        slot = self._outbox.slot
        while slot and (now >= self._pace.next_s or is_final(slot[0]) or is_ending) and not self._is_silent(now):
            _send(socket, slot[0])
            self._unheard_bytes += slot.popleft().nbytes
            self._pace.sent(now)
            self._rest()

    def _rest(self) -> None:
        """Want nothing before the next frame is due, where nobody watches and nothing is kept."""
        self._outbox.wanted = (
            self._outbox.is_closed or self._outbox.mode != "off" or not self._pace.is_resting(time.monotonic())
        )

    def _send_kept(self, socket: zmq.Socket[bytes], now: float) -> None:
        while (frame := self._window.next(now)) is not None:
            _send(socket, frame)
            self._window.sent(frame, now)

    def _send_end(self, socket: zmq.Socket[bytes], end: End | None) -> None:
        outbox = self._outbox
        is_undecided = outbox.mode is None and outbox.next_seq > 0
        if end is None or self._is_end_sent or is_undecided or outbox.pending or outbox.slot or outbox.kept.count:
            return
        _send(socket, end)
        self._is_end_sent = True

    def _receive_all(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._asked_s, self._unheard_bytes = None, 0
            try:
                self._handle(wire.unpack(parts, wire.TO_PUBLISHER))
            except WireError as error:
                self._bad_messages += 1
                if self._bad_messages == 1:
                    logger.warning("broker_message_bad stream=%s error=%s (said once)", self.info.stream, error)

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
        if self._window.ack(ack.seq, time.monotonic()):
            self._notify()
        self._is_end_acked = self._is_end_acked or (ack.ended and self._is_end_sent)

    def _on_demand(self, demand: DemandUpdate) -> None:
        is_late = self._end is not None and self._outbox.mode is not None
        if not is_late and self._outbox.settle(demand.record):
            self._next_hello_s = 0.0  # say kept_from at once
        self._pace.ask(demand)
        self._rest()
        if not self._is_refused:
            self.error = None
        self._notify()

    def _on_refused(self, refused: Refused) -> None:
        self._is_open = False
        if refused.code == "unknown_run":  # the broker was restarted: say all of it again
            self._is_end_sent = False
            self._clock = ClockOffset()
        elif refused.code == "taken" and refused.use:
            logger.warning("stream_name_taken stream=%s now=%s", refused.stream, refused.use)
            self.info = dataclasses.replace(self.info, stream=refused.use)
        else:
            if refused.text != self.error:
                logger.error("stream_refused stream=%s code=%s %s", refused.stream, refused.code, refused.text)
            self.error = refused.text
            self._is_refused = True
            self._next_hello_s = time.monotonic() + REFUSED_RETRY_S
            self._notify()

    def _notify(self) -> None:
        with self._outbox.changed:
            self._outbox.changed.notify_all()

    def _finish(self) -> None:
        """Whatever happened, what no broker took is not thrown away, and nobody waits for this thread any more."""
        end = self._end or End(run=self.info.run, last_seq=self._outbox.close(), reason="failed")
        try:
            paths = self._outbox.stop(self.info, end, is_end_sent=self._is_end_sent)
        except LogError as error:
            self.error = f"kept frames were not taken, and are lost: {error}"
        else:
            files = " ".join(str(path) for path in paths)
            self.error = f"kept frames were not taken; `taesd-stream publish` sends {files}" if paths else self.error
        if self._outbox.kept.count:
            logger.error(
                "frames_not_taken stream=%s frames=%d %s", self.info.stream, self._outbox.kept.count, self.error
            )
        self.is_over = True
        self._notify()


def _send(socket: zmq.Socket[bytes], message: Any) -> None:
    socket.send_multipart(wire.pack(message), zmq.NOBLOCK, copy=False)
