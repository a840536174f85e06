"""`taesd-stream ray`: decode workers in a Ray cluster."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Final

import typer

from taesd_stream.errors import ConfigError, UnreachableError
from taesd_stream_workers.commands.options import (
    ConfigOption,
    InsecureOption,
    SetOption,
    WebOption,
    said_insecure,
    say,
)

if TYPE_CHECKING:
    from types import ModuleType

START_S: Final = 120.0
ClusterOption = Annotated[
    str, typer.Option("--cluster", metavar="ADDRESS", envvar="RAY_ADDRESS", help="The Ray cluster; auto finds it.")
]


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    ray = typer.Typer(no_args_is_help=True, help="Decode workers in a Ray cluster, as many as the load needs.")
    ray.command()(up)
    ray.command()(status)
    ray.command()(down)
    app.add_typer(ray, name="ray", rich_help_panel="Roles, each alone")


def up(
    broker: Annotated[str, typer.Option(metavar="ADDRESS", help="Where workers dial: the daemon's workers_bind.")],
    connect: WebOption,
    least: Annotated[int, typer.Option("--min", min=0, help="Fewest workers.")] = 1,
    most: Annotated[int, typer.Option("--max", min=1, help="Most workers.")] = 4,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="A fraction shares a GPU.")] = 1.0,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="Cores a worker counts for.")] = 1.0,
    settle_s: Annotated[float, typer.Option(min=0, help="Seconds of less load before a worker goes.")] = 120.0,
    cluster: ClusterOption = "auto",
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
    insecure: InsecureOption = False,
) -> None:
    """Place decode workers, and a controller that follows the load. They stay when this command has ended.

    Example: taesd-stream ray up --broker tcp://daemon:5761 --connect http://daemon:8765 --min 1 --max 8
    """
    from taesd_stream.config import load_config
    from taesd_stream_workers.daemon_client import DaemonClient
    from taesd_stream_workers.role.addresses import workers_address

    if least > most:
        raise ConfigError(f"--min {least}: more than --max {most}")
    loaded = load_config(config, said_insecure([*sets, f"broker.workers_bind={broker}"], insecure))
    workers_address(loaded)  # what every worker would refuse
    for key, folder in (("security.keys_folder", loaded.keys_folder), ("weights.folder", loaded.weights_folder)):
        if folder is not None and not folder.is_absolute():
            raise ConfigError(f"{key} = {folder}: expected an absolute path, for workers start in a folder of Ray's")
    DaemonClient(connect).desired_workers()  # now rather than in a log on some node
    ray_cluster = _join(cluster)
    ray_cluster.place(
        ray_cluster.Plan(
            web=connect,
            values=json.loads(loaded.to_json()),
            min_workers=least,
            max_workers=most,
            gpus_per_worker=gpus_per_worker,
            cpus_per_worker=cpus_per_worker,
            settle_s=settle_s,
        )
    )
    _wait(lambda: len(ray_cluster.worker_names()) >= least, f"{least} workers placed")
    count = len(ray_cluster.worker_names())
    say(f"Placed {count} of at most {most}. `taesd-stream ray status` says how they are, `ray down` takes them away.")


def status(cluster: ClusterOption = "auto") -> None:
    """Print the workers that are placed, as JSON.

    Example: taesd-stream ray status
    """
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints its news, as of a dead node, to stdout
        rows = [{"name": name, **facts} for name, facts in _join(cluster).worker_facts().items()]
    sys.stdout.write(json.dumps({"workers": rows}) + "\n")


def down(cluster: ClusterOption = "auto") -> None:
    """Drain all workers, and take them and the controller away.

    Example: taesd-stream ray down
    """
    ray_cluster = _join(cluster)
    ray_cluster.stop_controller()
    try:
        for name in reversed(ray_cluster.worker_names()):
            say(f"draining {name}")
            ray_cluster.stop_worker(name)
    finally:  # Ctrl-C while one drains must not keep the autoscaler's nodes
        ray_cluster.want_nothing()


def _join(cluster: str) -> ModuleType:
    """Join the cluster. Raises: ConfigError without the extra, UnreachableError without a cluster."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError('Ray is not installed here: pip install "taesd-stream[daemon,ray]", on every node') from error
    from taesd_stream_workers import ray_cluster

    try:
        ray.init(address=cluster, namespace=ray_cluster.NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError) as error:
        raise UnreachableError(f"no Ray cluster at {cluster}: start one with `ray start --head`") from error
    return ray_cluster


def _wait(is_done: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + START_S
    while not is_done():
        if time.monotonic() > deadline_s:
            raise UnreachableError(f"not within {START_S:.0f} s: {what}; `ray status` shows what the cluster lacks")
        time.sleep(0.2)
