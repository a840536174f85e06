"""Keys of encrypted sockets (CURVE): read from files, checked, put on a socket.

A daemon's folder has `server.key`, its pair; a client's has `client.key`, its own pair, and `server.pub`, the daemon's
public key. The files are ZeroMQ certificates (ZPL), as czmq and pyzmq write them; keys are z85 text, 40 characters.
`taesd-stream keys` makes them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq

from taesd_stream.errors import ConfigError

SERVER_KEY: Final = "server.key"
CLIENT_KEY: Final = "client.key"
SERVER_PUBLIC: Final = "server.pub"
KEYS_VARIABLE: Final = "TAESD_STREAM_KEYS_FOLDER"
_ROW = re.compile(rb'^\s*(public|secret)-key\s*=\s*"([!-~]{40})"\s*$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Keys:
    """One side's pair, and the daemon's public key; a daemon's own roles have one and the same in both places."""

    public: bytes
    secret: bytes = field(repr=False)
    server: bytes

    @property
    def is_server(self) -> bool:
        """Whether sockets may be bound with it."""
        return self.public == self.server

    def put_on_client(self, socket: zmq.Socket[bytes]) -> None:
        """Before it connects: only the daemon that has the secret of `server` is talked to."""
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)

    def put_on_server(self, socket: zmq.Socket[bytes], domain: str) -> None:
        """Before it binds: whoever connects is asked for a key. domain: whom the handler of ZAP is asked for.

        Without ENFORCE_DOMAIN everybody who knows the public key gets in while no handler runs (measured).
        """
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def load_keys(folder: Path) -> Keys:
    """The keys of a daemon's folder, or of a client's.

    Raises: ConfigError for a file that is missing, that others can read, or that holds no key.
    """
    if not zmq.has("curve"):
        raise ConfigError("this build of pyzmq has no encryption (CURVE): install the wheel from PyPI")
    if (folder / CLIENT_KEY).exists():
        public, secret = read_pair(folder / CLIENT_KEY)
        return Keys(public, secret, read_public(folder / SERVER_PUBLIC))
    if not (folder / SERVER_KEY).exists():
        raise ConfigError(
            f"{folder}: expected {SERVER_KEY} (of a daemon), or {CLIENT_KEY} and {SERVER_PUBLIC} (of a client); "
            "`taesd-stream keys new NAME` on the daemon's host makes them"
        )
    public, secret = read_pair(folder / SERVER_KEY)
    return Keys(public, secret, public)


def read_pair(file: Path) -> tuple[bytes, bytes]:
    """Public and secret key of a file that nobody else may read. Raises: ConfigError."""
    rows = _read(file)
    if mode := open_to_others(file):
        raise ConfigError(f"{file}: others can read this secret (mode {mode:03o} for them): chmod 600 {file}")
    secret = rows.get(b"secret")
    if secret is None or zmq.curve_public(secret) != rows.get(b"public"):
        raise ConfigError(f"{file}: expected a pair of keys, a public-key and its secret-key")
    return rows[b"public"], secret


def read_public(file: Path) -> bytes:
    """The public key in a file. Raises: ConfigError."""
    public = _read(file).get(b"public")
    if public is None:
        raise ConfigError(f"{file}: expected a public-key of 40 characters")
    return public


def open_to_others(file: Path) -> int:
    """Bits of a secret's mode that it must not have; 0 is well. Raises: OSError.

    What root gives us by our group, as Kubernetes does, is no one else's.
    """
    if os.name != "posix":
        return 0
    facts = file.stat()
    is_given = facts.st_uid == 0 and os.geteuid() != 0
    return facts.st_mode & (0o037 if is_given else 0o077)


def _read(file: Path) -> dict[bytes, bytes]:
    try:
        return dict(_ROW.findall(file.read_bytes()))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
