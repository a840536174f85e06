"""Latents as a pipeline's scheduler sees them -> as a publisher sends them, by the pipeline's own sizes."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from taesd_stream.latent_formats import LatentFormat

# Pipelines whose tokens no shape can tell from another's.
_LAYOUTS: Final = {
    "Ideogram4Pipeline": "tokens_2x2_channels_last",
    "QwenImageLayeredPipeline": "layered_tokens_2x2",
}


class Geometry:
    """How one call of a pipeline holds its latents; read at its first step, for sizes stay.

    pipe, variables: of the call, as running_call gives them.
    """

    def __init__(self, pipe: Any, known: LatentFormat, variables: dict[str, Any], sample: Tensor) -> None:
        self._known = known
        self._layout = _LAYOUTS.get(type(pipe).__name__)
        # tokens are counted from pixels by the format's factor; a VAE of another one has another pixel
        factor = known.spatial_factor / _pixels_per_cell(pipe, known)
        self._height = round((variables.get("height") or 0) * factor)
        self._width = round((variables.get("width") or 0) * factor)
        self._leading_tokens = variables.get("extra_conditioning_num_latents") or 0
        self._latent_frames = variables.get("latent_num_frames") if sample.ndim == 3 else None
        self._padding_frames = variables.get("additional_frames") or 0
        self._given_frame = _given_frame(variables.get("latents"), sample)
        self._fixed = _fixed_cells(variables, sample)
        self._scaling_factor = None if known.decoder_scale is None else pipe.vae.config.scaling_factor
        if sample.ndim == 5 and known.layouts == ("video_tokens",):
            self._layout = "frames_third"  # LTX's image to video unpacks before the step

    def spatial(self, latents: Tensor) -> Tensor:
        """(N, C, h, w), of video formats (N, T, C, h, w); z stays z, in the format's scale.

        Raises: ValueError as LatentFormat.to_spatial does.
        """
        if self._given_frame is not None:
            latents = torch.cat([self._given_frame.to(latents), latents], dim=2)
        if self._fixed is not None:
            cells, is_free = self._fixed
            latents = torch.lerp(cells.to(latents), latents, is_free.to(latents))
        spatial = self._known.to_spatial(
            latents,
            self._width,
            self._height,
            layout=self._layout,
            leading_tokens=self._leading_tokens,
            latent_frames=self._latent_frames,
            scaling_factor=self._scaling_factor,
        )
        return spatial[:, self._padding_frames :] if self._padding_frames else spatial


def _pixels_per_cell(pipe: Any, known: LatentFormat) -> float:
    for name in ("vae_spatial_compression_ratio", "vae_scale_factor_spatial", "vae_scale_factor"):
        value = getattr(pipe, name, None)
        if value:
            return float(value)
    return known.spatial_factor


def _given_frame(held: Any, sample: Tensor) -> Tensor | None:
    """The first frame, where an image becomes a video and the scheduler sees the frames behind it alone."""
    if sample.ndim != 5 or getattr(held, "ndim", 0) != 5 or held.shape[2] != sample.shape[2] + 1:
        return None
    first: Tensor = held[:, :, :1].clone()
    return first


def _fixed_cells(variables: dict[str, Any], sample: Tensor) -> tuple[Tensor, Tensor] | None:
    """Latents that the call puts in after a step, and where it does not (1): there the scheduler's are not shown.

    Of Wan 2.2 TI2V-5B from an image it is the first frame; of inpainting what is around the mask.
    """
    cells, is_free = variables.get("condition"), variables.get("first_frame_mask")
    if variables.get("is_inpainting"):
        cells, is_free = variables.get("image_latents"), variables.get("mask")
        if cells is None or is_free is None or cells.shape != sample.shape:
            return None
        is_free = is_free[: len(sample)]  # with guidance it is there twice
    return None if cells is None or is_free is None else (cells, is_free)
