"""How many files and connections a role may have open."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Final

logger = logging.getLogger(__name__)

# macOS says that there is no limit, and takes no more than kern.maxfilesperproc, which is 10240 or more.
FEWER: Final = (65536, 10240, 4096)


def allow_many() -> None:
    """As many as the system lets us have: each sampler, viewer and recording is one, and a shell's 1024 are too few."""
    if sys.platform != "win32":
        import resource  # Windows has no such limit, and no such module

        now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        for count in (most, *(fewer for fewer in FEWER if fewer > now)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))
                return
        if 0 <= now < FEWER[-1]:  # below 0: without a limit
            logger.warning("open_files_few limit=%d: the system allows no more", now)
