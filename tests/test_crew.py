"""The broker's view of its workers: whose job is late, and what a worker that comes back still holds."""

from __future__ import annotations

import select
import time

import pytest

from taesd_stream.messages import WorkerHello
from taesd_stream.scheduling import Candidate
from taesd_stream_workers.broker.crew import LATE_S, SILENT_S, Crew, Worker
from tests.daemon import wait_for

HELLO = WorkerHello(device="cpu", credits=2)
PEER = b"one"
DEADLINE_S = 0.3


def item(seq: int, *, is_sliced: bool = False, is_suspect: bool = False, run: str = "00000000000000aa") -> Candidate:
    """A frame to decode."""
    return Candidate(
        run=run,
        seq=seq,
        group=("sd1", (4, 8, 8), "float16"),
        renditions=("record",),
        nbytes=512,
        since_ns=0,
        is_sliced=is_sliced,
        is_suspect=is_suspect,
    )


@pytest.fixture
def crew() -> Crew:
    """A crew of one worker, whose jobs may take DEADLINE_S without a word."""
    one = Crew(DEADLINE_S, 16)
    one.hello(PEER, HELLO)
    return one


def worker_of(crew: Crew) -> Worker:
    """Its one worker."""
    return crew.workers[PEER]


def test_a_word_about_one_job_renews_the_one_behind_it(crew: Crew) -> None:
    """A job that waits behind another is not late while the worker says that it goes on."""
    first = crew.assign(worker_of(crew), (item(0),))
    second = crew.assign(worker_of(crew), (item(1),))
    deadline_s = worker_of(crew).jobs[second].deadline_s
    select.select([], [], [], 0.01)
    crew.progress(PEER, first)
    assert worker_of(crew).jobs[second].deadline_s > deadline_s
    deadline_s = worker_of(crew).jobs[second].deadline_s
    select.select([], [], [], 0.01)
    assert crew.finish(PEER, first) is not None
    assert worker_of(crew).jobs[second].deadline_s > deadline_s


def test_a_silent_job_makes_its_worker_late(crew: Crew) -> None:
    """Without a word for the deadline the worker is among those that are gone."""
    crew.assign(worker_of(crew), (item(0),))
    assert crew.gone() == []
    wait_for(lambda: crew.gone() == [PEER], of="the deadline")


def test_what_waits_behind_a_suspected_frame_waits_as_long(crew: Crew) -> None:
    """It has a minute to show what it is: no job behind it is late before, also after a word; then all is as ever."""
    suspect = crew.assign(worker_of(crew), (item(0, is_suspect=True),))
    behind = crew.assign(worker_of(crew), (item(1),))
    jobs = worker_of(crew).jobs
    assert jobs[behind].deadline_s >= jobs[suspect].deadline_s
    crew.progress(PEER, suspect)
    assert jobs[behind].deadline_s >= jobs[suspect].deadline_s
    crew.finish(PEER, suspect)
    assert jobs[behind].deadline_s <= time.monotonic() + LATE_S / 2


def test_what_it_still_holds_counts_against_its_credits(crew: Crew) -> None:
    """A worker that was given up and says HELLO again gets no more jobs than it can hold."""
    jobs = [crew.assign(worker_of(crew), (item(seq),)) for seq in range(2)]
    assert crew.remove(PEER) is not None
    assert crew.finish(PEER, jobs[0]) is None
    assert crew.hello(PEER, HELLO)
    assert worker_of(crew).credits == 1
    assert crew.finish(PEER, jobs[1]) is None
    assert worker_of(crew).credits == 2


@pytest.mark.parametrize("is_late", [False, True])
def test_a_worker_that_was_let_go_has_not_died(crew: Crew, *, is_late: bool) -> None:
    """It drained while it was late, heard of again or not: its silence since blames no frame of those in its hands."""
    worker = worker_of(crew)
    crew.assign(worker, (item(0),))
    crew.remove(PEER)
    if not is_late:
        crew.hello(PEER, HELLO)
    assert crew.let_go(PEER) is not is_late
    worker.heard_s -= SILENT_S + 1
    assert crew.dead() == []


def test_an_answer_that_was_lost_is_not_waited_for_in_all_eternity(crew: Crew) -> None:
    """What a worker that is back owes costs a credit until long past its deadline, which PROGRESS puts off."""
    job = crew.assign(worker_of(crew), (item(0),))
    crew.remove(PEER)
    crew.hello(PEER, HELLO)
    worker_of(crew).overdue[job].deadline_s -= LATE_S + 1
    crew.progress(PEER, job)
    assert crew.gone() == []
    assert worker_of(crew).credits == 1
    worker_of(crew).overdue[job].deadline_s -= LATE_S + 1
    assert crew.gone() == []
    assert worker_of(crew).credits == 2


def test_jobs_of_another_broker_are_nothing(crew: Crew) -> None:
    """Two brokers do not begin with the same job number."""
    mine = crew.assign(worker_of(crew), (item(0),))
    other = Crew(DEADLINE_S, 16)
    other.hello(PEER, HELLO)
    assert other.assign(other.workers[PEER], (item(0),)) != mine


