"""The fast GPU decoders, as far as a processor can tell: the same steps, weights as kernels read them, and reasons."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.decoding.acceleration import accelerated, check, latent_channels
from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.cuda_graphs import MAX_BATCH, batches
from taesd_stream.decoding.decoder_plan import UnsupportedNetworkError, decoder_plan
from taesd_stream.decoding.float8 import blocks_in_float8
from taesd_stream.decoding.kernels.cubins import (
    OPTIONS,
    TINY_DECODER,
    KernelsUnavailableError,
    cubin_path,
    kernel_cubin,
)
from taesd_stream.decoding.kernels.later import compile_behind, lacks_for_kernels
from taesd_stream.decoding.kernels.launching import KERNELS, choose_tile, shared_bytes
from taesd_stream.decoding.kernels.packing import (
    LARGEST_8,
    pack_conv,
    pack_conv8,
    pack_conv_last,
    pack_up,
    paired,
    quantise,
)
from taesd_stream.decoding.pooled_detour import pooled_detour
from taesd_stream.decoding.stock_decoder import StockDecoder
from taesd_stream.models import build_decoder

FAMILIES = ("taesd", "taesdxl", "taesd3", "taef1", "taef2", "taesana")
MULTIPROCESSORS = 132  # of an H100
BLOCK_SHARED_BYTES = 227 * 1024  # what Hopper gives one block


def decoder(family: str) -> nn.Module:
    """A decoder with seeded random weights."""
    torch.manual_seed(3)
    return build_decoder(family).eval().requires_grad_(False)


def latents_for(network: nn.Module, height: int, width: int) -> Tensor:
    """Two random latents."""
    latents = torch.randn(2, latent_channels(network), height, width)
    return latents.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(5, 3), (1, 1)], ids=str)
def test_the_steps_are_the_network(family: str, size: tuple[int, int]) -> None:
    """The fused steps give the network's picture and its planes, borders included."""
    network = decoder(family)
    latents = latents_for(network, *size)
    expected = network(latents)
    fused = StockDecoder(network)
    torch.testing.assert_close(fused.rgb(latents), expected.clamp(0, 1), atol=2e-5, rtol=0)
    apart = (fused.planes(latents).int() - video_planes(expected).int()).abs()
    assert apart.max() <= 1


