"""Latent spaces that a user has fitted: a file a format, found by name where the table has none.

NAME.safetensors in `weights.folder` or in the user's own folder. Its metadata says channels, pixels a cell and rgb
factors; its tensors, if it has any, are a ShuffleProjection. `taesd-stream fit` writes them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import platformdirs
from safetensors import SafetensorError, safe_open

from taesd_stream.errors import ConfigError, WeightsError
from taesd_stream.latent_formats import LATENT_FORMATS, LatentFormat, latent_format

METADATA_KEY: Final = "taesd_stream.format"
MAX_CHANNELS: Final = 4096
MAX_FACTOR: Final = 256
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class UserFormat:
    """A fitted format and its file."""

    format: LatentFormat
    path: Path


def user_formats_folder() -> Path:
    """The user's own folder of formats, where every daemon of this user looks; it may not exist."""
    return platformdirs.user_data_path("taesd-stream", appauthor=False) / "formats"


def check_format_name(name: str) -> None:
    """Raises: ConfigError for a name that a new format cannot have: it is a file's, and what publishers say."""
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{name!r} cannot name a format: expected 1 to 64 letters, digits, '.', '_', '-'")


def find_user_format(name: str, weights_folder: Path | None = None) -> UserFormat | None:
    """The fitted format of that name, in the given folder, else in the user's own; None if neither has it.

    Names come from publishers: they are compared with the files that are there, and never become a path.
    Raises: WeightsError for a file of that name that says it is a format and is none that can be used.
    """
    found = (read_user_format(path) for path in format_files(name, weights_folder))
    return next(filter(None, found), None)


def format_files(name: str, weights_folder: Path | None = None) -> Iterator[Path]:
    """The files that may be a fitted format of that name, in order; as `find_user_format` compares them."""
    for folder in filter(None, (weights_folder, user_formats_folder())):
        yield from (path for path in sorted(folder.glob("*.safetensors")) if path.stem == name)


def known_format(name: str, weights_folder: Path | None = None) -> LatentFormat:
    """The format of that name, of the table or a user's own. Raises: ValueError naming the nearest; WeightsError."""
    fitted = None if name in LATENT_FORMATS else find_user_format(name, weights_folder)
    return latent_format(name) if fitted is None else fitted.format


def read_user_format(path: Path) -> UserFormat | None:
    """What a format file says; None for a file of something else. Raises: WeightsError for one that is broken."""
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if text is None:
        return None
    try:
        facts = json.loads(text)
        return UserFormat(_format_from(path.stem, facts), path)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path}: its metadata {METADATA_KEY} is no format: {error}") from error


def to_metadata(known: LatentFormat, notes: Mapping[str, Any]) -> dict[str, str]:
    """A format as the metadata of its file. notes: what people may want to know of the fit."""
    facts = {
        "channels": known.channels,
        "spatial_factor": known.spatial_factor,
        "rgb_factors": known.rgb_factors,
        "rgb_bias": known.rgb_bias,
        **notes,
    }
    return {METADATA_KEY: json.dumps(facts)}


def _format_from(name: str, facts: Any) -> LatentFormat:
    """Checked: the file may be anybody's."""
    channels, factor = facts["channels"], facts["spatial_factor"]
    if type(channels) is not int or not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"channels: expected 1 to {MAX_CHANNELS}, got {channels!r}")
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= MAX_FACTOR:
        raise ValueError(f"spatial_factor: expected 1 to {MAX_FACTOR} pixels a cell, got {factor!r}")
    rows = [_colour("rgb_factors", row) for row in facts["rgb_factors"]]
    if len(rows) != channels:
        raise ValueError(f"rgb_factors: expected {channels} rows, got {len(rows)}")
    bias = _colour("rgb_bias", facts["rgb_bias"])
    known = LATENT_FORMATS.get(name)
    if known is not None and (known.channels, known.spatial_factor) != (channels, factor):
        expected = f"{known.channels} channels, {known.spatial_factor} pixels a cell"
        raise ValueError(f"{name} has {expected}, the file says {channels} channels, {factor} pixels")
    return LatentFormat(
        name=name,
        channels=channels,
        spatial_factor=factor,
        normalisation="scale_shift",
        rgb_factors=tuple(rows),
        rgb_bias=bias,
        layouts=("spatial",),
    )


def _colour(key: str, values: Any) -> tuple[float, float, float]:
    if len(values) != 3 or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        raise ValueError(f"{key}: expected rows of 3 finite numbers, got {str(values)[:60]}")
    red, green, blue = (float(value) for value in values)
    return red, green, blue
