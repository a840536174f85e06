"""The scheduler by property: every job is one that a worker can take, and over many jobs everybody gets his turn."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from taesd_stream.frames import Rendition
from taesd_stream.scheduling import (
    MAX_JOB_BYTES,
    RECORD_PATIENCE_NS,
    Candidate,
    Group,
    WorkerLimits,
    first_due,
    history_due,
    next_job,
)

GROUPS: list[Group] = [("sd1", (4, 8, 8), "float16"), ("sd1", (4, 16, 8), "float16"), ("flux2", (32, 8, 8), "float16")]
WORKERS = [b"one", b"two"]
LIVE: tuple[Rendition, ...] = ("live",)
RECORD: tuple[Rendition, ...] = ("record",)
MS = 1_000_000


def candidate(run: str, seq: int = 0, **changes: object) -> Candidate:
    """A live picture that any worker may take."""
    base = Candidate(run=run, seq=seq, group=GROUPS[0], renditions=LIVE, nbytes=1000, since_ns=0)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def limits(worker: bytes = WORKERS[0], batch: int = 16, **changes: object) -> WorkerLimits:
    """A worker without other bounds."""
    base = WorkerLimits(worker=worker, max_batch_size=batch, max_job_s=0.25)
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@st.composite
def run_candidates(draw: st.DrawFn, run: str) -> list[Candidate]:
    """What one run offers: its newest picture, a row of frames for its recording, or both; sizes may change."""
    worker = draw(st.sampled_from([None, *WORKERS]))
    record_since = draw(st.integers(0, 1000)) * MS
    groups = draw(st.lists(st.sampled_from(GROUPS), max_size=5))
    is_sliced = draw(st.booleans())
    found = [
        Candidate(
            run=run,
            seq=seq,
            group=group,
            renditions=RECORD,
            nbytes=draw(st.sampled_from([1000, 1 << 20, MAX_JOB_BYTES - 1, MAX_JOB_BYTES + 1])),
            since_ns=record_since,
            worker=worker,
            is_suspect=draw(st.integers(0, 9)) == 0,
            is_sliced=is_sliced,
        )
        for seq, group in enumerate(groups)
    ]
    if draw(st.booleans()):
        group = draw(st.sampled_from(GROUPS))
        since = draw(st.integers(0, 1000)) * MS
        found.append(candidate(run, 100, group=group, since_ns=since, worker=worker, is_sliced=is_sliced))
    return found


candidates = st.integers(0, 6).flatmap(
    lambda count: st.tuples(*(run_candidates(f"run{number}") for number in range(count))).map(
        lambda rows: [one for row in rows for one in row]
    )
)
any_limits = st.builds(
    WorkerLimits,
    worker=st.sampled_from(WORKERS),
    max_batch_size=st.integers(1, 8),
    max_job_s=st.sampled_from([0.01, 0.25]),
    seconds_per_byte=st.sampled_from([None, 1e-9, 1e-5]),
)


@given(candidates, any_limits)
@settings(max_examples=400)
def test_a_job_is_one_that_the_worker_can_take(offered: list[Candidate], worker: WorkerLimits) -> None:
    """A job is of one group, all clips or none, within its bounds where it has several items, none of them twice."""
    job = next_job(offered, worker)
    assert len({(one.group, one.is_sliced) for one in job}) <= 1
    assert len(job) <= worker.max_batch_size
    assert len(set(job)) == len(job)
    assert set(job) <= set(offered)
    if len(job) > 1:
        nbytes = sum(one.nbytes for one in job)
        assert nbytes <= MAX_JOB_BYTES
        assert nbytes * (worker.seconds_per_byte or 0.0) <= worker.max_job_s


@given(candidates, any_limits)
def test_who_may_work_gets_work(offered: list[Candidate], worker: WorkerLimits) -> None:
    """A job is empty only where nothing may go to this worker."""
    mine = [one for one in offered if one.worker in (None, worker.worker)]
    assert bool(next_job(offered, worker)) == bool(mine)


@given(candidates, any_limits)
def test_a_stream_stays_with_its_worker(offered: list[Candidate], worker: WorkerLimits) -> None:
    """What another worker has the encoder of is never taken."""
    assert {one.worker for one in next_job(offered, worker)} <= {None, worker.worker}


@given(candidates, any_limits)
def test_the_one_that_is_due_first_goes_first(offered: list[Candidate], worker: WorkerLimits) -> None:
    """The first item is the one that is due first, and the others follow in order of due time."""
    job = next_job(offered, worker)
    due = [one.due_ns for one in job]
    assert due == sorted(due)
    if job:
        assert due[0] == min(one.due_ns for one in offered if one.worker in (None, worker.worker))


@given(candidates, st.lists(any_limits, min_size=1, max_size=4))
@settings(max_examples=400)
def test_nothing_is_lost_and_nothing_done_twice(offered: list[Candidate], workers: list[WorkerLimits]) -> None:
    """Job after job, all that the workers may take is taken exactly once."""
    left = list(offered)
    done: list[Candidate] = []
    names = {worker.worker for worker in workers}
    while jobs := [job for worker in workers if (job := take(left, worker))]:
        done += [one for job in jobs for one in job]
    assert sorted(done, key=repr) == sorted((one for one in offered if one.worker in {None, *names}), key=repr)


@given(candidates, any_limits)
@settings(max_examples=400)
def test_a_recording_is_decoded_in_its_order(offered: list[Candidate], worker: WorkerLimits) -> None:
    """Also where a run changes its size in the middle, no frame of its recording overtakes an earlier one."""
    left = list(offered)
    done: list[Candidate] = []
    while job := take(left, worker):
        done += job
    for run in {one.run for one in done}:
        seqs = [one.seq for one in done if one.run == run and one.is_record]
        assert seqs == sorted(seqs)


@given(candidates, any_limits)
def test_a_suspect_goes_alone(offered: list[Candidate], worker: WorkerLimits) -> None:
    """A frame whose job has failed shares its next one with nobody."""
    left = list(offered)
    while job := take(left, worker):
        assert len(job) == 1 or not any(one.is_suspect for one in job)


def take(left: list[Candidate], worker: WorkerLimits) -> tuple[Candidate, ...]:
    """The next job, taken out of what is left."""
    job = next_job(left, worker)
    for one in job:
        left.remove(one)
    return job


@given(
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=12),
    st.lists(st.sampled_from(GROUPS), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([20 * MS, 50 * MS, 250 * MS]),
)
@settings(max_examples=60)
def test_neither_live_pictures_nor_recordings_starve(
    live: list[Group], recorded: list[Group], batch: int, job_ns: int
) -> None:
    """Under endless load of both kinds everybody waits at most the recordings' patience and one round of jobs."""
    now = 0
    waiting = {f"live{n}": candidate(f"live{n}", group=group) for n, group in enumerate(live)} | {
        f"record{n}": candidate(f"record{n}", group=group, renditions=RECORD) for n, group in enumerate(recorded)
    }
    longest_ns = RECORD_PATIENCE_NS + (len(waiting) + 1) * job_ns
    for _ in range(200):
        job = next_job(waiting.values(), limits(batch=batch))
        now += job_ns
        for one in job:
            waiting[one.run] = dataclasses.replace(one, seq=one.seq + 1, since_ns=now)
        assert max(now - one.since_ns for one in waiting.values()) <= longest_ns


