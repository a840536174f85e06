"""Run the kernels on torch's tensors and stream, through the CUDA driver; also while a graph is captured."""

from __future__ import annotations

import ctypes
import importlib
from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError

TILES: Final = (256, 128, 64)  # pixels of an image row that one tile covers
_NAMES: Final = ("conv_relu", "conv_residual", "up", "last")
_THREADS: Final = 384  # a producer and two consumers, 128 each
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
    slot = -(-(tile + 2) * _PIXEL_BYTES // 1024) * 1024
    ring = 4 if tile == 256 and name != "last" else 6
    taps = {"up": 8, "last": 9 / 8}.get(name, 9)
    staging = 2 * 3 * tile * 4 if name == "last" else 64 * _PIXEL_BYTES
    return int(taps * 64 * _PIXEL_BYTES) + ring * slot + 2 * staging + 256 + 1024


class Kernels:
    """The loaded kernels, on one device. Maps are (N, 64, H, W) float16 in channels_last; weights as packing.py packs.

    Outputs are new tensors. Everything goes to torch's current stream, and is right there in order.
    """

    def __init__(self, cubin: bytes, device: torch.device, tile: int | None = None) -> None:
        """tile: one of TILES for every launch, None for the best of each: for tests and tuning.

        Raises: KernelsUnavailableError if the driver refuses the machine code.
        """
        self._tile = tile
        torch.cuda.init()
        self._driver: Any = importlib.import_module("cuda.bindings.driver")
        self._device = device
        self._workers = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            torch.zeros(1, device=device)  # makes the device's context current for the driver
            (self._library,) = self._do(self._driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
            self._functions = {(name, tile): self._function(name, tile) for name in _NAMES for tile in TILES}

    def conv(self, x: Tensor, weights: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        """ReLU(conv3x3(x) + bias [+ residual]); bias: (64,) float32; residual in channels_last."""
        output = torch.empty_like(x)
        name = "conv_relu" if residual is None else "conv_residual"
        self._launch(name, x, weights, bias, residual, output)
        return output

    def up(self, x: Tensor, weights: Tensor) -> Tensor:
        """Upsampling by 2 and a 3x3 convolution, without bias: (N, 64, h, w) -> (N, 64, 2h, 2w)."""
        count, channels, height, width = x.shape
        size = (count, channels, 2 * height, 2 * width)
        output = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        self._launch("up", x, weights, None, None, output)
        return output

    def planes(self, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """The last convolution, as `colour.video_planes`: (N, 64, H, W), H and W even -> (N, H*3//2, W) uint8."""
        count, _, height, width = x.shape
        output = torch.empty((count, height * 3 // 2, width), dtype=torch.uint8, device=x.device)
        self._launch("last", x, weights, bias, output, None)
        return output

    def rgb(self, x: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
        """The last convolution: (N, 64, H, W), H and W even -> (N, 3, H, W) float16, NCHW, in [0, 1]."""
        count, _, height, width = x.shape
        output = torch.empty((count, 3, height, width), dtype=torch.float16, device=x.device)
        self._launch("last", x, weights, bias, None, output)
        return output

    def _launch(self, name: str, x: Tensor, *tensors: Tensor | None) -> None:
        count, _, height, width = x.shape
        phases = 2 if name == "up" else 1
        rows = count * (height // 2 if name == "last" else height)
        workers = self._workers // phases
        tile = self._tile or choose_tile(width, rows, workers)
        blocks = phases * min(workers, -(-width // tile) * rows)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        values = (self._map(x, tile), *pointers, count, height, width)
        types = (None, *[ctypes.c_void_p] * len(pointers), ctypes.c_int, ctypes.c_int, ctypes.c_int)
        config = self._config(blocks, shared_bytes(name, tile))
        self._do(self._driver.cuLaunchKernelEx(config, self._functions[name, tile], (values, types), 0))

    def _config(self, blocks: int, shared: int) -> Any:
        driver = self._driver
        # A kernel may begin, with its barriers and weights, before the one ahead of it has ended.
        early = driver.CUlaunchAttribute()
        early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
        early.value = value
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = _THREADS, 1, 1
        config.sharedMemBytes = shared
        config.hStream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
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
        strides = [size * _PIXEL_BYTES for size in (1, width, width * height)]
        (made,) = self._do(
            driver.cuTensorMapEncodeTiled(
                driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                4,
                x.data_ptr(),
                [wide(size) for size in (channels, width, height, count)],
                [wide(stride) for stride in strides],
                [narrow(size) for size in (channels, box, 1, 1)],
                [narrow(1)] * 4,
                driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
                driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
                driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,  # zeros
            )
        )
        return made

    def _function(self, name: str, tile: int) -> Any:
        driver = self._driver
        (kernel,) = self._do(driver.cuLibraryGetKernel(self._library, f"{name}_{tile}".encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        device = driver.CUdevice(self._device.index or 0)
        self._do(driver.cuKernelSetAttribute(attribute, shared_bytes(name, tile), kernel, device))
        return driver.CUfunction(int(kernel))

    def _do(self, result: tuple[Any, ...]) -> tuple[Any, ...]:
        status, *values = result
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise KernelsUnavailableError(f"the CUDA driver answers {status}")
        return tuple(values)
