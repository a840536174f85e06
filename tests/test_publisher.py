"""The publisher's talk with a broker: what it says, in which order, and what it does with each answer."""

from __future__ import annotations

import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taesd_stream import LatentPublisher, publisher_link
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.messages import PublisherHello, StopRun
from taesd_stream.outbox import RESTING_NS, Outbox
from taesd_stream.publish_rhythm import NEVER_NS
from taesd_stream.publisher_link import HELLO_S
from taesd_stream.pulse import MAX_UNHEARD_BYTES
from tests.broker_peer import TIMEOUT_S, BrokerPeer
from tests.daemon import wait_for

LATENTS = np.arange(4 * 8 * 8, dtype=np.float16).reshape(4, 8, 8)


@pytest.fixture
def open_run(peer: BrokerPeer) -> Iterator[Any]:
    """Opens publishers at the peer, and ends what the test left open without waiting."""
    opened: list[LatentPublisher] = []

    def open_one(**options: Any) -> LatentPublisher:
        opened.append(
            LatentPublisher(peer.address, **{"stream": "a", "latent_format": "sd1", "record": "off", **options})
        )
        return opened[-1]

    yield open_one
    for publisher in opened:
        publisher.close(0.0)


def publish(publisher: LatentPublisher, count: int, *, first: int = 0, total: int = 1000) -> None:
    """Steps `first` and on, each told by its first value."""
    for step in range(first, first + count):
        publisher.publish(np.full((4, 8, 8), step, np.float16), step=step, total_steps=total, sigma=1.0)


def closed(publisher: LatentPublisher, beside: ThreadPoolExecutor, peer: BrokerPeer) -> Any:
    """Close it while the peer takes what is left. Returns the END."""
    closing: Future[None] = beside.submit(publisher.close)
    end = peer.finish()
    closing.result(20)
    return end


# --- the order ---


def test_open_is_the_first_word(peer: BrokerPeer, open_run: Any) -> None:
    """OPEN comes before anything else, and says what the program said."""
    publisher = open_run(stream="studio/a", meta={"seed": 42}, record="last")
    first = peer.receive()
    assert isinstance(first, StreamInfo)
    assert (first.stream, first.run, first.record) == ("studio/a", publisher.run, "last")
    assert first.meta["seed"] == 42


def test_hello_comes_at_once_and_each_second(peer: BrokerPeer, open_run: Any) -> None:
    """HELLO follows OPEN, counts the publishes, and comes again by itself."""
    publisher = open_run()
    assert peer.next(PublisherHello).runs[publisher.run].next_seq == 0
    publish(publisher, 3)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq == 3)


def test_the_programs_random_numbers_stay_as_they_are(peer: BrokerPeer, open_run: Any) -> None:
    """A sampler that seeds them has the same ones, whatever publishers say meanwhile, and when."""

    def states() -> tuple[Any, ...]:
        return random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    publisher = open_run(record="all")
    publish(publisher, 3)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq == 3)
    assert states() == before


def test_publishers_that_were_opened_together_say_hello_apart(open_run: Any) -> None:
    """Each has a pace of its own, about a second."""
    paces = {open_run(stream=f"studio/{number}")._link._hello_s for number in range(4)}
    assert len(paces) == 4
    assert min(paces) >= HELLO_S[0]
    assert max(paces) <= HELLO_S[1]


def test_the_echo_gives_the_offset(peer: BrokerPeer, open_run: Any) -> None:
    """After a round trip HELLO tells how far the broker's clock is ahead: on one host almost nothing."""
    open_run()
    hello = peer.next(PublisherHello, lambda hello: hello.offset_ns != 0)
    assert abs(hello.offset_ns) < 5e9


