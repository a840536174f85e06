"""How a program's end becomes the end of its runs: the reason of END, said also by a program that closes nothing."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import weakref
from typing import Final

from taesd_stream.frames import EndReason
from taesd_stream.publisher_link import PublisherLink

EXIT_S: Final = 2.0  # for all runs of the program together
MAX_TEXT_CHARS: Final = 500

# to the process that opened it; held by its own thread alone
_open_links: weakref.WeakKeyDictionary[PublisherLink, int] = weakref.WeakKeyDictionary()


def reason_of(error: BaseException | None) -> tuple[EndReason, str]:
    """Why a run ended, for the exception that ended it: a person's Ctrl-C stops it, sys.exit(0) is done."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "done", ""
    is_failed = isinstance(error, Exception | SystemExit)
    try:
        text = repr(error)
    except Exception:  # noqa: BLE001 what ends the program is its own error, and no repr's
        text = type(error).__name__
    return ("failed" if is_failed else "stopped"), text[:MAX_TEXT_CHARS]


def end_at_exit(link: PublisherLink) -> None:
    """Say END for this run when the program exits, unless it is over by then."""
    _open_links[link] = os.getpid()
    atexit.unregister(_end_all)  # once, however many runs
    atexit.register(_end_all)
    _end_with_child(os.getpid())
    _watch_forks()


@functools.cache  # once in a process
def _end_with_child(_pid: int) -> None:
    """A child that multiprocessing forked ends without atexit; what it registers here itself it runs."""
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _end_all, exitpriority=10)


@functools.cache  # once: it cannot be taken back
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forget_all)


def _forget_all() -> None:
    for link in list(_open_links):
        link.forget()
    _open_links.clear()


def _end_all() -> None:
    # what the interpreter printed, if it is an exception that ends the program; at a prompt it may be an old one
    error = None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
    reason, text = reason_of(error)
    links = [link for link, pid in list(_open_links.items()) if pid == os.getpid() and not link.is_over]
    for link in links:
        link.end_soon(EXIT_S, reason, text)
    for link in links:
        link.join()
