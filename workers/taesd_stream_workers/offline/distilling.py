"""Distil a nano decoder from the material of files: resumed from a checkpoint, measured, written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from taesd_stream.errors import ConfigError
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.linear import FactorSquares, LeastSquares
from taesd_stream.models.nano import default_layout, nano_from_weights
from taesd_stream.training.distillation import Distillation, Settings, settings_text
from taesd_stream.training.quality import psnr_db, sharpness, ssim
from taesd_stream.user_formats import to_metadata
from taesd_stream_workers.offline.material import Material
from taesd_stream_workers.offline.tensor_file import write_tensors

CHECKPOINT_STEPS: Final = 500
_SETTINGS_KEY: Final = "taesd_stream.settings"


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
    Raises: ConfigError for a checkpoint of other settings or material, or a space that has no layout.
    """
    source = material.source
    try:
        layout = default_layout(source.latent_channels, source.spatial_factor)
    except ValueError as error:
        raise ConfigError(f"{material.name}: no nano decoder for it: {error}") from error
    facts = {**material.facts, **settings_text(settings, layout)}
    facts["--steps"] = facts.pop("steps")
    metadata = {_SETTINGS_KEY: json.dumps(facts)}
    before = _read_checkpoint(checkpoint, facts) if checkpoint.exists() else None
    training = Distillation(source, layout, settings, device)
    if before is not None:
        _go_on(training, before, checkpoint)
    while not training.is_over and not is_stopped():
        squared = training.step()
        if training.done % CHECKPOINT_STEPS == 0:
            write_tensors(checkpoint, training.checkpoint(), metadata)
        if training.done % 10 == 0 or training.is_over:
            on_step(training.done, float(squared))
    write_tensors(checkpoint, training.checkpoint(), metadata)
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
    for latents, pixels in material.held_out:
        picture = pixels.float() / 255
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


def _go_on(training: Distillation, tensors: dict[str, Tensor], path: Path) -> None:
    try:
        training.restore(tensors)
    except (ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{path}: is not whole: {error}; delete it to begin anew") from error


def _read_checkpoint(path: Path, facts: dict[str, str]) -> dict[str, Tensor]:
    """Raises: ConfigError for one that cannot be read, or is of a training with other facts."""
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get(_SETTINGS_KEY, "")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dict
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; delete it to begin anew") from error
    try:
        before = json.loads(said)
    except ValueError:
        before = None
    if not isinstance(before, dict) or before.keys() != facts.keys():
        raise ConfigError(f"{path}: is of another version of this command; delete it to begin anew")
    others = [f"{word}: {before[word]} then, {now} now" for word, now in facts.items() if before[word] != now]
    if others:
        told = "; ".join(others)
        raise ConfigError(f"{path}: is of another training ({told}): say the same as then, or delete it to begin anew")
    return tensors
