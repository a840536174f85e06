"""What a publisher still has to say: the hand-over from the sampler's thread to the side thread that owns the socket.

Frames that nobody keeps share one slot, where the newest wins. Kept ones wait, in order, until the broker's log has
them (kept_frames.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from threading import Condition, RLock
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from taesd_stream.device_looks import DeviceLooks
from taesd_stream.frames import CLOCK_HZ, LatentFrame, RecordMode, StreamInfo
from taesd_stream.kept_frames import KeptFrames
from taesd_stream.latent_log import LogError
from taesd_stream.latent_snapshot import Snapshot
from taesd_stream.messages import End
from taesd_stream.publish_rhythm import LATE_NS, NEVER_NS, SOON_NS, PublishRhythm

logger = logging.getLogger(__name__)

RESTING_NS: Final = 0  # of `wake_before_ns`: nothing is sent before the next frame is due
MAX_OUTRUN_S: Final = 0.1  # of a pause in which publishes are not copied: a run may end there without a last step
MAX_FINALS: Final = 8  # last steps' frames that wait for the socket: more only where no broker is

NS_PER_TICK: Final = math.ceil(1e9 / CLOCK_HZ)


class Step(Protocol):
    """What tells whether a frame is the last step's."""

    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int | None: ...


def is_final(frame: Step) -> bool:
    """Whether it is the last step's: it is sent whatever the demand."""
    return _is_last_step(frame.step, frame.total_steps)


def _is_last_step(step: int, total_steps: int | None) -> bool:
    return total_steps is not None and step >= total_steps - 1


# One publish as the sampler's thread leaves it, a tuple, for that costs it least: step, total_steps, sigma (a number,
# None, or a tensor on a device that is not waited for), its time, and the snapshot with what it has taken.
Said: TypeAlias = tuple[int, int | None, Any, int, Snapshot, Any]


@dataclasses.dataclass(slots=True, eq=False)
class Offered:
    """One publish that has its place in the run; its bytes may still be on a device."""

    step: int
    total_steps: int | None
    sigma: Any
    sent_ns: int
    snapshot: Snapshot
    taken: Any
    seq: int
    index: int
    missed_s: float = 0.0

    def to_frame(self, run: str) -> LatentFrame:
        """The frame, its bytes fetched from where they are. Raises: RuntimeError for a device that failed."""
        payload = self.snapshot.to_bytes(self.taken)
        return LatentFrame(
            run=run,
            seq=self.seq,
            index=self.index,
            step=self.step,
            total_steps=self.total_steps,
            sigma=self.snapshot.to_number(self.sigma),
            dtype=self.snapshot.dtype,
            shape=self.snapshot.shape,
            kept=False,
            sent_ns=self.sent_ns,
            payload=payload,
        )


N = TypeVar("N", LatentFrame, Offered)


