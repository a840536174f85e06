"""Several daemons of one host as one: `taesd-stream up --daemons N`, for more than one broker's loop carries.

Each is whole: broker, streamer, decode workers, folders and limits of its own. Publishers choose among their addresses
by the stream's name; the first one's page has the others as its peers.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from taesd_stream.config import AUTO, Config, PeerDaemon
from taesd_stream.errors import ConfigError
from taesd_stream_workers.role.addresses import LOOPBACK
from taesd_stream_workers.role.gpus import devices, is_mps_on
from taesd_stream_workers.start_checks import is_free
from taesd_stream_workers.supervisor import Addresses, Supervisor

MAX_PORT: Final = 65535
MPS_COMMAND: Final = "nvidia-cuda-mps-control -d"
TURN_S: Final = 0.2  # Windows tells Python of Ctrl-C between two waits only

T = TypeVar("T")


class HostDaemons:
    """Supervisors side by side, a thread each. `with` stops all at its end. The first has the page that people open."""

    def __init__(self, configs: Sequence[Config], *, options: Sequence[str] = ()) -> None:
        """configs: one a daemon. options: as of Supervisor."""
        # The first is made first: it takes the service manager's socket, and speaks for all.
        self._first, *self._others = [
            Supervisor(config, name=f"daemon-{number}" if len(configs) > 1 else "", options=options)
            for number, config in enumerate(configs, start=1)
        ]

    def __enter__(self) -> HostDaemons:
        return self

    def __exit__(self, *_: object) -> None:
        self._for_all(Supervisor.close, [self._first, *self._others])

    def start(self) -> list[Addresses] | None:
        """Start all; the first when the others are ready, whose pages it shows.

        Returns: their addresses; None when told to stop before that. Raises: as Supervisor.start.
        """
        others = [one for one in self._for_all(Supervisor.start, self._others) if one is not None]
        if len(others) < len(self._others):
            return None
        self._first.add_peers([PeerDaemon(url=one.web) for one in others])
        first = self._first.start()
        return None if first is None else [first, *others]

    def run(self) -> None:
        """Watch until told to stop. Raises: GaveUpError when a role of any dies again and again."""
        self._for_all(Supervisor.run, [self._first, *self._others])

    def stop(self) -> None:
        """Make `start` and `run` return. Any thread, and signal handlers."""
        for one in (self._first, *self._others):
            one.stop()

    def status(self) -> list[list[dict[str, Any]]]:
        """Of each daemon its roles, as Supervisor.status."""
        return [one.status() for one in (self._first, *self._others)]

    def _for_all(self, act: Callable[[Supervisor], T], supervisors: Sequence[Supervisor]) -> list[T]:
        """Do it to all at once; when one fails the others are told to stop."""
        if not supervisors:
            return []
        with ThreadPoolExecutor(len(supervisors)) as pool:
            acting = [pool.submit(act, one) for one in supervisors]
            pending = set(acting)
            while pending:
                done, pending = wait(pending, TURN_S, FIRST_EXCEPTION)
                if any(one.exception() for one in done):
                    self.stop()
            return [one.result() for one in acting]


def configs_of(config: Config, count: int) -> list[Config]:
    """The configuration of each of `count` daemons: the first as it is given, but for its share of the devices.

    Samplers reach the others at the next free ports, people by the first one's page alone; their folders have the
    first one's names with `-2`, `-3`… behind. Where there are fewer devices than daemons, they are shared.
    Raises: ConfigError where no port is left.
    """
    if count == 1:
        return [config]
    found = devices(config.decoder.device, config.decoder.min_free_bytes)
    threads = config.decoder.threads or max(1, (os.cpu_count() or 1) // count)
    binds = (config.broker.bind, config.broker.workers_bind, config.streamer.packets_bind, config.web.bind)
    taken = {_port(bind) for bind in binds}
    all_of_them = [config, *(_another(config, number, taken) for number in range(2, count + 1))]
    return [
        one.with_values(
            decoder={"device": ",".join(found[place::count] or [found[place % len(found)]]), "threads": threads}
        )
        for place, one in enumerate(all_of_them)
    ]


def share_of(count: int, used: Sequence[str]) -> str:
    """What `count` daemons have together, for people; and how they get more of a GPU that several have.

    used: the devices of all their workers, one each.
    """
    text = f"the {count} daemons have {os.cpu_count()} processors together"
    shared = [name for name, workers in Counter(used).items() if name.startswith("cuda") and workers > 1]
    if not shared or is_mps_on():
        return text
    return f"{text}, and {', '.join(shared)} in turns; for side by side start NVIDIA's MPS before: {MPS_COMMAND}"


def _another(config: Config, number: int, taken: set[int]) -> Config:
    log_folder = config.broker.log_folder
    return config.with_values(
        broker={
            "bind": _beside(config.broker.bind, number, taken),
            "workers_bind": _beside(config.broker.workers_bind, number, taken),
            "log_folder": log_folder if log_folder == AUTO else _numbered(config.log_folder, number),
        },
        streamer={"packets_bind": _beside(config.streamer.packets_bind, number, taken)},
        web={"bind": f"{LOOPBACK}:0", "hosts": []},
        recording={"folder": _numbered(config.recording_folder, number)},
    ).model_copy(update={"pushes": (), "peers": ()})


def _numbered(folder: Path, number: int) -> str:
    folder = folder.absolute()
    return str(folder.with_name(f"{folder.name}-{number}"))


def _beside(address: str, number: int, taken: set[int]) -> str:
    """A socket's address for another daemon: the next port that is free, the same each time if nobody took it."""
    if address == AUTO or not (first := _port(address)):
        return address if not address.startswith("ipc://") else f"{address}-{number}"
    for port in range(first + 1, MAX_PORT + 1):
        candidate = f"{address.removesuffix(str(first))}{port}"
        if port not in taken and is_free(candidate):
            taken.add(port)
            return candidate
    raise ConfigError(f"--daemons: no port above {address} is free for another daemon; choose a lower one")


def _port(address: str) -> int:
    return urlsplit(address if "://" in address else f"tcp://{address}").port or 0 if address != AUTO else 0
