"""ComfyUI's latent formats by our names, and x0 of its callbacks in the form that is published.

At a callback x0 is in the model's space (after `process_in`, before `process_out`): z, as everywhere on the wire.
"""

from __future__ import annotations

from typing import Any, Final

from taesd_stream.latent_formats import LATENT_FORMATS, LatentFormat

# Classes of comfy.latent_formats (Comfy-Org/ComfyUI@75399d7). Sound, 3D and pixel models have none: they are not shown.
_BY_CLASS: Final = {
    "CogVideoX": "cogvideox",
    "Cosmos1CV8x8x8": "cosmos1_cv8x8x8",
    "Flux": "flux1",
    "Flux2": "flux2",
    "HunyuanImage21": "hunyuan_image_2_1",
    "HunyuanImage21Refiner": "hunyuan_image_2_1_refiner",
    "HunyuanVideo": "hunyuan_video",
    "HunyuanVideo15": "hunyuan_video_1_5",
    "LTXAV": "ltx_2",
    "LTXV": "ltx_video",
    "MiniMaxH3Video": "minimax_h3",
    "Mochi": "mochi",
    "QwenImage21": "qwen_image_2_1",
    "SC_B": "stable_cascade_decoder",
    "SC_Prior": "stable_cascade_prior",
    "SD15": "sd1",
    "SD3": "sd3",
    "SDXL": "sdxl",
    "SDXL_Playground_2_5": "sdxl_playground_2_5",
    "SD_X4": "sd_x4_upscaler",
    "Wan21": "wan2_1",
    "Wan22": "wan2_2",
}
_WAN_PICTURE: Final = "qwen_image"  # Wan's space with one frame: Qwen-Image, Krea 2, Anima, and Wan's own pictures


def format_of(model: Any, frames: int | None) -> LatentFormat | None:
    """The format of what a ComfyUI model (comfy.model_base.BaseModel) samples; None where we have none.

    frames: T of (B, C, T, h, w); None for pictures.
    """
    bases = (base.__name__ for base in type(model.latent_format).__mro__)
    name = next((_BY_CLASS[base] for base in bases if base in _BY_CLASS), None)
    if name == "wan2_1" and frames == 1:
        name = _WAN_PICTURE
    if name == "ltx_2" and _is_ltx_2_3(model):
        name = "ltx_2_3"
    return None if name is None else LATENT_FORMATS[name]


def published(x0: Any, known: LatentFormat, scaling_factor: float) -> Any:
    """What a callback holds -> what is published: (N, C, h, w), of video formats (N, T, C, h, w).

    scaling_factor: of ComfyUI's format; CogVideoX's checkpoints differ in it.
    Raises: ValueError that names the format, what was expected and what came.
    """
    if x0.ndim == 4 and x0.shape[1] == known.patchified_channels:
        return x0  # FLUX.2: the wire knows its 128 channels
    pictures_of_views = x0.ndim == 5 and known.temporal_factor is None
    return known.to_spatial(
        x0,
        0,
        0,
        convention="comfyui",
        layout="frames_third" if pictures_of_views else None,
        scaling_factor=None if known.decoder_scale is None else scaling_factor,
    )


def _is_ltx_2_3(model: Any) -> bool:
    """The latent format's class is LTX-2's: the transformer's blocks tell them apart."""
    blocks = getattr(model.diffusion_model, "transformer_blocks", ())
    return any(getattr(block, "cross_attention_adaln", False) for block in blocks)
