"""Finished recordings as pages are told them: to each what is new to it, some at a time, for there may be thousands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeAlias

MAX_TOLD: Final = 200  # of one message, about 140 KB: over a slow line pictures come between

Told: TypeAlias = Mapping[str, str]  # by id: a row as JSON


def with_daemon(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the daemon that it is of: a peer's says it, ours is none."""
    return {"daemon": None, **row}


@dataclass(frozen=True, slots=True)
class News:
    """What is said beside a state. fields: of its JSON object, each behind a comma; known: what is told by then."""

    fields: str
    known: Told
    is_more: bool


class FinishedRows:
    """In the web thread's loop. Pages that were told the same share what they know, and what they are told next."""

    def __init__(self) -> None:
        self._rows: dict[str, dict[str, Any]] = {}
        self._now: Told = {}
        self._last: tuple[Told | None, News] | None = None  # what was asked last, and the answer

    def take(self, rows: Iterable[dict[str, Any]]) -> None:
        """All rows, those that are told first in front."""
        by_id = {row["id"]: row for row in rows}
        if by_id != self._rows:
            before, texts = self._rows, self._now
            self._now = {
                one: texts[one] if before.get(one) == row else json.dumps(with_daemon(row))
                for one, row in by_id.items()
            }
            self._rows, self._last = by_id, None

    def news(self, known: Told | None) -> News:
        """What to tell a page that knows so much; None: nothing yet, not even how many there are."""
        if known is self._now:
            return News("", known, is_more=False)
        if self._last is None or known is not self._last[0]:
            self._last = known, self._since(known)
        return self._last[1]

    def _since(self, known: Told | None) -> News:
        before = known or {}
        changed = {one: text for one, text in self._now.items() if before.get(one) != text}
        told = dict(islice(changed.items(), MAX_TOLD))
        gone = [one for one in before if one not in self._now]
        fields = f', "recordings": [{", ".join(told.values())}]' if told or known is None else ""
        fields += f', "gone": {json.dumps(gone)}' if gone else ""
        if len(told) == len(changed):
            return News(fields, self._now, is_more=False)
        kept = {one: text for one, text in before.items() if one in self._now}
        return News(fields, kept | told, is_more=True)