def test_end_is_the_last_word(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """END comes after every frame, and counts them."""
    publisher = open_run(record="all")
    publish(publisher, 5)
    end = closed(publisher, beside, peer)
    assert (end.last_seq, end.reason) == (4, "done")
    assert peer.heard[-1] is end
    assert peer.seqs() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("attempt", range(20))
def test_a_frame_published_right_before_close_is_sent_before_end(
    peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor, attempt: int
) -> None:
    """However publish() and close() fall into the side thread's turn, the last frame comes before END."""
    publisher = open_run(record="off")
    peer.next(PublisherHello)
    publish(publisher, 2)
    closed(publisher, beside, peer)
    assert peer.seqs()[-1] == 1


def test_a_run_without_frames_ends_too(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """A program that publishes nothing still says OPEN and END, with last_seq -1."""
    publisher = open_run()
    peer.opened()
    assert closed(publisher, beside, peer).last_seq == -1


# --- frames ---


def test_a_frame_says_what_was_published(peer: BrokerPeer, open_run: Any) -> None:
    """Step, total, sigma, shape, dtype and bytes arrive as they were given."""
    open_run().publish(LATENTS, step=3, total_steps=20, sigma=2.5)
    frame = peer.frame(0)
    assert (frame.step, frame.total_steps, frame.sigma, frame.kept) == (3, 20, 2.5, False)
    assert (frame.shape, frame.dtype, bytes(frame.payload)) == ((4, 8, 8), "float16", LATENTS.tobytes())


def test_a_later_write_does_not_show(peer: BrokerPeer, open_run: Any) -> None:
    """The caller may overwrite its 2 MiB array as soon as publish() returns: what is sent is what it was."""
    publisher = open_run(record="all", wire_dtype="float32")
    latents = np.empty((4, 256, 512), np.float32)
    assert latents.nbytes == 2 << 20
    for step in range(20):
        latents[:] = step
        publisher.publish(latents, step=step)
        latents[:] = -1
    for step in range(20):
        frame = peer.frame(step)
        assert np.unique(np.frombuffer(frame.payload, np.float32)).tolist() == [step]
        peer.ack(publisher.run, step)


def test_a_timeout_is_a_number_of_seconds(open_run: Any, peer: BrokerPeer) -> None:
    """One that is none is refused before anything changes; without a limit it lasts until the ack."""
    publisher = open_run(record="all")
    publisher.publish(LATENTS, step=0)
    assert not publisher.wait_until_acked(0.01)
    for wait in (publisher.wait_until_acked, publisher.close):
        for timeout_s in (None, float("nan")):
            with pytest.raises(ValueError, match="timeout_s: expected seconds, got"):
                wait(timeout_s)
    peer.opened()
    peer.ack(publisher.run, peer.frame(0).seq)
    assert publisher.wait_until_acked(float("inf"))
    assert publisher.error is None


def test_an_end_without_a_limit_waits_for_the_broker(open_run: Any, peer: BrokerPeer) -> None:
    """`close(inf)` ends when the END is acked."""
    publisher = open_run()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(publisher.close, float("inf"))
        assert peer.finish().reason == "done"
        closing.result(20)


def test_meta_with_half_a_character_travels(open_run: Any, peer: BrokerPeer) -> None:
    """A single surrogate, as of a command line that is no UTF-8, becomes a question mark."""
    open_run(meta={"prompt": "a\udcff", "\ud83d": 1})
    meta = peer.opened().meta
    assert (meta["prompt"], meta["?"]) == ("a?", 1)


def test_an_error_that_cannot_be_said_ends_its_run_too(open_run: Any, peer: BrokerPeer) -> None:
    """An exception whose repr() fails is the one that leaves the block, and its type's name is what people read."""

    class MuteError(Exception):
        def __repr__(self) -> str:
            raise RuntimeError("no words")

    def sample() -> None:
        with open_run() as publisher:
            publisher.publish(LATENTS, step=0)
            raise MuteError

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(peer.finish)
        with pytest.raises(MuteError):
            sample()
        assert (ended.result(20).reason, ended.result().text) == ("failed", "MuteError")


@pytest.mark.parametrize("sigma", [float("nan"), float("inf"), np.float32("nan")])
def test_a_sigma_that_is_no_number_is_left_out(peer: BrokerPeer, open_run: Any, sigma: float) -> None:
    """NaN and infinity as sigma: the picture is shown, without a noise level."""
    open_run().publish(LATENTS, step=0, sigma=sigma)
    assert peer.frame(0).sigma is None


def test_numbers_of_numpy_are_numbers(peer: BrokerPeer, open_run: Any) -> None:
    """step, total_steps and sigma may be numpy's."""
    open_run().publish(LATENTS, step=np.int64(1), total_steps=np.int32(4), sigma=np.float64(0.5))
    frame = peer.frame(0)
    assert (frame.step, frame.total_steps, frame.sigma) == (1, 4, 0.5)


def test_times_of_frames_rise_by_a_tick_at_least(peer: BrokerPeer, open_run: Any) -> None:
    """Two frames published at once never share a tick of the 90 kHz clock."""
    publisher = open_run(record="all")
    publish(publisher, 50)
    ticks = [peer.frame(seq).sent_ns * 90_000 // 1_000_000_000 for seq in range(50)]
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        (np.zeros((4, 8, 8), np.int64), "floats"),
        (np.zeros((4, 8, 8), np.uint8), "floats"),
        (np.zeros((4, 8, 8), bool), "floats"),
        ([[1.0]], "list"),
        (None, "NoneType"),
        (np.zeros((16, 8, 8), np.float16), "expected 4 channels, got 16"),
        (np.zeros((8, 8), np.float16), "got shape (8, 8)"),
        (np.zeros((4, 0, 8), np.float16), "empty"),
        (np.broadcast_to(np.float16(0), (4, 4096, 4096)), "over the"),
    ],
)
def test_what_cannot_be_shown_is_said(open_run: Any, latents: Any, words: str) -> None:
    """Latents of a wrong type, shape or size raise nothing; `error` names the fault until a good publish comes."""
    publisher = open_run()
    publisher.publish(latents, step=0)
    assert words in (publisher.error or "")
    publisher.publish(LATENTS, step=0)
    assert publisher.error is None


@pytest.mark.parametrize(
    "arguments",
    [
        {"step": None},
        {"step": "one", "total_steps": 4},
        {"step": -1},
        {"step": 0, "total_steps": 0},
        {"step": 0, "total_steps": "many"},
        {"step": 0, "sigma": "loud"},
        {"step": 0, "sigma": 1e31},
        {"step": 1 << 40},
    ],
)
def test_arguments_that_no_frame_can_hold_raise_nothing(open_run: Any, arguments: dict[str, Any]) -> None:
    """Whatever publish() is given, the run goes on; `error` says what was wrong."""
    publisher = open_run()
    publisher.publish(LATENTS, **arguments)
    assert (publisher.error or "").startswith("publish: ")


def test_a_refused_publish_leaves_no_hole(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """In a kept run a publish that cannot be sent takes no seq: those around it are still acked as one row."""
    publisher = open_run(record="all")
    publish(publisher, 2)
    publisher.publish(np.zeros((3, 8, 8), np.float16), step=2)
    publish(publisher, 2, first=3)
    assert closed(publisher, beside, peer).last_seq == 3
    assert peer.seqs() == [0, 1, 2, 3]


def test_latents_without_a_value_are_refused(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """An empty array of a format that the publisher does not know is a fault of that publish, and the next one goes."""
    publisher = open_run(latent_format="custom", record="all")
    publisher.publish(np.zeros((0, 4, 8, 8), np.float32), step=0)
    assert publisher.error == "publish: latents: expected values, got none, shape (0, 4, 8, 8)"
    publish(publisher, 1)
    assert closed(publisher, beside, peer).last_seq == 0


def test_faults_are_logged_once(open_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A sampler that publishes nonsense at each step gets one line, not one a step."""
    publisher = open_run()
    for step in range(50):
        publisher.publish(None, step=step)
    assert sum("publish_failed" in record.message for record in caplog.records) == 1


def test_threads_share_one_run(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """Several threads publish at once: every frame has its own seq, and they come in that order, none missing."""
    publisher = open_run(record="all")
    threads = [threading.Thread(target=publish, args=(publisher, 50)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    closed(publisher, beside, peer)
    assert peer.seqs() == list(range(200))


def test_a_live_stream_counts_latents_in_video_time(peer: BrokerPeer, open_run: Any) -> None:
    """`live`: index is the place of a publish's first latent, also behind publishes that were only counted."""
    publisher = open_run(kind="live", fps=16.0)
    peer.opened()
    publisher.publish(np.zeros((3, 4, 8, 8), np.float16), step=0)
    assert peer.frame(0).index == 0
    peer.demand(publisher.run, "idle", max_fps=0.001)
    wait_for(lambda: not publisher._outbox.wanted, of="the publisher's rest")
    publisher.publish(np.zeros((5, 4, 8, 8), np.float16), step=1)
    publisher.publish(LATENTS, step=2)
    peer.demand(publisher.run, "every")
    wait_for(lambda: publisher._outbox.wanted, of="the publisher's waking")
    publisher.publish(np.zeros((2, 4, 8, 8), np.float16), step=3)
    frame = peer.frame(3)
    assert (frame.index, frame.shape) == (9, (2, 4, 8, 8))


def test_a_clip_is_one_frame(peer: BrokerPeer, open_run: Any) -> None:
    """`clip`: a whole video a publish, its index the seq; a single picture is none, and `error` says so."""
    publisher = open_run(kind="clip", fps=16.0)
    publisher.publish(LATENTS, step=0)
    assert "clip latents are (T, C, h, w)" in (publisher.error or "")
    publisher.publish(np.zeros((9, 4, 8, 8), np.float16), step=0)
    frame = peer.frame(0)
    assert (frame.index, frame.shape) == (0, (9, 4, 8, 8))


def test_latents_may_change_their_form(peer: BrokerPeer, open_run: Any) -> None:
    """Size, precision and library may be others at each publish: what is sent is always what was given."""
    publisher = open_run(record="all")
    forms: list[Any] = [LATENTS, LATENTS.astype(np.float32), np.ones((4, 4, 6), np.float16), torch.from_numpy(LATENTS)]
    for step, latents in enumerate([*forms, *reversed(forms)]):
        publisher.publish(latents, step=step)
    for step, latents in enumerate([*forms, *reversed(forms)]):
        frame = peer.frame(step)
        assert (frame.shape, bytes(frame.payload)) == (tuple(latents.shape), np.float16(latents).tobytes())


@pytest.mark.parametrize("system", ["macos", "windows"])
def test_without_eventfd_frames_are_sent_at_once_too(
    peer: BrokerPeer, open_run: Any, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    """Where there is no eventfd, and on Windows no write() for sockets, a publish still wakes the side thread."""
    monkeypatch.delattr(os, "eventfd", raising=False)
    if system == "windows":
        monkeypatch.setattr("taesd_stream.sockets._has_write", lambda: False)
    publisher = open_run(record="off")
    peer.next(PublisherHello, lambda hello: hello.offset_ns != 0)
    for step in range(20):  # far more than there are seconds, in which HELLO would wake it
        wait_for(
            lambda: publisher._outbox.wake_before_ns > time.monotonic_ns(), of="a side thread that waits to be woken"
        )
        publish(publisher, 1, first=step)
        peer.frame(step)
    assert sum(isinstance(message, PublisherHello) for message in peer.heard) < 20


def counted_wakes(publisher: LatentPublisher) -> list[int]:
    """Grows with each time that a publish wakes the side thread."""
    wake: Callable[[], object] = publisher._signal
    wakes: list[int] = []

    def counted() -> None:
        wakes.append(len(wakes))
        wake()

    publisher._signal = counted
    return wakes


def test_a_sampler_with_a_rhythm_need_not_wake_anybody(peer: BrokerPeer, open_run: Any) -> None:
    """Once its steps are as long as each other, the side thread looks by itself, and every frame is sent."""
    publisher = open_run(record="off")
    wakes = counted_wakes(publisher)
    hellos = in_silence = 0
    for step in range(1000):
        time.sleep(0.02)  # its pace
        peer.heard.clear()
        before = len(wakes)
        publish(publisher, 1, first=step)
        peer.frame(step)
        if len(wakes) == before:
            in_silence += 1
            hellos += any(isinstance(message, PublisherHello) for message in peer.heard)
        if in_silence == 20:
            break
    assert in_silence == 20
    assert hellos < 20  # which are once a second, and look too


def early_one(peer: BrokerPeer, open_run: Any) -> Any:
    """A publisher of two steps, whose first was sent; the second waits, for no frame is due for long."""
    publisher = open_run(record="off")
    publish(publisher, 1)
    peer.frame(0)
    peer.demand(publisher.run, "watched", max_fps=0.001)
    wait_for(lambda: publisher._link._pace.next_s > time.monotonic(), of="a frame that is not due for long")
    publish(publisher, 1, first=1)
    return publisher


def test_until_the_next_frame_is_due_only_the_last_step_wakes(peer: BrokerPeer, open_run: Any) -> None:
    """A sampler faster than what is asked for wakes nobody in vain; its last step is sent at once all the same."""
    publisher = early_one(peer, open_run)
    wakes = counted_wakes(publisher)
    for step in range(2, 6):
        wait_for(lambda: publisher._outbox.wake_before_ns == RESTING_NS, of="a side thread that rests until then")
        publisher.publish(LATENTS, step=step, total_steps=7)
    assert len(wakes) <= 1  # HELLO may go out meanwhile, once: until it has, the side thread promises nothing
    publisher.publish(LATENTS, step=6, total_steps=7)
    assert peer.frame(6).step == 6
    assert peer.seqs() == [0, 6]


def test_what_a_newer_step_replaces_before_it_can_be_sent_is_only_counted(
    peer: BrokerPeer, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a newer one is sure to come in time latents are not even looked at, but for the last step's."""
    monkeypatch.setattr(Outbox, "_outrun_before_ns", lambda *_: NEVER_NS)  # whatever its rhythm: test_outbox tells
    publisher = early_one(peer, open_run)
    steps = itertools.count(2)

    def is_counted() -> bool:  # HELLO may go out meanwhile: until it has, the side thread promises nothing
        publisher._fault = None
        publisher.publish("no latents", step=next(steps), total_steps=1000)
        return publisher.error is None

    wait_for(is_counted, of="a step that is only counted")
    publisher.publish(LATENTS, step=999, total_steps=1000)
    last = peer.next(LatentFrame, lambda frame: frame.step == 999)
    hello = peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq > last.seq)
    assert last.seq == hello.runs[publisher.run].next_seq - 1
    publisher.publish("no latents", step=0)
    assert "str" in (publisher.error or "")  # that is perhaps the last one


def test_the_side_thread_stands_aside_while_a_publish_is_under_way(
    peer: BrokerPeer, open_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A publish() is told apart from what is around it, also where it fails; until it is over the thread sleeps."""
    publisher = open_run(record="off")
    outbox, seen = publisher._outbox, []

    class Watched(np.ndarray):
        def tobytes(self, *_: Any) -> bytes:
            seen.append(outbox.is_busy)
            if not self.any():
                raise RuntimeError("these have gone")
            return super().tobytes()

    publisher.publish(LATENTS.view(Watched), step=0)
    publisher.publish(np.zeros_like(LATENTS).view(Watched), step=1)
    assert "these have gone" in (publisher.error or "")
    assert seen == [True, True]
    assert not outbox.is_busy

    monkeypatch.setattr(publisher_link, "MAX_ASIDE", 1_000_000)
    thread = publisher._link._thread

    def is_aside() -> bool:
        peer.hear()  # while its HELLO has no answer it stands aside for nobody
        publisher._link.wakes.wake()
        return stands_aside(thread)

    outbox.is_busy = True
    try:
        wait_for(is_aside, of="a side thread that stands aside")
    finally:
        outbox.is_busy = False
    wait_for(lambda: not stands_aside(thread), of="a side thread that goes on")


def stands_aside(thread: threading.Thread) -> bool:
    """Whether a side thread waits for a publish()."""
    assert thread.ident is not None
    return sys._current_frames()[thread.ident].f_code.co_name == "_stand_aside"


def test_the_side_thread_goes_on_however_long_a_publish_takes(peer: BrokerPeer, open_run: Any) -> None:
    """A sampler that does nothing but publish, or whose GPU lets it wait there, hears and is heard."""
    publisher = open_run(record="off")
    publish(publisher, 1)
    frame = peer.frame(0)
    publisher._outbox.is_busy = True
    try:
        peer.send(StopRun(run=frame.run))
        wait_for(lambda: publisher.stopped, of="the word to stop")
    finally:
        publisher._outbox.is_busy = False


def test_acks_are_read_while_frames_go(peer: BrokerPeer, open_run: Any) -> None:
    """They wake nobody just after a kept frame; but a sampler that never pauses does not fill the memory."""
    publisher = open_run(record="all")
    most = 0
    for step in range(100):
        publish(publisher, 1, first=step)
        peer.frame(step, kept=True)
        peer.ack(publisher.run, step)
        most = max(most, publisher._outbox.kept.count)
    assert most < 50
    assert publisher.wait_until_acked(TIMEOUT_S)


# --- demand ---


def test_idle_sends_one_frame_and_counts_the_others(peer: BrokerPeer, open_run: Any) -> None:
    """While nobody watches one frame is sent for a late viewer; the next ones are only counted."""
    publisher = open_run(record="off")
    peer.opened()
    peer.demand(publisher.run, "idle", max_fps=0.001)
    publish(publisher, 1)
    peer.frame(0)
    wait_for(lambda: not publisher._outbox.wanted, of="the publisher's rest")
    publish(publisher, 5, first=1)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq == 6)
    assert peer.seqs() == [0]


def test_a_stream_that_is_no_longer_watched_rests_at_once(peer: BrokerPeer, open_run: Any) -> None:
    """DEMAND idle right after a frame was sent: that one is the late viewer's, the next ones are only counted."""
    publisher = open_run(record="off")
    publish(publisher, 1)
    peer.frame(0)
    peer.demand(publisher.run, "idle", max_fps=0.001)
    wait_for(lambda: not publisher._outbox.wanted, of="the publisher's rest")
    publish(publisher, 5, first=1)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq == 6)
    assert peer.seqs() == [0]


def test_a_viewer_ends_the_rest(peer: BrokerPeer, open_run: Any) -> None:
    """DEMAND watched after idle: the very next publish is sent."""
    publisher = open_run(record="off")
    peer.opened()
    peer.demand(publisher.run, "idle", max_fps=0.001)
    publish(publisher, 1)
    peer.frame(0)
    wait_for(lambda: not publisher._outbox.wanted, of="the publisher's rest")
    peer.demand(publisher.run, "watched")
    wait_for(lambda: publisher._outbox.wanted, of="the publisher's waking")
    publish(publisher, 1, first=1)
    peer.frame(1)


def test_the_last_step_is_sent_whatever_the_demand(peer: BrokerPeer, open_run: Any) -> None:
    """The frame with step = total_steps - 1 is sent at once though the stream is idle."""
    publisher = open_run(record="off")
    peer.opened()
    peer.demand(publisher.run, "idle", max_fps=0.001)
    publish(publisher, 1, total=4)
    peer.frame(0)
    wait_for(lambda: not publisher._outbox.wanted, of="the publisher's rest")
    publish(publisher, 3, first=1, total=4)
    assert peer.frame(3).step == 3


def test_no_later_step_replaces_the_last_one(peer: BrokerPeer, open_run: Any) -> None:
    """A sampler that begins its next picture at once does not push the finished one out of the slot."""
    publisher = open_run(record="off")
    for _ in range(3):
        publish(publisher, 4, total=4)
    peer.frame(11)
    assert {3, 7, 11} <= set(peer.seqs())


def test_max_fps_bounds_what_is_sent(peer: BrokerPeer, open_run: Any) -> None:
    """Frames within 1 / max_fps of each other: the first goes, the newest waits, those between are dropped."""
    publisher = open_run(record="off")
    peer.opened()
    peer.demand(publisher.run, "watched", max_fps=0.5)
    wait_for(lambda: publisher._link._pace._interval_s == 2.0, of="the demand")
    publish(publisher, 1)
    peer.frame(0)
    publish(publisher, 9, first=1)
    peer.frame(9)
    assert peer.seqs() == [0, 9]


# --- keeping ---


def test_undecided_frames_wait_for_the_first_demand(peer: BrokerPeer, open_run: Any) -> None:
    """record=None: nothing is sent before DEMAND; if that says `all`, every frame from the first is kept."""
    publisher = open_run(record=None)
    publish(publisher, 3)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq == 3)
    assert peer.seqs() == []
    peer.demand(publisher.run, "every", record="all")
    assert [peer.frame(seq).kept for seq in range(3)] == [True, True, True]


def test_undecided_frames_that_nobody_keeps_are_one(peer: BrokerPeer, open_run: Any) -> None:
    """record=None and the answer `off`: of all that waited the newest is shown."""
    publisher = open_run(record=None)
    publish(publisher, 3)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].next_seq == 3)
    peer.demand(publisher.run, "watched", record="off")
    peer.frame(2)
    assert peer.seqs() == [2]


def test_hello_names_the_first_kept_frame(peer: BrokerPeer, open_run: Any) -> None:
    """Set to record in mid-run: from that DEMAND on frames are kept, and kept_from says from which."""
    publisher = open_run(record="off")
    publish(publisher, 1)
    peer.frame(0)
    peer.demand(publisher.run, "every", record="all")
    hello = peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].kept_from is not None)
    assert hello.runs[publisher.run].kept_from == 1
    publish(publisher, 1, first=1)
    assert peer.frame(1).kept


