"""Decode workers placed by Ray: one actor a worker, as many as the daemon says it needs. No Ray call in the data path.

An actor starts the same `taesd-stream worker` as everywhere, as its child; that dials the broker by itself. A lost head
stops only the placing. Needs the extra `ray`, and this package on every node.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from dataclasses import dataclass
from typing import Any, Final

from taesd_stream.config import load_config
from taesd_stream.errors import ConfigError, TaesdStreamError
from taesd_stream_workers.daemon_client import DaemonClient
from taesd_stream_workers.role.process import Reports, Role
from taesd_stream_workers.supervisor import LAST_WORDS_S, USAGE_EXIT

logger = logging.getLogger(__name__)

NAMESPACE: Final = "taesd-stream"
CONTROLLER: Final = "taesd-stream-controller"
WORKER_PREFIX: Final = "taesd-stream-worker-"
LOOK_S: Final = 2.0
DRAIN_S: Final = 30.0
ANSWER_S: Final = 5.0
DEAD_CHILD_EXIT: Final = 70


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `ray up` was told.

    values: the worker's configuration, `Config` as a mapping. web: the daemon's address, or link with token.
    gpus_per_worker: a fraction shares a GPU between workers. settle_s: the load must ask for fewer workers for so long
    before one goes.
    """

    web: str
    values: dict[str, Any]
    min_workers: int
    max_workers: int
    gpus_per_worker: float
    cpus_per_worker: float
    settle_s: float = 120.0

    def bounded(self, desired: int) -> int:
        """`desired` within the plan's bounds."""
        return max(self.min_workers, min(self.max_workers, desired))

    def resources(self) -> dict[str, float]:
        """One worker's share of a node, in Ray's names."""
        return {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}


class WorkerActor:
    """One decode worker, as a child process of the actor: it ends with the actor, and the actor ends with it.

    Not so where the settings are refused: they would be again. Then the actor stays, says why, and holds its place.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._reports: Reports = queue.SimpleQueue()
        self._is_drained = False
        self._refusal = ""
        self._role: Role | None = None
        try:
            self._role = Role("worker", "worker", load_config(values=values))
        except ConfigError as error:  # this node has another version of the package; an actor that died came anew
            self._refusal = str(error)
            return
        self._role.spawn([], self._reports)
        threading.Thread(target=self._watch, args=(self._role,), name="watch", daemon=True).start()

    def facts(self) -> dict[str, Any]:
        """Whether the worker is ready, its process, its node, its device; `refusal`: why it would not start."""
        node = _ray().get_runtime_context().get_node_id()
        if self._role is None or self._refusal:
            return {"ready": False, "pid": None, "node": node, "refusal": self._refusal}
        process = self._role.process
        return {"ready": self._role.is_ready, "pid": process.pid if process else None, "node": node} | self._role.facts

    def drain(self) -> None:
        """No new jobs; what is decoded is passed on; then the worker has ended."""
        if self._role is None:
            return
        self._is_drained = True
        self._role.ask_to_stop()
        self._role.wait_or_kill(time.monotonic() + DRAIN_S)

    def _watch(self, role: Role) -> None:
        process, listener = role.process, role.listener
        assert process is not None
        assert listener is not None
        while process.poll() is None:
            self._take_reports(timeout_s=0.5)
        listener.join(LAST_WORDS_S)
        self._take_reports(timeout_s=0.0)
        if process.returncode == USAGE_EXIT:
            self._refusal = role.refusal or f"exit code {USAGE_EXIT}; the actor's log on its node says why"
        elif not self._is_drained:
            os._exit(DEAD_CHILD_EXIT)  # Ray sees a dead actor, and starts it again, elsewhere if need be

    def _take_reports(self, timeout_s: float) -> None:
        """Wait for a report, then take all that are there."""
        with contextlib.suppress(queue.Empty):
            role, pid, report = self._reports.get(timeout=timeout_s)
            while True:
                role.take(pid, report)
                role, pid, report = self._reports.get_nowait()


class Controller:
    """A detached actor that keeps the number of workers at what the daemon needs. All its state is Ray's own."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._daemon = DaemonClient(plan.web)
        self._needed_s = time.monotonic()  # when all workers were last needed
        self._error: str | None = None
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def status(self) -> dict[str, Any]:
        """How many workers there are, within which bounds, and what is wrong with the daemon, if anything."""
        plan = self._plan
        return {
            "workers": len(worker_names()),
            "min": plan.min_workers,
            "max": plan.max_workers,
            "error": self._error,
        }

    def _run(self) -> None:
        while True:
            try:
                self._look()
                self._error = None
            except TaesdStreamError as error:  # the daemon restarts: as many workers as before
                self._error = str(error)
            except Exception as error:  # the outermost loop: Ray's own faults must not end the only controller
                self._error = f"{type(error).__name__}: {error}"
                logger.exception("controller_failed")
            time.sleep(LOOK_S)

    def _look(self) -> None:
        there = worker_names()
        for name in free_names(there, self._plan.min_workers):
            self._start(name)
        count = self._plan.bounded(self._daemon.desired_workers())
        _ray().autoscaler.sdk.request_resources(bundles=[self._plan.resources()] * count)
        if count >= len(there):
            self._needed_s = time.monotonic()
            for name in free_names(worker_names(), count):
                self._start(name)
        elif time.monotonic() - self._needed_s > self._plan.settle_s:
            stop_worker(there[-1])

    def _start(self, name: str) -> None:
        logger.info("worker_placed name=%s", name)
        plan = self._plan
        _remote(
            WorkerActor,
            name,
            num_cpus=plan.cpus_per_worker,
            num_gpus=plan.gpus_per_worker,
            scheduling_strategy="SPREAD",
        ).remote(plan.values)


