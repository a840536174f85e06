"""Compile the kernels at first use, by the compiler that comes with torch (NVRTC), and keep the result on disk."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import time
from importlib import resources
from pathlib import Path
from typing import Any, Final

import platformdirs

logger = logging.getLogger(__name__)

# sm_90a, not sm_90: wgmma and setmaxnreg belong to the architecture's own set. split-compile 0: all processors.
OPTIONS: Final = ("--gpu-architecture=sm_90a", "--std=c++17", "--split-compile=0")


class KernelsUnavailableError(Exception):
    """The kernels cannot be had here; the message says why."""


def kernel_source() -> str:
    """The CUDA source that comes with this package."""
    return (resources.files(__package__) / "tiny_decoder.cu").read_text(encoding="utf-8")


def kernel_cubin(folder: Path | None = None) -> bytes:
    """The machine code of all kernels: from the cache, else compiled now (some seconds) and kept.

    folder: the cache, None for the user's. One that cannot be written costs the next start a compilation.
    Raises: KernelsUnavailableError without NVRTC, or if it refuses the source.
    """
    nvrtc = _nvrtc()
    source = kernel_source()
    version = ".".join(map(str, _checked(nvrtc, *nvrtc.nvrtcVersion())))
    path = cubin_path(source, version, folder)
    if path.is_file():
        return path.read_bytes()
    started_s = time.monotonic()
    cubin = _compile(nvrtc, source)
    logger.info("kernels_compiled s=%.1f nvrtc=%s", time.monotonic() - started_s, version)
    _keep(path, cubin)
    return cubin


def cubin_path(source: str, nvrtc_version: str, folder: Path | None = None) -> Path:
    """Where machine code of this source, these options and this compiler is kept."""
    key = hashlib.sha256("\n".join((source, *OPTIONS, nvrtc_version)).encode()).hexdigest()[:24]
    cache = folder or platformdirs.user_cache_path("taesd-stream", appauthor=False) / "kernels"
    return cache / f"{key}.cubin"


def forget(folder: Path | None = None) -> None:
    """Drop the kept machine code: it was found to be broken."""
    nvrtc = _nvrtc()
    version = ".".join(map(str, _checked(nvrtc, *nvrtc.nvrtcVersion())))
    cubin_path(kernel_source(), version, folder).unlink(missing_ok=True)


def _nvrtc() -> Any:
    """cuda.bindings.nvrtc, which torch for CUDA brings since 2.10; untyped."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: the bindings without the library
        raise KernelsUnavailableError(f"NVRTC cannot be used: {error}") from error
    return nvrtc


def _compile(nvrtc: Any, source: str) -> bytes:
    (program,) = _checked(nvrtc, *nvrtc.nvrtcCreateProgram(source.encode(), b"tiny_decoder.cu", 0, [], []))
    try:
        options = [option.encode() for option in OPTIONS]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            (size,) = _checked(nvrtc, *nvrtc.nvrtcGetProgramLogSize(program))
            log = bytearray(size)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise KernelsUnavailableError(f"NVRTC refused the kernels: {log.rstrip(bytes(1)).decode(errors='replace')}")
        (size,) = _checked(nvrtc, *nvrtc.nvrtcGetCUBINSize(program))
        # The bindings fill the buffer in place: a bytearray would be copied.
        cubin: bytes = b" " * size
        _checked(nvrtc, *nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: Any, status: Any, *values: Any) -> tuple[Any, ...]:
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelsUnavailableError(f"NVRTC: {status}")
    return values


def _keep(path: Path, cubin: bytes) -> None:
    """Write it whole or not at all: two workers may compile at the same time."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(cubin)
        draft.replace(path)
    except OSError as error:
        logger.info("kernels_not_kept path=%s error=%s", path, error)
