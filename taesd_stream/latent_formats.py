"""What a sampler's latents mean: channels, factors, normalisation, and which tiny decoder reads them.

The facts are in data/latent_formats.json. A format is chosen by name, never guessed from a file name or a shape.
No torch: whoever checks a publisher's shape imports this.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final, Literal, TypeAlias

from taesd_stream.frames import Kind
from taesd_stream.latent_layouts import LAYOUTS, Latents, Shape, Space, find_layout, rearrange, unpack

Convention: TypeAlias = Literal["diffusers", "comfyui"]


DEFAULT_MAGNITUDE: Final = 3.0  # of uint8 = clamp(z / (2 m) + 0.5), for formats that the table does not have


class LatentsError(ValueError):
    """Latents are not what their format has; the message says what was expected, and what came."""


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
    mirrors: tuple[tuple[str, str], ...] = ()  # other Hugging Face repositories that have it, each with its file
    image_channels: int = 3  # 4: RGBA, straight alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentFormat:
    """One latent space, by the values that a sampler holds ("z", already normalised).

    channels: of the spatial form (C, h, w); patchified_channels: of the same space with 2x2 cells in the channels.
    spatial_factor: pixels per cell; temporal_factor: pictures per latent, None for pictures.
    scale, shift, mean, std: z to the full VAE's input, by `normalisation`: z/scale + shift, or z*std + mean (per
    channel; "batch_norm" in the patchified channel order; 256 values are 16 channels of 16 moments).
    layouts: how diffusers' pipelines hold latents, names of latent_layouts.LAYOUTS; comfyui_layout: how ComfyUI does.
    decoder_scale: what z is divided by for the tiny decoder, the full VAE's scale; None, but for CogVideoX: z itself.
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
    layouts: tuple[str, ...] = ()
    comfyui_layout: str | None = None  # None: its rule, (B, C, h, w) and (B, C, T, h, w)
    decoder_scale: float | None = None
    aliases: tuple[str, ...] = ()  # models whose latents these are too
    scale: float | None = None
    shift: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rgb_factors: tuple[tuple[float, float, float], ...] | None = None
    rgb_bias: tuple[float, float, float] | None = None
    magnitude: float = DEFAULT_MAGNITUDE

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) cells -> (H, W) pixels."""
        return round(height * self.spatial_factor), round(width * self.spatial_factor)

    def check_shape(self, kind: Kind, shape: Shape) -> tuple[int, int, int, int]:
        """Check what a publisher says, and return it as (N, C, h, w) in the spatial form.

        shape: `steps` (C, h, w) or (N, C, h, w); `clip` (T, C, h, w); `live` (C, h, w) or (t, C, h, w).
        Raises: LatentsError that names the format, what was expected and what came.
        """
        allowed = {4} if kind == "clip" else {3, 4}
        if len(shape) not in allowed:
            forms = "(T, C, h, w)" if kind == "clip" else "(C, h, w) or (N, C, h, w)"
            raise LatentsError(f"{self.name}: {kind} latents are {forms}, got shape {tuple(shape)}")
        count, channels, height, width = (1, *shape) if len(shape) == 3 else tuple(shape)
        if min(count, height, width) < 1:
            raise LatentsError(f"{self.name}: latents are empty (shape {tuple(shape)})")
        if channels == self.patchified_channels:
            return count, self.channels, 2 * height, 2 * width
        if channels != self.channels:
            raise LatentsError(f"{self.name}: expected {self.channels} channels, got {channels} (shape {tuple(shape)})")
        return count, channels, height, width

    def to_spatial(
        self,
        latents: Latents,
        width: int,
        height: int,
        *,
        convention: Convention = "diffusers",
        layout: str | None = None,
        leading_tokens: int = 0,
        latent_frames: int | None = None,
        scaling_factor: float | None = None,
    ) -> Latents:
        """What a sampler holds -> what a publisher sends: (N, C, h, w), of video (N, T, C, h, w); z stays z.

        latents: numpy or torch, as diffusers' callbacks or ComfyUI's see them ("convention"); of ComfyUI's nested
            video and audio the video. width, height: pixels of the picture, for tokens alone.
        layout: a name of LAYOUTS, where the shape cannot tell (Ideogram 4 holds its tokens as FLUX.2 does).
        leading_tokens: conditions before the picture's tokens. latent_frames: T; conditions behind it are dropped.
        scaling_factor: the checkpoint's own, where it is not `scale` (CogVideoX-5b: 0.7).
        Raises: ValueError that names the format, what was expected and what came.
        """
        if convention == "comfyui":
            latents = _first_of_nested(latents)
        space = Space(
            name=self.name,
            channels=self.channels,
            spatial_factor=self.spatial_factor,
            width=width,
            height=height,
            leading_tokens=leading_tokens,
            latent_frames=latent_frames,
        )
        held = find_layout(space, self._layout_names(convention, layout), latents.shape)
        spatial = unpack(latents, held, space)
        if scaling_factor is not None:
            spatial = spatial * self._own_scale(scaling_factor)
        count, frames, *cell_axes = spatial.shape
        # A picture's frames are pictures too: AnimateDiff's and SVD's, and the layers of Qwen-Image-Layered.
        return spatial if self.temporal_factor else spatial.reshape((count * frames, *cell_axes))

    def to_decoder(self, latents: Latents, width: int, height: int, **how: Any) -> Latents:
        """What a sampler holds -> what its tiny decoder wants: (N, C, h, w), of video decoders (N, T, C, h, w).

        how: as to_spatial takes it. Raises: ValueError as to_spatial does.
        """
        spatial = self.to_spatial(latents, width, height, **how)
        if self.decoder_scale is not None:
            spatial = spatial / self.decoder_scale
        is_video = self.decoder is not None and TINY_DECODERS[self.decoder].kind == "video"
        if is_video and len(spatial.shape) == 4:  # Qwen-Image: a video of one latent each
            count, *cell_axes = spatial.shape
            return spatial.reshape((count, 1, *cell_axes))
        return spatial

    def unfold(self, latents: Latents) -> Latents:
        """A publisher's latents with whole cells: (..., 4C, h, w) -> (..., C, 2h, 2w); others come back as they are.

        A patchified channel is c*4 + dy*2 + dx (FLUX.2 as ComfyUI and ERNIE-Image hold it). numpy or torch.
        """
        *leading, channels, height, width = latents.shape
        if channels != self.patchified_channels:
            return latents
        flat = latents.reshape((-1, channels, height, width))
        cells = rearrange(flat, "n (c y x) h w", "n c (h y) (w x)", {"y": 2, "x": 2})
        return cells.reshape((*leading, self.channels, 2 * height, 2 * width))

    def _layout_names(self, convention: Convention, layout: str | None) -> tuple[str, ...]:
        """The layouts that latents may have."""
        if layout is not None:
            if layout not in LAYOUTS:
                raise ValueError(f"{self.name}: no layout {layout!r}; there are: {', '.join(LAYOUTS)}")
            return (layout,)
        if convention == "comfyui":
            return (self.comfyui_layout or ("frames_third" if self.temporal_factor else "spatial"),)
        if convention != "diffusers":
            raise ValueError(f"{self.name}: expected convention 'diffusers' or 'comfyui', got {convention!r}")
        if not self.layouts:
            raise ValueError(f"{self.name}: diffusers has no pipeline for it; say layout=, one of {', '.join(LAYOUTS)}")
        return self.layouts

    def _own_scale(self, scaling_factor: float) -> float:
        """From a checkpoint's own scale to the table's: its latents are then the format's, for every decoder."""
        if self.decoder_scale is None:
            raise ValueError(f"{self.name}: its decoder takes latents as they are held: no scaling_factor is used")
        return self.decoder_scale / scaling_factor


def _first_of_nested(latents: Any) -> Any:
    """The video of ComfyUI's nested (video, audio); other latents as they are."""
    parts = getattr(latents, "tensors", latents)
    return parts[0] if isinstance(parts, list | tuple) else latents


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


def unfolded(name: str, latents: Latents) -> Latents:
    """Latents in the spatial form of the format of that name, see LatentFormat.unfold; of a user's own as they are."""
    known = LATENT_FORMATS.get(name)
    return latents if known is None else known.unfold(latents)


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


def magnitude_of(latent_format: str) -> float:
    """|z| that the uint8 wire form of a format holds, also of one that the table does not have."""
    known = LATENT_FORMATS.get(latent_format)
    return known.magnitude if known else DEFAULT_MAGNITUDE
