"""Which of several daemons has a stream: the first by a hash of its name, and the next one where that is gone."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Sequence
from typing import Final, TypeAlias

from taesd_stream.wire import DEFAULT_ADDRESS

ADDRESS_VARIABLE: Final = "TAESD_STREAM_ADDRESS"
AVOID_S: Final = 30.0  # one that a publisher of this process found gone is nobody's first choice for so long

Addresses: TypeAlias = str | Sequence[str]

_COMMA = re.compile(r"\s*,\s*(?=[a-z]+://)|\s*,\s*$")  # a socket file's name may have commas of its own
_left_s: Final[dict[str, float]] = {}  # when an address was left, by whichever publisher of this process


def addresses_of(address: Addresses | None) -> tuple[str, ...]:
    """The brokers' addresses, each once: of one text, where commas part several, or of a sequence of such texts.

    address: None or "" stands for $TAESD_STREAM_ADDRESS, else for the daemon's default.
    Raises: ValueError for what is neither, or holds none.
    """
    if address is None or address == "":
        address = os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    given = [address] if isinstance(address, str) else address
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise ValueError(f"address: expected one such as {DEFAULT_ADDRESS}, or a sequence of them, got {address!r}")
    found = dict.fromkeys(part for one in given for part in _COMMA.split(one.strip()) if part)
    if not found:
        raise ValueError(f"address: expected at least one such as {DEFAULT_ADDRESS}, got {address!r}")
    return tuple(found)


def ranked(addresses: Sequence[str], stream: str) -> list[str]:
    """The addresses in a stream's own order, the same in every process: highest random weight first.

    Each address is the first of its fair share of names; one that goes moves only the streams that it had (Thaler and
    Ravishankar, Using name-based mappings to increase hit rates, IEEE/ACM Transactions on Networking 6(1), 1998).
    """
    return sorted(addresses, key=lambda address: (_weight(address, stream), address), reverse=True)


def _weight(address: str, stream: str) -> bytes:
    return hashlib.blake2b(f"{address}\0{stream}".encode(), digest_size=8).digest()


class Daemons:
    """The daemons that may have a stream, and which one has it. One publisher's side thread; `now` is monotonic."""

    def __init__(self, addresses: Sequence[str], stream: str, now: float) -> None:
        self.ranked = ranked(addresses, stream)
        self.current = self._choice(now)
        self._told: set[str] = set()  # those that were left since one answered

    @property
    def are_several(self) -> bool:
        """Whether there is another one to go to."""
        return len(self.ranked) > 1

    def has_fresh(self, now: float) -> bool:
        """Whether another one was not left lately."""
        return any(address != self.current and _is_fresh(address, now) for address in self.ranked)

    def leave(self, now: float) -> bool:
        """Go to the next one: of those that were not left lately the first, else the one that was left first.

        Returns: whether that is worth a word, once for each until one answers.
        """
        is_news = self.current not in self._told
        self._told.add(self.current)
        _left_s[self.current] = now
        self.current = self._choice(now)
        return is_news

    def answered(self) -> None:
        """The current one is there: it is as good a choice as any."""
        self._told.clear()
        _left_s.pop(self.current, None)

    def _choice(self, now: float) -> str:
        fresh = (address for address in self.ranked if _is_fresh(address, now))
        return next(fresh, None) or min(self.ranked, key=lambda address: _left_s.get(address, -math.inf))


def _is_fresh(address: str, now: float) -> bool:
    return now - _left_s.get(address, -math.inf) >= AVOID_S