def place(plan: Plan) -> Any:
    """Start the controller in the cluster that `ray.init` has joined, in place of one with another plan.

    The workers that are there stay, and go on with the configuration that they were started with. Those that refused
    theirs go: the new one may mend it.
    """
    stop_controller()
    for name, facts in worker_facts().items():
        if "refusal" in facts:
            stop_worker(name)
    return _remote(Controller, CONTROLLER, num_cpus=0).remote(plan)


def worker_names() -> list[str]:
    """Names of all worker actors, in the order of their numbers."""
    actors = _ray().util.list_named_actors(all_namespaces=True)
    mine = [one["name"] for one in actors if one["namespace"] == NAMESPACE and one["name"].startswith(WORKER_PREFIX)]
    return sorted(mine, key=lambda name: int(name.removeprefix(WORKER_PREFIX)))


def worker_facts() -> dict[str, dict[str, Any]]:
    """What each worker actor says of itself; of one that does not answer, why."""
    found: dict[str, dict[str, Any]] = {}
    for name in worker_names():
        try:
            found[name] = _ray().get(_ray().get_actor(name, NAMESPACE).facts.remote(), timeout=ANSWER_S)
        except (ValueError, _ray().exceptions.RayError) as error:
            found[name] = {"ready": False, "error": type(error).__name__}
    return found


def free_names(there: list[str], count: int) -> list[str]:
    """Names for the workers that lack until there are `count`."""
    numbers = (f"{WORKER_PREFIX}{number}" for number in range(count + len(there)))
    return [name for name in numbers if name not in there][: max(0, count - len(there))]


def stop_worker(name: str) -> None:
    """Drain a worker and take its actor away."""
    try:
        actor = _ray().get_actor(name, NAMESPACE)
        _ray().get(actor.drain.remote(), timeout=DRAIN_S + 5)
    except (ValueError, _ray().exceptions.RayError) as error:  # gone, or its node is
        logger.warning("worker_not_drained name=%s error=%s", name, error)
        if isinstance(error, ValueError):
            return
    _ray().kill(actor, no_restart=True)


def want_nothing() -> None:
    """Ray's autoscaler keeps nodes for what was asked of it last, until something else is."""
    _ray().autoscaler.sdk.request_resources(bundles=[])


def stop_controller() -> None:
    """End the controller, if there is one; the workers go on."""
    try:
        _ray().kill(_ray().get_actor(CONTROLLER, NAMESPACE), no_restart=True)
    except ValueError:
        return


def _ray() -> Any:
    """Ray, imported when it is used: it is an extra, and its import changes the environment."""
    import ray
    import ray.autoscaler.sdk

    return ray


def _remote(actor: type, name: str, **options: object) -> Any:
    return (
        _ray()
        .remote(actor)
        .options(name=name, namespace=NAMESPACE, lifetime="detached", max_restarts=-1, max_concurrency=4, **options)
    )
