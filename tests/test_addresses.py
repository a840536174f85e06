"""Where roles of one host meet: a folder that is nobody else's; and which addresses can be taken."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from taesd_stream.config import Config
from taesd_stream.errors import ConfigError
from taesd_stream_workers.role.addresses import runtime_folder
from taesd_stream_workers.start_checks import check_free

STRANGER = 64321  # a user's number that nobody has


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's runtime folder."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def test_the_folder_of_socket_files_is_for_its_owner_alone(base: Path) -> None:
    """It is made in the user's runtime folder, mode 0700, and found there again."""
    folder = runtime_folder(Config())
    assert folder.is_relative_to(base)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert runtime_folder(Config()) == folder


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("up", [0, 1])
def test_another_users_folder_is_refused(up: int) -> None:
    """Who owns the folder, or the one above it, could put his own sockets there: it is not used."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder = runtime_folder(Config())
    os.chown((folder, folder.parent)[up], STRANGER, STRANGER)
    with pytest.raises(ConfigError, match=r"no folder for socket files: .*workers_bind"):
        runtime_folder(Config())


def test_an_address_on_every_interface_is_looked_at() -> None:
    """ZeroMQ's tcp://*:PORT is free, or in use, as any other."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104 that is the case
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="another daemon may be running"):
            check_free("broker.bind", f"tcp://*:{port}")
    check_free("broker.bind", f"tcp://*:{port}")
