"""Logging of the roles: text on a terminal, JSON lines elsewhere. Called by processes, never by the library."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(
    role: str, *, is_verbose: bool = False, is_quiet: bool = False, stream: TextIO | None = None
) -> None:
    """Log to stderr, one line an event: text on a terminal, JSON elsewhere (TTY decides).

    is_verbose: messages too. is_quiet: only what was lost, and what someone must act on.
    """
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    if target.isatty():
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname).1s {role} %(message)s", "%H:%M:%S"))
    else:
        handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.DEBUG if is_verbose else logging.WARNING if is_quiet else logging.INFO)
    for noisy in (
        "uvicorn",
        "uvicorn.access",
        "uvicorn.error",
        "asyncio",
        "websockets",
        "httpx",
        "httpx2",
        "httpcore2",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
