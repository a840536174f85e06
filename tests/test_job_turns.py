"""Whose turn it is on the device, by property: long ones in slices, others between them, everybody in his order."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.frames import MAX_LATENTS_AT_ONCE
from taesd_stream.messages import Job
from taesd_stream_workers.worker.job_run import JobRun
from taesd_stream_workers.worker.job_turns import JobTurns
from tests.golden_messages import JOB_ITEM


def job(number: int, *, is_sliced: bool = False, run: str = "") -> JobRun:
    """A job of one item, of a run of its own unless it is named."""
    shape = (MAX_LATENTS_AT_ONCE + is_sliced, 16, 8, 8)
    item = dataclasses.replace(JOB_ITEM, kind="live", shape=shape, run=run or f"{number:016x}")
    return JobRun(Job(job=number, latent_format="wan2_1", items=(item,), packets_to="tcp://127.0.0.1:9"))


def order(turns: JobTurns, jobs: list[JobRun], slices: int) -> list[int]:
    """Put them all, then work each clip off in so many slices. Returns: the number of the job of each turn."""
    for one in jobs:
        turns.put(one)
    left = {one.job.job: slices if one.is_sliced else 1 for one in jobs}
    taken = []
    while any(left.values()):
        turn = turns.next()
        assert turn is not None
        number = turn.job.job
        taken.append(number)
        left[number] -= 1
        if not left[number]:
            turns.over(turn)
    return taken


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_everybody_gets_his_turns_in_his_order(clips: list[bool], slices: int) -> None:
    """Each clip has all its slices, one clip after the other; of the others the first comes first, once each."""
    taken = order(JobTurns(), [job(number, is_sliced=is_sliced) for number, is_sliced in enumerate(clips)], slices)
    expected = [number for number, is_sliced in enumerate(clips) if is_sliced for _ in range(slices)]
    assert [number for number in taken if clips[number]] == expected
    assert [number for number in taken if not clips[number]] == [number for number, one in enumerate(clips) if not one]


@given(st.lists(st.booleans(), max_size=12), st.integers(1, 5))
def test_neither_waits_for_more_than_one_turn_of_the_other(clips: list[bool], slices: int) -> None:
    """While both sorts wait, a slice and another job take turns."""
    taken = order(JobTurns(), [job(number, is_sliced=is_sliced) for number, is_sliced in enumerate(clips)], slices)
    sorts = [clips[number] for number in taken]
    both = min(sorts.count(True), sorts.count(False))
    assert sorts[: 2 * both] == [True, False] * both


def test_frames_of_a_run_stay_in_order() -> None:
    """What goes on with a run whose long job is not over waits for it, and others do not wait for that."""
    turns = JobTurns()
    jobs = [job(0, is_sliced=True, run="aa"), job(1, run="aa"), job(2), job(3)]
    assert order(turns, jobs, slices=3) == [0, 2, 0, 3, 0, 1]
    assert not turns.is_waited_for


def test_a_job_that_comes_is_given_to_who_waits() -> None:
    """`next` waits for a job, and `close` ends that, also of what is left of a clip."""
    turns = JobTurns()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(turns.next)
        clip = job(1, is_sliced=True)
        turns.put(clip)
        assert waiting.result(10) is clip
        assert turns.next() is clip
        turns.over(clip)
        waiting = pool.submit(turns.next)
        turns.close()
        assert waiting.result(10) is None
    turns.put(clip)
    assert turns.next() is None
