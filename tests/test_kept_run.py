"""What of a kept run is read ahead of its recording, and so held in memory: a window of bytes, never a whole log."""

from __future__ import annotations

from pathlib import Path

import pytest

from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_log import RunLog
from taesd_stream.scheduling import Candidate
from taesd_stream_workers.broker.kept_run import LEAST_FRAMES, MAX_STUCK_S, READ_AHEAD_FRAMES, RECORD_STUCK_S, KeptRun
from taesd_stream_workers.broker.runs import Run
from taesd_stream_workers.broker.troubles import MAX_ENCODINGS, MAX_FAILURES, Troubles
from tests.broker_role import frame, new_run

SHAPE = (4, 32, 32)
NBYTES = 8192
COUNT = 40


@pytest.fixture
def kept(tmp_path: Path) -> KeptRun:
    """A run of which COUNT frames are logged, and nothing is recorded."""
    run = new_run()
    info = StreamInfo(stream="a", run=run, kind="steps", latent_format="sd1")
    log = RunLog(tmp_path, info, first_seq=0)
    for seq in range(COUNT):
        log.append(frame(run, seq, kept=True, shape=SHAPE))
    return KeptRun(log=log, queued=COUNT - 1, logged=COUNT - 1, next_seq=0, written=-1)


def seqs(frames: list[LatentFrame]) -> list[int]:
    """Their numbers."""
    return [one.seq for one in frames]


def test_no_more_is_read_than_there_is_room_for(kept: KeptRun) -> None:
    """As many frames as fit, records' heads counted; two, however small the room; what lost its room is let go."""
    assert seqs(kept.ahead(6 * NBYTES)) == [0, 1, 2, 3, 4]
    assert kept.held(4) is not None
    assert seqs(kept.ahead(3 * NBYTES + 1000)) == [0, 1, 2]
    assert kept.held(4) is None
    assert seqs(kept.ahead(-5 * NBYTES)) == list(range(LEAST_FRAMES))
    assert seqs(kept.ahead(1000 * NBYTES)) == list(range(READ_AHEAD_FRAMES))


def test_what_is_on_its_way_counts_among_the_least(kept: KeptRun) -> None:
    """Without room a run has two frames on their way and ready together: its file grows, and no memory does."""
    for expected in ([0, 1], [1], []):
        frames = kept.ahead(0)
        assert seqs(frames) == expected
        if frames:
            kept.send(frames[0])
    kept.on_cursor(0)
    assert seqs(kept.ahead(0)) == [2]


def test_what_was_sent_is_held_no_longer(kept: KeptRun) -> None:
    """A frame that a worker has is not given again; a new attempt reads on behind the file; who waits holds none."""
    first = kept.ahead(4 * NBYTES)[0]
    kept.send(first)
    assert kept.held(0) is None
    kept.restart(-1, 2)
    assert seqs(kept.ahead(4 * NBYTES))[0] == 0
    kept.let_go()
    assert kept.held(0) is None


def test_a_file_that_does_not_grow_costs_less_and_less(kept: KeptRun) -> None:
    """Each attempt in vain waits twice as long, a minute at most, and sends one frame; once one is written, all go."""
    for waits_s in (RECORD_STUCK_S, 2 * RECORD_STUCK_S, MAX_STUCK_S, MAX_STUCK_S):
        for one in kept.ahead(1000 * NBYTES):
            kept.send(one)
        kept.moved_s -= 1000.0
        assert not kept.is_stuck  # they are still being decoded
        for seq in list(kept.undecoded):
            kept.on_answered(seq)
        kept.answered_s -= waits_s - 1
        assert not kept.is_stuck
        kept.answered_s -= 1
        assert kept.is_stuck
        kept.try_again()
        assert not kept.is_stuck
        assert seqs(kept.ahead(1000 * NBYTES)) == [0]
    kept.send(kept.ahead(1000 * NBYTES)[0])
    kept.on_cursor(0)
    assert seqs(kept.ahead(1000 * NBYTES)) == list(range(1, 1 + READ_AHEAD_FRAMES))


def test_what_comes_behind_does_not_hold_up_a_new_attempt(kept: KeptRun) -> None:
    """The file lacks a frame that was decoded long ago: it goes again, though others are decoded all the time."""
    first, *others = kept.ahead(1000 * NBYTES)
    kept.send(first)
    kept.on_answered(first.seq)
    for one in others:
        kept.send(one)
    kept.on_answered(others[0].seq)
    kept.moved_s -= RECORD_STUCK_S + 1
    assert not kept.is_stuck
    kept.answered_s -= RECORD_STUCK_S + 1
    assert kept.is_stuck


def test_a_gap_ends_what_is_read(kept: KeptRun) -> None:
    """Frames behind one that gives no picture wait until the file has passed it."""
    kept.pass_gap(2)
    assert seqs(kept.ahead(1000 * NBYTES)) == [0, 1]


def test_failures_of_old_frames_are_forgotten() -> None:
    """A run whose every frame ends a job remembers the newest ones, and of those how often each failed."""
    troubles = Troubles()
    for seq in range(2 * MAX_FAILURES):
        assert troubles.failed(seq) == 1
        assert troubles.failed(seq) == 2
    assert len(troubles.failures) == MAX_FAILURES
    assert min(troubles.failures) == MAX_FAILURES


def test_encoders_have_more_tries_than_decoders() -> None:
    """What an encoder could not take is no poison; how often is told, until it succeeds."""
    troubles = Troubles()
    assert [troubles.not_encoded(7) for _ in range(MAX_ENCODINGS)] == list(range(1, MAX_ENCODINGS + 1))
    assert (troubles.is_poison(7), troubles.not_encoded(8)) == (False, 1)
    troubles.succeeded(7)
    assert troubles.not_encoded(7) == 1


def test_an_answer_to_a_former_attempt_is_none_to_this_one(kept: KeptRun) -> None:
    """A worker that is still at a frame of the new attempt is waited for, though the old one's same frame is done."""
    run = Run(kept.log.info, peer=None, record="all")
    run.kept = kept
    sent: list[Candidate] = []
    for _ in range(2):
        one = run.candidates({}, 2 * NBYTES)[0]
        taken = run.frame_of(one)
        assert taken is not None
        run.on_dispatched(one, taken, b"worker")
        sent.append(one)
        if len(sent) == 1:
            kept.restart(-1, kept.attempt + 1)
    run.on_answered(sent[0])
    assert kept.undecoded == {0}
    run.on_answered(sent[1])
    assert kept.undecoded == set()
