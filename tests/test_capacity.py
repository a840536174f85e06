"""The arithmetic of capacity: laws that hold for every load, and waits against a queue that is played through."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from taesd_stream.capacity import (
    LOAD_FACTOR,
    Departures,
    JobCost,
    batch_under_load,
    bottleneck,
    held_per_s,
    sent_per_s,
    servers_needed,
    streams_held,
    utilisation,
    wait_s,
)
from taesd_stream.frames import DEMANDS
from taesd_stream.scaling import Scaling

rates = st.floats(0.01, 1e5)
seconds = st.floats(1e-5, 10.0)


@given(st.lists(st.floats(0, 5), max_size=50))
def test_workers_are_enough_and_not_too_many(loads: list[float]) -> None:
    """The broker's number of workers keeps each at 70 % or less, and one fewer would not."""
    workers = Scaling().update(0.0, loads, 0.0, 1)
    assert workers == servers_needed(sum(loads))
    assert utilisation(sum(loads), 1.0, workers) <= LOAD_FACTOR * (1 + 1e-6)
    assert workers == 1 or utilisation(sum(loads), 1.0, workers - 1) > LOAD_FACTOR * (1 - 1e-6)


@pytest.mark.parametrize(
    ("loads", "wanted"), [([], 1), ([0.1], 1), ([0.7], 1), ([0.7] * 3, 3), ([0.8], 2), ([0.5] * 6, 5), ([1.0, 1.0], 3)]
)
def test_workers_follow_the_load(loads: list[float], wanted: int) -> None:
    """The shares of a worker that all streams need, with 30 % to spare, and never none."""
    assert servers_needed(sum(loads)) == wanted


@given(st.dictionaries(st.sampled_from(["broker", "decode", "encode", "serve"]), rates, min_size=1))
def test_a_chain_holds_what_its_slowest_stage_holds(stages: dict[str, float]) -> None:
    """No stage is loaded over 70 % by what is said to be held, and the one that is named is at 70 %."""
    held = held_per_s(stages)
    loads = {stage: utilisation(held, 1 / rate) for stage, rate in stages.items()}
    assert max(loads.values()) == pytest.approx(LOAD_FACTOR)
    assert loads[bottleneck(stages)] == pytest.approx(LOAD_FACTOR)


def test_a_chain_without_a_stage_is_refused() -> None:
    """There is no bottleneck of nothing."""
    with pytest.raises(ValueError, match="expected at least one stage"):
        bottleneck({})


@given(st.integers(0, 1000), rates)
def test_as_many_streams_fit_as_were_counted(streams: int, each_per_s: float) -> None:
    """What N streams offer holds N streams, and a little less does not."""
    assert streams_held(streams * each_per_s, each_per_s) == streams
    assert streams == 0 or streams_held((streams - 0.01) * each_per_s, each_per_s) == streams - 1


@given(st.floats(0.01, 10.0))
def test_demand_orders_what_is_sent(step_s: float) -> None:
    """Idle is at most one frame in two seconds, watched at most 30 a second, and every is all: each sends no more."""
    idle, watched, every = (sent_per_s(step_s, demand) for demand in DEMANDS)
    assert idle <= watched <= every == 1 / step_s
    assert idle <= 0.5 * (1 + 1e-6)
    assert watched <= 30


@pytest.mark.parametrize(("step_s", "per_s"), [(0.5, 0.5), (0.7, 1 / 2.1), (1.5, 1 / 3), (2.0, 0.5), (3.0, 1 / 3)])
def test_an_idle_sampler_sends_whole_steps(step_s: float, per_s: float) -> None:
    """While nobody watches, the frame that goes is the first one that comes once two seconds have passed."""
    assert sent_per_s(step_s, "idle") == pytest.approx(per_s)


def played_waits(load: float, count: int) -> NDArray[np.float64]:
    """Waits in an M/D/1 queue of service time 1, one arrival after the other (Lindley's recursion)."""
    between = np.random.default_rng(7).exponential(1 / load, count)
    steps = np.cumsum(np.concatenate([[0.0], 1 - between[1:]]))
    return steps - np.minimum.accumulate(steps)


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("quantile", [0.95, 0.99])
def test_waits_are_those_of_a_queue(load: float, quantile: float) -> None:
    """What 95 and 99 % of frames wait at most is, within 5 % of a service time and 5 %, what a played queue shows."""
    waits = played_waits(load, 1_000_000)
    expected = float(np.quantile(waits, quantile))
    assert wait_s(load, 1.0, quantile) == pytest.approx(expected, rel=0.06, abs=0.06)
    assert waits.mean() == pytest.approx(load / 2 / (1 - load), rel=0.05)  # so the queue itself is the right one


