"""Memory shared with encoders: what is put there stays as it is until it is given back, and all of it is used again."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taesd_stream_workers.worker.encode_processes import EncodeProcesses
from taesd_stream_workers.worker.shared_planes import ALIGNMENT, SharedPlanes, shared_bytes

pytestmark = pytest.mark.skipif(
    not EncodeProcesses.are_possible(), reason="this system shares no memory without a name"
)
PIECES = 6  # held at once
MOST_AT_ONCE = 9 * ALIGNMENT
NBYTES = 128 * ALIGNMENT  # with five pieces in the worst places, a hole is left for a sixth


@pytest.fixture
def planes() -> Iterator[SharedPlanes]:
    """Memory of a few pieces."""
    memory = SharedPlanes(NBYTES)
    yield memory
    memory.close()


@given(st.lists(st.tuples(st.integers(1, MOST_AT_ONCE), st.integers(0, PIECES - 1)), max_size=60))
def test_pieces_never_overlap(steps: list[tuple[int, int]]) -> None:
    """Pieces of any size, given back in any order: each holds its bytes all the time, and at the end all is one."""
    memory = SharedPlanes(NBYTES)
    seen = shared_bytes(memory.fd, NBYTES)
    held: list[tuple[int, int, int]] = []

    def give_back(which: int) -> None:
        first, length, word = held.pop(which)
        assert (seen[first : first + length] == word).all()
        memory.give_back(first, length)

    for number, (nbytes, which) in enumerate(steps):
        if len(held) == PIECES:
            give_back(which)
        held.append((memory.put(np.full(nbytes, number, np.uint8)), nbytes, number))
    while held:
        give_back(len(held) // 2)
    assert memory._free == [(0, NBYTES)]
    memory.close()


def test_who_finds_no_room_waits_for_it(planes: SharedPlanes) -> None:
    """Another piece goes where one was given back, not before."""
    first = planes.put(np.zeros(NBYTES - ALIGNMENT, np.uint8))
    places: list[int] = []
    words = np.ones(2 * ALIGNMENT, np.uint8)
    waiter = threading.Thread(target=lambda: places.append(planes.put(words)), daemon=True)
    waiter.start()
    waiter.join(0.1)
    assert not places
    planes.give_back(first, NBYTES - ALIGNMENT)
    waiter.join(20)
    assert places == [0]


def test_what_would_never_fit_is_refused(planes: SharedPlanes) -> None:
    """Waiting would be in vain."""
    with pytest.raises(ValueError, match=f"{NBYTES + 1} bytes, over the {NBYTES}"):
        planes.put(np.zeros(NBYTES + 1, np.uint8))
