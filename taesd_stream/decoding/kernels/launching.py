"""Run the kernels on torch's tensors and stream, through the CUDA driver; also while a graph is captured."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.decoding.kernels.library import Library

TILES: Final = (256, 128, 64)  # pixels of an image row that one tile covers
# up writes more than it computes, and 64 is its best at every size; conv_last has no shared memory for 256.
_ONLY_TILE: Final = {
    "up": 64,
    "conv_last": 128,
    "conv_last_8": 128,
    "conv_relu_to8": 128,
    "conv_relu_8to8": 128,
    "conv_residual_8": 128,
}
_READS_8: Final = ("conv_last_8", "conv_relu_8to8", "conv_residual_8")
KERNELS: Final = (*((name, tile) for name in ("conv_relu", "conv_residual") for tile in TILES), *_ONLY_TILE.items())
_THREADS: Final = 384  # a producer and two consumers, 128 each
_SUM_THREADS: Final = 128
_PIXEL_BYTES: Final = 128
# What a tile costs for each pixel: narrow products read the weights again and again.
_COST: Final = {256: 1.0, 128: 1.04, 64: 1.16}


def choose_tile(columns: int, rows: int, workers: int) -> int:
    """The tile width with the least work for the busiest of `workers`.

    rows: image rows of the whole batch, one tile high each. One tile more than a worker's share is counted: its first
    and its last overlap with nothing.
    """

    def cost(tile: int) -> float:
        tiles = -(-columns // tile) * rows
        return (-(-tiles // workers) + 1) * tile * _COST[tile]

    return min(TILES, key=cost)


def shared_bytes(name: str, tile: int) -> int:
    """Shared memory of one block, as tiny_decoder.cu lays it out: weights, ring, staging, barriers, alignment."""
    pixel = _PIXEL_BYTES // 2 if name in _READS_8 else _PIXEL_BYTES
    slot = -(-(tile + 2) * pixel // 1024) * 1024
    ring = 4 if tile == 256 else 6
    is_last = name.startswith("conv_last")
    weights = (8 if name == "up" else 9) * 64 * pixel + (64 * _PIXEL_BYTES if is_last else 0)
    staging = (tile if is_last else 64) * _PIXEL_BYTES
    return weights + ring * slot + 2 * staging + 256 + 1024


class Kernels:
    """The loaded kernels, on one device. Maps are (N, 64, H, W) float16 in channels_last; weights as packing.py packs.

    Outputs are new tensors. Everything goes to torch's current stream, and is right there in order.
    """

    def __init__(self, cubin: bytes, device: torch.device, tile: int | None = None) -> None:
        """tile: one of TILES for every convolution, None for the best of each: for tests and tuning.

        Raises: KernelsUnavailableError if the driver refuses the machine code.
        """
        self._tile = tile
        self._device = device
        self._workers = torch.cuda.get_device_properties(device).multi_processor_count
        self._library = Library(cubin, device)
        self._driver = self._library.driver
        with torch.cuda.device(device):
            self._functions = {(name, tile): self._function(name, tile) for name, tile in KERNELS}
            self._functions["sum_last", 0] = self._library.kernel("sum_last")

    def conv(self, x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        """ReLU(conv3x3(x) + bias [+ residual]); bias: (64,) float32; residual in channels_last."""
        output = torch.empty_like(x)
        name = "conv_relu" if residual is None else "conv_residual"
        self._launch(name, x, weights, bias, residual, output)
        return output

    def conv8(self, x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        """The same where float8 is read, written, or both: such maps are uint8 tensors of its bits.

        x: float16, and the output is float8; or float8, and the output is float8 without a residual, float16 with one.
        bias: (128,) float32, biases and then scales, as packing.py makes them.
        """
        writes_8 = residual is None
        output = torch.empty_like(x, dtype=torch.uint8 if writes_8 else torch.float16)
        name = "conv_residual_8" if residual is not None else f"conv_relu_{'8to8' if x.dtype == torch.uint8 else 'to8'}"
        self._launch(name, x, weights, bias, residual, output)
        return output

    def up(self, x: Tensor, weights: Tensor) -> Tensor:
        """Upsampling by 2 and a 3x3 convolution, without bias: (N, 64, h, w) -> (N, 64, 2h, 2w)."""
        count, channels, height, width = x.shape
        size = (count, channels, 2 * height, 2 * width)
        output = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        self._launch("up", x, weights, None, None, output)
        return output

    def planes(self, x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor, last_bias: Tensor) -> Tensor:
        """`conv` with a residual and the last convolution, as `colour.video_planes`: (N, H*3//2, W) uint8.

        weights: packing.pack_conv_last's; H and W are even; last_bias: (3,) float32.
        """
        count, _, height, width = x.shape
        output = torch.empty((count, height * 3 // 2, width), dtype=torch.uint8, device=x.device)
        self._finish(x, weights, bias, residual, last_bias, planes=output, rgb=None)
        return output

    def rgb(self, x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor, last_bias: Tensor) -> Tensor:
        """The same as a picture: (N, 3, H, W) float16, NCHW, in [0, 1]."""
        count, _, height, width = x.shape
        output = torch.empty((count, 3, height, width), dtype=torch.float16, device=x.device)
        self._finish(x, weights, bias, residual, last_bias, planes=None, rgb=output)
        return output

    def _finish(
        self,
        x: Tensor,
        weights: Tensor,
        bias: Tensor,
        residual: Tensor,
        last_bias: Tensor,
        *,
        planes: Tensor | None,
        rgb: Tensor | None,
    ) -> None:
        count, _, height, width = x.shape
        strips = -(-width // _ONLY_TILE["conv_last"])
        rows = torch.empty((count, 9, height, width), dtype=torch.float16, device=x.device)
        edges = torch.empty((count, height, strips, 2, 9), dtype=torch.float16, device=x.device)
        name = "conv_last_8" if x.dtype == torch.uint8 else "conv_last"
        self._launch(name, x, weights, bias, residual, rows, edges)
        tensors = (rows, edges, last_bias, planes, rgb)
        config = self._config((-(-width // (2 * _SUM_THREADS)), height // 2, count), _SUM_THREADS, 0)
        self._run(config, self._functions["sum_last", 0], (), tensors, x)

    def _launch(self, name: str, x: Tensor, *tensors: Tensor | None) -> None:
        count, _, height, width = x.shape
        phases = 2 if name == "up" else 1
        workers = self._workers // phases
        tile = _ONLY_TILE.get(name) or self._tile or choose_tile(width, count * height, workers)
        blocks = phases * min(workers, -(-width // tile) * count * height)
        config = self._config((blocks, 1, 1), _THREADS, shared_bytes(name, tile))
        self._run(config, self._functions[name, tile], (self._map(x, tile),), tensors, x)

    def _run(
        self, config: Any, function: Any, maps: tuple[Any, ...], tensors: tuple[Tensor | None, ...], x: Tensor
    ) -> None:
        """Launch with the arguments that all kernels have: maps, then pointers, then the size of x."""
        count, _, height, width = x.shape
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        types = (*[None] * len(maps), *[ctypes.c_void_p] * len(pointers), *[ctypes.c_int] * 3)
        arguments = ((*maps, *pointers, count, height, width), types)
        self._library.do(self._driver.cuLaunchKernelEx(config, function, arguments, 0))

    def _config(self, grid: tuple[int, int, int], threads: int, shared: int) -> Any:
        driver = self._driver
        # A kernel may begin, with its barriers and weights, before the one ahead of it has ended.
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        early.value = value
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        config.hStream = self._library.stream()
        config.attrs, config.numAttrs = [early], 1
        return config

    def _map(self, x: Tensor, tile: int) -> Any:
        """How the copy engine sees a map: channels, columns, rows, pictures; a box is a part of one row.

        It holds the address, so it is made for each launch; a captured launch keeps it, and the graph the memory.
        """
        driver = self._driver
        count, channels, height, width = x.shape
        box = (tile + 2) // (2 if tile == 256 else 1)  # 258 pixels are more than a box takes
        wide, narrow = driver.cuuint64_t, driver.cuuint32_t
        strides = [size * channels * x.element_size() for size in (1, width, width * height)]
        kind, swizzle = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        is_8 = x.dtype == torch.uint8
        (made,) = self._library.do(
            driver.cuTensorMapEncodeTiled(
                kind.CU_TENSOR_MAP_DATA_TYPE_UINT8 if is_8 else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                4,
                x.data_ptr(),
                [wide(size) for size in (channels, width, height, count)],
                [wide(stride) for stride in strides],
                [narrow(size) for size in (channels, box, 1, 1)],
                [narrow(1)] * 4,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle.CU_TENSOR_MAP_SWIZZLE_64B if is_8 else swizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # zeros
            )
        )
        return made

    def _function(self, name: str, tile: int) -> Any:
        driver = self._driver
        kernel = self._library.kernel(f"{name}_{tile}")
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = driver.CUdevice(self._device.index or 0)
        self._library.do(
            driver.cuKernelSetAttribute(attribute, shared_bytes(name, tile), driver.CUkernel(int(kernel)), device)
        )
        return kernel