class Doubled(nn.Module):
    """A layer that no fused call knows."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        return 2 * x


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (nn.Conv2d(4, 3, 3), "the network is a Conv2d"),
        (
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), Doubled(), nn.Conv2d(8, 3, 3, padding=1)),
            "layer 1 is a Doubled",
        ),
        (nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)), "layer 1 is a SiLU"),
        (nn.Sequential(nn.Conv2d(4, 3, 3)), "layer 0 is a Conv2d"),
        (nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ReLU()), "the last layer is no 3x3 convolution"),
    ],
)
def test_an_unknown_layer_is_named(network: nn.Module, reason: str) -> None:
    """A network that the fused calls do not cover is refused, with the layer that stops them."""
    with pytest.raises(UnsupportedNetworkError, match=reason):
        decoder_plan(network)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_detour_is_group_norm(offset: float) -> None:
    """The detour by second moments equals the one with GroupNorm, also where values have a mean far from zero."""
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 64)
    detour = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), norm, nn.ReLU(), nn.Conv2d(64, 16, 1, bias=False))
    detour.requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    norm.bias.uniform_(-1, 1)
    x = (torch.randn(3, 16, 5, 7) + offset).contiguous(memory_format=torch.channels_last)
    fast = pooled_detour(detour)
    assert fast is not None
    torch.testing.assert_close(fast(x), x + detour(x), atol=1e-4, rtol=1e-4)


def test_another_detour_is_left_alone() -> None:
    """A detour of other layers is not taken for the known one."""
    assert pooled_detour(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())) is None


@pytest.mark.parametrize("count", [1, 3, 15, 16, 37, 100])
def test_batches_cover_every_frame_once(count: int) -> None:
    """A count is cut into powers of two up to the limit, in order, without gap or padding."""
    parts = list(batches(count, picture_px=512 * 512))
    assert [frame for part in parts for frame in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert all(size <= MAX_BATCH and size & (size - 1) == 0 for size in sizes)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("side_px", "largest"), [(1024, 16), (1536, 4), (2048, 4), (4096, 1), (16384, 1)])
def test_large_pictures_go_in_small_batches(side_px: int, largest: int) -> None:
    """No batch has more pixels than cuDNN can count the values of, as long as one picture has not."""
    parts = list(batches(16, side_px**2))
    assert max(part.stop - part.start for part in parts) == largest
    assert sum(part.stop - part.start for part in parts) == 16


def unswizzled(image: Tensor) -> Tensor:
    """(taps, rows, 64) as the tensor cores see it: 16-byte chunk c of row r is at place c ^ (r % 8)."""
    taps = torch.empty_like(image)
    for row in range(image.shape[1]):
        for chunk in range(8):
            place = chunk ^ (row % 8)
            taps[:, row, 8 * chunk : 8 * chunk + 8] = image[:, row, 8 * place : 8 * place + 8]
    return taps.float()


def shifted(x: Tensor, dy: int, dx: int) -> Tensor:
    """x[..., y + dy, x + dx], zeros outside."""
    height, width = x.shape[-2:]
    return F.pad(x, (2, 2, 2, 2))[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width]


def product(tap: Tensor, x: Tensor) -> Tensor:
    """What one tap adds: its rows are output channels."""
    return torch.einsum("oi,nihw->nohw", tap, x)


def test_convolution_weights_are_packed_tap_by_tap() -> None:
    """Nine taps, each on the map moved by its place in the kernel, are the convolution."""
    weight, x = (torch.randn(64, 64, 3, 3) * 0.1).half(), torch.randn(1, 64, 4, 6)
    taps = unswizzled(pack_conv(weight))
    given = sum(product(taps[3 * dy + dx], shifted(x, dy - 1, dx - 1)) for dy in range(3) for dx in range(3))
    torch.testing.assert_close(given, F.conv2d(x, weight.float(), padding=1), atol=1e-4, rtol=1e-4)


def test_upsampling_weights_are_packed_by_phase() -> None:
    """Four taps of each phase, from row y - 1 + a and column x - 1 + b on, are the transposed convolution's pixels."""
    weight, x = (torch.randn(64, 64, 4, 4) * 0.1).half(), torch.randn(1, 64, 3, 5)
    taps = unswizzled(pack_up(weight)).reshape(2, 2, 2, 2, 64, 64)
    expected = F.conv_transpose2d(x, weight.float(), stride=2, padding=1)
    for a in range(2):
        for b in range(2):
            given = sum(product(taps[a, b, i, j], shifted(x, i - 1 + a, j - 1 + b)) for i in range(2) for j in range(2))
            torch.testing.assert_close(given, expected[..., a::2, b::2], atol=1e-4, rtol=1e-4)


def test_the_last_weights_are_the_tenth_tap() -> None:
    """The tenth tap's 27 products, seven to a warp, each of its own pixel and then moved, are the last convolution."""
    weight, x = (torch.randn(3, 64, 3, 3) * 0.1).half(), torch.randn(1, 64, 4, 6)
    image = pack_conv_last(torch.zeros(64, 64, 3, 3), weight)
    assert image.shape == (10, 64, 64)
    tap = unswizzled(image)[9].reshape(4, 16, 64)
    assert not tap[:, 7:].any()
    rows = product(tap[:, :7].reshape(28, 64), x)[:, :27].reshape(1, 3, 3, 3, 4, 6)  # dy, colour, dx
    given = sum(shifted(rows[:, dy, :, dx], dy - 1, dx - 1) for dy in range(3) for dx in range(3))
    torch.testing.assert_close(given, F.conv2d(x, weight.float(), padding=1), atol=1e-4, rtol=1e-4)


