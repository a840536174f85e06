"""diffusers' own pipeline classes with tiny random weights, made from configs: nothing is downloaded.

Prompts come as embeddings, for text encoders are not ours to test. What is true to the real ones is what a preview
meets: latent channels, packing, the scheduler's kind, the VAE's class and scale.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from torch import Tensor

STEPS: Final = 3
D: Any = diffusers


@dataclass(frozen=True, slots=True)
class Case:
    """A pipeline and the arguments of its call; `to_vae`: a publisher's z -> what the pipeline hands to its VAE."""

    pipe: Any
    arguments: dict[str, Any]
    latent_format: str
    to_vae: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]  # of what is published
    told: dict[str, Any] = field(default_factory=dict)  # of the meta


def call(case: Case, **more: Any) -> tuple[Any, list[Tensor]]:
    """Run the pipeline, always from the same noise. Returns its output and what its VAE was given."""
    given: list[Tensor] = []
    vae = case.pipe.vae
    decode = vae.decode

    def listening(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        given.append(latents.detach().clone())
        return decode(latents, *args, **kwargs)

    vae.decode = listening
    try:
        output = case.pipe(**{"generator": torch.Generator().manual_seed(7), **case.arguments, **more})
    finally:
        del vae.decode
    return output, given


def _embeds(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def _flow(**config: Any) -> Any:
    return D.FlowMatchEulerDiscreteScheduler(**config)


def _kl(channels: int, scale: float, shift: float | None = None) -> Any:
    return D.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        sample_size=64,
        scaling_factor=scale,
        shift_factor=shift,
    )


def _scaled(scale: float, shift: float = 0.0) -> Callable[[Tensor], Tensor]:
    return lambda z: z / scale + shift


def _unet(cross_attention_dim: int, **more: Any) -> Any:
    return D.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def sd1(scheduler: Any = None) -> Case:
    """Stable Diffusion 1: epsilon by default, DDIM whose last alpha is 1."""
    pipe = D.StableDiffusionPipeline(
        vae=_kl(4, 0.18215),
        text_encoder=None,
        tokenizer=None,
        unet=_unet(8),
        scheduler=scheduler or D.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "height": 64,
        "width": 96,
        "guidance_scale": 3.0,
    }
    return Case(pipe, arguments, "sd1", _scaled(0.18215), (1, 4, 8, 12), {"guidance": 3.0})


def with_prompts(case: Case, folder: Path) -> Case:
    """The same with a text encoder, and a tokenizer that knows letters: prompts are texts."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    case.pipe.tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
    )
    encoder: Any = transformers.CLIPTextModel(config)
    case.pipe.text_encoder = encoder.eval()
    embeds = ("prompt_embeds", "negative_prompt_embeds")
    arguments = {name: value for name, value in case.arguments.items() if name not in embeds}
    return dataclasses.replace(case, arguments=arguments)


def sdxl() -> Case:
    """SDXL: v-prediction by Euler, latents in k-diffusion's scale."""
    pipe = D.StableDiffusionXLPipeline(
        vae=_kl(4, 0.13025),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=_unet(
            8,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=4 * 6 + 8,
            use_linear_projection=True,
        ),
        scheduler=D.EulerDiscreteScheduler(prediction_type="v_prediction"),
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    )
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "pooled_prompt_embeds": _embeds(1, 8),
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "negative_pooled_prompt_embeds": -_embeds(1, 8),
        "height": 64,
        "width": 96,
        "num_images_per_prompt": 2,
    }
    return Case(pipe, arguments, "sdxl", _scaled(0.13025), (2, 4, 8, 12))


def sd3(scheduler: Any = None) -> Case:
    """Stable Diffusion 3: flow matching, spatial latents of 16 channels."""
    transformer = D.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_projection_dim=8,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        out_channels=16,
    )
    pipe = D.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=scheduler or _flow(shift=3.0),
        vae=_kl(16, 1.5305, 0.0609),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "pooled_prompt_embeds": _embeds(1, 8),
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "negative_pooled_prompt_embeds": -_embeds(1, 8),
        "height": 64,
        "width": 96,
    }
    return Case(pipe, arguments, "sd3", _scaled(1.5305, 0.0609), (1, 16, 8, 12))


