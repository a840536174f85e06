"""The outbox: what waits between the sampler's thread and the socket. No hole, no double, bounded, nothing lost."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from taesd_stream.device_looks import MAX_PAUSE_S
from taesd_stream.frames import Kind, LatentFrame, RecordMode, StreamInfo, WireDtype
from taesd_stream.kept_frames import KeptFrames
from taesd_stream.latent_log import LogError, read_messages
from taesd_stream.latent_snapshot import snapshot_of
from taesd_stream.messages import End
from taesd_stream.outbox import MAX_FINALS, RESTING_NS, Outbox, Said
from taesd_stream.send_window import ACK_PAUSE_S, MAX_UNACKED_BYTES, RESEND_S, SendWindow
from tests.golden_messages import FRAME, OPEN, RUN

FRAME_BYTES = 96
RING_BYTES = 5 * FRAME_BYTES
END = End(run=RUN, last_seq=9, reason="done")


def payload_of(seq: int) -> bytes:
    """Bytes that tell a frame's seq."""
    return random.Random(seq).randbytes(FRAME_BYTES)  # noqa: S311 no secret


def frame(seq: int, *, is_final: bool = False) -> LatentFrame:
    """Frame `seq`."""
    return dataclasses.replace(
        FRAME, seq=seq, index=seq, step=3 if is_final else 0, total_steps=4, kept=False, payload=payload_of(seq)
    )


def info(record: RecordMode | None) -> StreamInfo:
    """OPEN with that word on keeping."""
    return dataclasses.replace(OPEN, record=record)


def outbox(folder: Path, record: RecordMode | None, *, ring_bytes: int = RING_BYTES) -> Outbox:
    """An outbox with a small ring."""
    return Outbox(info(record), ring_bytes=ring_bytes, log_folder=folder)


def said(seq: int, *, is_final: bool = False) -> Said:
    """Frame `seq` as publish() offers it."""
    made = frame(seq, is_final=is_final)
    latents = np.frombuffer(made.payload, np.float16).reshape(made.shape)
    snapshot = snapshot_of(latents, None, 3.0)
    return made.step, made.total_steps, made.sigma, made.sent_ns, snapshot, snapshot.take(latents)


def offer(box: Outbox, count: int = 1, *, is_final: bool = False) -> None:
    """Publish `count` frames."""
    for _ in range(count):
        box.said.append(said(box.next_seq, is_final=is_final))
        box.place()


def skip(box: Outbox, count: int = 1) -> None:
    """Publish `count` frames that nobody wants."""
    box.said.extend([1] * count)
    box.place()


class Device:
    """A device that holds one frame until it is done, and may fail: what a GPU does at moments of its own."""

    is_on_device = True
    dtype: WireDtype = "float16"
    shape = FRAME.shape
    held_bytes = FRAME_BYTES

    def __init__(self, fetch: Callable[[], bytes], *, is_done: bool = True) -> None:
        self.is_done = is_done
        self.is_dropped = False
        self._fetch = fetch

    def take(self, _latents: object) -> None:
        return None

    def drop(self, _taken: None) -> None:
        self.is_dropped = True

    def is_ready(self, _taken: None) -> bool:
        return self.is_done

    def to_bytes(self, _taken: None) -> bytes:
        return self._fetch()

    def to_number(self, value: float | None) -> float | None:
        return value

    def said(self) -> Said:
        """Its frame, as publish() says it."""
        return 0, 4, None, 0, self, None


def kept_seqs(kept: KeptFrames) -> list[int]:
    """All unacked frames as they would be sent, each checked to be whole."""
    seqs: list[int] = []
    seq = 0
    while (found := kept.read(seq)) is not None:
        assert bytes(found.payload) == payload_of(found.seq)
        seqs.append(found.seq)
        seq = found.seq + 1
    return seqs


