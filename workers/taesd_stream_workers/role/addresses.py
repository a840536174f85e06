"""Where the roles of one daemon find each other, and which addresses may be bound at all."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs
import zmq

from taesd_stream.config import AUTO, Config
from taesd_stream.errors import ConfigError

LOOPBACK = "127.0.0.1"
EVERY_INTERFACE = ("0.0.0.0", "*", "::")  # noqa: S104 as others bind it
MAX_IPC_PATH_BYTES = 100  # a Unix socket's path may have 107; libzmq adds to it


def runtime_folder(config: Config) -> Path:
    """A folder of this daemon's own for socket files, told by its public address; made with mode 0700.

    Raises: ConfigError where it cannot be made, or is another user's: no keys are asked of who speaks there.
    """
    name = hashlib.sha256(config.broker.bind.encode()).hexdigest()[:10]
    way_out = "give tcp addresses by --set broker.workers_bind=… and --set streamer.packets_bind=…"
    try:
        folder = platformdirs.user_runtime_path("taesd-stream", ensure_exists=True) / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_ours = os.name != "posix" or folder.lstat().st_uid == folder.parent.lstat().st_uid == os.geteuid()
    except OSError as error:
        raise ConfigError(f"no folder for socket files: {error}; {way_out}") from error
    if not is_ours:
        raise ConfigError(f"{folder}: no folder for socket files: it is another user's; {way_out}")
    return folder


def workers_address(config: Config) -> str:
    """`broker.workers_bind`, resolved."""
    return _inner(config, "broker.workers_bind", config.broker.workers_bind, "workers", 5761)


def packets_address(config: Config) -> str:
    """`streamer.packets_bind`, resolved."""
    return _inner(config, "streamer.packets_bind", config.streamer.packets_bind, "packets", 5762)


def check_inner_addresses(config: Config) -> None:
    """Check the inner sockets that were given. Raises: ConfigError."""
    inner = {"broker.workers_bind": config.broker.workers_bind, "streamer.packets_bind": config.streamer.packets_bind}
    for key, address in inner.items():
        if address != AUTO:
            _checked(config, key, address)


def _inner(config: Config, key: str, address: str, name: str, port: int) -> str:
    if address != AUTO:
        return _checked(config, key, address)
    if sys.platform == "win32":
        return f"tcp://{LOOPBACK}:{port}"
    return f"ipc://{runtime_folder(config) / name}"


def _checked(config: Config, key: str, address: str) -> str:
    if address.startswith("ipc://") and len(address.removeprefix("ipc://").encode()) > MAX_IPC_PATH_BYTES:
        raise ConfigError(f"{key} = {address}: too long for a socket file; at most {MAX_IPC_PATH_BYTES} bytes")
    return require_guarded(config, key, address)


def require_guarded(config: Config, key: str, address: str) -> str:
    """Return `address` if ZeroMQ knows such, and keys guard it where others than this host can reach it.

    Raises: ConfigError else, with the way out.
    """
    if not address.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"{key} = {address}: expected tcp://host:port, as in tcp://127.0.0.1:5760")
    if address.startswith("ipc://"):
        return address
    host, _ = _host_and_port(key, address, "tcp://127.0.0.1:5760")
    if is_loopback(host) or config.keys_folder is not None or config.security.insecure:
        return address
    raise ConfigError(
        f"{key} = {address}: other hosts can reach it, and no keys guard it: make some by `taesd-stream keys new NAME` "
        "and give --set security.keys_folder=DIR; or say --insecure"
    )


def web_address(config: Config) -> tuple[str, int]:
    """Host and port of `web.bind`. Raises: ConfigError when it is none."""
    return _host_and_port("web.bind", config.web.bind, "127.0.0.1:8765")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def dialled(address: str, beside: str = "") -> str:
    """Where to reach a socket that is bound at `address`.

    One that is bound on every interface is reached on the host of `beside`, another socket of its daemon; without
    one, on this host.
    """
    host = urlsplit(beside).hostname if beside.startswith("tcp://") else None
    return on_host(address, LOOPBACK if host is None or host in EVERY_INTERFACE else _bracketed(host))


def on_host(address: str, host: str) -> str:
    """The address of a socket that is bound at `address`, by that host where it is bound on every interface."""
    parts = urlsplit(address)
    if parts.scheme != "tcp" or parts.hostname not in EVERY_INTERFACE:
        return address
    return f"tcp://{host}:{parts.port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _host_and_port(key: str, address: str, example: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"{key} = {address}: {error}") from error
    if not host or port is None:
        raise ConfigError(f"{key} = {address}: expected host:port, as in {example}")
    return host, port


def tcp_socket(host: str) -> socket.socket:
    """A socket that can be bound at a host, also just after another one was."""
    new = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    if os.name == "posix":  # elsewhere it lets two programs have one port
        new.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return new


def bound_address(bound: zmq.Socket[bytes]) -> str:
    """The address that a bound socket has, its port resolved."""
    endpoint = bound.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.rstrip(b"\0").decode()
