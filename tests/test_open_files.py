"""The limit of open files, with systems that are not this one: what they answer is the test's."""

from __future__ import annotations

import errno
import sys

import pytest

from taesd_stream_workers.role.open_files import allow_many

if sys.platform == "win32":
    pytest.skip("Windows has no such limit", allow_module_level=True)

import resource

NONE = resource.RLIM_INFINITY


class System:
    """One that takes soft limits up to `takes`; what it was left at."""

    def __init__(self, soft: int, hard: int, takes: int) -> None:
        self.limits = (soft, hard)
        self._takes = takes

    def getrlimit(self, _: int) -> tuple[int, int]:
        """What it has."""
        return self.limits

    def setrlimit(self, _: int, limits: tuple[int, int]) -> None:
        """Change it."""
        if limits[0] == NONE or limits[0] > self._takes:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.limits = limits


@pytest.mark.parametrize(
    ("soft", "hard", "takes", "left"),
    [
        (1024, 1_048_576, 1_048_576, 1_048_576),  # Linux
        (256, NONE, 245_760, 65_536),  # macOS
        (256, NONE, 10_240, 10_240),
        (256, NONE, 5000, 4096),
        (20_000, NONE, 20_000, 20_000),  # never less than before
        (256, NONE, 256, 256),
        (-1, NONE, 256, -1),  # without a limit already
    ],
)
def test_as_many_as_the_system_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, soft: int, hard: int, takes: int, left: int
) -> None:
    """Where the hard limit is not taken, the largest that is; the hard limit stays, and it is said where none was."""
    system = System(soft, hard, takes)
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    allow_many()
    assert system.limits == (left, hard)
    is_few = left == soft == 256
    assert [f"open_files_few limit={soft}" in record.message for record in caplog.records] == [True] * is_few