class KeptMachine(RuleBasedStateMachine):
    """Kept frames against the simplest model: a list of seqs."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.kept = KeptFrames(RING_BYTES, Path(self.folder.name))
        self.model: list[int] = []
        self.next_seq = 0

    @rule(count=st.integers(1, 8))
    def append(self, count: int) -> None:
        for _ in range(count):
            self.kept.append(dataclasses.replace(frame(self.next_seq), kept=True))
            self.model.append(self.next_seq)
            self.next_seq += 1

    @rule(skipped=st.integers(1, 5))
    def keep_nothing_for_a_while(self, skipped: int) -> None:
        self.next_seq += skipped

    @rule()
    def spill(self) -> None:
        self.kept.spill(OPEN)
        assert not self.kept.is_full

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        seq = data.draw(st.integers(-1, self.next_seq + 3))
        was_new = self.kept.ack(seq)
        left = [one for one in self.model if one > seq]
        assert was_new == (len(left) < len(self.model))
        self.model = left

    @invariant()
    def holds_the_model(self) -> None:
        assert kept_seqs(self.kept) == self.model
        assert self.kept.count == len(self.model)

    @invariant()
    def leaves_no_file_behind(self) -> None:
        if not self.model:
            assert list(Path(self.folder.name).iterdir()) == []

    def teardown(self) -> None:
        paths = self.kept.close(OPEN, END)
        messages = [message for path in paths for message in read_messages(path)]
        assert [message.seq for message in messages if isinstance(message, LatentFrame)][
            -len(self.model) :
        ] == self.model
        assert bool(paths) == bool(self.model)
        assert messages[-1:] == [END] * bool(self.model)
        self.folder.cleanup()


def test_kept_frames_hold_what_is_unacked() -> None:
    """Over any order of appends, pauses, spills and acks: what is unacked is there once, in order, whole."""
    run_state_machine_as_test(KeptMachine, settings=settings(max_examples=60, stateful_step_count=30))


def test_the_ring_says_when_it_is_over_its_bytes(tmp_path: Path) -> None:
    """Up to its bytes the ring holds frames in memory; the one past them makes it full."""
    kept = KeptFrames(RING_BYTES, tmp_path)
    for seq in range(5):
        kept.append(frame(seq))
        assert not kept.is_full
    kept.append(frame(5))
    assert kept.is_full


def test_a_spilled_frame_is_not_in_memory(tmp_path: Path) -> None:
    """spill() empties the ring into files of the run, each closed to others."""
    kept = KeptFrames(RING_BYTES, tmp_path)
    for seq in range(20):
        kept.append(frame(seq))
    paths = kept.spill(OPEN)
    assert [path.name for path in paths] == [f"{RUN}.0000.latents"]
    assert kept._held_bytes == 0
    assert kept_seqs(kept) == list(range(20))


def test_a_disk_that_takes_nothing_is_a_log_error(tmp_path: Path) -> None:
    """Where the log's folder cannot be made spill() says so, and the frames stay in memory."""
    (tmp_path / "file").write_text("")
    kept = KeptFrames(RING_BYTES, tmp_path / "file" / "logs")
    kept.append(frame(0))
    with pytest.raises(LogError, match="file/logs"):
        kept.spill(OPEN)
    assert kept_seqs(kept) == [0]


def test_a_user_without_a_home_is_a_log_error() -> None:
    """Nobody has a folder for the log: spill() says what to set, and the frames stay in memory."""
    kept = KeptFrames(RING_BYTES, None)
    kept.append(frame(0))
    with pytest.raises(LogError, match="XDG_STATE_HOME"):
        kept.spill(OPEN)
    assert kept_seqs(kept) == [0]


# --- the window ---