def test_keeping_can_end(peer: BrokerPeer, open_run: Any) -> None:
    """Back to `off`: HELLO names no kept frame, and the next one is not kept."""
    publisher = open_run(record="all")
    publish(publisher, 1)
    peer.frame(0)
    peer.ack(publisher.run, 0)
    peer.demand(publisher.run, "watched", record="off")
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].kept_from is None)
    publish(publisher, 1, first=1)
    assert not peer.frame(1).kept


def test_keeping_can_begin_again(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """Off and on again, the first part unacked: both parts are sent, in order, and END waits for both."""
    publisher = open_run(record="all")
    publish(publisher, 2)
    peer.frame(1)
    peer.demand(publisher.run, "watched", record="off")
    wait_for(lambda: publisher._outbox.mode == "off", of="the demand")
    publish(publisher, 2, first=2)
    peer.frame(3)
    peer.demand(publisher.run, "every", record="all")
    wait_for(lambda: publisher._outbox.mode == "all", of="the demand")
    publish(publisher, 2, first=4)
    peer.frame(5, kept=True)
    peer.heard.clear()
    peer.refuse(publisher.run, "unknown_run")
    closed(publisher, beside, peer)
    assert [frame.seq for frame in peer.heard if isinstance(frame, LatentFrame) and frame.kept] == [0, 1, 4, 5]


def test_hello_names_the_oldest_unacked_frame(peer: BrokerPeer, open_run: Any) -> None:
    """kept_from is the first frame that the log has not: past a pause it jumps once the part before is acked."""
    publisher = open_run(record="all")
    publish(publisher, 2)
    peer.frame(1)
    peer.demand(publisher.run, "watched", record="off")
    wait_for(lambda: publisher._outbox.mode == "off", of="the demand")
    assert peer.next(PublisherHello).runs[publisher.run].kept_from == 0
    publish(publisher, 2, first=2)
    peer.frame(3)
    peer.demand(publisher.run, "every", record="all")
    peer.ack(publisher.run, 1)
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].kept_from == 4)


