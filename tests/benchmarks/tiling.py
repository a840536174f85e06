"""Exact tiles against the whole network and against diffusers' blended tiles: time, memory, error; on the CPU.

    python -m tests.benchmarks.tiling            (some minutes at 2048x2048; --side for another size)

Rounds alternate, so that a shared machine's load falls on all; times are the least of the rounds. `cpu_s` is processor
time, which other processes disturb least. `peak_mib`: tensors alive at once beside weights and latents. Errors are
against the whole network, over max(1, its largest value). Weights are random: they change no time. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.decoding.live_bytes import LiveBytes
from taesd_stream.decoding.tiling import decode_tiled
from taesd_stream.models import build_decoder
from tests.benchmarks.figures import cpu_name
from tests.test_tiling import lively

Decode: TypeAlias = Callable[[Tensor], Tensor]

MIB: Final = 1 << 20


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--side", type=int, default=2048, help="pixels on a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure_all(arguments.side, arguments.rounds)
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": arguments.threads, "load": os.getloadavg()[0]}
    for name, row in results["ways"].items():
        sys.stdout.write(f"{name:<28} {json.dumps(row)}\n")
    sys.stdout.write(json.dumps({"machine": machine, "torch": torch.__version__, **results}) + "\n")


@torch.no_grad()
def measure_all(side: int, rounds: int) -> dict[str, Any]:
    """Every way's time, peak and error."""
    latents = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    ways = ways_to_decode(3 * 4 * side * side)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    rows: dict[str, dict[str, float]] = {}
    expected = ways["whole"](latents)
    for name, decode in ways.items():
        with LiveBytes(beside=(latents,)) as live:
            picture = decode(latents)
        error = float((picture - expected).abs().max() / expected.abs().max().clamp(min=1))
        rows[name] = {"peak_mib": round(live.peak / MIB, 1), "error": float(f"{error:.2g}")}
        del picture
    for _ in range(rounds):
        for name, decode in ways.items():
            times[name].append(timed(decode, latents))
    for name, row in rows.items():
        row["s"], row["cpu_s"] = (round(min(column), 2) for column in zip(*times[name], strict=True))
        row["times_whole"] = round(row["cpu_s"] / min(cpu_s for _, cpu_s in times["whole"]), 3)
    return {"pixels": f"{side}x{side}", "ways": rows}


def ways_to_decode(picture_bytes: int) -> dict[str, Decode]:
    """By name; all with the same weights, in channels_last, values in [0, 1]."""
    from diffusers import AutoencoderTiny

    network = lively(build_decoder("taesd")).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    folded = fold_upsampling(network)
    theirs: Any = AutoencoderTiny()  # type: ignore[no-untyped-call]
    weights = dict(network.state_dict())
    # diffusers keeps the clamp outside of the layers: its numbers are one less.
    renumbered = {f"layers.{int(key.split('.')[0]) - 1}.{key.split('.', 1)[1]}": weights[key] for key in weights}
    theirs.decoder.load_state_dict(renumbered)
    theirs.eval().to(memory_format=torch.channels_last)
    theirs.enable_tiling()

    def tiled(budget_bytes: int) -> Decode:
        return lambda latents: decode_tiled(network, latents, budget_bytes=picture_bytes + budget_bytes)

    return {
        "whole": lambda latents: network(latents.contiguous(memory_format=torch.channels_last)),
        "whole, folded": lambda latents: folded(latents.contiguous(memory_format=torch.channels_last)),
        "tiled, picture + 512 MiB": tiled(512 * MIB),
        "tiled, picture + 64 MiB": tiled(64 * MIB),
        "tiled, picture + 16 MiB": tiled(16 * MIB),
        "diffusers, tiled": lambda latents: theirs.decode(latents).sample / 2 + 0.5,
    }


def timed(decode: Decode, latents: Tensor) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    decode(latents)
    return time.perf_counter() - started_s, time.process_time() - started_cpu_s


if __name__ == "__main__":
    main()