def test_nothing_is_sent_twice_before_its_time(tmp_path: Path) -> None:
    """Each kept frame goes once; without an ack all of them go again after 2 s, the first one first."""
    kept = KeptFrames(RING_BYTES, tmp_path)
    window = SendWindow(kept)
    for seq in range(3):
        kept.append(frame(seq))

    def sent_at(now: float) -> list[int]:
        seqs = []
        while (one := window.next(now)) is not None:
            window.sent(one, now)
            seqs.append(one.seq)
        return seqs

    assert sent_at(100.0) == [0, 1, 2]
    assert sent_at(100.0 + 0.9 * RESEND_S) == []
    assert window.ack(0, 101.0)
    assert sent_at(101.0 + 0.9 * RESEND_S) == []
    assert sent_at(101.0 + RESEND_S) == [1, 2]


def test_acks_may_wait_a_little_unless_frames_wait_for_them(tmp_path: Path) -> None:
    """After a frame its ack is worth no wake, for 50 ms; a window that is full needs it at once."""
    kept = KeptFrames(1 << 40, tmp_path)
    window = SendWindow(kept)
    assert window.listens_s < 100.0
    window.sent(dataclasses.replace(FRAME, seq=0), 100.0)
    assert window.listens_s == 100.0 + ACK_PAUSE_S
    big = dataclasses.replace(FRAME, seq=1, shape=(1, 1024, MAX_UNACKED_BYTES >> 12), dtype="float32", payload=b"")
    window.sent(big, 100.01)
    assert window.listens_s == 100.01


@given(st.lists(st.integers(0, 30), max_size=30), st.integers(1, 31))
def test_the_window_is_bounded_in_bytes(acks: list[int], count: int) -> None:
    """However acks come, no more than 16 MiB and one frame are on their way, and all is sent in the end, once."""
    with tempfile.TemporaryDirectory() as folder:
        kept = KeptFrames(1 << 40, Path(folder))
        window = SendWindow(kept)
        big = dataclasses.replace(FRAME, shape=(1, 1024, 1024), dtype="float32", payload=b"")
        for seq in range(count):
            kept.append(dataclasses.replace(big, seq=seq))
        sent: list[int] = []
        for ack in [*acks, *range(count)]:
            while (one := window.next(0.0)) is not None:
                window.sent(one, 0.0)
                sent.append(one.seq)
                assert window._on_way_bytes < MAX_UNACKED_BYTES + big.nbytes
            window.ack(min(ack, sent[-1]) if sent else -1, 0.0)
        assert sent == list(range(count))


# --- the slot ---


@pytest.mark.parametrize("record", ["off", "last"])
def test_the_newest_wins_before_and_behind_collect(tmp_path: Path, record: RecordMode) -> None:
    """Of frames that nobody keeps one waits: the newest."""
    box = outbox(tmp_path, record)
    offer(box, 3)
    assert len(box.pending) == 3  # and two before it, for they may be done first
    box.collect()
    assert [one.seq for one in box.slot] == [2]
    offer(box, 2)
    box.collect()
    assert [one.seq for one in box.slot] == [4]


def test_last_steps_wait_beside_the_newest(tmp_path: Path) -> None:
    """A last step's frame is not replaced by a newer one; but without a broker only so many wait."""
    box = outbox(tmp_path, "off")
    for _ in range(MAX_FINALS + 5):
        offer(box, 2)
        offer(box, is_final=True)
        box.collect()
    offer(box)
    box.collect()
    finals = [3 * number + 2 for number in range(MAX_FINALS + 5)][-MAX_FINALS:]
    assert [one.seq for one in box.slot] == [*finals, box.next_seq - 1]


# --- settling ---


def test_undecided_frames_become_kept_from_the_first(tmp_path: Path) -> None:
    """Before the first DEMAND frames wait; `all` keeps them, and those that came since, without a hole."""
    box = outbox(tmp_path, None)
    offer(box, 3)
    box.collect()
    offer(box, 2)
    assert box.settle("all")
    box.collect()
    assert (box.kept_from, kept_seqs(box.kept)) == (0, [0, 1, 2, 3, 4])