@given(st.floats(0.001, 0.98), st.floats(0.001, 0.01), seconds)
def test_more_load_waits_longer(load: float, more: float, service_s: float) -> None:
    """A wait grows with the load, scales with the service time, and has no end from full load on."""
    assert 0 <= wait_s(load / service_s, service_s) <= wait_s((load + more) / service_s, service_s)
    assert wait_s(load / service_s, service_s) == pytest.approx(service_s * wait_s(load, 1.0), rel=1e-6, abs=1e-9)
    assert wait_s(1 / service_s * 1.001, service_s) == math.inf


@given(st.floats(0.001, 0.99), st.floats(1e-5, 0.1), st.floats(0.1, 100), st.integers(1, 256))
def test_batches_hold_what_comes_meanwhile(load: float, frame_s: float, fixed: float, most: int) -> None:
    """A job takes as long as its frames needed to come; where that is less than one, or too many, it has these."""
    per_s, job_s = load / frame_s, fixed * frame_s  # so `load` is what the frames alone cost, without their jobs
    frames, seconds = batch_under_load(per_s, job_s, frame_s, most)
    assert 1 <= frames <= most
    assert seconds == pytest.approx(job_s + frames * frame_s)
    came = per_s * seconds
    assert came == pytest.approx(frames, rel=1e-6) or (frames == 1 and came < 1) or (frames == most and came > most)


def test_batches_are_full_past_the_limit() -> None:
    """Frames that come faster than a worker can do them alone fill every batch."""
    assert list(batch_under_load(1001.0, 0.01, 0.001, 16)) == pytest.approx([16, 0.026])


@given(st.floats(0.0001, 0.01), st.floats(0.0001, 0.01), st.lists(st.integers(1, 16), min_size=40, max_size=80))
def test_a_line_of_costs_is_found(fixed_s: float, frame_s: float, sizes: list[int]) -> None:
    """From jobs of several sizes the cost of a frame in a full one: no dearer than now, no cheaper than it is."""
    cost = JobCost()
    assert cost.full_s(16) == 0
    for size in sizes:
        cost.add(size, fixed_s + size * frame_s)
    real = fixed_s / 16 + frame_s
    assert real * (1 - 1e-6) <= cost.full_s(16) <= cost.mean_s * (1 + 1e-6)
    if len(set(sizes[-20:])) > 4 and max(sizes[-10:]) >= 12:
        assert cost.full_s(16) == pytest.approx(real, rel=0.02)


def test_jobs_of_one_size_promise_nothing() -> None:
    """Where all jobs are alike, nothing is believed of larger ones."""
    cost = JobCost()
    for _ in range(50):
        cost.add(2, 0.01)
    assert cost.full_s(16) == cost.mean_s == pytest.approx(0.005)


@given(st.lists(st.integers(1, 16), min_size=30, max_size=60), st.floats(0.0, 0.05))
def test_what_overlaps_is_counted_once(sizes: list[int], encode_s: float) -> None:
    """A worker that encodes one job while it decodes the next takes the decoding's time of each, however long both."""
    departures, decoded_s = Departures(), 0.0
    for size in sizes:
        decoded_s += 0.001 + 0.0005 * size
        departures.done("sd1", size, given_s=0.0, now_s=decoded_s + encode_s)
    cost = departures.costs["sd1"]
    assert cost.full_s(16) >= (0.0005 + 0.001 / 16) * (1 - 1e-6)
    assert cost.full_s(16) <= cost.mean_s * (1 + 1e-6)
    assert cost.mean_s <= 0.0015 * (1 + 1e-6)  # a frame of a job of its own


def test_gaps_are_nobodys_work() -> None:
    """From one job's end to the next one's is no service time where the next came only later."""
    departures = Departures()
    for number in range(10):
        departures.done("sd1", 1, given_s=10.0 * number + 9, now_s=10.0 * number + 9.5)
    assert departures.costs == {}
