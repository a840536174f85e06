"""configs/default.toml, made from taesd_stream/config.py. `python -m tests.config_document` writes it anew."""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any, Final

from pydantic.fields import FieldInfo

from taesd_stream.config import SECTIONS, TABLES

DEFAULT_TOML: Final = Path(__file__).parent.parent / "configs" / "default.toml"
_HEAD: Final = """\
Every setting of the daemon, at its default. A copy needs to hold only what is changed in it:
    taesd-stream up --config my.toml
Order: defaults < file < environment (TAESD_STREAM_WEB__BIND=127.0.0.1:9000) < --set web.bind=127.0.0.1:9000
Relative folders are taken from where the daemon is started; ~ is your home."""
_EXAMPLES: Final[dict[str, dict[str, Any]]] = {
    "rules": {"stream": "comfy/*", "record": "all", "batch": "each", "film": "off", "decoder": "linear"},
    "pushes": {"stream": "my-run", "url": "rtsp://127.0.0.1:8554/my-run"},
    "peers": {"url": "http://gpu-2:8765", "token_file": "~/.config/taesd-stream/gpu-2-token"},
}
_LIMITS: Final = {"ge": "at least", "gt": "over", "le": "at most", "lt": "under"}


def document() -> str:
    """The whole file."""
    parts = [_comment(_HEAD)]
    for name, section in SECTIONS.items():
        parts.append(f"\n\n{_comment(section.__doc__ or '')}\n[{name}]")
        parts += [f"\n{_comment(_meaning(field))}\n{key} = {_toml(field.default)}" for key, field in section_keys(name)]
    for name, table in TABLES.items():
        told = f"{_comment(table.__doc__ or '')}\n# There is none by itself; this would be one:"
        parts.append(f"\n\n{told}\n{table_example(name, '#')}")
    return "\n".join(parts) + "\n"


def table_example(name: str, prefix: str) -> str:
    """A rule, say, with every key, each explained before it; prefix: what each line begins with."""
    lines = [f"{prefix}[[{name}]]"]
    for key, field in TABLES[name].model_fields.items():
        lines += [_comment(field.description or ""), f"{prefix}{key} = {_toml(_EXAMPLES[name][key])}"]
    return "\n".join(lines)


def section_keys(name: str) -> list[tuple[str, FieldInfo]]:
    """The keys of a section in the order of the model."""
    return list(SECTIONS[name].model_fields.items())


def _meaning(field: FieldInfo) -> str:
    """The field's docstring, and the limits that its type checks."""
    limits = [
        f"{word} {_toml(getattr(limit, name))}"
        for limit in field.metadata
        for name, word in _LIMITS.items()
        if getattr(limit, name, None) is not None
    ]
    return " ".join([field.description or "", f"({', '.join(limits)})"] if limits else [field.description or ""])


def _comment(text: str) -> str:
    lines = [
        line
        for row in inspect.cleandoc(text).splitlines()
        for line in textwrap.wrap(row, 118, drop_whitespace=True) or [""]
    ]
    return "\n".join(f"# {line}".rstrip() for line in lines)


def _toml(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:_}" if isinstance(value, int) else repr(value)  # repr of a list or a float is TOML too


if __name__ == "__main__":
    DEFAULT_TOML.write_text(document(), encoding="utf-8")