@pytest.mark.parametrize(
    ("credits_", "held", "taken"),
    [
        (2, [], ["clip", "other", "suspect clip", "suspect other"]),
        (2, ["other"], ["clip", "other", "suspect other"]),
        (2, ["clip"], ["other"]),
        (4, ["clip", "clip"], ["clip", "other", "suspect clip"]),
        (4, ["clip", "other"], ["clip", "other"]),
        (4, ["clip", "clip", "clip"], ["other"]),
        (4, ["suspect clip"], ["clip", "suspect clip"]),
        (4, ["suspect other"], ["other", "suspect other"]),
    ],
)
def test_what_goes_beside_what_a_worker_holds(credits_: int, held: list[str], taken: list[str]) -> None:
    """The last credit is never a clip's; and a suspected frame is never where a death would not tell whose it was."""
    crew = Crew(DEADLINE_S, 16)
    crew.hello(PEER, WorkerHello(device="cpu", credits=credits_))
    for name in held:
        crew.assign(worker_of(crew), (named(name),))
    offered = [named(name) for name in ("clip", "other", "suspect clip", "suspect other")]
    assert list(worker_of(crew).takes_beside(offered)) == [named(name) for name in taken]


def named(name: str) -> Candidate:
    """A frame of that sort, of a run of its own."""
    return item(0, is_sliced="clip" in name, is_suspect="suspect" in name, run=name)


@pytest.mark.parametrize("is_sliced", [False, True])
def test_what_follows_a_suspected_frame_does_not_overtake_it(crew: Crew, *, is_sliced: bool) -> None:
    """While it waits for the other kind to be done, no later frame of its run goes; what came before it does."""
    crew.hello(PEER, WorkerHello(device="cpu", credits=4))
    crew.assign(worker_of(crew), (named("other" if is_sliced else "clip"),))
    offered = [item(seq, is_sliced=is_sliced, is_suspect=seq == 1) for seq in (2, 0, 1)]
    assert [one.seq for one in worker_of(crew).takes_beside(offered)] == [0]


@pytest.mark.parametrize("is_sliced", [False, True])
def test_a_suspected_frame_gets_its_turn(crew: Crew, *, is_sliced: bool) -> None:
    """Where it is the oldest nothing more of the other kind is given: else it would wait for as long as more comes."""
    crew.hello(PEER, WorkerHello(device="cpu", credits=4))
    crew.assign(worker_of(crew), (named("other" if is_sliced else "clip"),))
    suspect = item(0, is_sliced=is_sliced, is_suspect=True)
    later = [item(1, is_sliced=one, run=f"later {one}") for one in (False, True)]
    assert list(worker_of(crew).takes_beside([*later, suspect])) == [one for one in later if one.is_sliced == is_sliced]
    for job in list(worker_of(crew).jobs):
        crew.finish(PEER, job)
    assert suspect in worker_of(crew).takes_beside([*later, suspect])


def test_a_dead_worker_may_have_been_at_two_jobs(crew: Crew) -> None:
    """Between a clip's slices it takes others up: its oldest clip and its oldest other job, of whatever place, are."""
    for number, is_sliced in enumerate([False, False, True, True]):
        crew.assign(worker_of(crew), (item(number, is_sliced=is_sliced),))
    assert sorted(job.items[0].seq for job in worker_of(crew).at_hand()) == [0, 2]


def test_two_jobs_at_once_are_not_counted_twice(crew: Crew) -> None:
    """A frame's share of a worker comes of how often its jobs end, not of how long each of them is under way."""
    first = crew.assign(worker_of(crew), (item(0),))
    crew.finish(PEER, first, ms=900.0)
    assert crew.slowest_s_per_frame("sd1", 512) == pytest.approx(0.9)  # all that is known
    began_s = time.monotonic()
    given = [crew.assign(worker_of(crew), (item(seq),)) for seq in (1, 2, 3)]
    for job in given:
        select.select([], [], [], 0.01)
        crew.finish(PEER, job, ms=900.0)
    spent_s = time.monotonic() - began_s
    assert 0.01 <= crew.slowest_s_per_frame("sd1", 512) <= spent_s / 2


def test_between_slices_nothing_is_learned_of_what_a_job_takes(crew: Crew) -> None:
    """A clip and other jobs take turns: how far apart they end says nothing; behind the clip it does again."""
    clip = crew.assign(worker_of(crew), (item(0, is_sliced=True),))
    others = [crew.assign(worker_of(crew), (item(seq),)) for seq in range(1, 4)]
    for job in (others[0], others[1], clip):
        assert crew.finish(PEER, job, ms=1.0) is not None
        assert not worker_of(crew).departures.costs
    assert crew.finish(PEER, others[2], ms=1.0) is not None
    assert list(worker_of(crew).departures.costs) == ["sd1"]


def test_the_time_of_a_failed_job_is_not_the_next_ones(crew: Crew) -> None:
    """A job that failed after long made no picture: what the one behind it takes counts from there."""
    first, failed, last = (crew.assign(worker_of(crew), (item(seq),)) for seq in range(3))
    crew.finish(PEER, first, ms=1.0)
    select.select([], [], [], 0.2)
    crew.finish(PEER, failed)
    crew.finish(PEER, last, ms=1.0)
    assert crew.slowest_s_per_frame("sd1", 512) < 0.1
