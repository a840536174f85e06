"""Our own kernels on a Hopper GPU: every tile, sizes that fit no tile, against float32 convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.kernels.launching import TILES, Kernels
from taesd_stream.decoding.kernels.packing import pack_conv, pack_conv_last, pack_up

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
    from taesd_stream.decoding.kernels.cubins import kernel_cubin

    return kernel_cubin(tmp_path_factory.mktemp("kernels"))


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
