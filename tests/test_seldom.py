"""Failures that come again and again."""

from __future__ import annotations

from taesd_stream_workers.role.seldom import MAX_SAID, SAY_AGAIN_S, Seldom


def test_each_text_is_said_once_a_minute_and_of_many_not_each() -> None:
    """Whatever fails, and however often, a minute brings no more than a few lines."""
    now_s = 100.0
    seldom = Seldom(clock_s=lambda: now_s)
    assert [seldom.may_say(text) for text in "aabba"] == [True, False, True, False, False]
    assert sum(seldom.may_say(f"packet {number}") for number in range(1000)) == MAX_SAID - 2
    now_s += SAY_AGAIN_S
    assert [seldom.may_say(text) for text in "aab"] == [True, False, True]