def test_undecided_frames_are_bounded(tmp_path: Path) -> None:
    """While no broker says what is kept, the ring holds the newest frames and lets the oldest go, collected or not."""
    box = outbox(tmp_path, None)
    offer(box, 50)
    box.collect()
    offer(box, 50)
    box.collect()
    assert box.settle("all")
    assert kept_seqs(box.kept) == [95, 96, 97, 98, 99]
    assert box.kept_from == 95


def test_the_frame_that_waits_is_kept_when_recording_begins(tmp_path: Path) -> None:
    """Set to record while the newest frame is not sent yet: that one is the first kept."""
    box = outbox(tmp_path, "off")
    offer(box, 3)
    box.collect()
    assert box.settle("all")
    offer(box)
    box.collect()
    assert (box.kept_from, kept_seqs(box.kept), list(box.slot)) == (2, [2, 3], [])


def test_a_frame_before_a_pause_is_not_kept(tmp_path: Path) -> None:
    """Set to record after publishes that were only counted: keeping begins at the next one, without a hole."""
    box = outbox(tmp_path, "off")
    offer(box)
    box.collect()
    skip(box, 4)
    assert box.settle("all")
    offer(box)
    box.collect()
    assert (box.kept_from, kept_seqs(box.kept), [one.seq for one in box.slot]) == (5, [5], [0])


@example("off", [("offer", 1), ("skip", 0), ("settle", "all")])  # a rest that began behind an uncollected frame
@given(
    st.sampled_from([None, "off", "last", "all"]),
    st.lists(
        st.one_of(
            st.integers(1, 6).map(lambda count: ("offer", count)),
            st.just(("collect", 0)),
            st.sampled_from(["off", "last", "all"]).map(lambda mode: ("settle", mode)),
            st.just(("skip", 0)),
            st.just(("spill", 0)),
        ),
        max_size=40,
    ),
)
@settings(max_examples=200)
def test_from_kept_from_on_there_is_no_hole(record: RecordMode | None, steps: list[tuple[str, object]]) -> None:
    """Whatever the order of publishes, demands and rests: while `all` is in force, every seq from kept_from is kept."""
    with tempfile.TemporaryDirectory() as folder:
        box = outbox(Path(folder), record, ring_bytes=1 << 20)
        for word, value in steps:
            if word == "offer":
                offer(box, int(str(value)))
            elif word == "collect":
                box.collect()
            elif word == "settle":
                box.settle(value)  # type: ignore[arg-type]
            elif word == "skip" and box.mode == "off":
                skip(box)
            elif word == "spill":
                box.kept.spill(OPEN)
        box.collect()
        seqs = kept_seqs(box.kept)
        assert seqs == sorted(set(seqs))
        if box.mode == "all":
            assert box.kept_from is not None
            assert [seq for seq in seqs if seq >= box.kept_from] == list(range(box.kept_from, box.next_seq))
        else:
            assert box.kept_from is None
        box.kept.close(OPEN, END)


# --- acks and ends ---


def test_what_is_being_collected_is_not_acked(tmp_path: Path) -> None:
    """While the side thread fetches a kept frame from its device, the frame counts as unacked."""
    box = outbox(tmp_path, "all")
    seen: list[bool] = []

    def fetch() -> bytes:
        with box.changed:
            seen.append(box.is_all_acked)
        return payload_of(0)

    box.said.append(Device(fetch).said())
    box.collect()
    assert seen == [False]
    box.kept.ack(0)
    assert box.is_all_acked


def test_a_count_that_comes_late_is_a_hole_and_no_end(tmp_path: Path) -> None:
    """A thread that was held up between its test and its count, while keeping began: both parts are kept, in order."""
    box = outbox(tmp_path, "all")
    offer(box, 2)
    skip(box)
    offer(box, 2)
    box.collect()
    assert kept_seqs(box.kept) == [0, 1, 3, 4]
    box.kept.ack(1)
    assert box.kept.first_seq == 3  # what HELLO then names as kept_from


