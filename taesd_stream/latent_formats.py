"""What a sampler's latents mean: channels, factors, normalisation, and which tiny decoder reads them.

The facts are in data/latent_formats.json. A format is chosen by name, never guessed from a file name or a shape.
No torch: whoever checks a publisher's shape imports this.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal, Protocol, Self, TypeVar

from taesd_stream.frames import Kind

Shape = Sequence[int]


class Reshapeable(Protocol):
    """What numpy arrays and torch tensors have in common here."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def reshape(self, shape: tuple[int, ...], /) -> Self: ...

    def swapaxes(self, axis0: int, axis1: int, /) -> Self: ...


Latents = TypeVar("Latents", bound=Reshapeable)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDecoder:
    """One published set of decoder weights.

    files: names in the original repository, decoder first; hub_files: names in the Hugging Face repository `hub_id`.
    temporal_factor: pictures per latent at the most; video decoders trim the start.
    """

    name: str
    kind: Literal["image", "video"]
    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    files: tuple[str, ...]
    hub_id: str | None
    hub_files: tuple[str, ...]
    source: str  # where the original files are


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFormat:
    """One latent space, by the values that a sampler holds ("z", already normalised).

    channels: of the spatial form (C, h, w); patchified_channels: of the same space with 2x2 cells in the channels.
    spatial_factor: pixels per cell; temporal_factor: pictures per latent, None for pictures.
    scale, shift, mean, std: z to the full VAE's input, by `normalisation`: z/scale + shift, or z*std + mean (per
    channel; "batch_norm" in the patchified channel order; 256 values are 16 channels of 16 moments).
    rgb_factors, rgb_bias: C rows of 3: rgb = z @ factors + bias, in [-1, 1].
    magnitude: |z| that the uint8 wire form still holds.
    """

    name: str
    channels: int
    spatial_factor: float
    normalisation: Literal["scale_shift", "mean_std", "batch_norm"]
    temporal_factor: int | None = None
    patchified_channels: int | None = None
    decoder: str | None = None  # key of TINY_DECODERS
    aliases: tuple[str, ...] = ()  # models whose latents these are too
    scale: float | None = None
    shift: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rgb_factors: tuple[tuple[float, float, float], ...] | None = None
    rgb_bias: tuple[float, float, float] | None = None
    magnitude: float = 3.0

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) cells -> (H, W) pixels."""
        return round(height * self.spatial_factor), round(width * self.spatial_factor)

    def check_shape(self, kind: Kind, shape: Shape) -> tuple[int, int, int, int]:
        """Check what a publisher says, and return it as (N, C, h, w) in the spatial form.

        shape: `steps` (C, h, w) or (N, C, h, w); `clip` (T, C, h, w); `live` (C, h, w) or (t, C, h, w).
        Raises: ValueError that names the format, what was expected and what came.
        """
        allowed = {4} if kind == "clip" else {3, 4}
        if len(shape) not in allowed:
            forms = "(T, C, h, w)" if kind == "clip" else "(C, h, w) or (N, C, h, w)"
            raise ValueError(f"{self.name}: {kind} latents are {forms}, got shape {tuple(shape)}")
        count, channels, height, width = (1, *shape) if len(shape) == 3 else tuple(shape)
        if min(count, height, width) < 1:
            raise ValueError(f"{self.name}: latents are empty (shape {tuple(shape)})")
        if channels == self.patchified_channels:
            return count, self.channels, 2 * height, 2 * width
        if channels != self.channels:
            raise ValueError(f"{self.name}: expected {self.channels} channels, got {channels} (shape {tuple(shape)})")
        return count, channels, height, width

    def to_spatial(self, latents: Latents) -> Latents:
        """Unfold patchified latents: (..., 4C, h, w) -> (..., C, 2h, 2w); spatial ones come back as they are.

        A patchified channel is c*4 + dy*2 + dx (FLUX.2 as ComfyUI and ERNIE-Image hold it). numpy or torch.
        """
        *leading, channels, height, width = latents.shape
        if channels != self.patchified_channels:
            return latents
        cells = latents.reshape((*leading, self.channels, 2, 2, height, width))  # c dy dx y x
        rows = cells.swapaxes(-4, -2).swapaxes(-3, -2).swapaxes(-2, -1)  # c y dy x dx
        return rows.reshape((*leading, self.channels, 2 * height, 2 * width))


def latent_format(name: str) -> LatentFormat:
    """The format of that name.

    Raises: ValueError that names the nearest known ones.
    """
    if name in LATENT_FORMATS:
        return LATENT_FORMATS[name]
    shared = next((known.name for known in LATENT_FORMATS.values() if name in known.aliases), None)
    if shared is not None:
        raise ValueError(f"unknown latent format {name!r}: its latents are those of {shared!r}")
    near = difflib.get_close_matches(name, LATENT_FORMATS, n=3, cutoff=0.4)
    known = f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(LATENT_FORMATS)}"
    raise ValueError(f"unknown latent format {name!r}; {known}")


def _frozen(value: Any) -> Any:
    """JSON's lists as tuples, so that the tables cannot change."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _load() -> tuple[dict[str, TinyDecoder], dict[str, LatentFormat]]:
    facts = json.loads((resources.files("taesd_stream") / "data" / "latent_formats.json").read_text("utf-8"))
    decoders, formats = (
        {name: {"name": name, **{key: _frozen(value) for key, value in entry.items()}} for name, entry in table.items()}
        for table in (facts["decoders"], facts["formats"])
    )
    return (
        {name: TinyDecoder(**entry) for name, entry in decoders.items()},
        {name: LatentFormat(**entry) for name, entry in formats.items()},
    )


_DECODERS, _FORMATS = _load()
TINY_DECODERS: Final[dict[str, TinyDecoder]] = _DECODERS
LATENT_FORMATS: Final[dict[str, LatentFormat]] = _FORMATS
