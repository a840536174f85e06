"""Tiles: the whole network's result, value for value, within the memory that was given."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.decoding.live_bytes import LiveBytes
from taesd_stream.decoding.tiles import TileSize, run_tiles, segments_of
from taesd_stream.decoding.tiling import (
    BudgetError,
    decode_parts,
    decode_tiled,
    decode_uint8,
    encode_tiled,
    is_tileable,
)
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.networks import TINY_FAMILIES, DecoderLayout, EncoderLayout, tiny_decoder, tiny_encoder

LEAST_OF_ALL = 1  # byte: no tile fits
FAMILIES = ("taesd", "taef2", "taesana")  # the others share their layouts
IN_TIME = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same numbers each time; strips this small are slower on two threads, far slower where others compute too."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def lively(network: nn.Module, seed: int = 0) -> nn.Sequential:
    """The network with random weights that keep values near 1, and biases and norms that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in network.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = name.endswith("pool.1.weight")
        scaled = noise / weight[0].numel() ** 0.5 if weight.ndim > 1 else 0.3 * noise + is_norm
        weight.requires_grad_(False).copy_(scaled)
    assert isinstance(network, nn.Sequential)
    return network.eval()


def narrow_decoder(*, has_pooled_blocks: bool) -> nn.Sequential:
    """A decoder of the family's shape, 4x, that takes a millisecond."""
    layout = DecoderLayout(latent_channels=3, widths=(8, 6, 5), blocks=(2, 1, 1), has_pooled_blocks=has_pooled_blocks)
    return lively(tiny_decoder(layout))


def narrow_encoder(*, has_pooled_blocks: bool, has_strided_stem: bool) -> nn.Sequential:
    """An encoder of the family's shape, 4x or 16x, that takes a millisecond."""
    layout = EncoderLayout(
        latent_channels=3,
        widths=(8, 8, 8),
        blocks=(1, 1, 2),
        has_pooled_blocks=has_pooled_blocks,
        has_strided_stem=has_strided_stem,
    )
    return lively(tiny_encoder(layout))


def in_tiles(network: nn.Sequential, frame: Tensor, tile: TileSize) -> Tensor:
    """The result put together from tiles of a given size; what no part covers is NaN."""
    with torch.no_grad():
        result = torch.full_like(network(frame), torch.nan)
        for rows, columns, part in run_tiles(segments_of(network), frame, tile):
            assert result[..., rows, columns].isnan().all()  # nothing comes twice
            result[..., rows, columns] = part
    return result