def test_frames_behind_a_busy_device_keep_their_order(tmp_path: Path) -> None:
    """While a device holds a kept frame nothing behind it is taken, nothing counts as acked, and it is asked again."""
    box = outbox(tmp_path, "all")
    device = Device(lambda: payload_of(0), is_done=False)
    box.said.append(device.said())
    box.place()
    offer(box, 2)
    box.collect()
    assert kept_seqs(box.kept) == []
    assert not box.is_all_acked
    assert 0 < box.looks.next_s - time.monotonic() <= MAX_PAUSE_S
    device.is_done = True
    box.collect()
    assert kept_seqs(box.kept) == [0, 1, 2]
    assert box.looks.next_s == math.inf


def test_the_newest_wins_while_a_device_is_busy(tmp_path: Path) -> None:
    """Of frames that nobody keeps three lie on the device, however long it takes; those between it may forget."""
    box = outbox(tmp_path, "off")
    devices = [Device(lambda: payload_of(0), is_done=False) for _ in range(5)]
    for device in devices:
        box.said.append(device.said())
        box.collect()
    assert [one.seq for one in box.pending] == [0, 3, 4]
    assert [device.is_dropped for device in devices] == [False, True, True, False, False]
    for device in devices:
        device.is_done = True
    box.collect()
    assert [one.seq for one in box.slot] == [4]
    assert devices[0].is_dropped


@pytest.mark.parametrize("record", ["off", "last"])
def test_what_cannot_be_sent_yet_stays_on_its_device(tmp_path: Path, record: RecordMode) -> None:
    """Until the next frame is due nothing is fetched and nobody needs to be woken; then it is the newest alone."""

    def read_in_vain() -> bytes:
        raise AssertionError("a newer one was there when it was due")

    box, due_s = outbox(tmp_path, record), time.monotonic() + 1000
    devices = [*(Device(read_in_vain) for _ in range(4)), Device(lambda: payload_of(4))]
    for device in devices:
        box.said.append(device.said())
        box.collect(due_s)
        assert box.expect(due_s) == due_s
        assert box.wake_before_ns == RESTING_NS
    assert (len(box.pending), len(box.slot)) == (3, 0)
    box.collect(time.monotonic())
    assert [one.seq for one in box.slot] == [4]
    assert box.expect(time.monotonic()) > due_s
    assert box.wake_before_ns > time.monotonic_ns()


def rest(box: Outbox) -> float:
    """Have the outbox rest, its last frame having come before the next is due; returns when that is."""
    due_s = time.monotonic() + 1000
    box.said.append(Device(lambda: payload_of(0)).said())
    box.collect(due_s)
    assert box.expect(due_s) == due_s
    return due_s


@pytest.fixture
def long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of any length are slept through, so that no test depends on its own speed."""
    monkeypatch.setattr("taesd_stream.outbox.MAX_OUTRUN_S", 10_000)


def paced(box: Outbox, *, interval_s: float, due_s: float, looks_s: float = 0.0) -> int:
    """Have a sampler publish with that rhythm, then rest until due_s; returns until when it need not copy."""
    behind_ns = time.monotonic_ns() - round(5 * interval_s * 1e9)
    for number in range(5):
        step, total_steps, sigma, _, *more = Device(lambda: payload_of(0)).said()
        box.said.append((step, total_steps, sigma, behind_ns + round(number * interval_s * 1e9), *more))
    box.looks.patience_s = looks_s
    box.collect(due_s)
    assert box.expect(due_s) == due_s
    return box.outrun_before_ns


@pytest.mark.usefixtures("long_pauses")
def test_what_a_newer_one_replaces_in_time_is_not_copied(tmp_path: Path) -> None:
    """The last publish that is there, and off its device, when a frame is due is copied; those before it are not."""
    due_s = time.monotonic() + 1000
    box = outbox(tmp_path, "off")
    before_ns = paced(box, interval_s=10, due_s=due_s, looks_s=3)
    assert due_s - before_ns / 1e9 == pytest.approx(10 + 3, abs=0.01)


def test_in_a_long_pause_all_are_copied(tmp_path: Path) -> None:
    """A run that is stopped within it, before its last step, shows its newest frame."""
    box = outbox(tmp_path, "off")
    assert paced(box, interval_s=10, due_s=time.monotonic() + 1000) == 0


@pytest.mark.usefixtures("long_pauses")
@pytest.mark.parametrize(
    ("record", "interval_s", "looks_s"), [("last", 10, 0), ("off", 10, 5.1), ("off", 2000, 0)], ids=str
)
def test_where_a_newer_one_may_come_late_all_are_copied(
    tmp_path: Path, record: RecordMode, interval_s: float, looks_s: float
) -> None:
    """Where the run's newest is kept, where a device is steps behind, and where steps are longer than the pause."""
    due_s = time.monotonic() + 1000
    box = outbox(tmp_path, record)
    assert paced(box, interval_s=interval_s, due_s=due_s, looks_s=looks_s) < time.monotonic_ns()


