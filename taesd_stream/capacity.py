"""How much a daemon holds: from service times to streams, workers and waits; docs/capacity.md has the same in words.

Pure arithmetic: no thread, socket, clock or measurement inside. `taesd-stream bench` measures what goes in here, the
broker asks for workers by it (`scaling`), and tests/benchmarks/capacity.py simulates what it cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from taesd_stream.frames import Demand
from taesd_stream.pace import IDLE_INTERVAL_S

# Of what a stage could do at most. At 0.7 the mean wait of M/D/1 is 1.2 service times, at 0.8 2, at 0.9 4.5.
LOAD_FACTOR: Final = 0.7
RECENT: Final = 20  # jobs that JobCost remembers, the newer the better
REACH: Final = 2.0  # how far beyond the largest job that it saw it believes its line
ALIKE: Final = 0.05  # of their mean: sizes of jobs that spread less give no line


def utilisation(per_s: float, service_s: float, servers: int = 1) -> float:
    """The share of its time that a stage works: U = X S / m.

    The utilisation law (Denning and Buzen, The Operational Analysis of Queueing Network Models, 1978): exact for any
    arrivals, as long as all that comes is served. per_s: X, frames a second. service_s: S, of one frame at one server.
    """
    return per_s * service_s / servers


def servers_needed(load: float, load_factor: float = LOAD_FACTOR) -> int:
    """The least m with load / m <= load_factor, and never none.

    load: the sum of the streams' shares of one server, frames a second times seconds a frame each: X S.
    """
    return max(1, math.ceil(load / load_factor - 1e-9))  # 0.7 + 0.7 + 0.7 is over 2.1


def bottleneck(rates_per_s: Mapping[str, float]) -> str:
    """The stage that limits a chain, by the rates that each could do alone: of equals the first.

    X <= min m / S, the bottleneck law (Denning and Buzen 1978). Raises: ValueError without a stage.
    """
    if not rates_per_s:
        raise ValueError("rates_per_s: expected at least one stage, got none")
    return min(rates_per_s, key=lambda stage: rates_per_s[stage])


def held_per_s(rates_per_s: Mapping[str, float], load_factor: float = LOAD_FACTOR) -> float:
    """Frames a second that a chain of stages holds with room to spare: its bottleneck's rate at `load_factor`."""
    return load_factor * rates_per_s[bottleneck(rates_per_s)]


def streams_held(frames_per_s: float, each_per_s: float) -> int:
    """How many streams of `each_per_s` frames a second fit into `frames_per_s`."""
    return math.floor(frames_per_s / each_per_s + 1e-9)


def sent_per_s(
    step_s: float, demand: Demand, *, max_fps: float = 30.0, idle_interval_s: float = IDLE_INTERVAL_S
) -> float:
    """Frames a second that a sampler sends, by what is asked of it (PROTOCOL 2; `pace`).

    idle: the first step after each `idle_interval_s`, kept at the broker, undecoded. watched: each step, at most
    `max_fps`, the newest when there are more. every: each step, whatever comes (kept runs). step_s: of the sampler.
    """
    if demand == "idle":
        return 1 / (step_s * max(1, math.ceil(idle_interval_s / step_s - 1e-9)))
    return 1 / step_s if demand == "every" else min(1 / step_s, max_fps)


def wait_s(per_s: float, service_s: float, quantile: float = 0.99) -> float:
    """What a frame waits for one server with one service time, arrivals by chance (M/D/1); infinite from full load on.

    P(W > t) ~ C exp(-r t): r solves per_s (exp(r S) - 1) = r, and C = (1 - U) / (per_s S exp(r S) - 1), the
    Cramer-Lundberg approximation (Asmussen and Albrecher, Ruin Probabilities, 2010, IV.5), for W of M/G/1 is a ruin's.
    Paced arrivals wait less. Exact is the mean, U S / (2 (1 - U)) (Pollaczek and Khinchine).
    """
    load = utilisation(per_s, service_s)
    if load >= 1:
        return math.inf
    if load <= 1 - quantile:  # so rarely does any frame wait
        return 0.0
    decay = _decay(load)
    weight = (1 - load) / (load * math.exp(decay) - 1)
    return max(0.0, math.log(weight / (1 - quantile)) / decay) * service_s


