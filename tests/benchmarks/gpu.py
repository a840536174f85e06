"""Tiny decoders on one NVIDIA GPU: frames/s of each way to run the same network, and how far each is from float32.

    python -m tests.benchmarks.gpu [--weights taef2_decoder.pth --latents latents.safetensors] [--compile]

Ways: `eager`, the network as it is in float16, NCHW, which is what diffusers' AutoencoderTiny does; `compile`, the same
by torch.compile with max-autotune; `stock`, cuDNN's fused calls in CUDA graphs; `own`, our kernels. RGB or I420 planes
out. Times are medians of device events around whole calls; `sustained` is back to back for some seconds, after which
the card is as warm, and as slow, as in use. Compare within one run only. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from taesd_stream.decoding.acceleration import AcceleratedDecoder, accelerated
from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.cuda_graphs import GraphedBody
from taesd_stream.decoding.stock_decoder import StockDecoder
from taesd_stream.models import build_decoder

Run = Callable[[Tensor], Tensor]

SIZES_PX: Final = (256, 512, 1024, 2048)
BATCHES: Final = (1, 4, 16, 64)
LARGEST_EAGER_PX: Final = 64 * 512 * 512  # in one batch, which eager does not cut
LARGEST_PX: Final = 16 * 1024 * 1024  # in all: larger batches only repeat what smaller ones show


def he_weights(network: nn.Module) -> None:
    """Random weights that keep activations as large as trained ones do: the power drawn depends on them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            scale = math.sqrt(2 / parameter[0].numel()) * (0.3 if name.endswith("conv.4.weight") else 1)
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05


def milliseconds(run: Run, latents: Tensor) -> float:
    """Median time of a call on the device."""
    for _ in range(3):
        run(latents)
    repeats = 15 if latents.numel() > 4 * 16 * 64**2 else 40
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run(latents)
        event.record()
    torch.cuda.synchronize()
    return statistics.median(float(a.elapsed_time(b)) for a, b in itertools.pairwise(events))


def sustained_fps(run: Run, latents: Tensor, seconds: float) -> float:
    """Frames a second, back to back for so long."""
    run(latents)
    torch.cuda.synchronize()
    started_s, calls = time.perf_counter(), 0
    while time.perf_counter() - started_s < seconds:
        for _ in range(20):
            run(latents)
        calls += 20
        torch.cuda.synchronize()
    return calls * len(latents) / (time.perf_counter() - started_s)


def peak_gib(run: Run, latents: Tensor) -> float:
    """Memory that a way allocates at its worst moment, weights and graphs of all ways not counted."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(latents)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def cold_start() -> dict[str, Any]:
    """Seconds from a network on the processor to its first picture, and to the kernels in use."""
    started_s = time.perf_counter()
    network = build_decoder("taesd").half().cuda().eval().requires_grad_(False)
    decoder, _ = accelerated(network, "cuda")
    assert decoder is not None
    decoder.planes(torch.randn(1, 4, 64, 64)).cpu()
    first_s = time.perf_counter() - started_s
    decoder.wait()
    return {"first_picture_s": round(first_s, 2), "kernels_s": round(time.perf_counter() - started_s, 2)}


def ceilings() -> dict[str, float]:
    """The card's own: a large matrix product, and a large copy."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    product_ms = milliseconds(lambda x: x @ x, a[None])
    block = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(block)
    copy_ms = milliseconds(lambda x: target.copy_(x), block)
    return {"matmul_tflops": 2 * 8192**3 / product_ms / 1e9, "copy_tb_s": 2 * 2**30 / copy_ms / 1e9}


def psnr_db(given: Tensor, expected: Tensor) -> float:
    """Of pictures in [0, 1]."""
    return -10 * math.log10(float((given.double() - expected.double()).square().mean()) + 1e-20)


def errors(network: nn.Module, ways: dict[str, Run], latents: Tensor) -> dict[str, float]:
    """PSNR of each way's RGB against the network in float32."""
    torch.backends.cudnn.allow_tf32 = False
    exact = copy.deepcopy(network).float()
    expected = torch.cat([exact(one[None].float()).clamp(0, 1) for one in latents])
    return {name: psnr_db(run(latents), expected) for name, run in ways.items()}


def ways_to_run(
    network: nn.Module, accelerated_decoder: AcceleratedDecoder, float8: AcceleratedDecoder
) -> dict[str, Run]:
    """Name -> a call that takes latents (N, C, h, w) float16."""
    stock = StockDecoder(network)
    return {
        "eager": lambda z: network(z).clamp(0, 1),
        "stock": GraphedBody(stock.rgb, stock.spatial_factor),
        "stock planes": GraphedBody(stock.planes, stock.spatial_factor),
        "own": accelerated_decoder.rgb,
        "own planes": accelerated_decoder.planes,
        "float8": float8.rgb,
        "float8 planes": float8.planes,
    }


