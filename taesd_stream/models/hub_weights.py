"""Weights on the Hugging Face hub: where each decoder's are, which of them are cached here, and how to fetch them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from taesd_stream.errors import UnreachableError, WeightsError
from taesd_stream.latent_formats import LATENT_FORMATS, TINY_DECODERS, latent_format

_SHA256_DIGITS: Final = 64  # of a large file the hub's etag is the content's own hash
_SHA1_DIGITS: Final = 40  # of a small one it is git's hash of a blob


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository on the hub."""

    repo_id: str
    name: str

    def __str__(self) -> str:
        return f"{self.repo_id}/{self.name}"


def hub_cache() -> Path:
    """The Hugging Face cache, where diffusers has its files too; it may not exist.

    From the environment at each call, as huggingface_hub reads it when it is imported.
    """
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def hub_files(decoder_id: str, part: Literal["decoder", "encoder"] = "decoder") -> list[HubFile]:
    """Where the hub has a decoder's weights, the author's own first; empty where it has none."""
    facts = TINY_DECODERS[decoder_id]
    other = "encoder" if part == "decoder" else "decoder"
    own = [HubFile(facts.hub_id, name) for name in facts.hub_files if facts.hub_id and f"_{other}." not in name]
    return own + [HubFile(repo_id, name) for repo_id, name in facts.mirrors]


def cached_weights(decoder_id: str, part: Literal["decoder", "encoder"] = "decoder") -> Path | None:
    """The weights in the Hugging Face cache of this user, None if nothing has fetched them yet. No network."""
    folder = hub_cache()
    if not folder.is_dir():
        return None  # and no import of the library, which takes its time
    from huggingface_hub import try_to_load_from_cache

    for file in hub_files(decoder_id, part):
        path = try_to_load_from_cache(file.repo_id, file.name, cache_dir=folder)
        if isinstance(path, str):  # else None, or a mark that the hub has no such file
            return Path(path)
    return None


def decoder_named(name: str) -> str:
    """The decoder of a latent format, or the decoder itself by its own name.

    Raises: ValueError naming the nearest known formats; WeightsError for a format without a decoder.
    """
    if name in TINY_DECODERS and name not in LATENT_FORMATS:
        return name
    decoder = latent_format(name).decoder
    if decoder is None:
        raise WeightsError(f"{name}: no tiny decoder is published for it")
    return decoder


def fetch_weights(decoder_id: str) -> tuple[HubFile, Path]:
    """Download a decoder's weights into the Hugging Face cache, with a progress bar, and check their hash.

    Raises: WeightsError where the hub has none, or sends others than it says; UnreachableError without a network.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    facts, failures = TINY_DECODERS[decoder_id], []
    for file in hub_files(decoder_id):
        expected, reason = _ask_hash(file)
        if expected is None:  # the next place may have it
            failures.append(f"{file}: {reason}")
            continue
        try:
            path = Path(hf_hub_download(file.repo_id, file.name, cache_dir=hub_cache()))
        except LocalEntryNotFoundError as error:
            raise UnreachableError(f"{file}: the hub cannot be reached any more: {_first_line(error)}") from error
        check_download(path, expected, file)
        return file, path
    way = f"get {facts.files[0]} from {facts.source} and put it into weights.folder"
    why = "; ".join(failures) if failures else "the Hugging Face hub is not known to have it"
    raise WeightsError(f"{decoder_id}: {why}; {way}")


def check_download(path: Path, expected: str, file: HubFile) -> None:
    """Compare a file of the cache with the hash that the hub gave for it; one that differs is removed.

    Raises: WeightsError with both hashes.
    """
    content = path.read_bytes()
    if len(expected) == _SHA256_DIGITS:
        kind, given = "sha256", hashlib.sha256(content).hexdigest()
    elif len(expected) == _SHA1_DIGITS:
        blob = b"blob %d\0" % len(content) + content
        kind, given = "git sha1", hashlib.sha1(blob, usedforsecurity=False).hexdigest()
    else:
        raise WeightsError(f"{file}: expected a sha256 or git's sha1 from the hub, got {expected[:80]!r}")
    if given != expected:
        path.resolve().unlink()  # the blob; the cache's entry links to it
        path.unlink(missing_ok=True)
        raise WeightsError(f"{file}: expected {kind} {expected}, got {given}; the download was removed, try again")


def _ask_hash(file: HubFile) -> tuple[str | None, str]:
    """The hub's hash of a file, or None and the reason. Raises: UnreachableError where no hub answers."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return get_hf_file_metadata(hf_hub_url(file.repo_id, file.name)).etag or "", ""
    except HfHubHTTPError as error:
        return None, _first_line(error)
    except Exception as error:  # the transport's errors have no base of their own that all its versions share
        raise UnreachableError(f"{file}: the hub cannot be reached: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def all_decoders() -> Iterator[tuple[str, list[str]]]:
    """Every decoder with the latent formats that it shows."""
    for decoder_id in TINY_DECODERS:
        yield decoder_id, [name for name, known in LATENT_FORMATS.items() if known.decoder == decoder_id]
