"""What people asked to record: said again to a broker that was restarted, which knows it of runs with a log alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from taesd_stream.frames import END_REASONS, RecordMode
from taesd_stream.messages import Record, State

SETTLED_S: Final = 1.0  # a broker that still runs so long after it was told has heard it
MAX_WISHES: Final = 1000
KEPT_S: Final = 3600.0  # for a stream that is not there yet


@dataclass(slots=True)
class _Wish:
    mode: RecordMode
    asked_s: float
    said_s: float
    broker: object  # which one was told: its process, as STATE names it
    run: str | None = None  # that it holds for, once a broker has heard it


class RecordWishes:
    """Used in the web thread's event loop alone. A later wish for a stream replaces the one before."""

    def __init__(self, tell_broker: Callable[[Record], None], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._tell_broker = tell_broker
        self._clock_s = clock_s
        self._wishes: dict[str, _Wish] = {}

    def add(self, stream: str, mode: RecordMode, state: State | None) -> None:
        """A person pressed Record, or took it back. state: the broker's newest."""
        now_s = self._clock_s()
        self._wishes.pop(stream, None)
        self._wishes[stream] = _Wish(mode, now_s, now_s, _broker_of(state))
        while len(self._wishes) > MAX_WISHES:
            del self._wishes[next(iter(self._wishes))]
        self._tell_broker(Record(stream=stream, mode=mode))

    def on_state(self, state: State) -> None:
        """The broker's newest STATE: say again what another one was told, forget what is over."""
        now_s, broker = self._clock_s(), _broker_of(state)
        rows = {row["name"]: row for row in state.streams}
        for stream, wish in list(self._wishes.items()):
            row = rows.get(stream)
            is_alive = row is not None and row["state"] not in END_REASONS
            if row is not None and wish.run is not None and (row["run"] != wish.run or not is_alive):
                del self._wishes[stream]
            elif wish.broker != broker:
                wish.broker, wish.said_s = broker, now_s
                self._tell_broker(Record(stream=stream, mode=wish.mode))
            elif row is not None and is_alive and now_s - wish.said_s > SETTLED_S:
                wish.run = row["run"]
            elif wish.run is None and now_s - wish.asked_s > KEPT_S:
                del self._wishes[stream]


def _broker_of(state: State | None) -> object:
    return None if state is None else state.stats.get("pid")
