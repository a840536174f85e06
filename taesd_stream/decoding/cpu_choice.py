"""Which arithmetic is fastest on this processor: measured once with a small decoder, and remembered.

A processor's flags do not tell: bfloat16 is twice as fast where its instructions are wide, and ten times slower where
they are emulated; channels_last helps one library's kernels and hurts another's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import platformdirs
import torch

from taesd_stream.decoding.few_threads import is_guest
from taesd_stream.models import build_decoder
from taesd_stream.models.strict_loading import without_weights

logger = logging.getLogger(__name__)

DtypeName: TypeAlias = Literal["float32", "bfloat16"]
LayoutName: TypeAlias = Literal["contiguous", "channels_last"]

_DTYPES: Final[dict[DtypeName, torch.dtype]] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FORMATS: Final[dict[LayoutName, torch.memory_format]] = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
_CELLS: Final = 12  # side of the measured latent: 96 pixels, a few hundredths of a second
_RUNS: Final = 4  # and one before them, in which kernels are chosen and weights packed
_HOPELESS: Final = 4.0  # a form whose first run takes so many times the best is not run again
# Rounding costs a little quality: bfloat16 must be worth it, and the noise of a measurement must not decide.
_LEAST_GAIN: Final = 1.1


@dataclass(frozen=True, slots=True)
class CpuChoice:
    """A dtype and a memory format for decoders on the CPU."""

    dtype_name: DtypeName
    layout_name: LayoutName

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return _DTYPES[self.dtype_name]

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of weights and activations."""
        return _FORMATS[self.layout_name]

    @property
    def exact(self) -> CpuChoice:
        """The same for what is kept: recordings are decoded in float32."""
        return CpuChoice("float32", self.layout_name)


# bfloat16 in channels_last only: no processor was seen where it is faster the other way.
CHOICES: Final = (
    CpuChoice("float32", "channels_last"),
    CpuChoice("float32", "contiguous"),
    CpuChoice("bfloat16", "channels_last"),
)


def cpu_choice(file: Path | None = None) -> CpuChoice:
    """The fastest choice on this processor with this torch: remembered, else measured (1 s) now, but not by a guest.

    file: where it is remembered, None for the user's cache folder. A file that cannot be read or written costs only
    the next measurement.
    """
    path = file or platformdirs.user_cache_path("taesd-stream", appauthor=False) / "cpu_choice.json"
    key, known = _key(), _read(path)
    remembered = _choice_from(known.get(key))
    if remembered is not None:
        return remembered
    if is_guest():
        return CHOICES[0]
    times_s = measure()
    choice = fastest(times_s)
    logger.info(
        "cpu_measured choice=%s,%s ms=%s",
        choice.dtype_name,
        choice.layout_name,
        " ".join(f"{one.dtype_name},{one.layout_name}:{1000 * time_s:.0f}" for one, time_s in times_s.items()),
    )
    _write(path, {**known, key: {"dtype": choice.dtype_name, "layout": choice.layout_name}})
    return choice


@torch.inference_mode()
def measure() -> dict[CpuChoice, float]:
    """Seconds of processor time that each form takes for one small picture.

    On one thread, in the time that this thread really had: on a busy machine (the sampler's, maybe) the clock on the
    wall says more about the others than about the arithmetic.
    """
    own = torch.Generator().manual_seed(0)  # torch's one generator is the sampler's, if this is its process
    network = without_weights(partial(build_decoder, "taesd")).eval().requires_grad_(False)
    for weights in network.parameters():
        weights.normal_(std=0.05, generator=own)
    latents = torch.randn(1, 4, _CELLS, _CELLS, generator=own)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times_s: dict[CpuChoice, float] = {}
        for choice in CHOICES:
            run = partial(network.to(choice.dtype).to(memory_format=choice.memory_format), _as(choice, latents))  # type: ignore[call-overload]
            times_s[choice] = _time(run, min(times_s.values(), default=float("inf")))
        return times_s
    finally:
        torch.set_num_threads(threads)


def _as(choice: CpuChoice, latents: torch.Tensor) -> torch.Tensor:
    return latents.to(dtype=choice.dtype, memory_format=choice.memory_format)


def _time(run: Callable[[], object], best_s: float) -> float:
    """Processor time of one run, the mean of a few."""
    first_s = _seconds(run)
    return first_s if first_s > _HOPELESS * best_s else sum(_seconds(run) for _ in range(_RUNS)) / _RUNS


def _seconds(run: Callable[[], object]) -> float:
    started_s = time.thread_time()
    run()
    return time.thread_time() - started_s


def fastest(times_s: dict[CpuChoice, float]) -> CpuChoice:
    """The quickest form; float32 unless another dtype gains something that can be seen."""
    exact = min((one for one in times_s if one.dtype_name == "float32"), key=times_s.__getitem__)
    best = min(times_s, key=times_s.__getitem__)
    return best if times_s[best] * _LEAST_GAIN < times_s[exact] else exact


def _key() -> str:
    """This processor and this torch. The flags tell virtual machines of one name apart."""
    facts = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = ("model name", "flags", "Features", "CPU part")
        facts += sorted({line for line in lines if line.startswith(names)})
    processor = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
    return f"{processor} torch {torch.__version__}"


def _choice_from(entry: object) -> CpuChoice | None:
    """What a file says, None for anything that we would not have written."""
    if not isinstance(entry, dict):
        return None
    dtype_name, layout_name = entry.get("dtype"), entry.get("layout")
    if dtype_name not in _DTYPES or layout_name not in _FORMATS:
        return None
    return CpuChoice(dtype_name, layout_name)


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, known: dict[str, Any]) -> None:
    """Write it whole or not at all: two workers may measure at the same time."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        logger.info("cpu_choice_not_kept path=%s error=%s", path, error)
