"""Tiny decoders on one NVIDIA GPU: frames/s of each way to run the same network, and how far each is from float32.

    python -m tests.benchmarks.gpu [--weights taef2_decoder.pth --latents latents.safetensors] [--compile]
    python -m tests.benchmarks.gpu --cold

Ways: `diffusers`, its own AutoencoderTiny with these weights, where it is installed, its picture brought to [0, 1];
`eager`, our network as it is, NCHW; `compile`, the same by torch.compile with max-autotune; `stock`, cuDNN's fused
calls in CUDA graphs; `own`, our kernels; `float8`. All in float16; RGB or I420 planes out. Times are medians of device
events around whole calls; `sustained` is back to back for some seconds, way after way and all of them again, after
which the card is as warm, and as slow, as in use. `batch_1_ms` is taken on the cool card and after that. `budget`: the
most that an engine allocates, its result in it, for batches and pictures that need more than it may take. Compare
within one run only. The last line is JSON, before it RESULTS.md's table. `--cold` is a start alone: give it a cache of
its own (XDG_CACHE_HOME, CUDA_CACHE_PATH).
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
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.stock_decoder import StockDecoder
from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_decoder

Run = Callable[[Tensor], Tensor]

SIZES_PX: Final = (256, 512, 1024, 2048)
BATCHES: Final = (1, 4, 16, 64)
LARGEST_EAGER_PX: Final = 64 * 512 * 512  # in one batch, which eager does not cut
LARGEST_PX: Final = 16 * 1024 * 1024  # in all: larger batches only repeat what smaller ones show
SUSTAINED_TOO: Final = ((1024, 4), (2048, 1))  # pixels, batch; planes alone
BUDGET_BYTES: Final = 1 << 30
OVER_BUDGET: Final = ((16, 512), (2, 2048), (1, 4096))  # pictures, pixels; the last goes in tiles
COLD_S: Final = 60.0


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
    """Seconds from a network on the processor to its first picture and to the kernels in use, and pictures until then.

    A picture follows the other, as in a daemon: nothing waits for the kernels.
    """
    started_s = time.perf_counter()
    network = build_decoder("taesd").half().cuda().eval().requires_grad_(False)
    decoder, at_first = accelerated(network, "cuda")
    assert decoder is not None, at_first
    latents = torch.randn(1, 4, 64, 64)
    decoder.planes(latents).cpu()
    first_s, pictures, slowest_s = time.perf_counter() - started_s, 1, 0.0
    while decoder.reason == at_first and time.perf_counter() - started_s < COLD_S:
        before_s = time.perf_counter()
        decoder.planes(latents).cpu()
        slowest_s = max(slowest_s, time.perf_counter() - before_s)
        pictures += 1
    return {
        "first_picture_s": round(first_s, 2),
        "kernels_s": round(time.perf_counter() - started_s, 2),
        "pictures_until_then": pictures,
        "slowest_of_them_ms": round(1000 * slowest_s),
        "reasons": [at_first, decoder.reason],
    }


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


def diffusers_decode(network: nn.Module) -> dict[str, Run]:
    """diffusers' AutoencoderTiny as it ships, float16, with this network's weights; nothing where it is not installed.

    Its picture is [-1, 1]; it is brought to [0, 1] as diffusers' image processor does.
    """
    try:
        from diffusers import AutoencoderTiny
    except (ImportError, RuntimeError) as error:  # RuntimeError: of a package that it looks for and cannot use
        print(f"diffusers is not measured: {error}")
        return {}
    theirs: Any = AutoencoderTiny()  # type: ignore[no-untyped-call]
    theirs.decoder.load_state_dict(dict(zip(theirs.decoder.state_dict(), network.state_dict().values(), strict=True)))
    theirs = theirs.half().cuda().eval().requires_grad_(False)
    return {"diffusers": lambda z: (theirs.decode(z).sample * 0.5 + 0.5).clamp(0, 1)}


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
                if name in ("diffusers", "eager") and batch * size**2 > LARGEST_EAGER_PX:
                    continue
                fps[name] = round(batch * 1000 / milliseconds(run, latents), 1)
            rows.append({"size_px": size, "batch": batch, "fps": fps})
            print(f"{size:5d} x{batch:3d}  " + "  ".join(f"{name} {value:8.1f}" for name, value in fps.items()))
            torch.cuda.empty_cache()
    return rows


def compiled_figures(seconds: float) -> dict[str, Any]:
    """torch.compile with max-autotune, channels_last, at 512x512, batch 16, beside own planes: minutes to compile."""
    network, decoder, _ = open_network("taesd", None)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run: Run = torch.compile(network, mode="max-autotune")
    latents = torch.randn(16, 4, 64, 64, device="cuda", dtype=torch.float16)
    latents = latents.contiguous(memory_format=torch.channels_last)
    fps = round(16000 / milliseconds(lambda z: run(z), latents), 1)
    ways = {"compile": run, "own planes": decoder.planes}
    return {"fps_512_16": fps, "sustained_fps": sustained(ways, latents, seconds, 1)}


def sustained(ways: dict[str, Run], latents: Tensor, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Frames a second of each way in each round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            found[name].append(round(sustained_fps(run, latents, seconds), 1))
            print(f"sustained {tuple(latents.shape)} {name} {found[name][-1]}", flush=True)
    return found


def over_budget() -> dict[str, dict[str, float]]:
    """What an engine allocates for work that needs more than its budget, its result in it, GiB; and how long it is."""
    network = build_decoder("taesd")
    he_weights(network)
    engine = Engine(latent_format("sd1"), network, decoder="taesd", reason="", is_full=True, device="cuda")
    warm = torch.randn(1, 4, 8, 8)
    until_s = time.perf_counter() + COLD_S
    at_first = engine.speed_reason
    while engine.speed_reason == at_first and time.perf_counter() < until_s:
        list(engine.decode_planes(warm, budget_bytes=BUDGET_BYTES))
    found: dict[str, dict[str, float]] = {}
    for count, size_px in OVER_BUDGET:
        latents = torch.randn(count, 4, size_px // 8, size_px // 8)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):  # by single calls, then captured, then replayed
            started_s = time.perf_counter()
            most = max(len(planes) for _, planes in engine.decode_planes(latents, budget_bytes=BUDGET_BYTES))
            torch.cuda.synchronize()
            last_s = time.perf_counter() - started_s
        is_tiled = size_px == OVER_BUDGET[-1][1]
        result_bytes = most * size_px**2 * (12 if is_tiled else 1.5)  # tiles give RGB in float32 before planes
        peak = torch.cuda.max_memory_allocated() - before
        found[f"{size_px}x{size_px}, {count}"] = {
            "budget_gib": BUDGET_BYTES / 2**30,
            "peak_gib": round(peak / 2**30, 3),
            "result_gib": round(result_bytes / 2**30, 3),
            "ms": round(1000 * last_s, 1),
        }
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """RESULTS.md's first table: 512x512 in batches of 16 is its first row."""
    rows = sorted(rows, key=lambda row: (row["size_px"], row["batch"]) != (512, 16))
    names = list(rows[0]["fps"])
    heads = [name if name.endswith("planes") else f"{name} RGB" for name in names]
    lines = [f"| picture, batch | {' | '.join(heads)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        figures = " | ".join(f"{row['fps'][name]:,.0f}" if name in row["fps"] else "" for name in names)
        unit = " frames/s" if row is rows[0] else ""
        lines.append(f"| {row['size_px']}x{row['size_px']}, {row['batch']} | {figures}{unit} |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    """Measure, print, and end in JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--weights", type=Path, help="taef2's, trained")
    parser.add_argument("--latents", type=Path, help="FLUX.2's of real pictures: `latents`, (4, 32, 64, 64)")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes")
    parser.add_argument("--sustained-s", type=float, default=4)
    parser.add_argument("--rounds", type=int, default=2, help="of the sustained figures")
    parser.add_argument("--cold", action="store_true", help="measure a start, and nothing else")
    options = parser.parse_args()
    result: dict[str, Any] = {"cold": cold_start(), "device": torch.cuda.get_device_name()}
    if not options.cold:
        result |= {"torch": torch.__version__, **ceilings()}
        print(result)
        result |= random_weights(options)
        if options.weights:
            result["taef2"] = trained(options.weights, options.latents)
        print(markdown(result["speed"]))
        if options.compile:
            print(json.dumps(result))  # whoever does not wait for the compiler has these
            result["compile"] = compiled_figures(options.sustained_s)
    print(json.dumps(result))


def random_weights(options: argparse.Namespace) -> dict[str, Any]:
    """TAESD's layout: errors, memory, every size, sustained."""
    network, decoder, float8 = open_network("taesd", None)
    ways = diffusers_decode(network) | ways_to_run(network, decoder, float8)
    noise = torch.randn(16, 4, 64, 64, device="cuda", dtype=torch.float16)
    rgb_ways = {name: run for name, run in ways.items() if "planes" not in name}
    result: dict[str, Any] = {
        "reason": f"{decoder.reason}; {float8.reason}",
        "psnr_db": errors(network, rgb_ways, noise[:4]),
        "peak_gib_512_16": {name: peak_gib(run, noise) for name, run in ways.items()},
        "budget": over_budget(),
        "batch_1_ms": batch_1_ms(ways, noise),
    }
    print(json.dumps(result))
    result["speed"] = speed_table(ways, 4)
    result["sustained_fps"] = sustained(ways, noise, options.sustained_s, options.rounds)
    result["batch_1_ms_after"] = batch_1_ms(ways, noise)
    planes = {name: run for name, run in ways.items() if "planes" in name}
    for size_px, batch in SUSTAINED_TOO:
        latents = torch.randn(batch, 4, size_px // 8, size_px // 8, device="cuda", dtype=torch.float16)
        result[f"sustained_fps_{size_px}_{batch}"] = sustained(planes, latents, options.sustained_s, 1)
    return result


def batch_1_ms(ways: dict[str, Run], latents: Tensor) -> dict[str, float]:
    """Of one 512x512 picture, as each way makes it."""
    return {name: round(milliseconds(run, latents[:1]), 3) for name, run in ways.items()}


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
