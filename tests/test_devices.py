"""Which device decodes, and in words why; on a GPU never more than a share of what its sampler left."""

from __future__ import annotations

import pytest
import torch

from taesd_stream.errors import ConfigError
from taesd_stream_workers.worker.devices import SHARE, busy_reason, choose_device, no_gpu_reason, share_of


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_auto_takes_the_processor_and_says_why() -> None:
    """The reason is that torch has no CUDA, or that it sees no device."""
    device, reason = choose_device("auto", 4 << 30)
    assert device.type == "cpu"
    expected = "no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
    assert reason == no_gpu_reason() == expected


def test_a_named_device_is_taken_as_it_is() -> None:
    """The processor by name, whatever else is here."""
    assert choose_device("cpu", 0) == (torch.device("cpu"), "as decoder.device says")


@pytest.mark.parametrize("name", ["cuda:99", "toaster"])
def test_a_named_device_that_is_not_here_is_refused(name: str) -> None:
    """The error names the key, what came, and the way out."""
    with pytest.raises(ConfigError, match=rf"decoder.device = {name}: .*; auto takes what is here"):
        choose_device(name, 0)


def test_a_busy_gpu_is_named_with_both_numbers() -> None:
    """How much is free, and how much should be."""
    assert busy_reason(3 << 30, 4 << 30) == "the GPU has 3072 MiB free, under decoder.min_free_bytes = 4096 MiB"


def test_the_share_is_of_what_is_free() -> None:
    """Half of what the sampler left, as a part of the whole card; never more than the card."""
    assert share_of(10 << 30, 80 << 30) == SHARE * 10 / 80
    assert share_of(0, 80 << 30) == 0.0
    assert share_of(200 << 30, 80 << 30) == 1.0


def test_a_gpu_that_takes_no_other_program_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full one has no room for a context, an exclusive one takes none: the processor decodes, and it is said."""

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    device, reason = choose_device("auto", 0)
    assert (device.type, reason) == ("cpu", "the GPU takes no other program: CUDA error: out of memory")


@pytest.mark.gpu
def test_a_gpu_is_capped_at_its_share() -> None:
    """Past the cap our own allocation fails, though the card has more."""
    torch.cuda.empty_cache()  # what an earlier test left there would be given again, whatever the cap
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    device, reason = choose_device("auto", 0)
    try:
        assert device.type == "cuda"
        assert "at most" in reason
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(0.8 * free_bytes), dtype=torch.uint8, device=device)
        torch.empty(int(0.2 * free_bytes), dtype=torch.uint8, device=device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert share_of(free_bytes, total_bytes) < 1


@pytest.mark.gpu
def test_a_gpu_with_too_little_free_is_left_alone() -> None:
    """Where less is free than decoder.min_free_bytes the processor decodes, and the reason says it."""
    device, reason = choose_device("auto", 1 << 60)
    assert device.type == "cpu"
    assert "under decoder.min_free_bytes" in reason