def open_network(family: str, weights: Path | None) -> tuple[nn.Module, AcceleratedDecoder, AcceleratedDecoder]:
    """A network on the GPU in float16, NCHW, and accelerated without and with float8; kernels in use where they can."""
    network = build_decoder(family, torch.load(weights, weights_only=True) if weights else None)
    if weights is None:
        he_weights(network)
    network = network.half().cuda().eval().requires_grad_(False)
    decoder, reason = accelerated(network, "cuda")
    float8, _ = accelerated(network, "cuda", is_float8=True)
    assert decoder is not None, reason
    assert float8 is not None
    decoder.wait()
    float8.wait()
    print(f"{family}: {decoder.reason}; {float8.reason}")
    return network, decoder, float8


def speed_table(ways: dict[str, Run], channels: int) -> list[dict[str, Any]]:
    """Frames/s at every size and batch; printed as it comes."""
    rows = []
    for size in SIZES_PX:
        for batch in [batch for batch in BATCHES if batch * size**2 <= LARGEST_PX]:
            latents = torch.randn(batch, channels, size // 8, size // 8, device="cuda", dtype=torch.float16)
            fps = {}
            for name, run in ways.items():
                if name in ("eager", "compile") and batch * size**2 > LARGEST_EAGER_PX:
                    continue
                fps[name] = round(batch * 1000 / milliseconds(run, latents), 1)
            rows.append({"size_px": size, "batch": batch, "fps": fps})
            print(f"{size:5d} x{batch:3d}  " + "  ".join(f"{name} {value:8.1f}" for name, value in fps.items()))
            torch.cuda.empty_cache()
    return rows


def compiled_fps(network: nn.Module, channels: int) -> float:
    """torch.compile with max-autotune at 512x512, batch 16: minutes to compile."""
    latents = torch.randn(16, channels, 64, 64, device="cuda", dtype=torch.float16)
    latents = latents.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(network.to(memory_format=torch.channels_last), mode="max-autotune")  # type: ignore[call-overload]
    return round(16000 / milliseconds(lambda z: compiled(z), latents), 1)


@torch.inference_mode()
def main() -> None:
    """Measure, print, and end in JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--latents", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--sustained-s", type=float, default=4)
    options = parser.parse_args()
    result: dict[str, Any] = {"cold": cold_start(), "device": torch.cuda.get_device_name()}
    result |= {"torch": torch.__version__, **ceilings()}
    print(result)
    network, decoder, float8 = open_network("taesd", None)
    ways = ways_to_run(network, decoder, float8)
    noise = torch.randn(16, 4, 64, 64, device="cuda", dtype=torch.float16)
    result["reason"] = decoder.reason
    result["psnr_db"] = errors(network, {name: run for name, run in ways.items() if "planes" not in name}, noise[:4])
    result["peak_gib_512_16"] = {name: peak_gib(run, noise) for name, run in ways.items()}
    result["speed"] = speed_table(ways, 4)
    result["sustained_fps"] = {name: sustained_fps(ways[name], noise, options.sustained_s) for name in ways}
    print("sustained", result["sustained_fps"])
    if options.weights:
        result["taef2"] = trained(options.weights, options.latents)
    if options.compile:
        result["compile_fps_512_16"] = compiled_fps(network, 4)
    print(json.dumps(result))


def trained(weights: Path, file: Path | None) -> dict[str, Any]:
    """The same with FLUX.2's trained weights, whose first stage is pooled: errors, and speed at 512x512."""
    network, decoder, float8 = open_network("taef2", weights)
    ways = ways_to_run(network, decoder, float8)
    latents = load_file(file)["latents"].cuda().half() if file else torch.randn(4, 32, 64, 64).cuda().half()
    rgb_ways = {name: run for name, run in ways.items() if "planes" not in name}
    exact = copy.deepcopy(network).float()
    expected = video_planes(torch.cat([exact(one[None].float()) for one in latents])).int()
    apart = {name: (run(latents).int() - expected).abs() for name, run in ways.items() if "planes" in name}
    many = latents.repeat(4, 1, 1, 1)
    return {
        "reason": f"{decoder.reason}; {float8.reason}",
        "psnr_db": errors(network, rgb_ways, latents),
        "planes_apart_max": {name: int(codes.max()) for name, codes in apart.items()},
        "planes_apart_share": {name: round(float((codes > 0).float().mean()), 4) for name, codes in apart.items()},
        "fps_512_16": {name: round(16000 / milliseconds(run, many), 1) for name, run in ways.items()},
    }


if __name__ == "__main__":
    main()
