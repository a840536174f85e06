"""Decoding on the CPU beside diffusers' AutoencoderTiny as shipped, interleaved in one run, and what each change gives.

    python -m tests.benchmarks.tiny_decoder            (two minutes if alone; --threads N, --rounds N)

Pictures of 256x256 and 512x512, float32 and, where the processor computes in it, bfloat16. Weights are random: they
change no time. Every round runs each network once; a ratio is the median over rounds of diffusers' time over ours, by
the wall's clock (`wall`) and the processor's (`cpu`, which other load disturbs less). `decode` is our
AutoencoderTiny.decode; the others are the bare decoder with one change more each: activations in place, channels_last,
upsampling folded, blocks fused (`engine`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from diffusers import AutoencoderTiny as TheirAutoencoderTiny
from torch import Tensor, nn

from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.models import AutoencoderTiny
from taesd_stream.models.networks import Block

SIZES_PX: Final = (256, 512)
PEER: Final = "diffusers"

Decode = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"processor": processor(), "torch": torch.__version__, "threads": arguments.threads}
    for dtype in dtypes():
        networks = prepared(dtype)
        for size_px in SIZES_PX:
            name = f"{str(dtype).removeprefix('torch.')}_{size_px}"
            results[name] = measured(networks, size_px, dtype, arguments.rounds)
            for network, figures in results[name].items():
                sys.stdout.write(f"{name:<14} {network:<14} {json.dumps(figures)}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def processor() -> str:
    """Its name as Linux knows it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  # no file of ours
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def dtypes() -> list[torch.dtype]:
    """float32, and bfloat16 where oneDNN computes in it."""
    has_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return [torch.float32, torch.bfloat16] if has_bfloat16 else [torch.float32]


def prepared(dtype: torch.dtype) -> dict[str, Decode]:
    """The peer, ours as it ships, and ours with one change after the other on top."""
    theirs: Any = TheirAutoencoderTiny()  # type: ignore[no-untyped-call]
    ours = AutoencoderTiny()
    ours.load_state_dict(theirs.state_dict())
    theirs, ours = theirs.eval().to(dtype), ours.eval().to(dtype)
    assert ours.decoder is not None
    in_place = copy.deepcopy(ours.decoder.bare())
    channels_last = copy.deepcopy(in_place).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unfused = copy.deepcopy(channels_last)
    for block in unfused.modules():
        if isinstance(block, Block):
            block.conv[0].register_forward_hook(leave)  # a watched block runs layer by layer
    return {
        PEER: lambda latents: theirs.decode(latents).sample,
        "decode": lambda latents: ours.decode(latents).sample,
        "in_place": in_place,
        "channels_last": in_channels_last(unfused),
        "folded": in_channels_last(fold_upsampling(unfused)),
        "engine": in_channels_last(fold_upsampling(channels_last)),
    }


def leave(*_arguments: Any) -> None:
    """A hook that does nothing."""


def in_channels_last(network: nn.Module) -> Decode:
    """The network with weights and latents in channels_last, as an engine runs it."""
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda latents: network(latents.contiguous(memory_format=torch.channels_last))


@torch.inference_mode()
def measured(networks: dict[str, Decode], size_px: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Median times of each network, and the ratio of the peer's to its own."""
    latents = torch.randn(1, 4, size_px // 8, size_px // 8).to(dtype)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for round_ in range(rounds + 1):  # the first warms up
        for name, network in networks.items():
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            network(latents)
            took = (time.perf_counter() - wall_s, time.process_time() - cpu_s)
            if round_:
                times[name].append(took)
    return {name: figures(times[PEER], own) for name, own in times.items()}


def figures(peer: list[tuple[float, float]], own: list[tuple[float, float]]) -> dict[str, float]:
    """wall_ms and cpu_ms: medians. wall, cpu: the median over rounds of the peer's time over ours."""
    result = {}
    for place, clock in enumerate(("wall", "cpu")):
        result[f"{clock}_ms"] = round(statistics.median(took[place] for took in own) * 1000, 1)
        ratios = [theirs[place] / ours[place] for theirs, ours in zip(peer, own, strict=True)]
        result[clock] = round(statistics.median(ratios), 2)
    return result


if __name__ == "__main__":
    main()
