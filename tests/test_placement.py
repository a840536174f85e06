"""Placement by property: streams spread by their loads; moves help clearly, end, and are never taken back."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from taesd_stream.placement import BASE_LOAD, MARGIN, StreamLoad, least_loaded, loads_of, next_move

ROUNDING = 1e-9  # of sums of loads
WORKERS = [b"one", b"two", b"three"]

streams = st.lists(
    st.tuples(st.sampled_from(WORKERS), st.floats(BASE_LOAD, 2.0), st.booleans()), min_size=0, max_size=30
).map(lambda rows: [StreamLoad(f"run{n}", worker, load, may_move) for n, (worker, load, may_move) in enumerate(rows)])


def moved(before: list[StreamLoad], run: str, worker: bytes) -> list[StreamLoad]:
    """The same streams after one move."""
    return [dataclasses.replace(one, worker=worker) if one.run == run else one for one in before]


@given(streams)
@settings(max_examples=300)
def test_moves_come_to_an_end_and_are_not_taken_back(before: list[StreamLoad]) -> None:
    """While the loads stay what they are each move lowers the busiest worker of the two, and no stream goes back."""
    left = list(before)
    seen = {tuple(left)}
    for _ in range(20 * len(left) + 1):
        move = next_move(left, WORKERS)
        if move is None:
            break
        run, worker = move
        loads = loads_of(left, WORKERS)
        source = next(one.worker for one in left if one.run == run)
        assert loads[source] == max(loads.values())
        left = moved(left, run, worker)
        after = loads_of(left, WORKERS)
        assert max(after[source], after[worker]) <= loads[source] - min(MARGIN, BASE_LOAD) + ROUNDING
        assert tuple(left) not in seen
        seen.add(tuple(left))
    assert next_move(left, WORKERS) is None


@given(streams)
def test_what_was_moved_just_now_stays(before: list[StreamLoad]) -> None:
    """Only a stream that may move is moved, from its worker to another."""
    move = next_move(before, WORKERS)
    if move is not None:
        one = next(one for one in before if one.run == move[0])
        assert one.may_move
        assert one.worker != move[1]


@given(st.integers(4, 40), st.floats(BASE_LOAD, 0.5))
def test_a_worker_that_is_added_gets_its_share(count: int, load: float) -> None:
    """Equal streams on one worker spread over two until the two differ by no more than one stream and the margin."""
    left = [StreamLoad(f"run{n}", b"one", load) for n in range(count)]
    while (move := next_move(left, WORKERS[:2])) is not None:
        left = moved(left, *move)
    loads = loads_of(left, WORKERS[:2])
    assert abs(loads[b"one"] - loads[b"two"]) <= load + MARGIN


@given(st.lists(st.floats(BASE_LOAD, 1.0), min_size=1, max_size=30))
def test_new_streams_go_where_least_is_to_do(loads: list[float]) -> None:
    """Placed one after the other, no worker has more than the least busy one and the largest stream."""
    placed: list[StreamLoad] = []
    for number, load in enumerate(loads):
        worker = least_loaded(loads_of(placed, WORKERS))
        assert worker is not None
        placed.append(StreamLoad(f"run{number}", worker, load))
    done = loads_of(placed, WORKERS)
    assert max(done.values()) <= min(done.values()) + max(loads) + 1e-9


def test_without_workers_there_is_no_place() -> None:
    """No worker: no place, no move."""
    assert least_loaded({}) is None
    assert next_move([StreamLoad("run", b"gone", 1.0)], []) is None
