"""Compile the kernels at first use, by the compiler that comes with torch (NVRTC), and keep the result on disk."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import time
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

import platformdirs

logger = logging.getLogger(__name__)

OPTIONS: Final = ("--std=c++17", "--split-compile=0")  # split-compile 0: all processors


@dataclass(frozen=True, slots=True)
class Program:
    """A CUDA source that comes with this package, and what it is compiled for."""

    name: str
    architecture: str

    @property
    def source(self) -> str:
        """The text."""
        return (resources.files(__package__) / self.name).read_text(encoding="utf-8")

    @property
    def options(self) -> tuple[str, ...]:
        """For the compiler."""
        return (f"--gpu-architecture={self.architecture}", *OPTIONS)


TINY_DECODER: Final = Program("tiny_decoder.cu", "sm_90a")  # not sm_90: wgmma and setmaxnreg are the architecture's own


class KernelsUnavailableError(Exception):
    """The kernels cannot be had here; the message says why."""


def kernel_cubin(program: Program, folder: Path | None = None) -> bytes:
    """The machine code of all kernels: from the cache, else compiled now (some seconds) and kept.

    folder: the cache, None for the user's. One that cannot be written costs the next start a compilation.
    Raises: KernelsUnavailableError without NVRTC, or if it refuses the source.
    """
    nvrtc = _nvrtc()
    version = ".".join(map(str, _checked(nvrtc, *nvrtc.nvrtcVersion())))
    path = cubin_path(program.source, program.options, version, folder)
    if path.is_file():
        return path.read_bytes()
    started_s = time.monotonic()
    cubin = _compile(nvrtc, program)
    logger.info("kernels_compiled %s s=%.1f nvrtc=%s", program.name, time.monotonic() - started_s, version)
    _keep(path, cubin)
    return cubin


def cubin_path(source: str, options: tuple[str, ...], nvrtc_version: str, folder: Path | None = None) -> Path:
    """Where machine code of this source, these options and this compiler is kept."""
    key = hashlib.sha256("\n".join((source, *options, nvrtc_version)).encode()).hexdigest()[:24]
    cache = folder or platformdirs.user_cache_path("taesd-stream", appauthor=False) / "kernels"
    return cache / f"{key}.cubin"


def forget(program: Program, folder: Path | None = None) -> None:
    """Drop the kept machine code: it was found to be broken."""
    nvrtc = _nvrtc()
    version = ".".join(map(str, _checked(nvrtc, *nvrtc.nvrtcVersion())))
    cubin_path(program.source, program.options, version, folder).unlink(missing_ok=True)


def _nvrtc() -> Any:
    """cuda.bindings.nvrtc, which torch for CUDA brings since 2.10; untyped."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: the bindings without the library
        raise KernelsUnavailableError(f"NVRTC cannot be used: {error}") from error
    return nvrtc


def _compile(nvrtc: Any, program: Program) -> bytes:
    (made,) = _checked(nvrtc, *nvrtc.nvrtcCreateProgram(program.source.encode(), program.name.encode(), 0, [], []))
    try:
        options = [option.encode() for option in program.options]
        (status,) = nvrtc.nvrtcCompileProgram(made, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            (size,) = _checked(nvrtc, *nvrtc.nvrtcGetProgramLogSize(made))
            log = bytearray(size)
            nvrtc.nvrtcGetProgramLog(made, log)
            raise KernelsUnavailableError(f"NVRTC refused the kernels: {log.rstrip(bytes(1)).decode(errors='replace')}")
        (size,) = _checked(nvrtc, *nvrtc.nvrtcGetCUBINSize(made))
        # The bindings fill the buffer in place: a bytearray would be copied.
        cubin: bytes = b" " * size
        _checked(nvrtc, *nvrtc.nvrtcGetCUBIN(made, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(made)


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
