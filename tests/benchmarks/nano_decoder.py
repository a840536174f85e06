"""The nano decoders: speed beside diffusers' AutoencoderTiny in one run, and quality on a folder of pictures.

    python -m tests.benchmarks.nano_decoder [--sizes 256 512] [--rounds 15] [--pictures FOLDER --weights DIR]

FOLDER holds pictures that no decoder was trained on: the middle of each is measured, its short side scaled to 512
pixels. DIR holds taef2_encoder.pth, taef2_decoder.pth and taesana_encoder.pth.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn

from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.checkpoints import load_state_dict
from taesd_stream.training.quality import psnr_db, sharpness, ssim

SIDE = 512
BARS = {256: 18, 512: 25}


def speed(sizes: list[int], rounds: int) -> None:
    """Milliseconds a picture, turn by turn; all on the same latents' size, batch 1."""
    theirs: Any = AutoencoderTiny(latent_channels=32)  # type: ignore[no-untyped-call]
    theirs.eval().requires_grad_(False)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32, median of {rounds} rounds, ms")
    for side in sizes:
        flux2 = torch.randn(1, 32, side // 8, side // 8)
        sana = torch.randn(1, 32, side // 32, side // 32).contiguous(memory_format=torch.channels_last)
        like = flux2.contiguous(memory_format=torch.channels_last)
        ways: dict[str, Callable[[], object]] = {"AutoencoderTiny": partial(theirs.decode, flux2)}
        for name, latents in (("flux2", like), ("sana", sana)):
            ours = build_decoder("nano", latent_format=name).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            ways[f"nano {name}"] = partial(ours, latents)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 2):
            for name, run in ways.items():
                started_s = time.perf_counter()
                run()
                if turn >= 2:
                    times[name].append(time.perf_counter() - started_s)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = ", ".join(
            f"{name} {1000 * value:.1f} ({medians['AutoencoderTiny'] / value:.1f}x)" for name, value in medians.items()
        )
        print(f"{side}x{side}: {ratios}; bar for nano flux2: {BARS.get(side, 0)}x")


def quality(folder: Path, weights: Path) -> None:
    """Means over the pictures, and the worst differences."""
    pictures = [_middle(path) for path in sorted(folder.iterdir()) if path.suffix in (".png", ".jpg", ".webp")]
    for name, tiny in (("flux2", "taef2"), ("sana", "taesana")):
        encoder = build_encoder(tiny, load_state_dict(weights / f"{tiny}_encoder.pth", "encoder")).float().eval()
        decoders = {kind: build_decoder(kind, latent_format=name).float().eval() for kind in ("nano", "linear")}
        own = weights / f"{tiny}_decoder.pth"
        if own.exists():
            decoders[tiny] = build_decoder(tiny, load_state_dict(own)).float().eval()
        rows = {kind: np.array([_row(decoder, encoder, one) for one in pictures]) for kind, decoder in decoders.items()}
        print(f"{name}, {len(pictures)} pictures: dB, SSIM, gradient / original's, dB with noise 0.3")
        for kind, values in rows.items():
            print(f"  {kind:8}", "  ".join(f"{value:.3f}" for value in values.mean(0)))
            if kind != "nano":
                apart = rows["nano"] - values
                print(f"           nano {apart[:, 0].mean():+.2f} dB, worst {apart[:, 0].min():+.2f}, ", end="")
                print(f"SSIM {apart[:, 1].mean():+.4f}, with noise {apart[:, 3].mean():+.2f} dB")


def _middle(path: Path) -> Tensor:
    image = Image.open(path).convert("RGB")
    scale = SIDE / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    pixels = np.array(image.crop((left, top, left + SIDE, top + SIDE)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def _row(decoder: nn.Module, encoder: nn.Module, picture: Tensor) -> tuple[float, float, float, float]:
    latents = encoder(picture)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)) * 0.3
    shown, noisy = (decoder(one).clamp(0, 1)[0] for one in (latents, latents + noise))
    original = picture[0]
    contrast = sharpness(shown) / sharpness(original)
    return psnr_db(shown, original), ssim(shown, original), contrast, psnr_db(noisy, original)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--weights", type=Path)
    arguments = parser.parse_args()
    with torch.inference_mode():
        speed(arguments.sizes, arguments.rounds)
        if arguments.pictures and arguments.weights:
            quality(arguments.pictures, arguments.weights)


if __name__ == "__main__":
    main()
