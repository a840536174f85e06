"""Commands as real processes that begin at once: forked from one that has torch and the other large libraries loaded.

Importing those takes longer than most commands do their work in. What is tested of a process's own life (signals, a
terminal, what is imported) starts one afresh instead.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

# none of them reads a setting of ours
LIBRARIES = ("torch", "av", "pydantic_settings", "rich.progress", "safetensors.torch", "typer", "zmq")


def run_command(
    *words: str | Path, environment: Mapping[str, str], timeout_s: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """`taesd-stream WORDS` to its end. Raises: TimeoutExpired, with the process killed."""
    arguments = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        asked = {"words": arguments, "environment": dict(environment), "outputs": [str(path) for path in outputs]}
        mother = _mother()
        assert mother.stdin is not None
        assert mother.stdout is not None
        mother.stdin.write(json.dumps({**asked, "folder": str(Path.cwd()), "timeout_s": timeout_s}) + "\n")
        mother.stdin.flush()
        code = json.loads(mother.stdout.readline())
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    if code is None:
        raise subprocess.TimeoutExpired(arguments, timeout_s, out, err)
    return subprocess.CompletedProcess(arguments, code, out, err)


@functools.cache
def _mother() -> subprocess.Popen[str]:
    """The process that is forked, one for all tests; it ends when its stdin does."""
    pipe = subprocess.PIPE
    mother = subprocess.Popen([sys.executable, "-m", "tests.commands"], stdin=pipe, stdout=pipe, text=True)
    atexit.register(mother.communicate)
    return mother


def main() -> None:
    """Fork for each line of stdin, and answer with the exit code; null when it took too long."""
    for name in LIBRARIES:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if not pid:
            _become(asked["words"], asked["environment"], asked["folder"], asked["outputs"])
        answers.write(json.dumps(_end_of(pid, asked["timeout_s"])) + "\n")
        answers.flush()


def _end_of(pid: int, timeout_s: float) -> int | None:
    ended = os.pidfd_open(pid)
    is_late = not select.select([ended], [], [], timeout_s)[0]
    os.close(ended)
    if is_late:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None if is_late else code


def _become(words: list[str], environment: dict[str, str], folder: str, outputs: list[str]) -> NoReturn:
    """Be the command: this process's files, environment and arguments are its own from here on."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    places = [os.open(os.devnull, os.O_RDONLY), *(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) for path in outputs)]
    for number, place in enumerate(places):
        os.dup2(place, number)
    sys.argv = ["taesd-stream", *words]
    code: object = 1
    try:
        runpy.run_module("taesd_stream_workers.cli", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 as the interpreter does
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # freeing torch's memory bit by bit takes longer than most commands


if __name__ == "__main__":
    main()
