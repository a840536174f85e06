"""The byte-bounded queue: first in first out, within its bytes, between real threads."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.queues import ByteBoundedQueue


def queue(max_bytes: int = 10) -> ByteBoundedQueue[bytes]:
    """A queue of byte strings."""
    return ByteBoundedQueue(max_bytes, len)


def test_it_gives_back_in_order() -> None:
    """What was put first comes first."""
    one = queue()
    assert all(one.put(item) for item in (b"a", b"bb", b"ccc"))
    assert [one.get(0.0) for _ in range(3)] == [b"a", b"bb", b"ccc"]


def test_it_says_no_when_full_and_yes_again() -> None:
    """Past its bytes put() is False and takes nothing; once there is room it takes again."""
    one = queue()
    assert one.put(b"x" * 6)
    assert not one.put(b"x" * 5)
    assert (len(one), one.held_bytes) == (1, 6)
    assert one.put(b"x" * 4)
    one.get(0.0)
    assert one.put(b"x" * 6)


def test_an_empty_queue_takes_any_item() -> None:
    """An item larger than the bound is not stuck for ever: alone it passes."""
    one = queue()
    assert one.put(b"x" * 100)
    assert not one.put(b"")
    assert one.get(0.0) == b"x" * 100


def test_get_gives_none_when_nothing_comes() -> None:
    """An empty queue answers None once the time has passed."""
    assert queue().get(0.0) is None


def test_get_is_woken_by_put() -> None:
    """A thread that waits gets the item as soon as it is put, long before its time is over."""
    one = queue()
    got: list[bytes | None] = []
    thread = threading.Thread(target=lambda: got.append(one.get(600.0)))
    thread.start()
    one.put(b"a")
    thread.join(20)
    assert got == [b"a"]


@given(st.lists(st.one_of(st.binary(max_size=12), st.none()), max_size=60))
def test_the_bound_holds_and_nothing_is_lost(steps: list[bytes | None]) -> None:
    """Over any order of put and get (None): bytes stay within the bound, accepted items come out once, in order."""
    one = queue()
    accepted: list[bytes] = []
    came: list[bytes] = []
    for item in steps:
        if item is not None:
            accepted += [item] if one.put(item) else []
        elif (taken := one.get(0.0)) is not None:
            came.append(taken)
        held = accepted[len(came) :]
        assert (len(one), one.held_bytes) == (len(held), sum(map(len, held)))
        assert one.held_bytes <= 10 or len(one) == 1
    while (taken := one.get(0.0)) is not None:
        came.append(taken)
    assert came == accepted


def test_threads_lose_nothing() -> None:
    """Several threads put while one gets: each accepted item comes out exactly once."""
    one: ByteBoundedQueue[int] = ByteBoundedQueue(50, lambda _: 1)
    accepted: list[int] = []

    def put(first: int) -> None:
        accepted.extend(item for item in range(first, first + 500) if one.put(item))

    threads = [threading.Thread(target=put, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    came: list[int] = []
    while any(thread.is_alive() for thread in threads) or len(one):
        item = one.get(0.01)
        if item is not None:
            came.append(item)
    assert sorted(came) == sorted(accepted)
    assert one.held_bytes == 0


def test_of_a_class_the_oldest_and_the_newest_wait() -> None:
    """put_newest takes its item in any case; what came between is gone, and its bytes; the oldest keeps its turn."""
    one: ByteBoundedQueue[bytes | str] = ByteBoundedQueue(4, len)
    for text in ("a", "bb"):
        one.put_newest(text)
    assert one.put(b"x")
    for text in ("ccc", "dddd"):
        one.put_newest(text)
    assert (len(one), one.held_bytes) == (3, 6)
    assert [one.get(0.0) for _ in range(3)] == ["a", b"x", "dddd"]
    assert one.held_bytes == 0


def test_some_are_taken_out_of_their_turn() -> None:
    """take_all gives those that are asked for, in order; the others keep theirs, and there is room again."""
    one = queue()
    assert all(one.put(item) for item in (b"a", b"bbb", b"cc", b"ddd"))
    assert one.take_all(lambda item: len(item) == 3) == [b"bbb", b"ddd"]
    assert (len(one), one.held_bytes) == (2, 3)
    assert one.put(b"e" * 7)
    assert [one.get(0.0) for _ in range(3)] == [b"a", b"cc", b"e" * 7]
