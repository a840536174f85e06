"""JSON without the numbers that are none: a browser cannot read them, and what came in may go on to one."""

from __future__ import annotations

import json
import math
from typing import Any


def parse(text: str | bytes) -> Any:
    """Raises: ValueError for what is no JSON, or has NaN, an infinity, or a number too large; RecursionError."""
    return json.loads(text, parse_float=_finite, parse_constant=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value
