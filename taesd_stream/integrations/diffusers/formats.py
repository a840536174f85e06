"""Which latent format a pipeline samples in, told from its VAE's class and config, else from its own class."""

from __future__ import annotations

from typing import Any, Final

from taesd_stream.latent_formats import LATENT_FORMATS, LatentFormat, latent_format

# AutoencoderKL is one class for many spaces: (channels, scaling_factor) tells them apart.
_BY_SCALE: Final = {
    (4, 0.18215): "sd1",
    (4, 0.13025): "sdxl",
    (4, 0.08333): "sd_x4_upscaler",
    (16, 1.5305): "sd3",
    (16, 0.3611): "flux1",
}
_BY_VAE: Final = {
    "AutoencoderKLCogVideoX": "cogvideox",
    "AutoencoderKLFlux2": "flux2",
    "AutoencoderKLHunyuanImage": "hunyuan_image_2_1",
    "AutoencoderKLHunyuanImageRefiner": "hunyuan_image_2_1_refiner",
    "AutoencoderKLHunyuanVideo": "hunyuan_video",
    "AutoencoderKLHunyuanVideo15": "hunyuan_video_1_5",
    "AutoencoderKLLTX2Video": "ltx_2",
    "AutoencoderKLLTXVideo": "ltx_video",
    "AutoencoderKLMochi": "mochi",
    "AutoencoderKLQwenImage": "qwen_image",
    "AutoencoderKLQwenImage21": "qwen_image_2_1",
    "AutoencoderKLTemporalDecoder": "sd1",  # Stable Video Diffusion
}
_BY_WAN_CHANNELS: Final = {16: "wan2_1", 48: "wan2_2"}
_DC_CHANNELS: Final = 32
# Where the VAE does not tell, AutoencoderTiny or none at all: the pipeline's name, the longest beginning first.
_BY_PIPELINE: Final = {
    "StableDiffusionXL": "sdxl",
    "StableDiffusion3": "sd3",
    "StableDiffusion": "sd1",
    "LatentConsistencyModel": "sd1",
    "AnimateDiff": "sd1",
    "PixArtAlpha": "sd1",
    "PixArtSigma": "sdxl",
    "Kolors": "sdxl",
    "Flux2": "flux2",
    "Flux": "flux1",
    "Chroma": "flux1",
    "ZImage": "flux1",
    "Lumina2": "flux1",
    "HiDreamImage": "flux1",
    "Sana": "sana",
    "QwenImage": "qwen_image",
    "Wan": "wan2_1",
    "HunyuanVideo15": "hunyuan_video_1_5",
    "HunyuanVideo": "hunyuan_video",
    "CogVideoX": "cogvideox",
    "LTX2": "ltx_2",
    "LTX": "ltx_video",
    "Mochi": "mochi",
}


def format_of(pipe: Any) -> str:
    """The name of the pipeline's latent format, a key of LATENT_FORMATS.

    Raises: ValueError that says what was looked at, and how to name the format.
    """
    name = type(pipe).__name__
    vae = getattr(pipe, "vae", None)
    found = _of_vae(pipe, vae) or next((_BY_PIPELINE[one] for one in _names() if name.startswith(one)), None)
    if found is None:
        vae_name = "no VAE" if vae is None else f"VAE {type(vae).__name__}"
        raise ValueError(
            f"{name} with {vae_name}: its latent format is not known; say latent_format=, one of "
            f"{', '.join(LATENT_FORMATS)}"
        )
    return found


def format_named(name: str) -> LatentFormat:
    """A format of the table, or one that this user has fitted. Raises: ValueError that names the nearest."""
    try:
        from taesd_stream.user_formats import known_format
    except ModuleNotFoundError:  # whoever fits one has installed what that needs
        return latent_format(name)
    return known_format(name)


def _names() -> list[str]:
    return sorted(_BY_PIPELINE, key=len, reverse=True)


def _of_vae(pipe: Any, vae: Any) -> str | None:
    name, config = type(vae).__name__, getattr(vae, "config", {})
    if name == "AutoencoderKL":
        channels, scale = config.get("latent_channels"), config.get("scaling_factor")
        if config.get("latents_mean") is not None and channels == 4:
            return "sdxl_playground_2_5"
        return next(
            (found for (count, value), found in _BY_SCALE.items() if _is_near(channels, count, scale, value)), None
        )
    if name == "AutoencoderKLWan":
        return _BY_WAN_CHANNELS.get(config.get("z_dim", 0))
    if name == "AutoencoderDC":
        return "sana" if config.get("latent_channels") == _DC_CHANNELS else None
    if name == "AutoencoderKLLTX2Video":
        transformer = getattr(getattr(pipe, "transformer", None), "config", {})
        return "ltx_2_3" if transformer.get("cross_attn_mod") else "ltx_2"
    return _BY_VAE.get(name)


def _is_near(channels: Any, count: int, scale: Any, value: float) -> bool:
    return channels == count and isinstance(scale, int | float) and abs(scale - value) < 1e-4
