"""The NVIDIA GPUs of this host, as CUDA numbers them: how much of each is free, and which processors are next to it.

Without torch, for the supervisor; and in a process of its own, for a driver may hang or crash whoever asks it:

    python -m taesd_stream_workers.role.gpus
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

logger = logging.getLogger(__name__)

PROBE_S: Final = 20.0
PCI_FOLDER: Final = Path("/sys/bus/pci/devices")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. index: torch's cuda:N. bus_id: where it is, as in 0000:1b:00.0. free_bytes: None where none can say."""

    index: int
    bus_id: str
    free_bytes: int | None


class _Memory(ctypes.Structure):
    """nvmlMemory_t of nvml.h."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def find_gpus() -> list[Gpu]:
    """All that CUDA shows a process of ours; none where there is no driver, or where it does not answer."""
    try:
        ctypes.CDLL(_library("cuda"))
    except OSError:
        return []
    command = [sys.executable, "-m", "taesd_stream_workers.role.gpus"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=PROBE_S, check=True)  # noqa: S603 ourselves
        return [Gpu(**row) for row in json.loads(answer.stdout)]
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        logger.warning("gpus_not_found error=%s", error)
        return []


def devices(wanted: str, min_free_bytes: int) -> list[str]:
    """The device of each decode worker that a daemon starts. wanted: as `decoder.device` says, several by commas.

    "auto" on a host of several GPUs: all that have so much memory free, or the processor if none has. Where there is
    one or none, the worker decides.
    """
    if wanted != "auto":
        return [name.strip() for name in wanted.split(",")]
    gpus = find_gpus()
    if len(gpus) < 2:
        return ["auto"]
    free = [gpu for gpu in gpus if gpu.free_bytes is None or gpu.free_bytes >= min_free_bytes]
    return [f"cuda:{gpu.index}" for gpu in free] or ["cpu"]


def stay_near(index: int) -> str | None:
    """Run this process on the processors next to a GPU: their memory is too, for it is given where it is first used.

    Returns: the processors, in words; None where the host does not say, or all are.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    gpu = next((one for one in visible_gpus() if one.index == index), None)
    if gpu is None:
        return None
    allowed = os.sched_getaffinity(0)
    near = local_cpus(gpu.bus_id) & allowed
    if not near or near == allowed:
        return None
    for thread in Path("/proc/self/task").iterdir():  # each thread has a set of its own; a new one takes its maker's
        with contextlib.suppress(OSError):
            os.sched_setaffinity(int(thread.name), near)
    return f"{len(near)} of {len(allowed)} processors, next to {gpu.bus_id}"


def local_cpus(bus_id: str, folder: Path = PCI_FOLDER) -> set[int]:
    """Processors on a PCI device's side of the host; empty where the system does not say."""
    try:
        text = (folder / bus_id.lower() / "local_cpulist").read_text(encoding="ascii").strip()
    except OSError:
        return set()
    cpus: set[int] = set()
    for part in text.split(",") if text else []:
        first, _, last = part.partition("-")
        cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def visible_gpus() -> list[Gpu]:
    """Ask the driver, in this process."""
    try:
        cuda = ctypes.CDLL(_library("cuda"))
    except OSError:
        return []
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found: list[Gpu] = []
    for index in range(count.value):
        device, text = ctypes.c_int(), ctypes.create_string_buffer(32)
        if cuda.cuDeviceGet(ctypes.byref(device), index) or cuda.cuDeviceGetPCIBusId(text, len(text), device):
            continue
        bus_id = text.value.decode()
        found.append(Gpu(index, bus_id, _free_bytes(bus_id)))
    return found


def is_mps_on() -> bool:
    """Whether programs that start now share a GPU by NVIDIA's Multi-Process Service: CUDA looks for this pipe, too."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")  # noqa: S108 NVIDIA's own default
    return (Path(folder) / "control").exists()


def _free_bytes(bus_id: str) -> int | None:
    """By NVML, which needs no memory on the GPU itself."""
    try:
        nvml = ctypes.CDLL(_library("nvidia-ml"))
    except OSError:
        return None
    handle, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(bus_id.encode(), ctypes.byref(handle)):
        return None
    return None if nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) else int(memory.free)


def _library(name: str) -> str:
    if sys.platform == "win32":
        return {"cuda": "nvcuda.dll", "nvidia-ml": "nvml.dll"}[name]
    return f"lib{name}.so.1"


if __name__ == "__main__":
    sys.stdout.write(json.dumps([dataclasses.asdict(gpu) for gpu in visible_gpus()]))
