"""Processes as tests look at them (Linux): who is whose child, who still lives, and what a terminal shows."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


def lives(pid: int) -> bool:
    """Whether the process runs; one that is dead and not yet waited for does not."""
    return _state_and_parent(pid)[0] not in ("", "Z", "X")


def children_of(pid: int) -> dict[int, list[str]]:
    """The living children of a process: their ids, and their command lines' words."""
    found: dict[int, list[str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and _state_and_parent(int(entry.name))[1] == pid and lives(int(entry.name)):
            with contextlib.suppress(OSError):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().decode().split("\0")
    return found


def role_pid(supervisor: int, role: str) -> int | None:
    """The process of a role that runs now, None while there is none."""
    return next((pid for pid, words in children_of(supervisor).items() if role in words), None)


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        after_name = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", 0
    return after_name[0], int(after_name[1])


class Terminal:
    """A command on a terminal of its own; what it shows is read as it comes."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**environment, "TERM": "xterm", "COLUMNS": "100"}
        )
        os.close(slave)
        self.shown = ""

    def read(self, timeout_s: float = 0.1) -> str:
        """All that was shown up to now, after waiting a moment for more."""
        ready, _, _ = select.select([self._master], [], [], timeout_s)
        if ready:
            with contextlib.suppress(OSError):  # EIO: the last process that had it is gone
                self.shown += os.read(self._master, 1 << 16).decode(errors="replace")
        return self.shown

    def close(self) -> None:
        """Free it; the process must have ended."""
        os.close(self._master)


class Usage(NamedTuple):
    """What a process holds now."""

    rss_mib: float
    pss_mib: float
    descriptors: int
    threads: int
    cpu_s: float


def usage_of(pid: int) -> Usage:
    """As /proc says it."""
    folder = Path("/proc") / str(pid)
    rows = dict(line.split(":", 1) for line in (folder / "smaps_rollup").read_text().splitlines()[1:])
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return Usage(
        rss_mib=int(rows["Rss"].split()[0]) / 1024,
        pss_mib=int(rows["Pss"].split()[0]) / 1024,
        descriptors=sum(1 for _ in (folder / "fd").iterdir()),
        threads=int(fields[17]),
        cpu_s=(int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
    )