def _decay(load: float) -> float:
    """r S of `wait_s`: the root above 0 of load (exp(x) - 1) = x, by halving."""
    low, high = 0.0, 1.0
    while load * math.expm1(high) < high:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if load * math.expm1(middle) < middle else (low, middle)
    return high


def batch_under_load(per_s: float, job_s: float, frame_s: float, max_batch_size: int) -> tuple[float, float]:
    """How far batches grow by themselves, and how long a job then takes: (frames, seconds).

    A worker takes what came while it did its last job, so n = per_s T with T = job_s + n frame_s; together
    T = job_s / (1 - per_s frame_s). At least 1 frame, at most `max_batch_size`: from there on frames wait or are
    replaced. A frame waits for the jobs that were given before, as many as a worker has credits, and for its own. This
    is of even arrivals: what bursts add, the simulation tells.
    """
    room = 1 - per_s * frame_s
    frames = per_s * job_s / room if room > 0 else math.inf
    frames = min(float(max_batch_size), max(1.0, frames))
    return frames, job_s + frames * frame_s


class JobCost:
    """What jobs of one kind take, learned from those that were done: about fixed + slope x units seconds.

    Of the last RECENT jobs or so, by least squares with weights that fall by time. A batch spreads its fixed part: at
    little load batches are small and a frame of theirs is dear, though there is room. Units are the caller's: bytes.
    """

    def __init__(self) -> None:
        self._units = self._seconds = 0.0  # means
        self._variance = self._covariance = 0.0
        self._largest = 0.0  # of the recent jobs

    def add(self, units: float, seconds: float) -> None:
        """One job is done. units: above 0."""
        if not self._units:
            self._units, self._seconds, self._largest = units, seconds, units
            return
        share = 1 / RECENT
        off = units - self._units
        self._covariance = (1 - share) * (self._covariance + share * off * (seconds - self._seconds))
        self._variance = (1 - share) * (self._variance + share * off * off)
        self._units += share * off
        self._seconds += share * (seconds - self._seconds)
        self._largest = max(units, self._largest - share * (self._largest - self._units))

    @property
    def mean_s(self) -> float:
        """Seconds a unit in jobs as they are now; 0 before the first one."""
        return self._seconds / self._units if self._units else 0.0

    def full_s(self, most_units: float) -> float:
        """Seconds a unit in jobs of `most_units`, as far as can be told: no further than REACH times what was seen."""
        if self._variance <= (ALIKE * self._units) ** 2:  # jobs of one size tell nothing of others
            return self.mean_s
        units = max(self._units, min(most_units, REACH * self._largest))
        slope = min(self.mean_s, max(0.0, self._covariance / self._variance))
        return slope + (self._seconds - slope * self._units) / units


class Departures:
    """What the jobs of one worker take of its time, learned from when each was given and done.

    A worker decodes one job while it encodes the one before: how long a job is under way says little of how many it
    can do. From one job's end to the next one's end does, if the next was there all the time.
    """

    def __init__(self) -> None:
        self.costs: dict[str, JobCost] = {}  # by kind of job
        self._last_s = -math.inf

    def done(self, kind: str, units: float, *, given_s: float, now_s: float) -> None:
        """A job is done."""
        if given_s <= self._last_s:
            self.costs.setdefault(kind, JobCost()).add(units, now_s - self._last_s)
        self._last_s = now_s

    def passed(self, now_s: float) -> None:
        """A job is done, but the time since the last one was not its alone: nothing is learned of it."""
        self._last_s = now_s