@pytest.mark.usefixtures("long_pauses")
def test_of_a_video_all_are_copied(tmp_path: Path) -> None:
    """What is appended in video time is worth more than its newest."""
    box = Outbox(dataclasses.replace(info("off"), kind="live", fps=16.0), ring_bytes=RING_BYTES, log_folder=tmp_path)
    assert paced(box, interval_s=10, due_s=time.monotonic() + 1000) == 0


@pytest.mark.usefixtures("long_pauses")
def test_a_frame_that_is_due_sooner_than_it_was_is_copied(tmp_path: Path) -> None:
    """A viewer who wants more pictures a second than before need not wait for the moment of the old pace."""
    box, now_s = outbox(tmp_path, "off"), time.monotonic()
    assert paced(box, interval_s=10, due_s=now_s + 1000) > time.monotonic_ns()
    box.collect(now_s)
    box.expect(now_s)
    assert box.outrun_before_ns == 0


@pytest.mark.usefixtures("long_pauses")
def test_once_keeping_begins_all_are_copied(tmp_path: Path) -> None:
    """A press on record: from the next publish on nothing is let go."""
    box = outbox(tmp_path, "off")
    assert paced(box, interval_s=10, due_s=time.monotonic() + 1000) > time.monotonic_ns()
    box.settle("all")
    assert box.outrun_before_ns == 0


def test_a_device_that_is_a_step_behind_is_shown_a_step_late(tmp_path: Path) -> None:
    """When a frame is due and the newest is not done yet, the one before it goes, not the first since the last went."""
    box = outbox(tmp_path, "off")
    rest(box)
    devices = [Device(lambda: payload_of(0), is_done=False) for _ in range(9)]
    for number, device in enumerate(devices):
        if number:
            devices[number - 1].is_done = True
        box.unsay()
        box.said.append(device.said())
    box.collect(time.monotonic())
    assert [one.seq for one in box.slot] == [8]
    assert [one.seq for one in box.pending] == [9]


@pytest.mark.parametrize("kind", ["steps", "live"])
def test_what_is_taken_back_is_counted(tmp_path: Path, kind: Kind) -> None:
    """Of what is published while nothing may be sent the newest two are offered; seq and index go on."""
    box = Outbox(dataclasses.replace(info("off"), kind=kind, fps=16.0), ring_bytes=RING_BYTES, log_folder=tmp_path)
    due_s = rest(box)
    devices = [Device(lambda: payload_of(0)) for _ in range(5)]
    for device in devices:
        box.unsay()
        box.said.append(device.said())
    assert [device.is_dropped for device in devices] == [True, True, True, False, False]
    box.collect(due_s)
    assert [(one.seq, one.index) for one in box.pending] == [(0, 0), (4, 4), (5, 5)]
    assert box.next_seq == 6


