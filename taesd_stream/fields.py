"""What one field of a message may hold: a check that gives the value, or a WireError that says what was expected."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from taesd_stream.errors import WireError
from taesd_stream.frames import NAME_RULE, is_run_id, is_stream_name

MAX_DEPTH: Final = 8  # of what people say about a run; a page has no use for more
MAX_NUMBER: Final = 1e30

_QUOTES: Final = reprlib.Repr()
_QUOTES.maxlevel, _QUOTES.maxstring, _QUOTES.maxother = 2, 120, 120


@dataclass(frozen=True, slots=True)
class Check:
    """Takes a value from outside. says: what it must be, for errors and for docs/wire.md."""

    says: str
    take: Callable[[Any], Any]

    def __call__(self, value: Any) -> Any:
        return self.take(value)


def wrong(says: str, value: Any) -> WireError:
    """The error for a value that is not what it must be; of the value only the beginning is quoted."""
    return WireError(f"expected {says}, got {quoted(value)}")


def quoted(value: Any, limit: int = 60) -> str:
    """The beginning of a value from outside, which may be nested deeper than repr() can follow."""
    return _QUOTES.repr(value)[:limit]


def as_utf8(value: str) -> str:
    """A text as UTF-8 takes it: of a command line, or of half an emoji, there may be single surrogates."""
    return value.encode("utf-8", "replace").decode()


def _power(limit: int) -> str:
    is_power = limit > 4096 and limit & (limit - 1) == 0
    return f"2^{limit.bit_length() - 1}" if is_power else str(limit)


def integer(low: int, high: int) -> Check:
    """A whole number from low to high; true and 1.0 are none."""
    shown_low = f"-{_power(-low)}" if low < 0 else _power(low)
    says = f"an integer from {shown_low} to {_power(high)}"

    def take(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise wrong(says, value)
        return value

    return Check(says, take)


def number(low: float = -MAX_NUMBER, high: float = MAX_NUMBER) -> Check:
    """A finite number from low to high."""
    says = f"a number from {low:g} to {high:g}"

    def take(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:  # NaN fails too
            raise wrong(says, value)
        return float(value)

    return Check(says, take)


def text(max_chars: int) -> Check:
    """Text of bounded length."""
    says = f"text of at most {max_chars} characters"

    def take(value: Any) -> str:
        if not isinstance(value, str) or len(value) > max_chars:
            raise wrong(says, value)
        return value

    return Check(says, take)


def choice(choices: Sequence[str]) -> Check:
    """One word of a closed set."""
    says = f"one of {', '.join(choices)}"

    def take(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise wrong(says, value)
        return value

    return Check(says, take)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(BOOLEAN.says, value)
    return value


def _stream(value: Any) -> str:
    if not isinstance(value, str) or not is_stream_name(value):
        raise wrong(f"{STREAM.says} ({NAME_RULE})", value)
    return value


def _run(value: Any) -> str:
    if not isinstance(value, str) or not is_run_id(value):
        raise wrong(RUN.says, value)
    return value


BOOLEAN: Final = Check("true or false", _boolean)
STREAM: Final = Check("a stream name", _stream)
RUN: Final = Check("a run of 16 hex digits", _run)
ANY: Final = Check("anything", lambda value: value)


def optional(check: Check) -> Check:
    """That, or null."""
    return Check(f"{check.says}, or null", lambda value: None if value is None else check(value))


def sequence(check: Check, max_items: int, min_items: int = 0) -> Check:
    """A list; a tuple comes out."""
    says = f"a list of {f'{min_items} to' if min_items else 'at most'} {_power(max_items)} items, each {check.says}"

    def take(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise wrong(says, value)
        if not min_items <= len(value) <= max_items:
            raise WireError(f"expected {says}, got {len(value)} items")
        return tuple(map(check.take, value))

    return Check(says, take)


def as_list(check: Check) -> Check:
    """The same check, but a list comes out."""
    return Check(check.says, lambda value: list(check(value)))


def mapping(check_key: Check, check_value: Check, max_items: int) -> Check:
    """A map of bounded size."""
    says = f"a map of at most {_power(max_items)} entries, from {check_key.says} to {check_value.says}"

    def take(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise wrong(says, value)
        if len(value) > max_items:
            raise WireError(f"expected {says}, got {len(value)} entries")
        return {check_key(key): check_value(item) for key, item in value.items()}

    return Check(says, take)


def is_plain(value: Any, depth: int = MAX_DEPTH) -> bool:
    """Whether JSON can hold it (no bytes, no NaN, only text as keys), so that a browser can be told."""
    if value is None or isinstance(value, str | bool | int):
        return True
    if isinstance(value, float):
        return math.isfinite(value)
    if depth == 0:
        return False
    if isinstance(value, list):
        return all(is_plain(item, depth - 1) for item in value)
    return isinstance(value, dict) and all(
        isinstance(key, str) and is_plain(item, depth - 1) for key, item in value.items()
    )


def _plain(value: Any) -> Any:
    if not is_plain(value):
        raise wrong(PLAIN.says, value)
    return value


PLAIN: Final = Check(f"what JSON can hold (nested at most {MAX_DEPTH} deep)", _plain)