def assert_equal_pictures(result: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums: differences are under 1e-5 of max(1, the largest value)."""
    assert result.shape == expected.shape
    assert float((result - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def whole(network: nn.Module, batch: Tensor) -> Tensor:
    """The result without tiles."""
    with torch.no_grad():
        result: Tensor = network(batch)
    return result


def within_budget(run: object, network: nn.Module, batch: Tensor, budget_bytes: int) -> tuple[Tensor, int]:
    """The result, and the most bytes that were alive at once beside the weights and the batch."""
    assert callable(run)
    with LiveBytes(beside=(batch, *network.parameters())) as live:
        result = run(network, batch, budget_bytes=budget_bytes)
    return result, live.peak


@IN_TIME
@given(
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    rows=st.integers(1, 20),
    across=st.integers(1, 14),
    is_pooled=st.booleans(),
    is_folded=st.booleans(),
)
def test_tiles_of_any_size_decode_to_the_whole(
    height: int, width: int, rows: int, across: int, is_pooled: bool, is_folded: bool
) -> None:
    """Whatever the sizes of latents and tiles, with and without GroupNorm, each value is the untiled one, made once."""
    assume(across <= width)
    network = narrow_decoder(has_pooled_blocks=is_pooled)
    latents = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    expected = whole(network, latents)
    tiled = fold_upsampling(network) if is_folded else network
    assert_equal_pictures(in_tiles(tiled, latents, TileSize(rows, across)), expected)


@IN_TIME
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    rows=st.integers(1, 80),
    across=st.integers(1, 18),
    is_pooled=st.booleans(),
    has_stem=st.booleans(),
)
def test_tiles_of_any_size_encode_to_the_whole(
    height: int, width: int, rows: int, across: int, is_pooled: bool, has_stem: bool
) -> None:
    """Also of pictures whose sides are no multiple of the factor, each latent is the untiled one, made once."""
    network = narrow_encoder(has_pooled_blocks=is_pooled, has_strided_stem=has_stem)
    pixels = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    expected = whole(network, pixels)
    assume(across <= expected.shape[3])
    assert_equal_pictures(in_tiles(network, pixels, TileSize(rows, across)), expected)


@settings(IN_TIME, max_examples=5)  # each counts its tensors
@given(
    height=st.integers(1, 40), width=st.integers(1, 10), budget_bytes=st.integers(1, 400_000), is_pooled=st.booleans()
)
def test_any_budget_is_kept_or_refused(height: int, width: int, budget_bytes: int, is_pooled: bool) -> None:
    """A budget is kept, tensors counted one by one; or it is an error, and the least that it names is kept."""
    network = narrow_decoder(has_pooled_blocks=is_pooled)
    latents = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    with pytest.raises(BudgetError) as least:
        decode_tiled(network, latents, budget_bytes=LEAST_OF_ALL)
    if budget_bytes < least.value.least_bytes:
        with pytest.raises(BudgetError):
            decode_tiled(network, latents, budget_bytes=budget_bytes)
        budget_bytes = least.value.least_bytes
    result, peak = within_budget(decode_tiled, network, latents, budget_bytes)
    assert peak <= budget_bytes
    assert_equal_pictures(result, whole(network, latents))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_within_the_least_budget(family: str) -> None:
    """The least budget that the error names gives the untiled pictures, all of a batch, within it."""
    network = lively(build_decoder(family))
    latents = torch.randn(2, TINY_FAMILIES[family].latent_channels, 3, 5)
    with pytest.raises(BudgetError, match=r"expected at least \d+ for this size, got 1$") as caught:
        decode_tiled(network, latents, budget_bytes=LEAST_OF_ALL)
    least_bytes = caught.value.least_bytes
    with pytest.raises(BudgetError, match=f"at least {least_bytes} "):
        decode_tiled(network, latents, budget_bytes=least_bytes - 1)
    result, peak = within_budget(decode_tiled, network, latents, least_bytes)
    assert peak <= least_bytes
    assert result.is_contiguous()
    assert_equal_pictures(result, whole(network, latents))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_encodes_within_the_least_budget(family: str) -> None:
    """The least budget that the error names gives the untiled latents, also of sides that are no multiple of 8."""
    network = lively(build_encoder(family))
    pixels = torch.rand(1, 3, 43, 67)
    with pytest.raises(BudgetError) as caught:
        encode_tiled(network, pixels, budget_bytes=LEAST_OF_ALL)
    least_bytes = caught.value.least_bytes
    result, peak = within_budget(encode_tiled, network, pixels, least_bytes)
    assert peak <= least_bytes
    assert_equal_pictures(result, whole(network, pixels))


@pytest.mark.parametrize("is_pooled", [False, True])
@pytest.mark.parametrize("size", [(1, 160), (160, 1), (160, 160), (1, 16385)])
def test_large_pictures_of_a_narrow_network(size: tuple[int, int], is_pooled: bool) -> None:
    """160x160 latents and single rows and columns of them, strips and tiles as a small budget makes them."""
    network = narrow_decoder(has_pooled_blocks=is_pooled)
    latents = torch.randn(1, 3, *size)
    picture_bytes = 3 * 4 * 16 * size[0] * size[1]
    assert_equal_pictures(
        decode_tiled(network, latents, budget_bytes=picture_bytes + (2 << 20)), whole(network, latents)
    )


def test_bfloat16_is_as_near_as_its_digits() -> None:
    """In half precision tiles are about as near to the exact picture as the whole network is."""
    network = lively(build_decoder("taef2"))
    latents = torch.randn(1, 32, 9, 7).bfloat16()
    exact = whole(network, latents.float())
    network.bfloat16()
    result = decode_tiled(network, latents, budget_bytes=2 << 20)
    assert result.dtype == torch.bfloat16
    assert (result - exact).square().mean() < 2 * (whole(network, latents) - exact).square().mean()


def test_groupnorm_survives_a_large_mean() -> None:
    """Statistics that were merged part by part are exact also where the mean is far larger than the spread."""
    network = narrow_decoder(has_pooled_blocks=True)
    bias = network[1].bias
    assert isinstance(bias, Tensor)
    bias.add_(100)
    latents = torch.randn(1, 3, 13, 11)
    assert_equal_pictures(in_tiles(network, latents, TileSize(2, 3)), whole(network, latents))


def test_parts_are_strips_of_whole_rows_in_order() -> None:
    """Where the width fits, parts come frame by frame and top down, each as wide as the picture."""
    network = narrow_decoder(has_pooled_blocks=False)
    latents = torch.randn(2, 3, 100, 30)
    rows, expected = [], whole(network, latents)
    for (frame, _, lines, columns), part in decode_parts(network, latents, budget_bytes=300_000):
        assert_equal_pictures(part, expected[frame, :, lines, columns])
        assert (columns.start, columns.stop) == (0, 120)
        rows += [(frame.start, line) for line in range(lines.start, lines.stop)]
    assert rows == [(frame, line) for frame in range(2) for line in range(400)]


def test_8_bits_are_rounded_and_clamped() -> None:
    """decode_uint8 gives the nearest of 256 codes, and their ends for what lies outside of [0, 1]."""
    network = narrow_decoder(has_pooled_blocks=False)
    next(network[-1].parameters()).mul_(9)  # far out of [0, 1], both ways
    latents = torch.randn(2, 3, 9, 7)
    codes = decode_uint8(network, latents, budget_bytes=1 << 20)
    picture = decode_tiled(network, latents, budget_bytes=1 << 20)
    assert codes.dtype == torch.uint8
    assert {0, 255} <= set(codes.flatten().tolist())
    assert (codes - picture.clamp(0, 1) * 255).abs().max() <= 0.5 + 1e-4


def test_an_empty_batch_is_an_empty_result() -> None:
    """No frames: no pictures, of the right size."""
    result = decode_tiled(narrow_decoder(has_pooled_blocks=True), torch.zeros(0, 3, 4, 5), budget_bytes=1 << 20)
    assert result.shape == (0, 3, 16, 20)


@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (3, 2, 2), (1, 3, 0, 2)])
def test_a_wrong_shape_names_the_right_one(shape: tuple[int, ...]) -> None:
    """A batch that the network cannot take is an error at once, with what was expected and given."""
    network = narrow_decoder(has_pooled_blocks=False)
    with pytest.raises(ValueError, match=r"expected a batch \(N, 3, H, W\), got \(" + ", ".join(map(str, shape))):
        decode_parts(network, torch.zeros(shape), budget_bytes=1 << 30)


def test_a_network_that_cannot_be_tiled_is_named() -> None:
    """A layer whose strips would not be exact is refused by its name, before anything is decoded."""
    smooth = tiny_decoder(DecoderLayout(latent_channels=3, upsample_mode="bilinear"))
    with pytest.raises(TypeError, match=r"no exact strips are known for the layer Upsample\(.*bilinear"):
        decode_parts(smooth, torch.zeros(1, 3, 2, 2), budget_bytes=1 << 30)
    with pytest.raises(TypeError, match=r"expected nn\.Sequential, as build_decoder makes it, got ShuffleProjection"):
        decode_tiled(build_decoder("linear", latent_format="flux2"), torch.zeros(1, 32, 2, 2), budget_bytes=1 << 30)
    assert not is_tileable(smooth)
    assert is_tileable(build_decoder("taef2"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", ["taesd", "taef2"])
@pytest.mark.parametrize("size", [(160, 160), (512, 128), (128, 512)])
def test_large_pictures_are_exact(family: str, size: tuple[int, int]) -> None:
    """The real networks at large sizes, in 512 MiB and a picture."""
    network = lively(build_decoder(family))
    latents = torch.randn(1, TINY_FAMILIES[family].latent_channels, *size)
    budget_bytes = (512 << 20) + 3 * 4 * 64 * size[0] * size[1]
    assert_equal_pictures(decode_tiled(network, latents, budget_bytes=budget_bytes), whole(network, latents))


_HUGE = """
import pathlib, re, sys, torch
from taesd_stream.decoding.tiling import decode_uint8
from taesd_stream.models import build_decoder
torch.set_num_threads(2)
family, channels = sys.argv[1], int(sys.argv[2])
latents = torch.randn(1, channels, 1024, 1024)
picture = decode_uint8(build_decoder(family).eval(), latents, budget_bytes=1 << 30)
assert picture.shape == (1, 3, 8192, 8192), picture.shape
status = pathlib.Path("/proc/self/status").read_text()  # not ru_maxrss, in which a child begins with its parent's
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize(("family", "channels"), [("taesd", 4), ("taef2", 32)])
def test_a_huge_picture_decodes_inside_2_gib(family: str, channels: int) -> None:
    """8192x8192 to 8 bits: a process, torch and all, never holds more than 2 GiB in memory."""
    command = [sys.executable, "-c", _HUGE, family, str(channels)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2 << 30
