"""Latents from files: .safetensors, .npy, .pth (weights_only) and .latents, as rows to publish or to decode.

Nothing in a file is executed: no pickle is read that holds more than plain tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from taesd_stream.errors import ConfigError, WeightsError
from taesd_stream.frames import Kind, LatentFrame, StreamInfo, WireDtype
from taesd_stream.latent_formats import DEFAULT_MAGNITUDE, LatentFormat, magnitude_of
from taesd_stream.latent_log import Damaged, read_run

if TYPE_CHECKING:
    from torch import Tensor

LOG_SUFFIX: Final = ".latents"
SUFFIXES: Final = (".safetensors", ".npy", ".pth", ".pt", LOG_SUFFIX)


@dataclass(frozen=True, slots=True)
class Row:
    """What one publish sends; of a log with the step and sigma that its sampler said."""

    latents: Tensor
    step: int
    total_steps: int | None
    sigma: float | None = None


def format_of(name: str, weights_folder: Path | None = None) -> LatentFormat:
    """The format of that name, of the table or a user's own. Raises: ConfigError naming the nearest known ones."""
    from taesd_stream.user_formats import known_format

    try:
        return known_format(name, weights_folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def load_latents(path: Path, known: LatentFormat) -> Tensor:
    """The latents of a file, first axis time: (T, C, h, w), floating point, finite.

    A leading batch axis of 1 goes, and channels-first video (C, T, h, w) is turned, where the format tells.
    Raises: ConfigError for a file that cannot be read, or holds no such latents.
    """
    return _time_first(load_tensor(path), known, path)


def load_tensor(path: Path) -> Tensor:
    """The latents of a file as they were saved, any axes.

    Raises: ConfigError for a file that cannot be read, or holds no one tensor of plain floating point values.
    """
    _check_name(path)
    try:
        tensor = _read(path)
    except WeightsError as error:  # of tensors that were saved, which say so themselves
        raise ConfigError(str(error)) from error
    except MemoryError as error:
        raise ConfigError(f"{path}: is damaged, or larger than this machine's memory: {error}") from error
    except Exception as error:  # of a damaged file a reader raises whatever it stumbles over
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{path}: cannot be read: {reason[:300]}") from error
    _check_plain(tensor, path)
    return tensor.detach()  # saved as a parameter it would want a gradient


def rows_of(latents: Tensor, kind: Kind, *, is_batch: bool) -> list[Row]:
    """One publish a frame; of a clip and of a grid the whole file is one."""
    parts = [latents] if kind == "clip" or is_batch else list(latents)
    return [Row(part, step, len(parts)) for step, part in enumerate(parts)]


def info_of_log(path: Path) -> StreamInfo | None:
    """Who published a .latents file; None for other files.

    Raises: ConfigError when it does not say, or is not the first of its run's files.
    """
    if path.suffix.lower() != LOG_SUFFIX:
        return None
    _check_name(path)
    try:
        info = next((message for message in read_run(path) if isinstance(message, StreamInfo)), None)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if info is None:
        raise ConfigError(f"{path}: no whole record is in it")
    return info


class LogRows:
    """The frames of a .latents file, and of those behind it, as they were published.

    They are read one at a time: a log may be larger than memory. damaged_bytes: what no frame was made of.
    """

    def __init__(self, path: Path, known: LatentFormat, kind: Kind) -> None:
        """Look at each once. Raises: ConfigError for a file without any, or with one that is none of the format."""
        self._path, self._count, self.damaged_bytes = path, 0, 0
        self.dtype: WireDtype | None = None  # of the first
        try:
            for message in read_run(path):
                if isinstance(message, LatentFrame):
                    known.check_shape(kind, message.shape)
                    self.dtype = self.dtype or message.dtype
                    self._count += 1
                elif isinstance(message, Damaged):
                    self.damaged_bytes += message.nbytes
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        if not self._count:
            raise ConfigError(f"{path}: no whole frame is in it")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return rows_of_log(self._path)


def rows_of_log(path: Path) -> Iterator[Row]:
    """The frames of a .latents file, and of those behind it, as they were published, one read at a time."""
    from taesd_stream.decoding.payloads import latents_from_payload

    magnitude = DEFAULT_MAGNITUDE
    for message in read_run(path):
        if isinstance(message, StreamInfo):
            magnitude = magnitude_of(message.latent_format)
        elif isinstance(message, LatentFrame):
            latents = latents_from_payload(message.payload, message.dtype, message.shape, magnitude)
            yield Row(latents, message.step, message.total_steps, message.sigma)


def _check_name(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")


def _read(path: Path) -> Tensor:
    import torch

    from taesd_stream.models.checkpoints import read_saved

    suffix = path.suffix.lower()
    if suffix == ".npy":
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    if suffix == LOG_SUFFIX:
        return _stacked(path)
    return _pick(read_saved(path))


def _pick(loaded: Any) -> Tensor:
    """`latents`, else the only tensor of the highest rank."""
    from torch import Tensor

    if isinstance(loaded, Tensor):
        return loaded
    items = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {str(name): value for name, value in items if isinstance(value, Tensor)}
    if "latents" in tensors:
        return tensors["latents"]
    deepest = max((tensor.ndim for tensor in tensors.values()), default=0)
    candidates = [tensor for tensor in tensors.values() if tensor.ndim == deepest]
    if len(candidates) != 1 or deepest < 3:
        raise ValueError(f"expected a tensor named latents, or only one, got {', '.join(sorted(tensors)) or 'none'}")
    return candidates[0]


def _stacked(log: Path) -> Tensor:
    import torch

    rows = [row.latents for row in rows_of_log(log)]
    if not rows:
        raise ValueError("no whole frame is in it")
    frames = [latents if latents.ndim == 4 else latents.unsqueeze(0) for latents in rows]
    if len({frame.shape[1:] for frame in frames}) > 1:
        raise ValueError("its frames have several sizes")
    return torch.cat(frames)


def _check_plain(tensor: Tensor, path: Path) -> None:
    """Before any value is looked at: torch computes with no others. Raises: ConfigError."""
    import torch

    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "a nested" if tensor.is_nested else f"a {str(tensor.layout).removeprefix('torch.')}"
        raise ConfigError(f"{path}: expected a dense tensor, got {kind} one; save a dense copy")
    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if tensor.dtype not in usual:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in usual)
        raise ConfigError(f"{path}: expected floating point latents, got {tensor.dtype}; save them as one of {names}")
    needed, held = tensor.nbytes, 0 if tensor.is_meta else tensor.untyped_storage().nbytes()
    if needed > held:  # a small file may claim terabytes
        fault = f"its shape {tuple(tensor.shape)} is {needed} bytes, it holds {held}"
        raise ConfigError(f"{path}: expected every value, but {fault}; save latents.contiguous()")


def _time_first(tensor: Tensor, known: LatentFormat, path: Path) -> Tensor:
    # with its batch axis it is as a sampler held it: where as many frames as channels leave it open, the format tells
    is_turned = tensor.ndim == 5 and tensor.shape[1] == tensor.shape[2] and known.layouts[:1] == ("frames_third",)
    if tensor.ndim == 5 and tensor.shape[0] == 1:
        tensor = tensor[0]
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim == 5:
        way_out = "save each video in a file of its own"
        raise ConfigError(f"{path}: expected one video, a batch axis of 1, got shape {tuple(tensor.shape)}; {way_out}")
    if tensor.ndim != 4:
        raise ConfigError(f"{path}: expected latents of 3 to 5 axes, got shape {tuple(tensor.shape)}")
    channels = {known.channels, known.patchified_channels}
    if tensor.shape[0] in channels and (is_turned or tensor.shape[1] not in channels):
        tensor = tensor.transpose(0, 1).contiguous()
    if tensor.shape[1] not in channels:
        expected = " or ".join(str(one) for one in sorted(one for one in channels if one))
        raise ConfigError(f"{path}: {known.name} has {expected} channels, the file has {tuple(tensor.shape)}")
    if not tensor.numel():
        raise ConfigError(f"{path}: holds no latents, shape {tuple(tensor.shape)}")
    _check_finite(tensor, path)
    return tensor


def _check_finite(tensor: Tensor, path: Path) -> None:
    from taesd_stream.decoding.payloads import check_finite

    bad = check_finite(tensor)
    if bad:
        raise ConfigError(f"{path}: {len(bad)} of {len(tensor)} frames hold NaN or infinity, the first is {bad[0]}")
