"""How many files and connections a role may have open."""

from __future__ import annotations

import contextlib
import sys


def allow_many() -> None:
    """As many as the system lets us have: each sampler, viewer and recording is one, and a shell's 1024 are too few."""
    if sys.platform != "win32":
        import resource  # Windows has no such limit, and no such module

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS says that there is no limit, and has one
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
