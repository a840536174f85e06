"""Latents from files: .safetensors, .npy, .pth (weights_only) and .latents, as frames to publish or to decode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from taesd_stream.errors import ConfigError
from taesd_stream.frames import Kind, LatentFrame, StreamInfo
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.latent_log import read_messages

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES: Final = (".safetensors", ".npy", ".pth", ".pt", ".latents")


def format_of(name: str) -> LatentFormat:
    """The format of that name. Raises: ConfigError naming the known ones."""
    from taesd_stream.latent_formats import latent_format

    try:
        return latent_format(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_latents(path: Path, latent_format: LatentFormat | None) -> Tensor:
    """The latents of a file, first axis time: (T, C, h, w), floating point.

    A leading batch axis of 1 goes, and channels-first video (C, T, h, w) is turned, where the format tells.
    latent_format: None leaves the axes as they are. Raises: ConfigError for a file that cannot be read, or holds no
    such latents.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: expected one of {', '.join(SUFFIXES)}")
    try:
        tensor = _read(path)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    return _time_first(tensor, latent_format, path)


def _read(path: Path) -> Tensor:
    import torch

    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix == ".latents":
        return _read_log(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return _pick(load_file(path))
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return _pick(loaded) if isinstance(loaded, dict) else loaded


def _pick(tensors: dict[str, Tensor]) -> Tensor:
    """`latents`, else the only one of the highest rank."""
    if "latents" in tensors:
        return tensors["latents"]
    deepest = max((tensor.ndim for tensor in tensors.values()), default=0)
    candidates = [tensor for tensor in tensors.values() if tensor.ndim == deepest]
    if len(candidates) != 1 or deepest < 3:
        raise ValueError(f"expected a tensor named latents, or only one, got {', '.join(sorted(tensors)) or 'none'}")
    return candidates[0]


def _read_log(path: Path) -> Tensor:
    import torch

    from taesd_stream.decoding.engine import latents_from_payload

    frames = [
        latents_from_payload(message.payload, message.dtype, message.shape)
        for message in read_messages(path)
        if isinstance(message, LatentFrame)
    ]
    if not frames:
        raise ValueError("no whole frame is in it")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError("its frames have several sizes")
    return torch.stack(frames)


def info_of_log(path: Path) -> StreamInfo | None:
    """Who published a .latents file; None for other files."""
    if path.suffix != ".latents" or not path.is_file():
        return None
    return next((message for message in read_messages(path) if isinstance(message, StreamInfo)), None)


def _time_first(tensor: Tensor, latent_format: LatentFormat | None, path: Path) -> Tensor:
    if not tensor.is_floating_point():
        raise ConfigError(f"{path}: expected floating point latents, got {tensor.dtype}")
    if tensor.ndim == 5 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != 4:
        raise ConfigError(f"{path}: expected latents of 3 to 5 axes, got shape {tuple(tensor.shape)}")
    if latent_format is not None:
        channels = {latent_format.channels, latent_format.patchified_channels}
        if tensor.shape[1] not in channels and tensor.shape[0] in channels:
            tensor = tensor.transpose(0, 1).contiguous()
        if tensor.shape[1] not in channels:
            expected = " or ".join(str(one) for one in sorted(one for one in channels if one))
            raise ConfigError(
                f"{path}: {latent_format.name} has {expected} channels, the file has {tuple(tensor.shape)}"
            )
    return tensor


def rows_to_publish(latents: Tensor, kind: Kind, *, is_batch: bool) -> list[Tensor]:
    """What each publish sends: a row a step, the whole file for a clip or a grid."""
    if kind == "clip" or is_batch:
        return [latents]
    return list(latents)
