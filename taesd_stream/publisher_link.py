"""The publisher's side thread: it owns the socket, and says OPEN, FRAME, HELLO and END in their order.

One state machine, and so one file: what is sent next depends on all that was heard.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import threading
import time
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.current_run import CurrentRun
from taesd_stream.daemons import Daemons
from taesd_stream.errors import WireError
from taesd_stream.fields import as_utf8
from taesd_stream.frames import EndReason, StreamInfo
from taesd_stream.keys import Keys
from taesd_stream.latent_log import LogError
from taesd_stream.line import Line, checked_line
from taesd_stream.message_fields import MAX_TEXT_CHARS
from taesd_stream.messages import Ack, DemandUpdate, Echo, End, PublisherHello, Refused, RunHello, StopRun
from taesd_stream.outbox import Outbox, is_final
from taesd_stream.pace import Pace
from taesd_stream.pulse import Pulse
from taesd_stream.send_window import SendWindow
from taesd_stream.sockets import ClockOffset, WakePipe

logger = logging.getLogger(__name__)

HELLO_S: Final = (0.8, 1.2)  # each has its own: publishers that were opened together would wake together
RETRY_S: Final = 0.1  # the socket took nothing: it says itself when it does, this is for the rest
REFUSED_RETRY_S: Final = 10.0
ASIDE_S: Final = 0.0002  # until it looks again whether publish() is over: on a GPU that takes half as long
MAX_ASIDE: Final = 10  # looks; a publish() may wait for its GPU, and a sampler may do nothing else
KNOCK_S: Final = 0.5  # how often a line that is not let in is looked after
JOIN_SPARE_S: Final = 5.0  # for a last write to disk


class PublisherLink:
    """A stream's talk with the broker. Everything but the marked entry points runs in the side thread.

    With several daemons, one that is gone is left for the next. There the stream goes on as a new run: seq, index and
    what is unacked stay as they are, as for a broker that was started again, and `meta.continues` names the former run.
    """

    def __init__(self, daemons: Daemons, info: StreamInfo, outbox: Outbox, keys: Keys | None = None) -> None:
        self.error: str | None = None
        self.is_stopped = False
        self.is_stoppable = False
        self.is_over = False  # the thread has ended
        self._daemons = daemons
        self.run = CurrentRun(info)
        self._keys = keys
        self._address_fault: ValueError | None = None
        self._is_connecting = threading.Event()
        self._outbox = outbox
        self.wakes = WakePipe()  # told when there is something new in the outbox
        self._thread = threading.Thread(target=self._work, name=f"taesd-stream {info.stream}", daemon=True)
        self._is_open = False  # OPEN went out, and nobody denied it
        self._is_refused = False
        self._has_no_room = False  # the daemon said so, and there is another
        self._not_let_in: str | None = None  # why nobody takes our key
        self._is_key_refused = False  # for certain: no daemon that is only not there
        self._pulse = Pulse()
        self._window = SendWindow(outbox.kept)
        self._pace = Pace()
        self._hello_s = random.SystemRandom().uniform(*HELLO_S)  # the program's own random numbers stay as they are
        self._next_hello_s = 0.0
        self._clock = ClockOffset()
        self._is_echo_due = False
        self._bad_messages = 0
        self._end: End | None = None
        self._is_end_sent = False
        self._is_end_acked = False
        self._give_up_s = math.inf
        self._waiting = 0  # threads, for acks

    # --- entry points of the sampler's thread ---

    def start(self) -> None:
        """Start the side thread. Raises: ValueError for an address that is none."""
        self._thread.start()
        self._is_connecting.wait()
        if self._address_fault is not None:
            self._thread.join()
            raise self._address_fault

    @property
    def address(self) -> str:
        """Of the daemon that has the stream, or is tried."""
        return self._daemons.current

    def wait_until_acked(self, timeout_s: float) -> bool:
        """Wait until nothing kept is unacked."""
        outbox, timeout_s = self._outbox, min(timeout_s, threading.TIMEOUT_MAX)
        with outbox.changed:
            self._waiting += 1
            self.wakes.wake()
            try:
                outbox.changed.wait_for(lambda: outbox.is_all_acked or self._is_denied or self.is_over, timeout_s)
            finally:
                self._waiting -= 1
            return outbox.is_all_acked

    def end_soon(self, timeout_s: float, reason: EndReason, text: str) -> None:
        """Send what is left, then END, and stop the thread; do not wait for it."""
        if self._end is None:
            self._give_up_s = time.monotonic() + timeout_s
            text = as_utf8(text)[:MAX_TEXT_CHARS]
            said: EndReason = "stopped" if self.is_stopped else reason
            self._end = End(run=self.run.first.run, last_seq=self._outbox.close(), reason=said, text=text)
            self.wakes.wake()

    def forget(self) -> None:
        """In a forked child: the run is the parent's. No lock is taken here or later, for it may be held for ever."""
        self._end = self._end or End(run=self.run.info.run, last_seq=-1, reason="done")
        self.wakes.close()
        self._outbox.is_closed = self._outbox.wanted = True

    def join(self) -> None:
        """Wait for the end that end_soon() asked for."""
        left_s = max(0.0, self._give_up_s - time.monotonic()) + JOIN_SPARE_S
        self._thread.join(min(left_s, threading.TIMEOUT_MAX))

    # --- side thread ---

    def _work(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        context.linger = 0
        line: Line | None = None
        try:
            line = checked_line(context, self.address, self._daemons.ranked, keys=self._keys)
            self._is_connecting.set()
            self._loop(line)
        except Exception as error:  # the outermost loop: the sampler goes on
            if line is None and isinstance(error, ValueError):
                self._address_fault = error
            else:
                self.error = "the publisher failed: see its log"
                logger.exception("publisher_failed stream=%s (the run goes on, unseen)", self.run.info.stream)
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
            if self._must_leave(line):
                if self._end is not None and not self._outbox.is_owing:
                    return  # END alone is no reason for another run
                self._leave(line, poller)
            else:
                self._watch(line, poller)
            socket = line.socket
            end = self._end  # before collect(): what was published before close() is said before END
            self._outbox.collect(self._due_s)
            self._outbox.spill_if_full(self.run.first)
            self._send_all(socket, end)
            events = self._events()
            poller.register(socket, events)
            woken = dict(poller.poll(self._timeout_ms(is_listening=events != 0)))
            self._stand_aside()
            if self.wakes.fileno() in woken:
                self.wakes.drain()
            if woken.get(socket, 0) & zmq.POLLIN or not events:  # else it costs 0.07 ms for nothing
                self._receive_all(socket)
            self._rest()

    @property
    def _due_s(self) -> float:
        """When the next frame goes that nobody keeps; at once, where the run ends."""
        return self._pace.next_s if self._end is None else -math.inf

    def _stand_aside(self) -> None:
        """Let a publish() that is under way have the GIL: each launch lets go of it, and waits to get it back."""
        for _ in range(MAX_ASIDE):
            if not self._outbox.is_busy or self._is_echo_due:
                return
            time.sleep(ASIDE_S)

    def _events(self) -> int:
        """What of the socket wakes this thread: nothing just after a kept frame, for it may wait for the next look."""
        if self._pulse.blocked_since_s is not None:
            return zmq.POLLIN | zmq.POLLOUT
        is_awaited = self._waiting > 0 or self._end is not None or self._is_echo_due  # read late, it is a wrong clock
        return zmq.POLLIN if is_awaited or time.monotonic() >= self._window.listens_s else 0

    def _watch(self, line: Line, poller: zmq.Poller) -> None:
        """Where the socket takes nothing, learn why."""
        if self._pulse.blocked_since_s is None and line.error is None:
            return
        before, old = line.error, line.socket
        if line.look():
            poller.register(old, 0)
        self._not_let_in = line.error
        self._is_key_refused = line.error is not None and not line.is_broken_off
        if line.error is not None and line.error != before:
            self._on_refused(Refused(stream=self.run.info.stream, run=self.run.info.run, code="key", text=line.error))
        elif line.error is None and before is not None:
            self._next_hello_s = 0.0  # it is open now

    def _must_leave(self, line: Line) -> bool:
        """Whether the next daemon is to be tried: this one is gone, or has no room."""
        now = time.monotonic()
        if self._has_no_room or now < self._gone_s():
            return self._has_no_room
        # but was it this program that stood still? What came meanwhile, and a socket that takes again, tell
        self._receive_all(line.socket)
        if self._pulse.blocked_since_s is not None and line.socket.poll(0, zmq.POLLOUT):
            self._next_hello_s = 0.0
            return False
        return now >= self._gone_s()

    @property
    def _is_denied(self) -> bool:
        """Whether it was refused, and no other daemon will be asked."""
        return self._is_refused and self._gone_s() == math.inf

    def _gone_s(self) -> float:
        if not self._daemons.are_several or self._is_key_refused:
            return math.inf
        return self._pulse.gone_s(is_ending=self._end is not None)

    def _leave(self, line: Line, poller: zmq.Poller) -> None:
        """Dial the next daemon. The run stays the former one's until that one is reached."""
        former = line.address
        is_news = self._daemons.leave(time.monotonic())
        poller.register(line.socket, 0)
        line.move(self._daemons.current)
        if is_news:
            why = "has no room" if self._has_no_room else "is gone"
            logger.warning("daemon_left stream=%s %s %s; next is %s", self.run.info.stream, former, why, line.address)
        self._is_open = self._is_refused = self._has_no_room = self._is_end_sent = False
        self._pulse, self._clock = Pulse(), ClockOffset()
        self._not_let_in, self._next_hello_s = None, 0.0

    def _is_finished(self) -> bool:
        if self._end is None:
            return False
        now = time.monotonic()
        return self._is_end_acked or now >= self._give_up_s or self._is_hopeless(now)

    def _is_hopeless(self, now: float) -> bool:
        """Whether waiting is in vain: the end of a run must not wait for a broker that is not there."""
        if self._is_denied and self._next_hello_s >= self._give_up_s:
            return True
        if not self._pulse.is_absent(now) or (self._outbox.is_owing and self._daemons.has_fresh(now)):
            return False
        return not self._outbox.pending and not self._outbox.kept.count and self._outbox.kept_from is None

    def _timeout_ms(self, *, is_listening: bool) -> int:
        until = self._outbox.expect(self._due_s)
        now = time.monotonic()
        until = min(until, self._next_hello_s, self._give_up_s, self._outbox.looks.next_s, self._gone_s())
        if self._pulse.blocked_since_s is None and not self._is_refused and not self._pulse.is_silent(now):
            if self._outbox.slot or not self._outbox.wanted:
                until = min(until, self._pace.next_s)
            until = min(until, self._window.resend_s)
        if self._end is not None:
            until = min(until, now + RETRY_S)
        if self._not_let_in is not None:
            until = min(until, now + KNOCK_S)
        if not is_listening:
            until = min(until, self._window.listens_s)
        return max(0, math.ceil((until - now) * 1000))

    def _send_all(self, socket: zmq.Socket[bytes], end: End | None) -> None:
        """Send what can be sent now."""
        now = time.monotonic()
        if self._is_refused and now < self._next_hello_s:
            return
        if end is not None and not self._outbox.pending and self._outbox.keep_last():
            self._next_hello_s = now  # say kept_from before it is sent
        try:
            if self._pulse.blocked_since_s is not None and socket.poll(0, zmq.POLLOUT):  # there may be nothing to send
                self._pulse.unblocked()
            self._send_open(socket)
            self._send_hello(socket, now)
            if not self._pulse.is_silent(now):
                self._send_slot(socket, now, is_ending=end is not None)
                self._send_kept(socket, now)
                self._send_end(socket, end)
        except zmq.Again:
            self._next_hello_s = max(self._next_hello_s, now + RETRY_S)
            self._pulse.blocked(now)

    def _send_open(self, socket: zmq.Socket[bytes]) -> None:
        if self._is_open:
            return
        if self.run.is_anothers(self.address):
            if not socket.poll(0, zmq.POLLOUT):
                raise zmq.Again  # nobody is there yet: the run may still go on where it is
            self.run.begin_anew(self.address, self._outbox.hand_over())
        # the last word on keeping wins, also where a new broker has not heard it
        _send(socket, dataclasses.replace(self.run.info, record=self._outbox.mode))
        self._is_open, self._is_refused = True, False
        self._next_hello_s = 0.0
        self._window.rewind()
        self._outbox.show_again()
        self.run.said(self.address)

    def _send_hello(self, socket: zmq.Socket[bytes], now: float) -> None:
        if now < self._next_hello_s:
            return
        outbox, offset_ns = self._outbox, self._clock.offset_ns or 0
        # the oldest unacked one first: a broker that sees it jump knows that what it has before is whole
        kept_from = outbox.kept.first_seq if outbox.kept.count else outbox.kept_from
        row = RunHello(next_seq=outbox.next_seq, kept_from=kept_from, stoppable=self.is_stoppable)
        _send(socket, PublisherHello(runs={self.run.info.run: row}, echo_ns=time.monotonic_ns(), offset_ns=offset_ns))
        self._next_hello_s = now + self._hello_s
        self._pulse.asked(now)
        self._is_echo_due = True

    def _send_slot(self, socket: zmq.Socket[bytes], now: float, *, is_ending: bool) -> None:
        slot = self._outbox.slot
        while slot and (now >= self._pace.next_s or is_final(slot[0]) or is_ending) and not self._pulse.is_silent(now):
            _send(socket, self.run.frame(slot[0]))
            self._pulse.sent(slot.popleft().nbytes)
            self._pace.sent(now)
            self._rest()

    def _rest(self) -> None:
        """Want nothing before the next frame is due, where nobody watches and nothing is kept."""
        self._outbox.wanted = (
            self._outbox.is_closed or self._outbox.mode != "off" or not self._pace.is_resting(time.monotonic())
        )

    def _send_kept(self, socket: zmq.Socket[bytes], now: float) -> None:
        while (frame := self._window.next(now)) is not None:
            _send(socket, self.run.frame(frame))
            self._window.sent(frame, now)

    def _send_end(self, socket: zmq.Socket[bytes], end: End | None) -> None:
        outbox = self._outbox
        is_undecided = outbox.mode is None and outbox.next_seq > 0
        if end is None or self._is_end_sent or is_undecided or outbox.pending or outbox.slot or outbox.kept.count:
            return
        _send(socket, self.run.end(end))
        self._is_end_sent = True

    def _receive_all(self, socket: zmq.Socket[bytes]) -> None:
        while True:
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._pulse.heard()
            self._daemons.answered()
            try:
                self._handle(wire.unpack(parts, wire.TO_PUBLISHER))
            except WireError as error:
                self._bad_messages += 1
                if self._bad_messages == 1:
                    logger.warning("broker_message_bad stream=%s error=%s (said once)", self.run.info.stream, error)

    def _handle(self, message: Any) -> None:
        if isinstance(message, Echo):
            self._is_echo_due = False
            self._clock.add(message.echo_ns, message.now_ns, time.monotonic_ns())
        elif message.run != self.run.info.run:
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
        self.run.taken()
        if self._window.ack(ack.seq, time.monotonic()):
            self._notify()
        self._is_end_acked = self._is_end_acked or (ack.ended and self._is_end_sent)

    def _on_demand(self, demand: DemandUpdate) -> None:
        self.run.taken()
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
            self.run.rename(refused.use)
        elif refused.code == "limit" and self._daemons.has_fresh(time.monotonic()):
            self.run.not_wanted()
            self._has_no_room = True
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
        info = self.run.first
        end = self._end or End(run=info.run, last_seq=self._outbox.close(), reason="failed")
        try:
            paths = self._outbox.stop(info, end, is_end_sent=self._is_end_sent)
        except LogError as error:
            self.error = f"kept frames were not taken, and are lost: {error}"
        else:
            if paths:
                more = f", with the {len(paths) - 1} behind it" if len(paths) > 1 else ""
                self.error = f"kept frames were not taken; `taesd-stream publish` sends {paths[0]}{more}"
        if self._outbox.kept.count:
            logger.error(
                "frames_not_taken stream=%s frames=%d %s", self.run.info.stream, self._outbox.kept.count, self.error
            )
        self.is_over = True
        self._notify()


def _send(socket: zmq.Socket[bytes], message: Any) -> None:
    socket.send_multipart(wire.pack(message), zmq.NOBLOCK, copy=False)
