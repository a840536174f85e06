"""Live video streams stepped together, against the same one by one, in one run, turn by turn.

    python -m tests.benchmarks.video_streaming         (a minute on two cores; a GPU is used where there is one)

Both go through the engine as a worker uses it: memories are taken from the store, stacked, stepped, split, put back.
`plain` is the network alone, one stream after the other, in the engine's dtype, as the original is run. Weights are
random: they change no time. `ratio` is one by one over together, of the median seconds; `tail_ratio` of the slowest
tenth, `plain_ratio` plain over together. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.decoding.video_engine import LivePart, VideoEngine
from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_decoder
from taesd_stream.models.tiny_video import VideoDecoder
from tests.benchmarks.figures import cpu_name

FORMAT: Final = "wan2_1"
STREAMS: Final = 8
MOST_S: Final = 60.0  # that kernels may take to compile
WARM_UP: Final = 2
BUDGET_BYTES: Final = 8 << 30


def main() -> None:
    """Measure each size, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=STREAMS)
    parser.add_argument("--sizes", nargs="+", default=None, metavar="HxW", help="of the latents, cells")
    arguments = parser.parse_args()
    default = ["16x16", "30x52", "60x104"] if arguments.device == "cuda" else ["4x4", "8x8", "16x16"]
    torch.manual_seed(0)
    engine = open_random(arguments.device)
    network = build_decoder(latent_format(FORMAT).decoder or "").to(arguments.device, engine.dtype).eval()
    assert isinstance(network, VideoDecoder)
    wait_for_kernels(engine, arguments.streams)
    results: dict[str, Any] = {
        "machine": machine(arguments.device),
        "format": FORMAT,
        "streams": arguments.streams,
        "runs": engine.speed_reason,
    }
    for size in arguments.sizes or default:
        height, width = (int(side) for side in size.split("x"))
        results[size] = measure(engine, arguments.streams, height, width, arguments.rounds)
        plain_s = statistics.median(plain_rounds(network, arguments.streams, height, width, arguments.rounds))
        results[size]["plain_fps"] = round(4 * arguments.streams / plain_s, 1)
        results[size]["plain_ratio"] = round(results[size]["together_fps"] / results[size]["plain_fps"], 2)
        sys.stdout.write(f"{size:>8}  {results[size]}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def open_random(device: str) -> VideoEngine:
    """The engine of the format, with random weights."""
    known = latent_format(FORMAT)
    network = build_decoder(known.decoder or "")
    assert isinstance(network, VideoDecoder)
    return VideoEngine(
        known,
        network,
        decoder=known.decoder or "",
        reason="",
        is_full=True,
        device=device,
        memory_budget_bytes=8 << 30,
    )


def wait_for_kernels(engine: VideoEngine, streams: int) -> None:
    """Step small streams until what runs is what will run: on a Hopper GPU kernels are compiled behind it."""
    until_s = time.monotonic() + MOST_S
    noise = torch.randn(streams, 1, latent_format(FORMAT).channels, 4, 4)
    while "until" in engine.speed_reason and time.monotonic() < until_s:
        timed(engine, [parts_of("first", 0, noise)])
    for number in range(streams):
        engine.forget(f"first{number}")


@torch.inference_mode()
def plain_rounds(network: VideoDecoder, streams: int, height: int, width: int, rounds: int) -> list[float]:
    """Seconds of each round of steps, one stream after the other."""
    like = next(network.parameters())
    latents = torch.randn(1, latent_format(FORMAT).channels, height, width).to(like)
    memories = [network.start(1, height, width) for _ in range(streams)]
    seconds = []
    for _ in range(WARM_UP + rounds):
        started_s = time.perf_counter()
        memories = [network.step(latents, memory)[1] for memory in memories]
        if like.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return seconds[WARM_UP:]


def measure(engine: VideoEngine, streams: int, height: int, width: int, rounds: int) -> dict[str, Any]:
    """Seconds a round of all streams takes, together and one by one, in turn; and how far their frames differ."""
    channels = latent_format(FORMAT).channels
    latents = torch.randn(WARM_UP + rounds, streams, 1, channels, height, width)
    together: list[float] = []
    one_by_one: list[float] = []
    difference = 0.0
    for index, now in enumerate(latents):
        ways = [
            (together, [parts_of("together", index, now)]),
            (one_by_one, [[part] for part in parts_of("alone", index, now)]),
        ]
        frames = []
        for seconds, jobs in ways if index % 2 else reversed(ways):  # neither always finds the cache warm
            shown, took_s = timed(engine, jobs)
            frames.append(torch.stack(shown))
            if index >= WARM_UP:
                seconds.append(took_s)
        difference = max(difference, float((frames[0] - frames[1]).abs().max()))
    pictures = streams * 4
    memory_bytes = engine.memories.nbytes // (2 * streams)
    for run in engine.memories.next_indices():
        engine.forget(run)
    return {
        "pixels": f"{8 * height}x{8 * width}",
        "together_fps": round(pictures / statistics.median(together), 1),
        "one_by_one_fps": round(pictures / statistics.median(one_by_one), 1),
        "ratio": round(statistics.median(one_by_one) / statistics.median(together), 2),
        "tail_ratio": round(tail(one_by_one) / tail(together), 2),
        "largest_difference": difference,
        "memory_bytes_a_stream": memory_bytes,
    }


def parts_of(prefix: str, index: int, latents: Tensor) -> list[LivePart]:
    """The next latent of each stream; each prefix has streams of its own."""
    return [LivePart(run=f"{prefix}{number}", index=index, latents=one) for number, one in enumerate(latents)]


def timed(engine: VideoEngine, jobs: Sequence[Sequence[LivePart]]) -> tuple[list[Tensor], float]:
    """The frames of all parts, in order, and the seconds that the jobs took, one after the other."""
    started_s = time.perf_counter()
    frames: list[Tensor] = []
    for job in jobs:
        shown = [one for group in engine.decode_live(job, budget_bytes=BUDGET_BYTES) for one in group]
        frames += [one.frames for one in sorted(shown, key=lambda one: one.place)]
    if frames[0].is_cuda:
        torch.cuda.synchronize()
    return frames, time.perf_counter() - started_s


def tail(seconds: Sequence[float]) -> float:
    """The 90th percentile."""
    return sorted(seconds)[int(0.9 * (len(seconds) - 1))]


def machine(device: str) -> dict[str, Any]:
    """What gave the figures."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name()
    return {"device": name, "cores": os.cpu_count(), "load": os.getloadavg()[0], "torch": torch.__version__}


if __name__ == "__main__":
    main()
