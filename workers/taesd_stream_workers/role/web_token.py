"""The token that guards the web address once others can reach it: a file that only its owner reads."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

import platformdirs

from taesd_stream.config import AUTO, Config
from taesd_stream.errors import ConfigError
from taesd_stream.keys import open_to_others
from taesd_stream_workers.role.addresses import is_loopback, web_address

MIN_CHARACTERS: Final = 16


def is_token_needed(config: Config) -> bool:
    """Whether others than this host's users can reach the page: by its address, or by a proxy in front of it."""
    return not is_loopback(web_address(config)[0]) or bool(config.web.hosts)


def token_file(config: Config) -> Path:
    """`web.token_file`, resolved."""
    if config.web.token_file != AUTO:
        return Path(config.web.token_file).expanduser()
    return platformdirs.user_state_path("taesd-stream") / "web-token"


def load_token(config: Config) -> str | None:
    """The token, made where there is none yet; None where none is needed.

    Raises: ConfigError for a file that others can read, that cannot be read or made, or whose token is too short.
    """
    if not is_token_needed(config):
        return None
    path, key = token_file(config), "web.token_file"
    try:
        _make_if_absent(path)
    except OSError as error:
        raise ConfigError(f"{key} = {path}: {error}; choose another with --set {key}=…") from error
    return _read(path, key, "delete it, and the next start makes a good one")


def peer_tokens(config: Config) -> list[str | None]:
    """The token of each peer, None for one that asks for none. Raises: ConfigError as `load_token`."""
    files = [Path(peer.token_file).expanduser() if peer.token_file else None for peer in config.peers]
    return [
        _read(file, f"peers.{number}.token_file", "copy it from the peer's host") if file else None
        for number, file in enumerate(files)
    ]


def page_link(config: Config, url: str) -> str:
    """The page's address as a person opens it first: with the token, where one is asked for. Raises: ConfigError."""
    token = load_token(config)
    return url if token is None else f"{url}/?token={token}"


def _make_if_absent(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    except OSError:
        path.unlink()  # an empty one would be refused when the disk has room again
        raise


def _read(path: Path, key: str, way_out: str) -> str:
    """The token in a file. key: that names it in the configuration. way_out: from a token that is none."""
    try:
        is_open, token = open_to_others(path), path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {path}: {error}; choose another file") from error
    if is_open:
        mode = stat.S_IMODE(path.stat().st_mode)
        raise ConfigError(f"{key} = {path}: others can read it (mode {mode:04o}): chmod 600 {path}")
    if len(token) < MIN_CHARACTERS or not token.isascii() or not token.isprintable():
        raise ConfigError(f"{key} = {path}: expected at least {MIN_CHARACTERS} letters and digits; {way_out}")
    return token
