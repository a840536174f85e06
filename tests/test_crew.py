"""The broker's view of its workers: whose job is late, and what a worker that comes back still holds."""

from __future__ import annotations

import select

import pytest

from taesd_stream.messages import WorkerHello
from taesd_stream.scheduling import Candidate
from taesd_stream_workers.crew import Crew, Worker
from tests.daemon import wait_for

HELLO = WorkerHello(device="cpu", credits=2)
PEER = b"one"
DEADLINE_S = 0.3


def item(seq: int) -> Candidate:
    """A frame to decode."""
    return Candidate(
        run="00000000000000aa",
        seq=seq,
        group=("sd1", (4, 8, 8), "float16"),
        renditions=("record",),
        nbytes=512,
        since_ns=0,
    )


@pytest.fixture
def crew() -> Crew:
    """A crew of one worker, whose jobs may take DEADLINE_S without a word."""
    one = Crew(DEADLINE_S)
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


def test_what_it_still_holds_counts_against_its_credits(crew: Crew) -> None:
    """A worker that was given up and says HELLO again gets no more jobs than it can hold."""
    jobs = [crew.assign(worker_of(crew), (item(seq),)) for seq in range(2)]
    assert crew.remove(PEER) is not None
    assert crew.finish(PEER, jobs[0]) is None
    assert crew.hello(PEER, HELLO)
    assert worker_of(crew).credits == 1
    assert crew.finish(PEER, jobs[1]) is None
    assert worker_of(crew).credits == 2


def test_jobs_of_another_broker_are_nothing(crew: Crew) -> None:
    """Two brokers do not begin with the same job number."""
    mine = crew.assign(worker_of(crew), (item(0),))
    other = Crew(DEADLINE_S)
    other.hello(PEER, HELLO)
    assert other.assign(other.workers[PEER], (item(0),)) != mine
