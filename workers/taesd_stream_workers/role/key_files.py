"""A daemon's keys as files: its own pair, and one public key for each client that may connect.

`server.key` is the daemon's pair, `server.pub` its public part. `samplers/NAME.pub` may publish, `workers/NAME.pub` may
decode: these files are the allow-list. `issued/NAME/` is a new client's folder until somebody takes it to its host.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import zmq

from taesd_stream.errors import ConfigError
from taesd_stream.keys import CLIENT_KEY, SERVER_KEY, SERVER_PUBLIC, load_keys, read_public

logger = logging.getLogger(__name__)

Purpose = Literal["samplers", "workers"]
PURPOSES: Final[tuple[Purpose, ...]] = ("samplers", "workers")
LOOK_S: Final = 0.5  # how soon a key that was revoked is noticed
LOOK_AT_STRANGER_S: Final = 0.05  # a key that is not known may have been made just now
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SUFFIX: Final = ".pub"


@dataclass(frozen=True, slots=True)
class Client:
    """One key of the allow-list."""

    name: str
    purpose: Purpose
    public: bytes
    made_unix: float


def make_client(folder: Path, name: str, purpose: Purpose) -> Path:
    """Make a client's pair, allow it, and, the first time, make the daemon's own.

    Returns: the folder that the client needs. Raises: ConfigError for a name that is none, or is in use, and for a
    folder that cannot be written.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{name}: cannot name a key: up to 64 letters, digits, '.', '_', '-'")
    taken = next((client for client in clients_in(folder) if client.name == name), None)
    if taken is not None:
        raise ConfigError(f"{name}: there is such a key already: `taesd-stream keys revoke {name}` first")
    with _named_faults(folder, "written"):
        return _make_files(folder, name, purpose)


@contextmanager
def _named_faults(folder: Path, what: str) -> Iterator[None]:
    """Of a folder that is a file, lies on a disk for reading only, or on a full one. Raises: ConfigError."""
    try:
        yield
    except OSError as error:
        fault = f"{error.filename or folder}: {error.strerror or error}"
        way_out = "name another folder with --set security.keys_folder=DIR"
        raise ConfigError(f"keys cannot be {what}: {fault}; {way_out}") from error


def _make_files(folder: Path, name: str, purpose: Purpose) -> Path:
    for part in (folder, *(folder / purpose for purpose in PURPOSES), folder / "issued"):
        part.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (folder / SERVER_KEY).exists():
        public, secret = zmq.curve_keypair()
        _write(folder / SERVER_KEY, "this daemon: secret, never leaves this folder", public, secret)
        _write(folder / SERVER_PUBLIC, "this daemon: public", public)
    server = load_keys(folder).server
    issued = folder / "issued" / name
    shutil.rmtree(issued, ignore_errors=True)
    issued.mkdir(mode=0o700)
    public, secret = zmq.curve_keypair()
    _write(issued / SERVER_PUBLIC, "the daemon: public", server)
    _write(issued / CLIENT_KEY, f"{name}: secret", public, secret)
    _write(folder / purpose / f"{name}{_SUFFIX}", f"{name}: public, of {purpose}", public)
    return issued


def revoke(folder: Path, name: str) -> None:
    """Allow this client no longer; a running daemon notices within a second. Raises: ConfigError when there is none."""
    found = [file for _, file in _files_in(folder) if file.stem == name]  # unread: another file may be broken
    if not found:
        raise ConfigError(f"{name}: there is no such key in {folder}; `taesd-stream keys list` shows them")
    with _named_faults(folder, "revoked"):
        for file in found:
            file.unlink(missing_ok=True)
    shutil.rmtree(folder / "issued" / name, ignore_errors=True)


def clients_in(folder: Path) -> list[Client]:
    """The allow-list, by purpose and name. Raises: ConfigError for a file without a key, or that others may change."""
    return [_read_client(purpose, file) for purpose, file in _files_in(folder)]


def _files_in(folder: Path) -> list[tuple[Purpose, Path]]:
    with _named_faults(folder, "read"):
        return [(purpose, file) for purpose in PURPOSES for file in sorted((folder / purpose).glob(f"*{_SUFFIX}"))]


def _read_client(purpose: Purpose, file: Path) -> Client:
    refuse_foreign_hands(file)
    return Client(file.stem, purpose, read_public(file), file.stat().st_mtime)


def refuse_foreign_hands(path: Path) -> None:
    """Raises: ConfigError where others than its owner could write: they could allow themselves.

    What is mounted for reading only nobody can write here, whatever its mode: Kubernetes' volumes have 0777.
    """
    is_open = os.name == "posix" and bool(path.stat().st_mode & 0o022)
    if is_open and not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise ConfigError(f"{path}: others can write there: chmod go-w {path}")


def _write(file: Path, what: str, public: bytes, secret: bytes | None = None) -> None:
    """A new file that nobody else can read, not even for the moment in which it is made."""
    rows = [f"#   taesd-stream key of {what}", f"#   made {time.strftime('%Y-%m-%d %H:%M:%S %z')}", "metadata", "curve"]
    rows.append(f'    public-key = "{public.decode()}"')
    if secret is not None:
        rows.append(f'    secret-key = "{secret.decode()}"')
    mode = 0o600 if secret is not None else 0o644
    with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w") as out:
        out.write("\n".join(rows) + "\n")


class AllowList:
    """Names by public key, as the files say them now. One thread's."""

    def __init__(self, folder: Path) -> None:
        """Raises: ConfigError where others may write, or a file has no key."""
        for part in (folder, *(folder / purpose for purpose in PURPOSES)):
            if part.is_dir():
                refuse_foreign_hands(part)
        self._folder = folder
        self._names = {(client.purpose, client.public): client.name for client in clients_in(folder)}
        self._looked_s = time.monotonic()
        self._looked_for_stranger_s = -math.inf
        self._fault: str | None = None

    def name_of(self, purpose: Purpose, public: bytes) -> str | None:
        """Whose key it is, None when it is not allowed (any more)."""
        return self._names.get((purpose, public))

    def look(self) -> None:
        """Read the files again if that was not done for LOOK_S."""
        if time.monotonic() >= self._looked_s + LOOK_S:
            self.read()

    def look_for_stranger(self) -> None:
        """Read the files, unless it was done for another stranger just before: they must not keep the disk busy."""
        now = time.monotonic()
        if now >= self._looked_for_stranger_s + LOOK_AT_STRANGER_S:
            self._looked_for_stranger_s = now
            self.read()

    def read(self) -> None:
        """Read the files; one that cannot be read allows nobody."""
        self._looked_s = time.monotonic()
        names: dict[tuple[Purpose, bytes], str] = {}
        fault: str | None = None
        for purpose, file in _files_in(self._folder):
            try:
                client = _read_client(purpose, file)
                names[purpose, client.public] = client.name
            except (ConfigError, OSError) as error:
                fault = str(error)
        if fault is not None and fault != self._fault:
            logger.error("key_file_bad %s", fault)
        self._names, self._fault = names, fault
