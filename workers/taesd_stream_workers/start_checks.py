"""What is checked before a role starts: a wrong setting is then one line, and no role's death among other lines.

Whoever uses an address or a folder takes it again and may still be refused: another daemon may have come between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from taesd_stream.config import Config
from taesd_stream.errors import ConfigError
from taesd_stream.folder_lock import FolderLock
from taesd_stream.keys import load_keys
from taesd_stream_workers.role.addresses import check_inner_addresses, require_guarded, tcp_socket, web_address
from taesd_stream_workers.role.key_files import AllowList
from taesd_stream_workers.role.web_token import load_token, peer_tokens
from taesd_stream_workers.streamer.push import format_of

ROLES: Final = ("broker", "streamer", "worker")


def check_start(config: Config, roles: Sequence[str] = ROLES) -> None:
    """Check what these roles need. Raises: ConfigError naming the key, what came, and the way out."""
    if config.keys_folder is not None:
        check_keys(config.keys_folder, roles)
    if "streamer" in roles:
        web_address(config)
        check_free("web.bind", config.web.bind)
        load_token(config)
        for push in config.pushes:
            format_of(push.url)
        peer_tokens(config)
        _check_folder(config.recording_folder, "recording.folder")
    if "broker" in roles:
        check_free("broker.bind", require_guarded(config, "broker.bind", config.broker.bind))
        _check_folder(config.log_folder, "broker.log_folder")
    check_inner_addresses(config)
    if "worker" in roles:
        _check_weights(config)


def check_free(key: str, address: str) -> None:
    """Raises: ConfigError when an address cannot be bound now."""
    try:
        _try_to_bind(address)
    except OSError as error:
        port_0 = f"{address.rpartition(':')[0]}:0"
        raise ConfigError(
            f"{key} = {address}: {error.strerror}; another daemon may be running; "
            f"choose another port, or a free one by --set {key}={port_0}"
        ) from error


def is_free(address: str) -> bool:
    """Whether an address can be bound now."""
    try:
        _try_to_bind(address)
    except OSError:
        return False
    return True


def _try_to_bind(address: str) -> None:
    parts = urlsplit(address if "://" in address else f"tcp://{address}")
    if parts.scheme == "ipc" or not parts.port:
        return
    host = (parts.hostname or "").replace("*", "")  # ZeroMQ's word for every interface
    with tcp_socket(host) as probe:
        probe.bind((host, parts.port))


def _check_folder(folder: Path, key: str) -> None:
    with FolderLock(folder, key):
        pass


def check_keys(folder: Path, roles: Sequence[str]) -> None:
    """A role that binds has the daemon's own pair; one that only dials may have a client's. Raises: ConfigError."""
    keys = load_keys(folder)
    binds = [role for role in roles if role != "worker"]
    if binds and not keys.is_server:
        raise ConfigError(
            f"security.keys_folder = {folder}: a client's keys; the {binds[0]} needs the daemon's, the folder where "
            "`taesd-stream keys new` was run"
        )
    if keys.is_server:
        AllowList(folder)


def _check_weights(config: Config) -> None:
    folder = config.weights_folder
    if folder is None or folder.is_dir():
        return
    if folder.is_file():
        raise ConfigError(f"weights.folder = {folder}: expected the folder that the weight file is in: {folder.parent}")
    raise ConfigError(
        f"weights.folder = {folder}: there is no such folder; name the one that holds the weight files, "
        "or leave it out for the linear decoder"
    )
