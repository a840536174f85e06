"""What benchmarks say alike: percentiles, and the processor that gave the figures. Imports little."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np


def percentiles(times_ms: list[float]) -> dict[str, float]:
    """p50, p95 and p99, ms."""
    return {f"p{one}": round(float(np.percentile(times_ms, one)), 3) for one in (50, 95, 99)}


def cpu_name() -> str:
    """The processor, as the system names it."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