def test_unacked_frames_are_sent_again(peer: BrokerPeer, open_run: Any) -> None:
    """Kept frames that are not acked come a second time, the same in everything; acked ones do not."""
    publisher = open_run(record="all")
    publish(publisher, 3)
    first = [peer.frame(seq) for seq in range(3)]
    peer.ack(publisher.run, 0)
    assert [peer.frame(seq) for seq in (1, 2)] == first[1:]
    assert peer.seqs() == [0, 1, 2, 1, 2]


def test_no_more_than_the_window_is_on_its_way(peer: BrokerPeer, open_run: Any) -> None:
    """Past 16 MiB unacked the publisher waits for an ack before it sends more."""
    publisher = open_run(record="all", wire_dtype="float32")
    for step in range(12):
        publisher.publish(np.zeros((4, 256, 512), np.float32), step=step)
    peer.frame(7)
    peer.next(PublisherHello)
    assert peer.seqs() == list(range(8))
    peer.ack(publisher.run, 0)
    peer.frame(8)


def test_last_is_kept_at_close(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """record="last": close() sends the newest frame as a kept one, though it was sent before, then END."""
    publisher = open_run(record="last")
    publish(publisher, 3)
    peer.frame(2, kept=False)
    closed(publisher, beside, peer)
    kept = [message.seq for message in peer.heard if isinstance(message, LatentFrame) and message.kept]
    assert kept == [2]
    assert [type(message).__name__ for message in peer.heard[-1:]] == ["End"]


def test_last_takes_frames_that_nobody_watches(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """record="last" while idle: the newest publish is the one that is kept, sent or not."""
    publisher = open_run(record="last")
    peer.opened()
    peer.demand(publisher.run, "idle", record="last", max_fps=0.001)
    publish(publisher, 1)
    peer.frame(0)
    publish(publisher, 7, first=1)
    closed(publisher, beside, peer)
    assert [message.seq for message in peer.heard if isinstance(message, LatentFrame) and message.kept] == [7]


def test_last_pressed_late_keeps_what_was_shown(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """Set to `last` after the final publish: the frame that was shown is kept."""
    publisher = open_run(record="off")
    publish(publisher, 2)
    peer.frame(1)
    peer.demand(publisher.run, "watched", record="last")
    wait_for(lambda: publisher._outbox.mode == "last", of="the demand")
    closed(publisher, beside, peer)
    assert [message.seq for message in peer.heard if isinstance(message, LatentFrame) and message.kept] == [1]


# --- acks ---


def test_waiting_ends_with_the_ack(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """wait_until_acked() is True once every kept frame is acked."""
    publisher = open_run(record="all")
    publish(publisher, 3)
    waiting = beside.submit(publisher.wait_until_acked, 20)
    peer.frame(2)
    peer.ack(publisher.run, 1)
    peer.next(PublisherHello)
    assert not waiting.done()
    peer.ack(publisher.run, 2)
    assert waiting.result(20)


def test_a_publish_that_was_to_be_kept_and_failed_is_told_to_the_end(
    peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """What publish() itself refuses of a kept run is no frame of it: the wait says False, `error` why; each once."""
    publisher = open_run(record="all")
    publish(publisher, 1)
    for latents in (np.zeros((16, 8, 8), np.float16), np.zeros((16, 8, 8), np.float16), np.zeros((4, 8, 8), np.int64)):
        publisher.publish(latents, step=1)
    publish(publisher, 1, first=1)
    waiting = beside.submit(publisher.wait_until_acked, 20)
    peer.frame(1)
    peer.ack(publisher.run, 1)
    assert not waiting.result(20)
    text = "publish: sd1: expected 4 channels, got 16 (shape (16, 8, 8)) (and 2 more not kept)"
    assert publisher.error == text
    assert [record.getMessage().count("said once") for record in caplog.records] == [1, 1]


@pytest.mark.parametrize("word", ["off", "all"])
def test_an_early_failure_counts_where_the_daemon_keeps_all(peer: BrokerPeer, open_run: Any, word: Any) -> None:
    """What failed before the broker's first word is a hole if that is "all", not where somebody records later."""
    publisher = open_run(record=None)
    peer.opened()
    publisher.publish(np.zeros((16, 8, 8), np.float16), step=0)
    for step, record in enumerate((word, "all"), start=1):
        peer.demand(publisher.run, "every", record=record)
        wait_for(lambda: publisher._outbox.mode == record, of=f"the word {record}")  # noqa: B023
        publish(publisher, 1, first=step)
        peer.frame(step - 1)
    assert bool(publisher.error) == (word == "all")


def test_waiting_without_an_ack_is_false(open_run: Any) -> None:
    """wait_until_acked() is False on time out; it never takes a frame for acked that is only on its way."""
    publisher = open_run(record="all")
    for step in range(100):
        publish(publisher, 1, first=step)
        assert not publisher.wait_until_acked(0.0)


@pytest.mark.parametrize("record", ["off", "last"])
def test_nothing_kept_is_acked_at_once(open_run: Any, record: Any) -> None:
    """Where nothing is kept wait_until_acked() is True without a broker's word."""
    publisher = open_run(record=record)
    publish(publisher, 3)
    assert publisher.wait_until_acked(0.0)


def test_a_refusal_ends_the_wait(peer: BrokerPeer, open_run: Any, beside: ThreadPoolExecutor) -> None:
    """Refused: wait_until_acked() is False long before its time, and `error` has the broker's text."""
    publisher = open_run(record="all")
    publish(publisher, 1)
    waiting = beside.submit(publisher.wait_until_acked, 600)
    peer.frame(0)
    peer.refuse(publisher.run, "limit", "too many streams")
    assert waiting.result(20) is False
    assert publisher.error == "too many streams"


# --- refusals and new brokers ---


def test_a_taken_name_is_opened_again_as_another(
    peer: BrokerPeer, open_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """REFUSED taken: OPEN again under the name that is free, and the log says so."""
    publisher = open_run(stream="taken")
    peer.opened()
    with caplog.at_level(logging.WARNING):
        peer.refuse(publisher.run, "taken", use="taken~2")
        assert peer.opened().stream == "taken~2"
    assert publisher.stream == "taken~2"
    assert "stream_name_taken stream=unknown now=taken~2" in caplog.text


def test_a_picture_is_not_lost_with_the_name(peer: BrokerPeer, open_run: Any) -> None:
    """The frame that went out under the taken name is sent again under the new one."""
    publisher = open_run(stream="taken", record="off")
    publish(publisher, 1)
    peer.frame(0)
    peer.refuse(publisher.run, "taken", use="taken~2")
    peer.opened()
    peer.frame(0)


def test_an_unknown_run_says_all_of_it_again(peer: BrokerPeer, open_run: Any) -> None:
    """A broker that does not know the run hears OPEN, then everything unacked, in order."""
    publisher = open_run(record="all")
    publish(publisher, 4)
    peer.frame(3)
    peer.ack(publisher.run, 1)
    wait_for(lambda: publisher._outbox.kept.count == 2, of="the ack")
    peer.heard.clear()
    peer.refuse(publisher.run, "unknown_run")
    peer.frame(3)
    assert isinstance(next(one for one in peer.heard if not isinstance(one, PublisherHello)), StreamInfo)
    assert peer.seqs() == [2, 3]


def test_a_new_broker_hears_the_last_word_on_keeping(peer: BrokerPeer, open_run: Any) -> None:
    """OPEN to a broker that was restarted says the mode in force, not the one that the program began with."""
    publisher = open_run(record="off")
    peer.opened()
    peer.demand(publisher.run, "every", record="all")
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].kept_from == 0)
    peer.refuse(publisher.run, "unknown_run")
    assert peer.opened().record == "all"


def test_a_broker_that_comes_late_is_found(tmp_path: Path) -> None:
    """No broker at the start: the publisher goes on, and says everything once one is there."""
    address = f"ipc://{tmp_path}/late"
    with LatentPublisher(address, stream="a", latent_format="sd1", record="all") as publisher:
        publish(publisher, 3)
        assert not publisher.wait_until_acked(0.0)
        with BrokerPeer(address) as peer, ThreadPoolExecutor(1) as beside:
            peer.opened()
            closed(publisher, beside, peer)
            assert peer.seqs() == [0, 1, 2]


@pytest.mark.faults
def test_what_the_ring_cannot_hold_waits_on_disk_and_is_sent_from_there(
    tmp_path: Path, own_state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No broker, a full ring: frames go to the publisher's own log; a broker that comes gets all, and the log goes."""
    monkeypatch.setattr("taesd_stream.publisher.RING_BYTES", 5 * LATENTS.nbytes)
    address = f"ipc://{tmp_path}/late"
    with LatentPublisher(address, stream="a", latent_format="sd1", record="all") as publisher:
        for step in range(60):
            publish(publisher, 1, first=step)
            wait_for(lambda step=step: publisher._outbox.kept.count > step, of="the frame")  # type: ignore[misc]
        wait_for(lambda: [*own_state.rglob("*.latents")], of="the log")
        with BrokerPeer(address) as peer, ThreadPoolExecutor(1) as beside:
            closed(publisher, beside, peer)
            frames = [message for message in peer.heard if isinstance(message, LatentFrame)]
    assert [frame.seq for frame in frames] == list(range(60))
    assert [frame.payload[:2] for frame in frames] == [np.float16(step).tobytes() for step in range(60)]
    assert publisher.error is None
    assert [*own_state.rglob("*.latents")] == []


def test_a_broker_that_died_and_came_back_gets_the_rest(tmp_path: Path) -> None:
    """What was not acked before the broker's death, and what came meanwhile, goes to the next one."""
    address = f"ipc://{tmp_path}/again"
    with LatentPublisher(address, stream="a", latent_format="sd1", record="all") as publisher:
        with BrokerPeer(address) as first:
            publish(publisher, 2)
            first.frame(1)
            first.ack(publisher.run, 0)
            wait_for(lambda: publisher._outbox.kept.count == 1, of="the ack")
        publish(publisher, 2, first=2)
        with BrokerPeer(address) as second, ThreadPoolExecutor(1) as beside:
            second.next(PublisherHello)
            second.refuse(publisher.run, "unknown_run")
            closed(publisher, beside, second)
            assert sorted(set(second.seqs())) == [1, 2, 3]


def test_stop_is_seen(peer: BrokerPeer, open_run: Any) -> None:
    """STOP turns `stopped` true; reading it has told the broker that the program can be stopped."""
    publisher = open_run()
    assert not peer.next(PublisherHello).runs[publisher.run].stoppable
    assert not publisher.stopped
    peer.next(PublisherHello, lambda hello: hello.runs[publisher.run].stoppable)
    peer.send(StopRun(run=publisher.run))
    wait_for(lambda: publisher.stopped, of="the stop")


def test_garbage_from_a_broker_harms_nothing(peer: BrokerPeer, open_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Messages that break the protocol are said once, and the run goes on."""
    publisher = open_run(record="off")
    peer.opened()
    for _ in range(20):
        peer._socket.send_multipart([peer.sender, b"\xc1garbage"])
    publish(publisher, 1)
    peer.frame(0)
    peer.next(PublisherHello)
    assert sum("broker_message_bad" in record.message for record in caplog.records) == 1


def test_a_broker_that_hangs_fills_no_memory(peer: BrokerPeer, open_run: Any) -> None:
    """To a broker that reads nothing no more than 64 MiB are sent; when it reads again the newest frame comes."""
    publisher = open_run(record="off", wire_dtype="float32")
    peer.next(PublisherHello)
    # what was sent before an answer does not count
    wait_for(lambda: publisher._link._clock.offset_ns is not None, of="the answer being heard")
    big = np.zeros((4, 512, 512), np.float32)

    steps = itertools.count()

    def fill() -> int:
        step = next(steps)
        big[:] = step
        publisher.publish(big, step=step)
        return step

    wait_for(lambda: fill() and publisher._link._pulse.is_silent(time.monotonic()), 60.0, of="the publisher's patience")
    newest = max(fill() for _ in range(20))
    last = peer.next(LatentFrame, lambda frame: frame.step == newest)
    assert np.unique(np.frombuffer(last.payload, np.float32)).tolist() == [newest]
    held = [message for message in peer.heard if isinstance(message, LatentFrame)]
    assert sum(frame.nbytes for frame in held[:-1]) <= MAX_UNHEARD_BYTES + big.nbytes


# --- opening ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stream": "a b"}, "stream:"),
        ({"stream": "a~2"}, "stream:"),
        ({"stream": None}, "stream:"),
        ({"kind": "film"}, "kind:"),
        ({"record": "some"}, "record:"),
        ({"wire_dtype": "int8"}, "wire_dtype:"),
        ({"fps": -1.0}, "fps"),
        ({"meta": {"prompt": "x" * 20_000}}, "meta"),
    ],
)
def test_what_cannot_be_opened_is_said_at_once(options: dict[str, Any], words: str) -> None:
    """A bad name, kind, mode or meta is a ValueError that names it."""
    with pytest.raises(ValueError, match=words):
        LatentPublisher(**{"stream": "a", "latent_format": "sd1", **options})


@pytest.mark.parametrize("address", ["localhost:5760", "tcp://", "smoke://signal", "tcp://127.0.0.1:99999"])
def test_an_address_that_is_none_is_said_at_once(address: str) -> None:
    """A broker's address that no socket takes is a ValueError that shows it."""
    with pytest.raises(ValueError, match=f"address: .*{address}"):
        LatentPublisher(address, stream="a", latent_format="sd1")


def test_the_environment_names_the_broker(peer: BrokerPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an argument $TAESD_STREAM_ADDRESS is the broker's address."""
    monkeypatch.setenv("TAESD_STREAM_ADDRESS", peer.address)
    publisher = LatentPublisher(stream="a", latent_format="sd1")
    assert peer.opened().run == publisher.run
    publisher.close(0.0)


def test_meta_that_is_none_is_said_at_once() -> None:
    """No mapping, or one that holds itself: a ValueError, as for every other option."""
    endless: dict[str, Any] = {}
    endless["again"] = endless
    for meta in ([1], endless):
        with pytest.raises(ValueError, match="meta: "):
            LatentPublisher(stream="a", latent_format="sd1", meta=meta)  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_a_home_publishes(peer: BrokerPeer) -> None:
    """In a container that runs as any user there is no home folder: nothing is raised, and frames are sent."""
    code = (
        "import numpy, os\n"
        "from taesd_stream import LatentPublisher\n"
        "os.setgid(54321); os.setuid(54321)\n"
        "os.environ.pop('HOME', None); os.environ.pop('XDG_STATE_HOME', None)\n"
        f"with LatentPublisher({peer.address!r}, stream='a', latent_format='sd1', record='all') as one:\n"
        "    one.publish(numpy.zeros((4, 8, 8), 'float32'), step=0)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        run = peer.opened().run
        peer.frame(0)
        peer.ack(run, 0)
        peer.finish()
        assert process.wait(60) == 0, process.stderr.read() if process.stderr else ""


def test_meta_of_any_kind_is_told(peer: BrokerPeer, open_run: Any) -> None:
    """What JSON has no form for becomes text: a seed over 64 bits, NaN, a path, numpy's numbers, a map's keys."""
    open_run(meta={"seed": 1 << 70, "cfg": float("nan"), "out": Path("x"), "n": np.int64(3), "more": {1: [2.5, None]}})
    meta = peer.opened().meta
    assert (meta["seed"], meta["cfg"], meta["out"], meta["n"]) == (str(1 << 70), "nan", "x", "3")
    assert meta["more"] == {"1": [2.5, None]}
