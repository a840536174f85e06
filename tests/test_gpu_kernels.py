"""Our own kernels on a Hopper GPU: every tile, sizes that fit no tile, against float32 convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.kernels.launching import TILES, Kernels
from taesd_stream.decoding.kernels.packing import (
    pack_conv,
    pack_conv8,
    pack_conv_last,
    pack_last,
    pack_up,
    paired,
    quantise,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU here"
    ),
]
# (N, h, w): less than a tile, more than one by a little, many blocks' worth, long and flat.
SIZES = [(1, 7, 5), (2, 23, 40), (1, 33, 67), (1, 2, 300), (3, 90, 160), (2, 256, 256), (1, 180, 320)]
ROUNDING = 6e-4  # of a float16 result; with a residual it is rounded twice


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The kernels, compiled once."""
    from taesd_stream.decoding.kernels.cubins import TINY_DECODER, kernel_cubin

    return kernel_cubin(TINY_DECODER, tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=TILES)
def kernels(cubin: bytes, request: pytest.FixtureRequest) -> Kernels:
    """The kernels with one tile."""
    return Kernels(cubin, torch.device("cuda", 0), tile=request.param)


@pytest.fixture(autouse=True)
def exact_references() -> Iterator[None]:
    """New memory is NaN, so that nothing unwritten goes unseen; references are float32, not TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = before


def feature_map(count: int, height: int, width: int) -> Tensor:
    """Random values as they come out of a ReLU."""
    x = torch.randn(count, 64, height, width, device="cuda").relu().half()
    return x.contiguous(memory_format=torch.channels_last)


def random_weights(*shape: int) -> Tensor:
    """Weights that keep the size of values."""
    return (torch.randn(*shape, device="cuda") * 0.06).half()


def error(given: Tensor, expected: Tensor) -> float:
    """Relative, over all elements; NaN if any is."""
    return float((given.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "residual"])
def test_convolution(kernels: Kernels, size: tuple[int, int, int], has_residual: bool) -> None:
    """The kernel is a 3x3 convolution with bias, residual and ReLU, borders included."""
    x, residual = feature_map(*size), feature_map(*size) if has_residual else None
    weight, bias = random_weights(64, 64, 3, 3), torch.randn(64, device="cuda")
    given = kernels.conv(x, pack_conv(weight), bias, residual)
    expected = F.conv2d(x.float(), weight.float(), bias, padding=1)
    expected = (expected if residual is None else expected + residual.float()).relu()
    assert given.isnan().sum() == 0
    assert error(given, expected) < ROUNDING


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_upsampling(kernels: Kernels, size: tuple[int, int, int]) -> None:
    """The kernel is the folded transposed convolution, borders included."""
    x, weight = feature_map(*size), random_weights(64, 64, 4, 4)
    given = kernels.up(x, pack_up(weight))
    assert given.isnan().sum() == 0
    assert error(given, F.conv_transpose2d(x.float(), weight.float(), stride=2, padding=1)) < ROUNDING


@pytest.mark.parametrize(
    "size", [(1, 8, 8), (2, 24, 40), (1, 34, 66), (1, 2, 300), (3, 90, 160), (1, 256, 512)], ids=str
)
def test_last_layers(kernels: Kernels, size: tuple[int, int, int]) -> None:
    """The kernels' RGB is the clamped last convolution of a block's end, its planes those of colour.py, to one code."""
    x, residual = feature_map(*size), feature_map(*size)
    weight, bias = random_weights(64, 64, 3, 3), torch.randn(64, device="cuda")
    last, last_bias = random_weights(3, 64, 3, 3), torch.rand(3, device="cuda")
    features = (F.conv2d(x.float(), weight.float(), bias, padding=1) + residual.float()).relu()
    expected = F.conv2d(features, last.float() / 4, last_bias, padding=1).clamp(0, 1)
    arguments = (x, pack_conv_last(weight, last / 4), bias, residual, last_bias)
    rgb, planes = kernels.rgb(*arguments), kernels.planes(*arguments)
    assert rgb.isnan().sum() == 0
    assert error(rgb, expected) < 1e-3
    apart = (planes.int() - video_planes(expected).int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.05


def affine(bias: Tensor, scale: Tensor) -> Tensor:
    """Biases and scales as the float8 kernels read them."""
    return torch.cat((bias, scale))


def bits(values: Tensor) -> Tensor:
    """float8 as the kernels' maps hold it."""
    return values.to(torch.float8_e4m3fn).view(torch.uint8).contiguous(memory_format=torch.channels_last)


def values(map8: Tensor) -> Tensor:
    """A float8 map as float32."""
    return map8.view(torch.float8_e4m3fn).float()


def differing(map8: Tensor, expected: Tensor) -> float:
    """Share of a float8 map that is not the rounded expectation: sums in another order cross a rounding edge."""
    return float((values(map8) != values(bits(expected.clamp(max=448)))).float().mean())


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_float8_between_convolutions(kernels: Kernels, size: tuple[int, int, int]) -> None:
    """A map written as float8 is the rounded convolution; read back, it gives the convolution of what it holds."""
    x, weight, bias = feature_map(*size), random_weights(64, 64, 3, 3), torch.randn(64, device="cuda")
    ones = torch.ones(64, device="cuda")
    written = kernels.conv8(x, pack_conv(paired(weight)), affine(paired(bias) * 3, ones * 3))
    assert differing(written, 3 * F.conv2d(x.float(), weight.float(), bias, padding=1).relu()) < 0.01
    weight_8, scales = quantise(weight)
    packed = pack_conv8(paired(weight_8.view(torch.uint8)).view(torch.float8_e4m3fn))
    exact = weight_8.float() * scales[:, None, None, None]
    again = kernels.conv8(written, packed, affine(paired(bias), paired(scales / 3)))
    assert differing(again, F.conv2d(values(written) / 3, exact, bias, padding=1).relu()) < 0.01


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_from_float8_with_residual(kernels: Kernels, size: tuple[int, int, int]) -> None:
    """A float8 map, convolved and added to a float16 residual, is float16 again."""
    x, residual, bias = bits(feature_map(*size).float()), feature_map(*size), torch.randn(64, device="cuda")
    weight, scales = quantise(random_weights(64, 64, 3, 3))
    given = kernels.conv8(x, pack_conv8(weight), affine(bias, scales), residual)
    exact = weight.float() * scales[:, None, None, None]
    expected = (F.conv2d(values(x), exact, bias, padding=1) + residual.float()).relu()
    assert given.isnan().sum() == 0
    assert error(given, expected) < ROUNDING


@pytest.mark.parametrize("size", [(1, 8, 8), (2, 24, 40), (1, 2, 300), (3, 90, 160)], ids=str)
def test_last_layers_from_float8(kernels: Kernels, size: tuple[int, int, int]) -> None:
    """The block's end reads float8 too; the last convolution itself stays float16."""
    x, residual, bias = bits(feature_map(*size).float()), feature_map(*size), torch.randn(64, device="cuda")
    weight, scales = quantise(random_weights(64, 64, 3, 3))
    last, last_bias = random_weights(3, 64, 3, 3) / 4, torch.rand(3, device="cuda")
    image = torch.cat((pack_conv8(weight).flatten(), pack_last(last).view(torch.uint8).flatten()))
    exact = weight.float() * scales[:, None, None, None]
    features = (F.conv2d(values(x), exact, bias, padding=1) + residual.float()).relu()
    expected = F.conv2d(features, last.float(), last_bias, padding=1).clamp(0, 1)
    assert error(kernels.rgb(x, image, affine(bias, scales), residual, last_bias), expected) < 1e-3