def flux1() -> Case:
    """FLUX.1: tokens of 2x2 cells."""
    transformer = D.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    pipe = D.FluxPipeline(
        scheduler=_flow(use_dynamic_shifting=True),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "pooled_prompt_embeds": _embeds(1, 8),
        "height": 64,
        "width": 96,
        "num_images_per_prompt": 2,
    }
    return Case(pipe, arguments, "flux1", _scaled(0.3611, 0.1159), (2, 16, 8, 12), {"guidance": 3.5})


def flux2() -> Case:
    """FLUX.2: tokens of 2x2 cells, normalised by a batch norm in the patchified order."""
    torch.manual_seed(0)
    transformer = D.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = D.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=1,
    )
    vae.bn.running_mean.uniform_(-0.1, 0.1)
    vae.bn.running_var.uniform_(2, 4)
    pipe = D.Flux2Pipeline(scheduler=_flow(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)

    def to_vae(z: Tensor) -> Tensor:
        cells = torch.nn.functional.pixel_unshuffle(z, 2)  # channels come as (c dy dx)
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).view(1, -1, 1, 1)
        return torch.nn.functional.pixel_shuffle(cells * std + vae.bn.running_mean.view(1, -1, 1, 1), 2)

    arguments = {"prompt_embeds": _embeds(1, 4, 8), "height": 64, "width": 96}
    return Case(pipe, arguments, "flux2", to_vae, (1, 32, 8, 12))


def sana() -> Case:
    """Sana: 32 channels of a deep compression autoencoder, flow matching by DPM-Solver++."""
    transformer = D.SanaTransformer2DModel(
        patch_size=1,
        in_channels=32,
        out_channels=32,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )
    vae = D.AutoencoderDC(
        in_channels=3,
        latent_channels=32,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 6,
        decoder_block_types=("ResBlock",) * 6,
        encoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        decoder_block_out_channels=(8, 8, 8, 8, 8, 32),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    scheduler = D.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    pipe = D.SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    mask = torch.ones(1, 4, dtype=torch.long)
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "negative_prompt_attention_mask": mask,
        "height": 64,
        "width": 96,
        "use_resolution_binning": False,
    }
    return Case(pipe, arguments, "sana", _scaled(0.41407), (1, 32, 2, 3))


def qwen_image() -> Case:
    """Qwen-Image: tokens of 2x2 cells, and Wan's latent space."""
    transformer = D.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    vae = D.AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipe = D.QwenImagePipeline(
        scheduler=_flow(use_dynamic_shifting=True), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer
    )
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "prompt_embeds_mask": torch.ones(1, 4, dtype=torch.long),
        "height": 64,
        "width": 96,
    }
    mean_std = _mean_std(vae)
    return Case(pipe, arguments, "qwen_image", lambda z: mean_std(z.unsqueeze(2)), (1, 16, 8, 12), {"cfg": 4.0})


def z_image() -> Case:
    """Z-Image: its model's velocity points to the picture, and the pipeline turns it round."""
    torch.manual_seed(0)
    transformer = D.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=16,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 32, 32],
    )
    with torch.no_grad():  # left unset by their constructor
        transformer.x_pad_token.fill_(1)
        transformer.cap_pad_token.fill_(1)
    pipe = D.ZImagePipeline(
        scheduler=_flow(shift=3.0),
        vae=_kl(16, 0.3611, 0.1159),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
    )
    arguments = {
        "prompt": None,
        "prompt_embeds": [_embeds(4, 8)],
        "negative_prompt_embeds": [-_embeds(4, 8)],
        "height": 64,
        "width": 96,
    }
    return Case(pipe, arguments, "flux1", _scaled(0.3611, 0.1159), (1, 16, 8, 12))


def _mean_std(vae: Any) -> Callable[[Tensor], Tensor]:
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    return lambda z: z * std + mean


