"""Where the roles of one daemon find each other, and which addresses may be bound at all."""

from __future__ import annotations

import hashlib
import ipaddress
import sys
from pathlib import Path
from urllib.parse import urlsplit

import platformdirs
import zmq

from taesd_stream.config import AUTO, Config
from taesd_stream.errors import ConfigError

MAX_IPC_PATH_BYTES = 100  # a Unix socket's path may have 107; libzmq adds to it


def runtime_folder(config: Config) -> Path:
    """A folder of this daemon's own for socket files, told by its public address; made with mode 0700."""
    name = hashlib.sha256(config.broker.bind.encode()).hexdigest()[:10]
    folder = platformdirs.user_runtime_path("taesd-stream", ensure_exists=False) / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"{folder}: no folder for socket files: {error.strerror}; "
            "give tcp addresses by --set broker.workers_bind=… and --set streamer.packets_bind=…"
        ) from error
    return folder


def workers_address(config: Config) -> str:
    """`broker.workers_bind`, resolved."""
    return _inner(config, "broker.workers_bind", config.broker.workers_bind, "workers", 5761)


def packets_address(config: Config) -> str:
    """`streamer.packets_bind`, resolved."""
    return _inner(config, "streamer.packets_bind", config.streamer.packets_bind, "packets", 5762)


def _inner(config: Config, key: str, address: str, name: str, port: int) -> str:
    if address != AUTO:
        return _checked(key, address)
    if sys.platform == "win32":
        return f"tcp://127.0.0.1:{port}"
    return f"ipc://{runtime_folder(config) / name}"


def _checked(key: str, address: str) -> str:
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if len(path.encode()) > MAX_IPC_PATH_BYTES:
            raise ConfigError(f"{key} = {address}: too long for a socket file; at most {MAX_IPC_PATH_BYTES} bytes")
        return address
    return require_tcp(key, address)


def require_tcp(key: str, address: str) -> str:
    """Return `address` if it is one that ZeroMQ can bind and only this host can reach. Raises: ConfigError else."""
    if not address.startswith(("tcp://", "ipc://")):
        raise ConfigError(f"{key} = {address}: expected tcp://host:port, as in tcp://127.0.0.1:5760")
    return require_loopback(key, address)


def require_loopback(key: str, address: str) -> str:
    """Return `address` if only this host can reach it. Raises: ConfigError else: there are no keys yet to guard it."""
    if address.startswith("ipc://"):
        return address
    host, _ = _host_and_port(key, address, "tcp://127.0.0.1:5760")
    if not is_loopback(host):
        raise ConfigError(f"{key} = {address}: only loopback addresses may be bound; reach it from elsewhere by ssh -L")
    return address


def web_address(config: Config) -> tuple[str, int]:
    """Host and port of `web.bind`. Raises: ConfigError when it is none."""
    return _host_and_port("web.bind", config.web.bind, "127.0.0.1:8765")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_and_port(key: str, address: str, example: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise ConfigError(f"{key} = {address}: {error}") from error
    if not host or port is None:
        raise ConfigError(f"{key} = {address}: expected host:port, as in {example}")
    return host, port


def bound_address(socket: zmq.Socket[bytes]) -> str:
    """The address that a bound socket has, its port resolved."""
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.rstrip(b"\0").decode()
