"""Logging of the roles: text on a terminal, JSON lines elsewhere. Called by processes, never by the library."""

from __future__ import annotations

import json
import logging
import sys
import time


class _JsonFormatter(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "process": self._name,
            "logger": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up_logging(name: str, *, is_verbose: bool = False, is_quiet: bool = False) -> None:
    """Log to stderr, one line an event: text on a terminal, JSON elsewhere (TTY decides).

    name: of this process, in each line. is_verbose: messages too. is_quiet: only what was lost, and what someone must
    act on.
    """
    handler = logging.StreamHandler()
    if sys.stderr.isatty():
        text = "%(asctime)s %(levelname).1s %(process_name)s %(message)s"
        handler.setFormatter(logging.Formatter(text, "%H:%M:%S", defaults={"process_name": name}))
    else:
        handler.setFormatter(_JsonFormatter(name))
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
