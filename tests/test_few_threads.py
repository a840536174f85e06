"""Few threads: as many as the pictures are large, and the program's own number afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from taesd_stream.decoding.choice import open_engine
from taesd_stream.decoding.few_threads import be_guest, few_threads

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def six_threads() -> Iterator[None]:
    """Torch has six threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("side_px", "threads"), [(64, 1), (512, 1), (724, 1), (725, 2), (1024, 4), (2048, 6)], ids=str)
def test_threads_grow_with_the_pictures(side_px: int, threads: int) -> None:
    """One up to 512x512, one more for each so many pixels, never more than there are; then as before."""
    with few_threads(CPU, side_px * side_px):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 6


def test_a_guest_sets_nothing() -> None:
    """In a sampler's process a thread that begins meanwhile would keep the number; other threads are none."""

    def guest() -> int:
        be_guest()
        with few_threads(CPU, 1):
            return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        own = pool.submit(torch.get_num_threads).result()
        assert pool.submit(guest).result() == own > 1
    with few_threads(CPU, 1):
        assert torch.get_num_threads() == 1


def test_an_error_leaves_the_number_as_it_was() -> None:
    """Also what fails gives the threads back."""
    with pytest.raises(RuntimeError, match="on purpose"), few_threads(CPU, 1):
        raise RuntimeError("on purpose")
    assert torch.get_num_threads() == 6


def test_a_gpu_is_none_of_its_business() -> None:
    """Pictures on a GPU change nothing."""
    with few_threads(torch.device("cuda"), 1):
        assert torch.get_num_threads() == 6


def test_a_processor_decodes_what_its_caches_hold() -> None:
    """Of 512x512 each slice has one picture, of 256x256 four; together they are what each alone would be."""
    engine = open_engine("sd1", weights_folder=None, choice="linear")
    for cells, expected in ((64, [1, 1, 1]), (32, [4, 1])):
        latents = torch.randn(sum(expected), 4, cells, cells)
        parts = list(engine.decode_planes(latents, budget_bytes=1 << 30))
        assert [len(planes) for _, planes in parts] == expected
        alone = [next(engine.decode_planes(one[None], budget_bytes=1 << 30))[1] for one in latents]
        assert torch.equal(torch.cat([planes for _, planes in parts]), torch.cat(alone))
    assert torch.get_num_threads() == 6