def _channels_first(to_vae: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A clip (T, C, h, w) as a VAE takes it: (1, C, T, h, w)."""
    return lambda z: to_vae(z.transpose(0, 1).unsqueeze(0))


def wan() -> Case:
    """Wan 2.1: clips, flow matching by UniPC."""
    transformer = D.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = D.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = D.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = D.WanPipeline(tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler, transformer=transformer)
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }
    return Case(pipe, arguments, "wan2_1", _channels_first(_mean_std(vae)), (3, 16, 4, 6))


def wan_img2vid() -> Case:
    """Wan 2.2 TI2V-5B's way from an image: the first frame is put in by the model's input alone, not by the step."""
    case = wan()
    parts = {name: part for name, part in case.pipe.components.items() if name in _own_names(D.WanImageToVideoPipeline)}
    pipe = D.WanImageToVideoPipeline(**parts, expand_timesteps=True)
    arguments = {**case.arguments, "image": torch.rand(1, 3, 32, 48)}
    return Case(pipe, arguments, case.latent_format, case.to_vae, case.shape)


def hunyuan_video() -> Case:
    """HunyuanVideo: clips, flow matching."""
    transformer = D.HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    vae = D.AutoencoderKLHunyuanVideo(
        latent_channels=16,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.476986,
    )
    pipe = D.HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=_flow(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
    )
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "pooled_prompt_embeds": _embeds(1, 8),
        "prompt_attention_mask": torch.ones(1, 4, dtype=torch.long),
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }
    return Case(pipe, arguments, "hunyuan_video", _channels_first(_scaled(0.476986)), (3, 16, 4, 6))


def hunyuan_video_1_5() -> Case:
    """HunyuanVideo 1.5: a pipeline without any step callback."""
    transformer = D.HunyuanVideo15Transformer3DModel(
        in_channels=65,
        out_channels=32,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=8,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=32,
        task_type="t2v",
    )
    vae = D.AutoencoderKLHunyuanVideo15(
        latent_channels=32,
        block_out_channels=(32, 32, 32, 32, 32),
        layers_per_block=1,
        scaling_factor=1.03682,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = D.HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        vae=vae,
        scheduler=_flow(shift=7.0),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=D.ClassifierFreeGuidance(guidance_scale=1.0),
    )
    mask = torch.ones(1, 4, dtype=torch.long)
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "prompt_embeds_mask": mask,
        "prompt_embeds_2": _embeds(1, 4, 8),
        "prompt_embeds_mask_2": mask,
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }
    return Case(pipe, arguments, "hunyuan_video_1_5", _channels_first(_scaled(1.03682)), (3, 32, 2, 3))


def cogvideox(scheduler: Any = None) -> Case:
    """CogVideoX-5b: frames before channels, v-prediction, a scale of its own, five arguments to step()."""
    transformer = D.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=16,
        out_channels=16,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=1,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=4,
    )
    vae = D.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    scheduler = scheduler or D.CogVideoXDPMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    pipe = D.CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "height": 32,
        "width": 48,
        "num_frames": 9,
    }
    # in the table's scale, 2b's, whatever the checkpoint's own
    return Case(pipe, arguments, "cogvideox", _channels_first(_scaled(1.15258426)), (3, 16, 4, 6))


def _ltx_vae(cls: Any, **more: Any) -> Any:
    vae = cls(
        in_channels=3,
        out_channels=3,
        latent_channels=128,
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        upsample_residual=(False,),
        upsample_factor=(1,),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
        **more,
    )
    vae.latents_mean.uniform_(-0.2, 0.2)
    vae.latents_std.uniform_(0.8, 1.5)
    return vae


def _ltx_to_vae(vae: Any) -> Callable[[Tensor], Tensor]:
    mean, std = vae.latents_mean.view(1, -1, 1, 1, 1), vae.latents_std.view(1, -1, 1, 1, 1)
    return _channels_first(lambda z: z * std + mean)


def ltx() -> Case:
    """LTX: tokens of all frames, by a VAE whose factors are not the real one's."""
    torch.manual_seed(0)
    transformer = D.LTXVideoTransformer3DModel(
        in_channels=128,
        out_channels=128,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    vae = _ltx_vae(D.AutoencoderKLLTXVideo)
    pipe = D.LTXPipeline(scheduler=_flow(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    mask = torch.ones(1, 4, dtype=torch.long)
    arguments = {
        "prompt_embeds": _embeds(1, 4, 8),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": -_embeds(1, 4, 8),
        "negative_prompt_attention_mask": mask,
        "height": 32,
        "width": 64,
        "num_frames": 9,
        "frame_rate": 25,
    }
    side = pipe.vae_spatial_compression_ratio
    shape = (8 // pipe.vae_temporal_compression_ratio + 1, 128, 32 // side, 64 // side)
    return Case(pipe, arguments, "ltx_video", _ltx_to_vae(vae), shape)


def ltx2() -> Case:
    """LTX-2: video and sound in one loop, the sound by a deep copy of the scheduler."""
    torch.manual_seed(0)
    transformer = D.LTX2VideoTransformer3DModel(
        in_channels=128,
        out_channels=128,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=8,
        rope_double_precision=False,
    )
    connectors = D.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=8,
        text_proj_in_factor=2,
        video_connector_num_attention_heads=1,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=1,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
        connector_rope_base_seq_len=32,
        rope_double_precision=False,
        causal_temporal_positioning=False,
    )
    vae = _ltx_vae(D.AutoencoderKLLTX2Video, downsample_type=("spatial",))
    audio_vae = D.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        attn_resolutions=None,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        norm_type="pixel",
        causality_axis="height",
        mid_block_add_attention=False,
        mel_bins=8,
    )
    vocoder = D.pipelines.ltx2.LTX2Vocoder(
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    pipe = D.LTX2Pipeline(
        scheduler=_flow(),
        vae=vae,
        audio_vae=audio_vae,
        text_encoder=None,
        tokenizer=None,
        connectors=connectors,
        transformer=transformer,
        vocoder=vocoder,
    )
    mask = torch.ones(1, 4, dtype=torch.long)
    arguments = {
        "prompt_embeds": _embeds(1, 4, 16),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": -_embeds(1, 4, 16),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 1.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "guidance_rescale": 0.0,
        "audio_guidance_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        "audio_guidance_rescale": 0.0,
        "spatio_temporal_guidance_blocks": None,
        "use_cross_timestep": False,
        "height": 32,
        "width": 64,
        "num_frames": 9,
        "frame_rate": 25.0,
    }
    frames = 8 // pipe.vae_temporal_compression_ratio + 1
    side = pipe.vae_spatial_compression_ratio
    return Case(pipe, arguments, "ltx_2", _ltx_to_vae(vae), (frames, 128, 32 // side, 64 // side))


def flux1_img2img() -> Case:
    """FLUX.1 from an image: the schedule's tail alone is walked."""
    case = flux1()
    pipe = D.FluxImg2ImgPipeline(**{name: case.pipe.components[name] for name in _own_names(D.FluxImg2ImgPipeline)})
    arguments = {**case.arguments, "image": torch.rand(1, 3, 64, 96), "strength": 0.7}
    return Case(pipe, arguments, case.latent_format, case.to_vae, case.shape)


def _half_mask() -> Tensor:
    """The left half of 64x96 stays."""
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 48:] = 1
    return mask


def sd1_inpaint() -> Case:
    """Stable Diffusion 1 within a mask: what is around it is put back after each step, guidance doubles the mask."""
    case = sd1(D.DPMSolverMultistepScheduler(steps_offset=1, final_sigmas_type="zero"))
    pipe = D.StableDiffusionInpaintPipeline(**case.pipe.components, requires_safety_checker=False)
    given = {"image": torch.rand(1, 3, 64, 96), "mask_image": _half_mask(), "num_images_per_prompt": 2}
    arguments = {**case.arguments, **given}
    return Case(pipe, arguments, case.latent_format, case.to_vae, (2, 4, 8, 12))


def flux1_inpaint() -> Case:
    """FLUX.1 within a mask: both come as tokens."""
    case = flux1()
    pipe = D.FluxInpaintPipeline(**{name: case.pipe.components[name] for name in _own_names(D.FluxInpaintPipeline)})
    given = {"image": torch.rand(1, 3, 64, 96), "mask_image": _half_mask(), "strength": 1.0}
    return Case(pipe, {**case.arguments, **given}, case.latent_format, case.to_vae, case.shape)


def ltx_img2vid() -> Case:
    """LTX from an image: the scheduler sees the frames behind it, unpacked."""
    case = ltx()
    pipe = D.LTXImageToVideoPipeline(**case.pipe.components)
    return Case(
        pipe, {**case.arguments, "image": torch.rand(1, 3, 32, 64)}, case.latent_format, case.to_vae, case.shape
    )


def ltx_condition() -> Case:
    """LTX from conditions: a timestep each token, and a velocity that points to the picture."""
    case = ltx()
    pipe = D.LTXConditionPipeline(**case.pipe.components)
    return Case(pipe, case.arguments, case.latent_format, case.to_vae, case.shape)


def _own_names(cls: Any) -> set[str]:
    names: set[str] = set(cls._get_signature_keys(cls)[0])
    return names


IMAGES: Final = (sd1, sdxl, sd3, flux1, flux2, sana, qwen_image, z_image)
VIDEOS: Final = (wan, hunyuan_video, hunyuan_video_1_5, cogvideox, ltx, ltx2)
GIVEN: Final = (flux1_img2img, flux1_inpaint, sd1_inpaint, wan_img2vid, ltx_img2vid, ltx_condition)  # from an image
