"""Distil a nano decoder from files: pictures and an encoder, or pairs; resumed from a checkpoint, measured, written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from taesd_stream.errors import ConfigError
from taesd_stream.latent_formats import TINY_DECODERS, LatentFormat
from taesd_stream.models.checkpoints import load_state_dict
from taesd_stream.models.families import build_encoder
from taesd_stream.models.linear import FactorSquares, LeastSquares
from taesd_stream.models.nano import default_layout, nano_from_weights
from taesd_stream.models.tiny import AutoencoderTiny
from taesd_stream.training.distillation import Distillation, EncodedPictures, Settings, Source, settings_text
from taesd_stream.training.pairs import PairedLatents
from taesd_stream.training.pictures import PicturePool
from taesd_stream.training.quality import psnr_db, sharpness, ssim
from taesd_stream.user_formats import to_metadata
from taesd_stream_workers.offline.format_fitting import find_pairs, read_picture
from taesd_stream_workers.offline.tensor_file import write_tensors

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
SIZES: Final = {128: 0.08, 192: 0.12, 256: 0.35, 384: 0.2, 512: 0.17, 768: 0.08}
HELD_OUT: Final = 10  # one picture of so many is only measured
CHECKPOINT_STEPS: Final = 500
_SETTINGS_KEY: Final = "taesd_stream.settings"
_MEASURED_PX: Final = 512  # of a held-out picture, its middle


@dataclass(frozen=True, slots=True)
class Material:
    """What a decoder is trained on, and the pairs (1, C, h, w), (1, 3, H, W) that it is measured on."""

    name: str
    source: Source
    held_out: list[tuple[Tensor, Tensor]]
    count: int


@dataclass(frozen=True, slots=True)
class Report:
    """Means over held-out pictures, of nano and of a 3x3 projection fitted to the same material."""

    pictures: int
    psnr_db: float
    ssim: float
    sharpness: float
    linear_psnr_db: float

    def text(self) -> str:
        """One line."""
        if not self.pictures:
            return "nothing was left to measure it on"
        return (
            f"on {self.pictures} held-out pictures: {self.psnr_db:.2f} dB, SSIM {self.ssim:.3f}, "
            f"gradient {self.sharpness:.2f} of the original's; linear: {self.linear_psnr_db:.2f} dB"
        )


def from_pictures(
    name: str, folder: Path, family: str, weights: Path, device: torch.device, *, pixels: int, smallest: int
) -> Material:
    """Pictures of a folder and an encoder of a known family: its own file, one of both parts, or a model's folder.

    pixels: of one batch. smallest: side of the smallest crop. Raises: ConfigError, WeightsError.
    """
    paths = sorted(path for path in _folder(folder).rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ConfigError(f"{folder}: expected pictures ({', '.join(PICTURES)}), there are none")
    random.Random(0).shuffle(paths)  # noqa: S311 names sort by kind; a tenth of each kind is to be measured
    held_out = paths[::HELD_OUT] if len(paths) > 1 else []
    kept = [path for place, path in enumerate(paths) if place % HELD_OUT or not held_out]
    encoder = _encoder(family, weights).float().to(device).eval().requires_grad_(False)
    channels, factor = _space(encoder, device)
    pictures = [_as_bytes(read_picture(path)) for path in kept]
    largest = max(min(picture.shape[-2:]) for picture in pictures)
    sizes = {smallest: SIZES[min(SIZES)]} | {side: SIZES[side] for side in SIZES if smallest <= side <= largest}
    try:
        pool = PicturePool(pictures, device=device, smallest=smallest)
    except ValueError as error:
        raise ConfigError(f"{folder}: {error}") from error
    source = EncodedPictures(
        pool, encoder, latent_channels=channels, spatial_factor=factor, device=device, pixels=pixels, sizes=sizes
    )
    measured = [_middle(read_picture(path), factor) for path in held_out]
    with torch.inference_mode():
        pairs = [(encoder(picture.to(device)).cpu(), picture) for picture in measured]
    return Material(name, source, pairs, len(pool))


def from_pairs(name: str, folder: Path, device: torch.device, *, pixels: int) -> Material:
    """Pairs of latents and pictures as `taesd-stream fit` takes them. Raises: ConfigError."""
    found = find_pairs(folder)
    if len(found) < 2:
        raise ConfigError(f"{folder}: expected two pairs at least, one to measure on")
    read = [pair.read() for pair in found]
    factors = {round(picture.shape[-1] / latents.shape[-1], 3) for latents, picture in read}
    channels = {latents.shape[1] for latents, _ in read}
    factor = int(min(factors))
    if len(factors) > 1 or len(channels) > 1 or factor not in factors:
        expected = "latents of one kind, a whole number of pixels a cell"
        raise ConfigError(f"{folder}: expected {expected}, got {sorted(channels)} channels, {sorted(factors)} pixels")
    for pair, (latents, picture) in zip(found, read, strict=True):
        if picture.shape[-2] != latents.shape[-2] * factor:
            raise ConfigError(f"{pair.picture}: expected {latents.shape[-2] * factor} rows, got {picture.shape[-2]}")
    step = min(HELD_OUT, len(found))
    kept = [(latents[0], picture[0]) for index, (latents, picture) in enumerate(read) if index % step]
    source = PairedLatents(kept, spatial_factor=factor, device=device, pixels=pixels)
    return Material(name, source, read[::step], len(kept))


def distil(
    material: Material,
    settings: Settings,
    device: torch.device,
    checkpoint: Path,
    *,
    is_stopped: Callable[[], bool],
    on_step: Callable[[int, float], None],
) -> Distillation:
    """Train to the end, or until it is stopped; both leave a checkpoint, from which the next call goes on.

    is_stopped: asked after every step. on_step: told the steps done and the squared error, now and then.
    Raises: ConfigError for a checkpoint of other settings, or a space that has no layout.
    """
    source = material.source
    try:
        layout = default_layout(source.latent_channels, source.spatial_factor)
        training = Distillation(source, layout, settings, device)
    except ValueError as error:
        raise ConfigError(f"{material.name}: no nano decoder for it: {error}") from error
    facts = json.dumps({**settings_text(settings, layout), "pictures": str(material.count)}, sort_keys=True)
    if checkpoint.exists():
        training.restore(_read_checkpoint(checkpoint, facts))
    while not training.is_over and not is_stopped():
        squared = training.step()
        if training.done % CHECKPOINT_STEPS == 0:
            write_tensors(checkpoint, training.checkpoint(), {_SETTINGS_KEY: facts})
        if training.done % 10 == 0 or training.is_over:
            on_step(training.done, float(squared))
    write_tensors(checkpoint, training.checkpoint(), {_SETTINGS_KEY: facts})
    return training


@torch.inference_mode()
def measure(training: Distillation, material: Material) -> Report:
    """The trained decoder, as its file will hold it, on the held-out pictures."""
    network = nano_from_weights({k: v.float() for k, v in training.weights().items()}, material.name)
    squares = LeastSquares(material.source.latent_channels, material.source.spatial_factor)
    for step in range(4):
        batch = material.source.batch(step)
        squares.add(batch.latents.cpu(), batch.pictures.cpu())
    linear = squares.solve(ridge=1e-4)
    rows = []
    for latents, picture in material.held_out:
        shown, flat = network(latents).clamp(0, 1)[0], linear(latents).clamp(0, 1)[0]
        contrast = sharpness(shown) / max(sharpness(picture[0]), 1e-6)
        rows.append([psnr_db(shown, picture[0]), ssim(shown, picture[0]), contrast, psnr_db(flat, picture[0])])
    if not rows:
        return Report(0, 0.0, 0.0, 0.0, 0.0)
    return Report(len(rows), *torch.tensor(rows).mean(0).tolist())


def save(path: Path, training: Distillation, material: Material, report: Report) -> None:
    """Write the decoder as a format file, which the daemon finds by its name. Raises: ConfigError."""
    factors = FactorSquares(material.source.latent_channels)
    batch = material.source.batch(0)
    factors.add(batch.latents.cpu(), batch.pictures.cpu())
    rows, bias = factors.solve()
    known = LatentFormat(
        name=material.name,
        channels=material.source.latent_channels,
        spatial_factor=material.source.spatial_factor,
        normalisation="scale_shift",
        rgb_factors=tuple((float(r), float(g), float(b)) for r, g, b in rows),
        rgb_bias=(float(bias[0]), float(bias[1]), float(bias[2])),
    )
    notes: dict[str, Any] = {"pictures": material.count, "steps": training.done, "report": report.text()}
    write_tensors(path, training.weights(), to_metadata(known, notes))


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of pictures, there is none")
    return folder


def _encoder(family: str, weights: Path) -> nn.Module:
    if weights.is_dir():
        model = AutoencoderTiny.from_pretrained(weights)
        return _OfModel(model)
    if family not in TINY_DECODERS:
        raise ConfigError(f"--family: no family {family!r}; there are: {', '.join(TINY_DECODERS)}")
    return build_encoder(family, load_state_dict(weights, "encoder"))


class _OfModel(nn.Module):
    """A model's encoder: pictures in [0, 1] -> z as a sampler holds it."""

    def __init__(self, model: AutoencoderTiny) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w)."""
        latents: Tensor = self.model.encode(pictures * 2 - 1).latents
        return (latents - self.model.shift_factor) * self.model.scaling_factor


@torch.inference_mode()
def _space(encoder: nn.Module, device: torch.device) -> tuple[int, int]:
    """Channels, and pixels a cell."""
    side = 256
    latents = encoder(torch.zeros(1, 3, side, side, device=device))
    return latents.shape[1], side // latents.shape[-1]


def _as_bytes(picture: Tensor) -> Tensor:
    return (picture * 255).round().byte()


def _middle(picture: Tensor, factor: int) -> Tensor:
    """(1, 3, H, W): the middle of a picture, whole cells of it."""
    height, width = (min(length, _MEASURED_PX) // factor * factor for length in picture.shape[-2:])
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return picture[None, :, top : top + height, left : left + width]


def _read_checkpoint(path: Path, facts: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(_SETTINGS_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; delete it to begin anew") from error
    if said != facts:
        raise ConfigError(f"{path}: is of another training (settings or pictures) or version; delete it to begin anew")
    return tensors
