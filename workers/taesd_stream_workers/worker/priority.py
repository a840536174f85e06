"""A worker gives way: where a sampler wants the same processor, the sampler gets most of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path
from typing import Any, Final

NICE: Final = 10  # a tenth of what a program of ordinary priority gets beside it, all of what nobody wants
_BELOW_NORMAL: Final = 0x4000  # BELOW_NORMAL_PRIORITY_CLASS of winbase.h


def give_way() -> None:
    """Lower this process's priority, and that of the processes it will start; before any of its threads.

    On Linux each thread has a priority of its own, which it takes from the one that starts it.
    """
    if sys.platform == "win32":
        kernel: Any = ctypes.windll.kernel32
        kernel.SetPriorityClass(kernel.GetCurrentProcess(), _BELOW_NORMAL)
        return
    os.nice(NICE)
    if os.getsid(0) == os.getpid():  # else the group is that of a shell and all that it runs
        # Desktops share processors out by session first (sched_autogroup), and there nice counts only within one.
        with contextlib.suppress(OSError):
            Path("/proc/self/autogroup").write_text(str(NICE))