def test_float8_weights_are_packed_tap_by_tap() -> None:
    """Bytes of nine taps, chunk c of row r at place c ^ (r // 2 % 4), are the scaled weights to float8's precision."""
    weight = torch.randn(64, 64, 3, 3) * 0.1
    weight_8, scales = quantise(weight)
    image = pack_conv8(weight_8)
    taps = torch.empty(9, 64, 64)
    for row in range(64):
        for chunk in range(4):
            place = chunk ^ (row // 2 % 4)
            held = image[:, row, 16 * place : 16 * place + 16].contiguous()
            taps[:, row, 16 * chunk : 16 * chunk + 16] = held.view(torch.float8_e4m3fn).float() * scales[row]
    expected = weight.permute(2, 3, 0, 1).reshape(9, 64, 64)
    largest = weight.abs().amax(dim=(1, 2, 3))
    assert ((taps - expected).abs() <= expected.abs() / 16 + largest[None, :, None] / LARGEST_8).all()


def test_channels_of_a_thread_are_neighbours() -> None:
    """Rows r and r + 8 of each sixteen are channels 2r and 2r + 1; every channel has its row."""
    order = paired(torch.arange(64))
    assert sorted(order.tolist()) == list(range(64))
    for row in range(64):
        if row % 16 < 8:
            assert (int(order[row]), int(order[row + 8])) == (
                row // 16 * 16 + row % 8 * 2,
                row // 16 * 16 + row % 8 * 2 + 1,
            )


@pytest.mark.parametrize(("family", "expected"), [("taesd", [10, 11, 12, 14]), ("taef2", [10, 11, 12, 14])])
def test_float8_is_for_the_largest_blocks(family: str, expected: list[int]) -> None:
    """The blocks of the two largest stages are packed; those at latent resolution, pooled or not, stay float16."""
    network = decoder(family).half()
    *steps, _ = decoder_plan(network)
    packed = blocks_in_float8(steps, latents_for(network, 3, 3).half())
    assert list(packed) == expected
    assert all(bool(part[1].isfinite().all()) for block in packed.values() for part in (block.first, block.third))


@pytest.mark.parametrize(
    ("side", "batch", "tile"),
    [(64, 1, 64), (64, 16, 64), (128, 16, 128), (256, 4, 128), (256, 16, 256), (512, 16, 256)],
)
def test_tiles_keep_all_multiprocessors_busy(side: int, batch: int, tile: int) -> None:
    """Small maps get narrow tiles, large ones wide: as measured on an H100."""
    assert choose_tile(side, side * batch, MULTIPROCESSORS) == tile


def test_a_block_fits_into_shared_memory() -> None:
    """No kernel asks for more shared memory than a Hopper block can have."""
    assert max(shared_bytes(name, tile) for name, tile in KERNELS) <= BLOCK_SHARED_BYTES


def test_every_kernel_is_in_the_source() -> None:
    """The names that are launched are those that the CUDA source defines."""
    source = TINY_DECODER.source
    for name, tile in KERNELS:
        assert f"CONVOLUTION({name}, {tile}," in source or f"KERNEL({name}_{tile})" in source


def test_machine_code_is_kept_by_what_made_it(tmp_path: Path) -> None:
    """Another source or compiler is another file; the same is the same."""
    source, options = TINY_DECODER.source, TINY_DECODER.options
    path = cubin_path(source, options, "13.0", tmp_path)
    assert path.parent == tmp_path
    assert path == cubin_path(source, options, "13.0", tmp_path)
    others = [(source + " ", options, "13.0"), (source, OPTIONS, "13.0"), (source, options, "13.1")]
    assert len({path, *(cubin_path(*other, tmp_path) for other in others)}) == 4


@pytest.mark.skipif(importlib.util.find_spec("cuda") is not None, reason="NVRTC may be here")
def test_without_nvrtc_the_reason_says_so(tmp_path: Path) -> None:
    """Where torch brought no compiler, the kernels are unavailable, in words."""
    with pytest.raises(KernelsUnavailableError, match="NVRTC cannot be used: No module named 'cuda'"):
        kernel_cubin(TINY_DECODER, tmp_path)
    with pytest.raises(KernelsUnavailableError, match="NVRTC cannot be used"):
        compile_behind(TINY_DECODER, tmp_path).result(20)  # the thread's failure reaches who waits for its kernels


def test_a_processor_runs_the_plain_network() -> None:
    """There is nothing to accelerate on a processor, and the reason says it."""
    assert accelerated(decoder("taesd"), "cpu") == (None, "the plain network: cpu has no fused calls")


@pytest.mark.parametrize(
    ("capability", "is_hopper"), [((9, 0), True), ((8, 9), False), ((10, 0), False), ((12, 0), False)]
)
def test_kernels_are_for_hopper(capability: tuple[int, int], is_hopper: bool) -> None:
    """Only compute capability 9.0 has these instructions: its successors dropped them."""
    lacks = lacks_for_kernels(capability)
    assert (lacks is None) == is_hopper
    assert is_hopper or f"this one has {capability[0]}.{capability[1]}" in str(lacks)


def test_a_wrong_picture_is_found_at_the_start() -> None:
    """Kernels that give another picture than the stock calls are refused; the right picture passes."""
    network = decoder("taesd").half()
    right, device = StockDecoder(network), torch.device("cpu")
    check(right, right, 4, device)
    last = network[-1]  # type: ignore[index]
    last.weight.data = last.weight.flip(3)  # a mirrored kernel, as a wrong packing gives it
    with pytest.raises(KernelsUnavailableError, match=r"our own kernels differ from cuDNN by .* of the picture"):
        check(StockDecoder(network), right, 4, device)