def test_what_must_be_said_is_not_taken_back(tmp_path: Path) -> None:
    """Neither the last step's frame nor a count of what nobody wanted; nor anything of a side thread that is awake."""
    box = outbox(tmp_path, "off")
    _, _, *more = Device(lambda: payload_of(0)).said()
    newest = (0, 4, *more)
    for one in ((0, 4, *more), 1, (3, 4, *more)):
        box.said.extend([one, newest])
        box.unsay()
        assert list(box.said) == [one, newest]
        box.said.clear()
        if isinstance(one, tuple) and one[0] == 0:
            rest(box)
    box.said.append(1)
    box.unsay()
    assert list(box.said) == [1]


def test_nothing_is_taken_back_of_what_the_side_thread_has_in_hand(tmp_path: Path) -> None:
    """While it gives frames their places publish() goes on without a wait, and what came since keeping began stays."""
    box = outbox(tmp_path, "off")
    rest(box)
    frames = [Device(lambda: payload_of(0)).said() for _ in range(2)]
    box.said.extend(frames)
    with ThreadPoolExecutor(1) as sampler:
        with box.changed:
            sampler.submit(box.unsay).result(60)
        assert list(box.said) == frames
        box.said.clear()
        box.settle("all")
        box.said.extend(frames)
        sampler.submit(box.unsay).result(60)
    assert list(box.said) == frames


def test_the_last_step_and_what_is_kept_are_fetched_before_the_next_is_due(tmp_path: Path) -> None:
    """No frame is due for long, but the last step's is sent all the same, and so is what is kept."""
    due_s = time.monotonic() + 1000
    for is_final in (True, False):
        box = outbox(tmp_path, "off" if is_final else "all")
        device = Device(lambda: payload_of(0))
        step, total_steps, *rest = device.said()
        box.said.append((3 if is_final else step, 4 if is_final else total_steps, *rest))
        box.collect(due_s)
        assert len(box.slot) + box.kept.count == 1
        if not is_final:
            assert box.expect(due_s) > due_s


def test_a_device_that_is_steps_behind_is_shown(tmp_path: Path) -> None:
    """Where each frame is done only after the next ones were published, pictures come all the same, and in order."""
    box = outbox(tmp_path, "off")
    devices = [Device(lambda: payload_of(0), is_done=False) for _ in range(30)]
    shown = []
    for number, device in enumerate(devices):
        if number >= 5:
            devices[number - 5].is_done = True
        box.said.append(device.said())
        box.collect()
        shown += [one.seq for one in box.slot]
        box.slot.clear()
    assert len(shown) >= 30 // 6
    assert shown == sorted(set(shown))


def test_what_is_dropped_meanwhile_is_not_fetched(tmp_path: Path) -> None:
    """Frames that come while the side thread asks a device may drop one that is ready: its memory is read no more."""
    box = outbox(tmp_path, "off")

    def read_too_late() -> bytes:
        raise AssertionError("it was dropped")

    class Asked(Device):
        """While it is asked, the sampler publishes twice."""

        def is_ready(self, taken: None) -> bool:
            if not self.is_dropped:
                box.said.extend(later.said() for later in (Device(read_too_late), newest))
                box.place()
            return super().is_ready(taken)

    oldest, asked, newest = Device(lambda: payload_of(0)), Asked(read_too_late), Device(lambda: payload_of(3))
    box.said.extend(one.said() for one in (oldest, asked))
    box.collect()
    assert (oldest.is_dropped, asked.is_dropped, newest.is_dropped) == (False, True, False)
    assert [one.seq for one in box.slot] == [0]
    box.collect()
    assert [one.seq for one in box.slot] == [3]


