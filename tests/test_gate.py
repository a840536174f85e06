"""What a gate says of those whom it does not let in."""

from __future__ import annotations

import pytest

from taesd_stream.config import Config
from taesd_stream_workers.role.gate import MAX_SAID, Gate


def test_a_stranger_with_ever_new_keys_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Of 300 keys in a moment each is counted, and the first hundred are said."""
    gate = Gate(Config())
    for number in range(3 * MAX_SAID):
        gate.count("refused_key", number, f"key={number}")
    assert gate.counts["refused_key"] == 3 * MAX_SAID
    assert len(caplog.records) == MAX_SAID == 100
