"""The peer of every preview: diffusers' AutoencoderTiny in the sampler's callback, as its documentation shows it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


def in_process_preview() -> Callable[[Tensor], None]:
    """Decodes latents (N,4,h,w), and makes a JPEG of the first picture. Weights are random: they change no time."""
    decoder: Any = AutoencoderTiny()  # type: ignore[no-untyped-call]
    decoder.eval()
    processor: Any = VaeImageProcessor()

    @torch.no_grad()
    def preview(latents: Tensor) -> None:
        picture = decoder.decode(latents).sample
        processor.postprocess(picture, output_type="pil")[0].save(io.BytesIO(), "JPEG")

    return preview