class Outbox:
    """Shared by two threads: the sampler's thread says what it publishes, the side thread does all the rest.

    The sampler's thread waits for no lock: it tests `wanted` and `outrun_before_ns`, and appends to `said`, either what
    it offers or, where nobody wants that or the next one replaces it before a frame is due, only how many latents it
    would be in video time. The order there is the order of seq. For what it offers it wakes the side thread if that is
    before `wake_before_ns`, or the last step's: a promise to look by itself in time, NEVER_NS from before each look at
    `said` until the next one is made. `is_busy` is the sampler's, too.
    Everything else that is not the side thread's own is changed under `changed`, which is never held over a disk write
    or a copy from a device: `said` but for what is appended, `pending`, `mode`, `next_…`, `kept_from`, `error` and the
    other `is_…` flags.
    """

    def __init__(self, info: StreamInfo, *, ring_bytes: int, log_folder: Path | None) -> None:
        self.wanted = True  # one test, before anything is built
        self.said: deque[Said | int] = deque()
        self.is_busy = False  # the sampler's thread is taking a snapshot
        self.wake_before_ns = NEVER_NS  # whoever publishes later need not wake the side thread; RESTING_NS: nobody
        self.outrun_before_ns = 0  # what is published before it a newer one replaces by the time that a frame is due
        self.changed = Condition(RLock())  # a signal's handler may publish, too
        self.is_closed = False  # nothing more is taken
        self.mode: RecordMode | None = info.record  # None: the broker has not said yet
        self.next_seq = 0
        self.kept_from: int | None = 0 if info.record == "all" else None
        self.error: str | None = None  # why keeping ended before its time
        self.pending: deque[Offered] = deque()  # perhaps still on a device
        self.looks = DeviceLooks()
        self.slot: deque[LatentFrame] = deque()  # not kept, not sent: last steps' frames, then the newest
        self.kept = KeptFrames(ring_bytes, log_folder)
        self._run, self._is_live = info.run, info.kind == "live"
        self._next_index = 0  # of `live`, in video time
        self._next_sent_ns = 0
        self._rhythm = PublishRhythm()
        self._is_outrun = False  # the newest came before a frame was due: of a slower sampler there is nothing then
        self._is_placing = self._is_collecting = False
        self._newest: LatentFrame | None = None  # of those that nobody keeps, also when it was sent
        self._undecided: deque[LatentFrame] = deque()
        self._undecided_bytes = 0
        self._ring_bytes = ring_bytes

    @property
    def is_all_acked(self) -> bool:
        """Whether the broker's log has all that is kept; call with `changed` held."""
        if self.mode is None:
            return self.next_seq == 0 and not self.said
        is_coming = self.mode == "all" and (self._is_collecting or bool(self.pending) or bool(self.said))
        return not is_coming and not self.kept.count and self.error is None

    @property
    def is_owing(self) -> bool:
        """Whether there are frames that are kept, or would be if the run ended now; the side thread alone."""
        is_last_due = self.mode == "last" and self._newest is not None
        return is_last_due or bool(self.pending or self._undecided or self.kept.count)

    def unsay(self) -> None:
        """Take back the last but one of what was said while the side thread rests; the sampler's, before another.

        Two stay: the newest may still be on its way when the next frame is due, the one before it hardly is. To give a
        frame its place only to drop it there would cost the sampler ten times as much. Nothing is waited for: the side
        thread may be at it.
        """
        if not self.changed.acquire(blocking=False):
            return
        try:
            at = len(self.said) - 2  # others may append meanwhile, but nobody else takes
            if at < 0 or self.wake_before_ns != RESTING_NS:
                return
            one = self.said[at]
            if isinstance(one, int) or _is_last_step(one[0], one[1]):
                return
            self.said[at] = count_of(one[4].shape) if self._is_live else 1
            one[4].drop(one[5])
        finally:
            self.changed.release()

    def place(self) -> None:
        """Give what was said its place in the run; any thread, or a side thread that is late would fill the memory."""
        with self.changed:
            if self._is_placing:  # a signal's handler publishes amid this: that has its turn below
                return
            self._is_placing = True
            try:
                while self.said:
                    self._place_one(self.said.popleft())
                self._drop_what_is_too_much()
            finally:
                self._is_placing = False

    def close(self) -> int:
        """Take nothing that is published from now on. Returns the seq of the last publish, -1 when there was none."""
        with self.changed:
            self.place()
            self.is_closed = self.wanted = True  # so that publish() looks closer
            return self.next_seq - 1

    def collect(self, due_s: float = -math.inf, *, is_last: bool = False) -> None:
        """Bring what is off its device into the slot, the ring or the undecided; the side thread alone.

        due_s: monotonic; until then nothing is sent that nobody keeps, nor is it fetched: a newer one may come.
        is_last: bring all of it, and wait for devices.
        """
        self.wake_before_ns = NEVER_NS  # first: who publishes from here on may come too late for this look
        self.outrun_before_ns = 0  # by now a frame may be due sooner than it was
        with self.changed:
            self.place()
            waiting = list(self.pending)
            is_early = self._is_early(due_s, time.monotonic())
            if waiting:
                self._is_outrun = waiting[-1].sent_ns / 1e9 < due_s
        ready = waiting if is_last else self.looks.ready([] if is_early else waiting)
        taken = set(map(id, ready))
        with self.changed:
            # not what publish() has dropped since: its memory may be the next frame's by now
            ready = [one for one in self.pending if id(one) in taken]
            if not ready:
                return
            self.pending = deque(one for one in self.pending if id(one) not in taken)
            self._is_collecting = True
            wanted = _newest_of(ready) if self.mode in ("off", "last") else ready
        _drop(ready, wanted)
        for one in wanted:
            try:
                frame = one.to_frame(self._run)
            except Exception as error:  # noqa: BLE001 of a device that failed, mostly: those behind it may be better
                self._lose(one, error)
            else:
                self._take(frame)
        with self.changed:
            self._is_collecting = False
            self.changed.notify_all()

    def expect(self, due_s: float = -math.inf) -> float:
        """Promise the next look to who publishes from `wake_before_ns` on. The side thread alone, before it waits.

        due_s: as of collect(). Returns: monotonic seconds, far away where only a wake brings it.
        """
        now_ns = time.monotonic_ns()
        with self.changed:
            if self._is_outrun and self.wanted and self._is_early(due_s, now_ns / 1e9):
                self.wake_before_ns = RESTING_NS
                self.outrun_before_ns = self._outrun_before_ns(due_s, now_ns / 1e9)
                return due_s
            look_ns = self._rhythm.look_ns(now_ns)
            self.wake_before_ns = look_ns - SOON_NS
        return look_ns / 1e9

    def settle(self, mode: RecordMode) -> bool:
        """The broker said what is kept; the side thread alone. Returns whether that is new.

        What waits, and is the very last before what comes, is kept too: by pressing a button nothing is lost but what
        was only counted.
        """
        if mode == "all" and self.error is not None:
            mode = "off"  # frames are missing already: a recording has no holes
        if mode == self.mode:
            return False
        self.wake_before_ns = NEVER_NS  # nothing is taken back from here on
        self.outrun_before_ns = 0
        waiting = [*self._undecided, *self.slot]
        self._undecided.clear()
        self._undecided_bytes = 0
        self.slot.clear()
        with self.changed:
            self.wanted = self.wanted or mode != "off"
            self.place()
            self.mode = mode
            begin = self.next_seq - len(_tail_before(list(self.pending), self.next_seq))
            early = _tail_before(waiting, begin) if mode == "all" else []
            self.kept_from = begin - len(early) if mode == "all" else None
        for frame in waiting[: len(waiting) - len(early)]:
            self._show(frame)
        for frame in early:
            self.kept.append(dataclasses.replace(frame, kept=True))
        if mode == "all":
            self._newest = None
        return True

    def keep_last(self) -> bool:
        """Turn the newest frame of `record="last"` into a kept one; the side thread alone, at the end of the run.

        Returns whether there was one.
        """
        frame = self._newest
        if self.mode != "last" or frame is None:
            return False
        self._newest, self.kept_from = None, frame.seq
        self.kept.append(dataclasses.replace(frame, kept=True))
        if self.slot and self.slot[-1] is frame:
            self.slot.pop()
        return True

    def hand_over(self) -> int | None:
        """Another broker, which has nothing yet, takes the run over; the side thread alone.

        Returns: when the first frame was published that it gets; None where none is here.
        """
        with self.changed:
            self.place()
            waiting: list[Offered | LatentFrame] = [*self.pending, *self._undecided, *self.slot]
            if self.kept_from is not None and not self.kept.count:  # what was acked will not come there
                coming = (one.seq for one in self.pending if one.seq >= self.kept_from)
                self.kept_from = min(coming, default=self.next_seq)
        kept = self.kept.read(self.kept.first_seq or 0)
        waiting += [frame for frame in (self._newest, kept) if frame is not None]
        return min((one.sent_ns for one in waiting), default=None)

    def show_again(self) -> None:
        """A broker that does not know the run has no picture of it: send the newest once more."""
        if self._newest is not None and not self.slot:
            self.slot.append(self._newest)

    def spill_if_full(self, info: StreamInfo) -> None:
        """Move a full ring to disk; where the disk takes it not either, keeping ends, loudly."""
        if not self.kept.is_full:
            return
        try:
            paths = self.kept.spill(info)
        except LogError as error:
            if self.error is None:
                self._stop_keeping(str(error))
        else:
            logger.warning("ring_full stream=%s kept_in=%s", info.stream, paths[-1])

    def stop(self, info: StreamInfo, end: End, *, is_end_sent: bool) -> list[Path]:
        """Take nothing more, and leave what no broker took in our own log. Returns its files.

        Raises: LogError when the disk takes it not.
        """
        self.close()
        self.collect(is_last=True)
        if not is_end_sent:
            self.keep_last()
        return self.kept.close(info, end)

    def _is_early(self, due_s: float, now_s: float) -> bool:
        """Whether all that waits may go on waiting; with `changed` held."""
        return now_s < due_s and self.mode in ("off", "last") and not any(map(is_final, self.pending))

    def _outrun_before_ns(self, due_s: float, now_s: float) -> int:
        """Until when a publish need not be copied: the one after it will be there, and off its device, by due_s."""
        interval_ns, late_ns = self._rhythm.interval_ns(), int(self.looks.patience_s * 1e9)
        is_known = 2 * late_ns < interval_ns < NEVER_NS  # of a device that is further behind too little is known
        is_long = due_s - now_s > MAX_OUTRUN_S
        if not is_known or is_long or self._is_live or self.mode != "off":  # "last" keeps the newest, wherever it ends
            return 0
        return int(due_s * 1e9) - late_ns - interval_ns - LATE_NS

    def _place_one(self, one: Said | int) -> None:
        if self.is_closed:
            return
        if isinstance(one, int):
            count = one
        else:
            count = count_of(one[4].shape)
            self.pending.append(self._offered(one))
        self.next_seq += 1
        self._next_index += count

    def _take(self, frame: LatentFrame) -> None:
        if self.mode == "all" and self.kept_from is not None and frame.seq < self.kept_from:
            self.slot.append(frame)  # offered before keeping began, with publishes behind it that were only counted
        elif self.mode == "all":
            self.kept.append(dataclasses.replace(frame, kept=True))
        elif self.mode is None:
            self._undecided.append(frame)
            self._undecided_bytes += frame.nbytes
            while self._undecided_bytes > self._ring_bytes and len(self._undecided) > 1:
                self._undecided_bytes -= self._undecided.popleft().nbytes
        else:
            self._show(frame)

    def _show(self, frame: LatentFrame) -> None:
        self.slot = deque(_newest_of([*self.slot, frame]))
        self._newest = frame

    def _offered(self, said: Said) -> Offered:
        step, total_steps, sigma, called_ns, snapshot, taken = said
        self._rhythm.add(self.next_seq, called_ns)
        # two frames never share a tick of the pictures' 90 kHz clock
        sent_ns = max(called_ns, self._next_sent_ns)
        self._next_sent_ns = sent_ns + NS_PER_TICK
        return Offered(
            step=step,
            total_steps=total_steps,
            sigma=sigma,
            sent_ns=sent_ns,
            snapshot=snapshot,
            taken=taken,
            seq=self.next_seq,
            index=self._next_index if self._is_live else self.next_seq,
        )

    def _drop_what_is_too_much(self) -> None:
        """Of what waits for a device: what nobody keeps, or no memory holds; with `changed` held.

        Of what nobody keeps the oldest stays beside the newest two: where the device is steps behind, that is done
        first, and newer ones would replace each other until the end of the run.
        """
        if len(self.pending) < 2:
            return
        nbytes = sum(one.snapshot.held_bytes for one in self.pending)
        if self.mode == "all" and nbytes > self._ring_bytes:
            self._stop_keeping(f"{nbytes} bytes wait to be taken out of the sampler's way")
        before = list(self.pending)
        if self.mode in ("off", "last") and len(before) > 2:
            self.pending = deque([before[0], *_newest_of(before[1:-1]), before[-1]])
        while self.mode is None and nbytes > self._ring_bytes and len(self.pending) > 1:
            nbytes -= self.pending.popleft().snapshot.held_bytes
        _drop(before, self.pending)

    def _lose(self, offered: Offered, error: Exception) -> None:
        logger.warning("frame_not_fetched run=%s seq=%d error=%s", self._run, offered.seq, error)
        if self.mode == "all":
            self._stop_keeping(f"frame {offered.seq} did not come off its device: {error}")

    def _stop_keeping(self, reason: str) -> None:
        """What is kept so far is still sent; what comes is only shown."""
        with self.changed:
            self.mode, self.kept_from = "off", None
            self.error = f"keeping stopped: {reason}"
        logger.error("keeping_stopped reason=%s", reason)


def count_of(shape: tuple[int, ...]) -> int:
    """Latents in video time that a `live` publish brings."""
    return shape[0] if len(shape) == 4 else 1


def _newest_of(waiting: list[N]) -> list[N]:
    """A preview is worth its newest frame; but the last step's is always sent."""
    *older, newest = waiting
    return [*[one for one in older if is_final(one)][-MAX_FINALS:], newest]


def _drop(waiting: list[Offered], stays: Iterable[Offered]) -> None:
    """Those that do not stay will not be fetched."""
    those = set(map(id, stays))
    for one in waiting:
        if id(one) not in those:
            one.snapshot.drop(one.taken)


def _tail_before(frames: list[N], seq: int) -> list[N]:
    """The last of `frames` that lead up to `seq` without a hole."""
    count = 0
    for frame in reversed(frames):
        if frame.seq != seq - 1 - count:
            break
        count += 1
    return frames[len(frames) - count :]