def test_a_signals_handler_may_publish_while_a_frame_gets_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is said amid it comes behind what was said before, each with a seq of its own."""
    box = outbox(tmp_path, "all")
    add, coming = box._rhythm.add, [said(1), said(2)]

    def interrupted(seq: int, sent_ns: int) -> None:
        add(seq, sent_ns)
        if coming:
            box.said.append(coming.pop(0))
            box.place()

    monkeypatch.setattr(box._rhythm, "add", interrupted)
    offer(box)
    box.collect()
    assert kept_seqs(box.kept) == [0, 1, 2]


def test_stopping_waits_for_the_device(tmp_path: Path) -> None:
    """A kept frame that a device still holds at the end of the run is in the log."""
    box = outbox(tmp_path, "all")
    box.said.append(Device(lambda: payload_of(0), is_done=False).said())
    box.collect()
    (path,) = box.stop(info("all"), END, is_end_sent=False)
    assert [message.seq for message in read_messages(path) if isinstance(message, LatentFrame)] == [0]


def test_a_device_that_fails_ends_keeping_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A kept frame that does not come off its device: what was kept before stays, what comes is only shown."""
    box = outbox(tmp_path, "all")
    offer(box, 2)

    def fetch() -> bytes:
        raise RuntimeError("CUDA error: device lost")

    box.said.append(Device(fetch).said())
    offer(box, 1)
    box.collect()
    assert (kept_seqs(box.kept), [one.seq for one in box.slot], box.mode, box.kept_from) == ([0, 1], [3], "off", None)
    assert "device lost" in (box.error or "")
    assert "keeping_stopped" in caplog.text


def test_a_full_disk_ends_keeping_for_the_rest_of_the_run(tmp_path: Path) -> None:
    """Ring and disk both full: keeping ends, is not begun again with a hole, and no wait says that all is well."""
    (tmp_path / "file").write_text("")
    box = outbox(tmp_path / "file" / "logs", "all")
    for _ in range(6):
        offer(box)
        box.collect()
    box.spill_if_full(OPEN)
    assert (box.mode, box.kept.count) == ("off", 6)
    assert "file/logs" in (box.error or "")
    assert not box.settle("all")
    box.kept.ack(5)
    assert not box.is_all_acked


def test_what_nobody_collects_is_bounded(tmp_path: Path) -> None:
    """A side thread that is stuck does not fill the memory: past the ring's bytes keeping ends, loudly."""
    box = outbox(tmp_path, "all")
    offer(box, 100)
    assert len(box.pending) == 3
    assert "wait to be taken" in (box.error or "")


def test_last_keeps_the_newest_once(tmp_path: Path) -> None:
    """keep_last() turns the newest frame into a kept one, sent or not, and does nothing the second time."""
    box = outbox(tmp_path, "last")
    offer(box, 3)
    box.collect()
    box.slot.clear()  # sent
    box.keep_last()
    box.keep_last()
    assert (kept_seqs(box.kept), box.kept_from) == ([2], 2)


def test_stopping_leaves_what_was_not_taken(tmp_path: Path) -> None:
    """stop() puts kept frames, also uncollected ones, and END into a log that can be published later."""
    box = outbox(tmp_path, "all")
    offer(box, 2)
    box.collect()
    offer(box, 1)
    (path,) = box.stop(info("all"), END, is_end_sent=False)
    messages = list(read_messages(path))
    assert [message.seq for message in messages if isinstance(message, LatentFrame)] == [0, 1, 2]
    assert (messages[0], messages[-1]) == (info("all"), END)
    assert box.is_closed


def test_stopping_with_nothing_left_makes_no_file(tmp_path: Path) -> None:
    """All acked, or nothing kept: no log is left."""
    box = outbox(tmp_path / "kept", "all")
    offer(box, 2)
    box.collect()
    box.kept.ack(1)
    assert box.stop(OPEN, END, is_end_sent=True) == []
    other = outbox(tmp_path / "off", "off")
    offer(other, 2)
    assert other.stop(OPEN, END, is_end_sent=False) == []
    assert list(tmp_path.iterdir()) == []
