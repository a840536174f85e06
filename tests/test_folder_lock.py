"""A folder has one daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taesd_stream.errors import ConfigError
from taesd_stream.folder_lock import LOCK_NAME, FolderLock

HOLDER = """
import sys
from pathlib import Path
from taesd_stream.folder_lock import FolderLock
FolderLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_holder_is_refused_until_the_first_one_lets_go(tmp_path: Path) -> None:
    """While held, the folder is refused by name, with the way out; then it can be had."""
    folder = tmp_path / "new" / "recordings"
    with FolderLock(folder):
        with pytest.raises(ConfigError, match=rf"{folder}.*process {os.getpid()}.*another folder"):
            FolderLock(folder).acquire()
        with FolderLock(tmp_path / "other"):
            pass
    with FolderLock(folder) as again, pytest.raises(ConfigError):
        FolderLock(again.folder).acquire()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    """Another process holds it, is named, and by its death frees it."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {process.pid}"):
            FolderLock(tmp_path).acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
    with FolderLock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"


def test_a_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A process started while the lock is held does not hold it on."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    command = [sys.executable, "-c", "import sys; print(1, flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        assert child.stdout
        assert child.stdout.readline()
        lock.release()
        with FolderLock(tmp_path):
            pass
        assert child.stdin
        child.stdin.close()


def test_a_folder_that_cannot_be_is_a_config_error(tmp_path: Path) -> None:
    """A file where the folder should be is said so, in one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        FolderLock(tmp_path / "file" / "below").acquire()


def test_releasing_twice_is_nothing(tmp_path: Path) -> None:
    """Only the first release lets go; a lock can be taken again."""
    lock = FolderLock(tmp_path)
    lock.acquire()
    lock.release()
    lock.release()
    with lock:
        pass
