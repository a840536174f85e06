"""The simulation of a farm: its simplest cases against the arithmetic, and its figures against measured daemons."""

from __future__ import annotations

import dataclasses

import pytest

from taesd_stream.capacity import batch_under_load, sent_per_s, servers_needed, utilisation
from tests.benchmarks.capacity import H200, against_measured, simulate, tables
from tests.benchmarks.farm import SECONDS, Farm, samplers
from tests.capacity_document import parts

CAPACITY_PER_S = 16 / (H200.job_s + 16 * H200.frame_s)  # of one worker with full batches


def offered_per_s(count: int, watched: float) -> float:
    """What those of `samplers` offer that somebody watches."""
    return sum(1 / one.interval_s for one in samplers(count, watched=watched, kept=0.0) if one.use == "watched")


def test_a_farm_that_is_not_full_shows_all() -> None:
    """Below its limits nothing is replaced, all that is offered comes out, and loads are the utilisation law's."""
    found = Farm(H200, samplers(300, watched=1.0, kept=0.0), 1, 1).run().figures()
    offered = offered_per_s(300, 1.0)
    assert found["replaced"] == 0
    assert found["frames_s"] == pytest.approx(offered, rel=0.03)
    _, job_s = batch_under_load(offered, H200.job_s, H200.frame_s, H200.max_batch_size)
    assert found["p50_ms"] < 1000 * (2 * job_s + H200.encode_s + H200.serve_s + 3 * H200.hop_s)
    at_broker = utilisation(offered, H200.take_s + H200.give_s) + 300 * H200.hello_s
    assert found["loads"]["broker"] == pytest.approx(at_broker, rel=0.1)
    assert found["desired_workers"] == 1
    assert found["loads"]["streamer"] == pytest.approx(utilisation(offered, H200.serve_s), rel=0.05)
    assert found["add"] == "nothing"


def test_a_farm_that_is_full_replaces() -> None:
    """Past its limit a worker shows what it can, the rest is replaced, and it is a worker that the farm lacks."""
    times = dataclasses.replace(H200, take_s=1e-6, give_s=1e-6, hello_s=1e-6)
    found = Farm(times, samplers(1500, watched=1.0, kept=0.0), 1, 1).run().figures()
    offered = offered_per_s(1500, 1.0)
    assert found["frames_s"] == pytest.approx(CAPACITY_PER_S, rel=0.03)
    assert found["replaced"] == pytest.approx(1 - CAPACITY_PER_S / offered, abs=0.05)
    assert found["loads"]["worker"] == pytest.approx(1.0, abs=0.02)
    assert (found["add"], found["desired_workers"]) == ("a worker", 2)
    enough = servers_needed(offered / CAPACITY_PER_S)
    assert Farm(times, samplers(1500, watched=1.0, kept=0.0), 1, enough).run().figures()["replaced"] == 0


@pytest.mark.parametrize("count", [100, 300, 500, 700, 850])
def test_a_broker_asks_for_the_workers_that_are_needed(count: int) -> None:
    """What a broker learns from its jobs' ends gives the number that service times and offered frames give."""
    found = Farm(H200, samplers(count, watched=1.0, kept=0.0), 1, 1).run().figures()
    assert found["desired_workers"] == servers_needed(offered_per_s(count, 1.0) / CAPACITY_PER_S)


def test_kept_frames_are_never_replaced() -> None:
    """Kept samplers' frames come out as often as they step, be it late."""
    streams = samplers(400, watched=0.0, kept=1.0)
    found = Farm(H200, streams, 1, 1).run().figures()
    assert (found["replaced"], found["p99_ms"]) == (0, None)
    assert found["frames_s"] == pytest.approx(sum(1 / one.interval_s for one in streams), rel=0.05)


def test_idle_samplers_cost_the_broker_alone() -> None:
    """Nobody watches: no frame goes to a worker; the broker takes one in two seconds or less of each, and HELLOs."""
    streams = samplers(2000, watched=0.0, kept=0.0)
    found = Farm(H200, streams, 1, 1).run().figures()
    sent = sum(1 / one.interval_s for one in streams)
    assert sent <= 2000 * sent_per_s(2.0, "idle")
    assert (found["frames_s"], found["loads"]["worker"], found["loads"]["streamer"]) == (0, 0, 0)
    assert found["loads"]["broker"] == pytest.approx(2000 * H200.hello_s + sent * H200.take_s, rel=0.15)


def test_the_same_farm_gives_the_same_figures() -> None:
    """The seed is fixed."""
    first, second = (Farm(H200, samplers(500, watched=0.5, kept=0.1), 2, 1).run().figures() for _ in range(2))
    assert first == second
    assert SECONDS > 1


def test_measured_daemons_are_met() -> None:
    """Of daemons that were measured on GPUs, frames/s are met within 5 % and the p99 within a factor of 1.8."""
    for row in against_measured():
        assert row["simulated_s"] == pytest.approx(row["measured_s"], rel=0.05), row
        assert 1 / 1.8 <= 1 + row["p99_off"] <= 1.8, row


@pytest.mark.slow
def test_the_document_shows_what_is_simulated() -> None:
    """The tables of docs/capacity.md are what the simulation gives, letter by letter."""
    assert parts()[1] == tables(simulate()), "run `python -m tests.capacity_document`"
