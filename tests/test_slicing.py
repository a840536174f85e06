"""Slices of a batch: all of it, once, in order, within the budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.config import DecoderConfig
from taesd_stream.decoding.slicing import bytes_per_latent_px, decode_budget, slices
from taesd_stream.models import build_decoder


@given(st.integers(0, 200), st.integers(1, 10_000), st.integers(1, 100_000))
def test_slices_cover_the_batch_within_the_budget(count: int, item_bytes: int, budget_bytes: int) -> None:
    """Every item is in one slice, in order; none is over the budget unless it is one item; lengths differ by 1."""
    pieces = list(slices(count, item_bytes, budget_bytes))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert [index for piece in pieces for index in range(piece.start, piece.stop)] == list(range(count))
    assert all(length == 1 or length * item_bytes <= budget_bytes for length in lengths)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1


@pytest.mark.parametrize(
    ("most", "lengths"), [(16, [16]), (20, [16]), (8, [8, 8]), (7, [4] * 4), (3, [2] * 8), (0, [1] * 16)]
)
def test_slices_for_graphs_are_powers_of_two(most: int, lengths: list[int]) -> None:
    """What fits the budget is one slice; else all but the last are the largest power of two that does."""
    pieces = list(slices(16, 10, max(1, 10 * most), is_graphed=True))
    assert [piece.stop - piece.start for piece in pieces] == lengths


def test_a_budget_of_nothing_is_an_error() -> None:
    """No memory at all is the caller's mistake, and named."""
    with pytest.raises(ValueError, match="budget_bytes: expected above 0, got 0"):
        list(slices(1, 1, 0))


def test_the_budget_of_a_processor() -> None:
    """Left alone it is 1 GiB; else what was said."""
    cpu = torch.device("cpu")
    assert decode_budget(DecoderConfig(), cpu) == 1 << 30
    assert decode_budget(DecoderConfig(memory_bytes=100 << 20), cpu) == 100 << 20


@pytest.mark.gpu
def test_the_budget_of_a_gpu_follows_what_it_has_free() -> None:
    """An eighth of what is free, 1 to 4 GiB: where much of it is held it is less; else what was said."""
    gpu = torch.device("cuda")
    assert decode_budget(DecoderConfig(memory_bytes=100 << 20), gpu) == 100 << 20
    free_bytes, _ = torch.cuda.mem_get_info()
    for left_bytes in (free_bytes, min(12 << 30, free_bytes)):
        held = torch.empty(free_bytes - left_bytes, dtype=torch.uint8, device=gpu)
        expected = min(max(left_bytes // 8, 1 << 30), 4 << 30)
        assert abs(decode_budget(DecoderConfig(), gpu) - expected) < 64 << 20
        del held
    torch.cuda.empty_cache()


def test_memory_is_that_of_three_maps_at_full_size() -> None:
    """At its worst a TAESD decoder holds a block's input, a value and the next: three maps of 64 floats a pixel."""
    maps = 3 * 64 * 64  # maps x channels x pixels of a cell
    measured = bytes_per_latent_px(build_decoder("taesd"), 4)
    assert maps * 4 <= measured <= maps * 4 * 1.01  # and the latents
    assert bytes_per_latent_px(build_decoder("taesd"), 4, torch.float16) <= maps * 2 * 1.01
