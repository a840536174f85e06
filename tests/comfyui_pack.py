"""A pack of nodes that `test_comfyui_real.py` puts into a real ComfyUI, which loads it beside ours.

Small models of ComfyUI's own classes with seeded weights, words without a text encoder; and, as other packs do, its own
hands on the previewer: what passes there is said in ComfyUI's log.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import comfy.latent_formats
import comfy.model_base
import comfy.model_patcher
import comfy.supported_models
import latent_preview
import torch

logger = logging.getLogger(__name__)

UNET: Final = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 32,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
}
WAN: Final = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 128,
    "ffn_dim": 64,
    "freq_dim": 32,
    "text_dim": 32,
    "num_heads": 1,
    "num_layers": 1,
}
POINTWISE: Final = {  # formats of newer versions only
    name: getattr(comfy.latent_formats, cls)
    for name, cls in (("flux2", "Flux2"), ("ltx_2", "LTXAV"))
    if hasattr(comfy.latent_formats, cls)
}


class Pointwise(torch.nn.Module):
    """A model without weights, for latents of any shape."""

    dtype = torch.float32

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """About the noise."""
        return x * 0.9


class TinyModel:
    """A model of few weights, the same at each load."""

    CATEGORY: Final = "testing"
    RETURN_TYPES: Final = ("MODEL",)
    FUNCTION: Final = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Which one."""
        return {"required": {"unet_name": (["sd1", "wan2_1", *POINTWISE],)}}

    def load(self, unet_name: str) -> tuple[Any]:
        """Build it."""
        cpu = torch.device("cpu")
        known = comfy.supported_models
        if unet_name in POINTWISE:
            plain = known.SD15({})
            plain.latent_format = POINTWISE[unet_name]()
            pointwise = comfy.model_base.BaseModel(plain, device="cpu", unet_model=Pointwise)
            return (comfy.model_patcher.ModelPatcher(pointwise, load_device=cpu, offload_device=cpu),)
        config = known.SD15(UNET) if unet_name == "sd1" else known.WAN21_T2V(WAN)
        if unet_name == "sd1":
            config.unet_config |= {"num_heads": 1, "num_head_channels": -1}
        model = config.get_model({}, device="cpu")
        generator = torch.Generator().manual_seed(3)
        for parameter in model.diffusion_model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.requires_grad_(False)
        return (comfy.model_patcher.ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu),)


class SoundBehind:
    """A video's latents with its sound's behind them, as LTX-2 has them."""

    CATEGORY: Final = "testing"
    RETURN_TYPES: Final = ("LATENT",)
    FUNCTION: Final = "nest"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The batch."""
        return {"required": {"batch_size": ("INT", {"default": 2})}}

    def nest(self, batch_size: int) -> tuple[Any]:
        """(B, 128, 3, 4, 5) and (B, 8, 6, 16)."""
        from comfy.nested_tensor import NestedTensor

        parts = (torch.zeros(batch_size, 128, 3, 4, 5), torch.zeros(batch_size, 8, 6, 16))
        return ({"samples": NestedTensor(parts)},)


class OnlyVideo:
    """Without the sound."""

    CATEGORY: Final = "testing"
    RETURN_TYPES: Final = ("LATENT",)
    FUNCTION: Final = "first"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Both."""
        return {"required": {"samples": ("LATENT",)}}

    def first(self, samples: dict[str, Any]) -> tuple[Any]:
        """(B, 128, T, h, w)."""
        return ({"samples": samples["samples"].unbind()[0]},)


class TinyText:
    """Words as numbers that only their length decides."""

    CATEGORY: Final = "testing"
    RETURN_TYPES: Final = ("CONDITIONING",)
    FUNCTION: Final = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The words."""
        return {"required": {"text": ("STRING", {})}}

    def encode(self, text: str) -> tuple[Any]:
        """(1, 8, 32), as ComfyUI's samplers take it."""
        numbers = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(len(text)))
        return ([[numbers, {}]],)


def _watch_previewer() -> None:
    get_previewer, prepare_callback = latent_preview.get_previewer, latent_preview.prepare_callback

    def get(device: Any, latent_format: Any) -> Any:
        previewer = get_previewer(device, latent_format)
        if previewer is not None:
            decode = previewer.decode_latent_to_preview_image

            def decoded(preview_format: Any, x0: Any) -> Any:
                picture = decode(preview_format, x0)
                logger.warning("the other pack saw a preview of %s pixels", picture[1].size)
                return picture

            previewer.decode_latent_to_preview_image = decoded
        return previewer

    def prepare(model: Any, steps: int, *args: Any, **kwargs: Any) -> Any:
        callback = prepare_callback(model, steps, *args, **kwargs)

        def called(step: int, *rest: Any) -> Any:
            logger.warning("the other pack saw step %d", step)
            return callback(step, *rest)

        return called

    latent_preview.get_previewer, latent_preview.prepare_callback = get, prepare


_watch_previewer()
NODE_CLASS_MAPPINGS: Final = {
    "TinyModel": TinyModel,
    "TinyText": TinyText,
    "SoundBehind": SoundBehind,
    "OnlyVideo": OnlyVideo,
}
