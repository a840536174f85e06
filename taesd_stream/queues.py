"""Hand-overs between two threads, each bounded and named for what it drops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition
from typing import Generic, TypeVar

T = TypeVar("T")


class ByteBoundedQueue(Generic[T]):
    """FIFO bounded by bytes: `put` says no when full, and the owner decides what that means (no ack, no credit)."""

    def __init__(self, max_bytes: int, size_of: Callable[[T], int]) -> None:
        self._items: deque[T] = deque()
        self._changed = Condition()
        self._size_of = size_of
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def put(self, item: T) -> bool:
        """Append, or return False when that would pass the bound. An empty queue takes any item."""
        size = self._size_of(item)
        with self._changed:
            if self._items and self.held_bytes + size > self._max_bytes:
                return False
            self._items.append(item)
            self.held_bytes += size
            self._changed.notify()
            return True

    def put_newest(self, item: T) -> None:
        """Append it, full or not. Of its class at most two wait: the oldest, which keeps its turn, and this one."""
        with self._changed:
            same = [other for other in self._items if type(other) is type(item)][1:]
            self._items = deque(other for other in self._items if not any(other is one for one in same))
            self._items.append(item)
            self.held_bytes += self._size_of(item) - sum(map(self._size_of, same))
            self._changed.notify()

    def get(self, timeout_s: float) -> T | None:
        """Return the oldest item, or None once timeout_s has passed."""
        with self._changed:
            if not self._changed.wait_for(self._items.__len__, timeout_s):
                return None
            item = self._items.popleft()
            self.held_bytes -= self._size_of(item)
            return item

    def take_all(self, takes: Callable[[T], bool]) -> list[T]:
        """Out of their turn, the items that `takes` says yes to, in their order."""
        with self._changed:
            taken = [item for item in self._items if takes(item)]
            self._items = deque(item for item in self._items if not takes(item))
            self.held_bytes -= sum(map(self._size_of, taken))
            return taken

    def __len__(self) -> int:
        return len(self._items)