def test_a_live_picture_goes_before_a_recording_that_came_with_it() -> None:
    """Of two that began to wait together the live one goes first; after its patience the recording does."""
    recording = candidate("r", renditions=RECORD, group=GROUPS[1])
    assert next_job([recording, candidate("l", since_ns=RECORD_PATIENCE_NS - 1)], limits())[0].run == "l"
    assert next_job([recording, candidate("l", since_ns=RECORD_PATIENCE_NS + 1)], limits())[0].run == "r"


def test_a_frame_for_viewers_and_file_has_no_patience() -> None:
    """One that is both live and recorded is due as a live one."""
    both = candidate("b", renditions=("live", "record"))
    assert (both.is_record, both.due_ns) == (True, 0)


def test_streams_of_a_kind_share_a_job() -> None:
    """Frames of many streams with one format, shape and dtype become one batch; others wait for theirs."""
    alike = [candidate(f"run{number}", since_ns=number) for number in range(5)]
    other = candidate("other", group=GROUPS[1], since_ns=1)
    assert next_job([*alike, other], limits()) == tuple(alike)


def test_one_frame_over_every_limit_is_taken_alone() -> None:
    """A frame too large and too slow for any job is still a job, of itself."""
    giant = candidate("giant", nbytes=MAX_JOB_BYTES * 2)
    job = next_job([giant, candidate("small", since_ns=1)], limits(seconds_per_byte=1.0))
    assert job == (giant,)


@given(candidates, any_limits)
@settings(max_examples=400)
def test_every_run_has_its_first_before_any_has_its_second(offered: list[Candidate], worker: WorkerLimits) -> None:
    """Fair shares: a run is left out of a full job only where no run of the job's group has more than one in it."""
    job = next_job(offered, worker)
    if not job or job[0].is_suspect:
        return
    counts = {run: sum(one.run == run for one in job) for run in {one.run for one in job}}
    if max(counts.values()) == 1:
        return
    mine = [one for one in offered if one.worker in (None, worker.worker)]
    firsts = [min((one for one in mine if one.run == run), key=lambda one: (one.due_ns, one.seq)) for run in runs(mine)]
    left_out = [one for one in firsts if one.run not in counts]
    alike = [one for one in left_out if (one.group, one.is_sliced) == (job[0].group, job[0].is_sliced)]
    assert all(one.is_suspect for one in alike)


def runs(offered: list[Candidate]) -> set[str]:
    """All that offer something."""
    return {one.run for one in offered}


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=10), st.sampled_from([None, *WORKERS]))
def test_history_goes_along_where_a_worker_is_new_to_a_run(order: list[str], memory: bytes | None) -> None:
    """Of each `live` run's items in a job exactly the first has history, and only where its memory is elsewhere."""
    job = [candidate(run, seq, memory=memory, history_bytes=100) for seq, run in enumerate(order)]
    due = history_due(job, WORKERS[0])
    for place, run in enumerate(order):
        assert due[place] == (memory != WORKERS[0] and run not in order[:place])


def test_history_counts_in_a_jobs_bytes() -> None:
    """A job with history is as large as both: what does not fit with it waits."""
    half = MAX_JOB_BYTES // 2
    new = candidate("new", nbytes=half, history_bytes=half)
    other = candidate("other", nbytes=half, since_ns=1)
    assert next_job([new, other], limits()) == (new,)
    known = dataclasses.replace(new, memory=WORKERS[0])
    assert next_job([known, other], limits()) == (known, other)


@given(candidates, any_limits)
def test_a_job_begins_with_the_one_that_is_due_first(offered: list[Candidate], worker: WorkerLimits) -> None:
    """first_due() names the frame that next_job() begins with, so that its group's limits can be asked for."""
    first = first_due(offered, worker.worker)
    job = next_job(offered, worker)
    assert (first.due_ns if first else None) == (job[0].due_ns if job else None)
