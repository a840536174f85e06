"""Make the demo's data: paint the scenes, encode them with the FLUX.2 tiny encoder, fit the linear projection.

    python -m tools.make_demo_data taef2_encoder.pth --video clip.mp4

writes taesd_stream/data/demo_flux2.safetensors and linear_flux2.safetensors, and prints how well the projection does on
frames that it was not fitted on. The same input gives the same files. `--preview DIR` writes the painted scenes as PNG.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_encoder
from taesd_stream.models.checkpoints import load_state_dict
from taesd_stream.models.linear import FactorProjection, LeastSquares
from tools.figures import balloons, city, lighthouse, meadow, moonrise
from tools.landscapes import alpine, aurora, dunes, sunrise
from tools.painting import Field, noise

DATA: Final = Path(__file__).parent.parent / "taesd_stream" / "data"
STILLS: Final[dict[str, tuple[Callable[[int, int], Field], int, int]]] = {  # painter, height and width in pixels
    "sunrise": (sunrise, 384, 640),
    "alpine": (alpine, 512, 512),
    "aurora": (aurora, 512, 512),
    "city": (city, 512, 320),
    "balloons": (balloons, 512, 320),
    "dunes": (dunes, 320, 512),
    "meadow": (meadow, 256, 256),
    "moonrise": (moonrise, 256, 256),
}
CLIP_FRAMES: Final = 12
CLIP_SIZE: Final = (256, 384)  # height, width in pixels
VARIANTS: Final = 10  # of each picture, for the fit
FITTED_FRAMES: Final = range(0, 50, 7)  # of the video; those from HELD_OUT on are only measured
HELD_OUT: Final = range(60, 81, 5)


def main() -> None:
    """Make both files and print their sizes and the projection's quality."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("encoder", type=Path, help="taef2_encoder.pth of madebyollin/taesd")
    parser.add_argument("--video", type=Path, required=True, help="a real clip, for the fit and for the measurement")
    parser.add_argument("--preview", type=Path, help="folder for the painted scenes as PNG")
    arguments = parser.parse_args()
    encoder = build_encoder("taef2", load_state_dict(arguments.encoder, "encoder")).eval()
    pictures = {name: painter(height, width) for name, (painter, height, width) in STILLS.items()}
    clip = [lighthouse(*CLIP_SIZE, moment=index / CLIP_FRAMES) for index in range(CLIP_FRAMES)]
    if arguments.preview:
        _write_previews(arguments.preview, {**pictures, "lighthouse": clip[0]})
    _write_scenes(encoder, pictures, clip)
    frames = _video_frames(arguments.video)
    _write_projection(encoder, [*pictures.values(), clip[0], *_abstracts()], frames)


def encode(encoder: nn.Module, picture: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Latents (1, 32, h, w) of a picture (H, W, 3) in [0, 1], and its pixels (1, 3, H, W)."""
    pixels = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        return encoder(pixels.contiguous()), pixels


def quantised(latents: Tensor) -> Tensor:
    """The wire's uint8 form: clamp(z / (2 m) + 0.5) in 255 steps."""
    magnitude = latent_format("flux2").magnitude
    return (latents / (2 * magnitude) + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)


def _write_scenes(encoder: nn.Module, pictures: dict[str, Field], clip: list[Field]) -> None:
    tensors = {name: quantised(encode(encoder, picture)[0])[0] for name, picture in pictures.items()}
    tensors["lighthouse"] = torch.cat([quantised(encode(encoder, picture)[0]) for picture in clip])
    _save(tensors, DATA / "demo_flux2.safetensors")


def _write_projection(encoder: nn.Module, pictures: list[Field], frames: list[NDArray[Any]]) -> None:
    """Fit twice: without the video, to measure on what is wholly foreign; and with it, to ship."""
    held_out = [encode(encoder, frames[index]) for index in HELD_OUT]
    equations = LeastSquares(32, 8)
    for picture in pictures:
        for variant in _variants(picture):
            equations.add(*encode(encoder, variant))
    foreign = equations.solve()
    for index in FITTED_FRAMES:
        for variant in _variants(frames[index]):
            equations.add(*encode(encoder, variant))
    shipped = equations.solve()
    plain = FactorProjection(latent_format("flux2"))
    for name, network in (("rgb factors", plain), ("3x3 without the video", foreign), ("3x3 as shipped", shipped)):
        sys.stdout.write(f"{name}: {_psnr_db(network, held_out):.2f} dB on held-out frames of the video\n")
    _save({key: value.half() for key, value in shipped.state_dict().items()}, DATA / "linear_flux2.safetensors")


def _psnr_db(network: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> float:
    with torch.inference_mode():
        errors = [F.mse_loss(network(latents).clamp(0, 1), pixels).item() for latents, pixels in pairs]
    return float(np.mean(-10 * np.log10(errors)))


def _variants(picture: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Crops of a picture in other colours, the first as it is: the projection must be right for unseen ones."""
    random = np.random.default_rng(round(float(picture.mean()) * 1e6))
    yield picture
    for _ in range(VARIANTS - 1):
        side = min(256, *(length // 8 * 8 for length in picture.shape[:2]))
        top, left = (int(random.integers(0, length - side + 1)) for length in picture.shape[:2])
        crop = picture[top : top + side, left : left + side][:, :: random.choice([-1, 1])]
        mixed = crop @ (0.7 * np.eye(3)[random.permutation(3)] + 0.3 * random.dirichlet(np.ones(3), 3).T)
        bent = np.clip(mixed, 0, 1) ** random.uniform(0.5, 1.8)
        yield np.clip((bent - 0.5) * random.uniform(0.6, 1.3) + 0.5 + random.uniform(-0.15, 0.15), 0, 1)


def _abstracts() -> Iterator[Field]:
    """Coloured noise from coarse to fine, flat fields and gradients: colours and textures that no scene has."""
    random = np.random.default_rng(1)
    for slope in np.linspace(0.4, 2.6, 12):
        channels = [noise(random, 256, 256, slope=float(slope)) for _ in range(3)]
        yield np.clip(0.5 + 0.22 * np.stack(channels, axis=-1) + random.uniform(-0.2, 0.2, 3), 0, 1)
    for _ in range(12):
        first, second, third = random.random((3, 3))
        y, x = np.mgrid[0:256, 0:256][..., None] / 256
        yield first * (1 - y) + second * y * (1 - x) + third * x * y
        yield np.kron(random.random((8, 8, 3)), np.ones((32, 32, 1)))


def _video_frames(path: Path) -> list[NDArray[Any]]:
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") / 255 for frame in container.decode(video=0)]


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    sys.stdout.write(f"{path.name}: {path.stat().st_size} bytes\n")


def _write_previews(folder: Path, pictures: dict[str, Field]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        frame = av.VideoFrame.from_ndarray((picture * 255).round().astype(np.uint8), format="rgb24")
        frame.save(folder / f"{name}.png")


if __name__ == "__main__":
    main()
