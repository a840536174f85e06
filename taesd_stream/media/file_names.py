"""Names of recordings' files, from a template: whatever a stream is called, a name stays inside the folder."""

from __future__ import annotations

import re
import string
from datetime import datetime
from typing import Final

DEFAULT_NAME: Final = "{stream}/{started:%Y%m%d-%H%M%S}-{run:.6}"
MAKING_SUFFIX: Final = ".making"  # behind the name of a file that a command makes: NAME.mp4.part may be a recording
FIELDS: Final = ("stream", "run", "started")
MAX_PARTS: Final = 8  # a stream's name has up to 4
_MAX_CHARACTERS: Final = 120  # of a part; file systems take 255 bytes, and `-2.mp4.part-finish` may come behind
_STRANGE: Final = re.compile(r"[^A-Za-z0-9._~=+@,() -]")
_DEVICES: Final = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)")  # no file of Windows can be called so
_OURS: Final = (".mp4", ".part")  # endings of files, which a folder must not have


def check_template(template: str) -> str:
    """Return a template that `file_name` can fill. Raises: ValueError saying what is wrong with it."""
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        unknown = [field for field in fields if field not in FIELDS]
        if unknown:
            raise ValueError(f"expected {{stream}}, {{run}} and {{started}} with formats, got {{{unknown[0]}}}")
        name = file_name(template, stream="a/b/c/d", run="0123456789abcdef", started=1e9)
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"no template of a file's name: {error}") from error
    if name.count("/") >= MAX_PARTS:
        raise ValueError(f"expected at most {MAX_PARTS} parts joined by /")
    return template


def file_name(template: str, *, stream: str, run: str, started: float) -> str:
    """A path relative to the recordings' folder, parts joined by `/`, without a suffix.

    started: time.time(). No part is empty, hidden, a step up, or anything but a plain name on every system.
    """
    text = template.format(stream=stream, run=run, started=datetime.fromtimestamp(started).astimezone())
    *folders, last = [_plain(part) for part in text.replace("\\", "/").split("/") if part] or ["_"]
    return "/".join([*(f"{part}_" if part.lower().endswith(_OURS) else part for part in folders), last])


def _plain(part: str) -> str:
    plain = _STRANGE.sub("-", part)[:_MAX_CHARACTERS].strip(" ").lstrip(".").rstrip(". ")
    return f"_{plain}" if not plain or _DEVICES.match(plain) else plain
