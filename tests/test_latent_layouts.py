"""From what a sampler holds to what the tiny decoder wants: every layout, against diffusers' own packing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taesd_stream.latent_formats import LATENT_FORMATS, TINY_DECODERS, latent_format
from taesd_stream.latent_layouts import rearrange
from tests.diffusers_source import function_of

FLUX = partial(function_of, "pipelines.flux.pipeline_flux")
QWEN_IMAGE = partial(function_of, "pipelines.qwenimage.pipeline_qwenimage")
BRIA_FIBO = partial(function_of, "pipelines.bria_fibo.pipeline_bria_fibo")
ERNIE_IMAGE = partial(function_of, "pipelines.ernie_image.pipeline_ernie_image")
FLUX2 = partial(function_of, "pipelines.flux2.pipeline_flux2")
HUNYUAN_IMAGE_REFINER = partial(function_of, "pipelines.hunyuan_image.pipeline_hunyuanimage_refiner")
LTX2 = partial(function_of, "pipelines.ltx2.pipeline_ltx2")
LTX = partial(function_of, "pipelines.ltx.pipeline_ltx")
QWEN_IMAGE21 = partial(function_of, "pipelines.qwenimage21.pipeline_qwenimage21")
QWEN_IMAGE_LAYERED = partial(function_of, "pipelines.qwenimage.pipeline_qwenimage_layered")


def numbered(*shape: int) -> Tensor:
    """Latents that are all different."""
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def video_first(latents: Tensor) -> Tensor:
    """NCTHW -> NTCHW."""
    return latents.transpose(1, 2)


# 96x64 pixels: 12x8 cells of 8 pixels, 6x4 of 16, 3x2 of 32; more columns than rows, so that a swap shows.
WIDTH, HEIGHT = 96, 64


@pytest.mark.parametrize(("width", "height"), [(96, 64), (104, 72), (1000, 40)])
@pytest.mark.parametrize("pipeline", [FLUX, QWEN_IMAGE], ids=["flux", "qwen_image"])
def test_tokens_of_flux1_and_qwen_image(pipeline: Any, width: int, height: int) -> None:
    """2x2 tokens, also of sizes that the pipeline rounds down, unpack as the pipeline does; Qwen's get a frame axis."""
    name = "flux1" if pipeline is FLUX else "qwen_image"
    h, w = 2 * (height // 16), 2 * (width // 16)
    tokens = pipeline("_pack_latents")(numbered(2, 16, h, w), 2, 16, h, w)
    theirs = pipeline("_unpack_latents")(tokens, height, width, 8)
    ours = latent_format(name).to_decoder(tokens, width, height)
    assert torch.equal(ours, theirs if name == "flux1" else video_first(theirs))
    assert latent_format(name).to_spatial(tokens, width, height).shape == (2, 16, h, w)


def test_tokens_of_flux2() -> None:
    """FLUX.2 patchifies to c, dy, dx and flattens; the batch norm stays on."""
    spatial = numbered(2, 32, 8, 12)
    tokens = FLUX2("_pack_latents")(FLUX2("_patchify_latents")(spatial))
    assert torch.equal(latent_format("flux2").to_decoder(tokens, WIDTH, HEIGHT), spatial)


@pytest.mark.parametrize("convention", ["diffusers", "comfyui"])
def test_patchified_flux2_of_ernie_and_comfyui(convention: Any) -> None:
    """128 channels on half the grid are 32 on the whole: ERNIE-Image's form in diffusers, and ComfyUI's."""
    spatial = numbered(2, 32, 8, 12)
    patchified = ERNIE_IMAGE("_patchify_latents")(spatial)
    assert torch.equal(latent_format("flux2").to_decoder(patchified, WIDTH, HEIGHT, convention=convention), spatial)


def test_bria_fibo_2_holds_flux2_in_32_channels() -> None:
    """In diffusers 32 channels come as they are; ComfyUI never holds them so, and is refused."""
    spatial = numbered(2, 32, 8, 12)
    flux2 = latent_format("flux2")
    assert torch.equal(flux2.to_decoder(spatial, WIDTH, HEIGHT), spatial)
    with pytest.raises(ValueError, match=r"flux2: expected patchified \(N, 128, h, w\) for 96x64 pixels, got shape"):
        flux2.to_decoder(spatial, WIDTH, HEIGHT, convention="comfyui")


def test_tokens_of_ideogram_4_have_the_channels_last() -> None:
    """Ideogram 4 orders a token dy, dx, c, which must be said; unpacked as Ideogram4Pipeline does before its VAE."""
    tokens = numbered(2, 4 * 6, 128)
    theirs = tokens.view(2, 4, 6, 2, 2, 32).permute(0, 5, 1, 3, 2, 4).reshape(2, 32, 8, 12)
    flux2 = latent_format("flux2")
    ours = flux2.to_decoder(tokens, WIDTH, HEIGHT, layout="tokens_2x2_channels_last")
    assert torch.equal(ours, theirs)
    assert not torch.equal(flux2.to_decoder(tokens, WIDTH, HEIGHT), theirs)


def test_layers_of_qwen_image_are_pictures_of_their_own() -> None:
    """Layers are said; each is a video of one latent, for neighbours in time they are not."""
    layers = numbered(1, 3, 16, 8, 12)
    tokens = QWEN_IMAGE_LAYERED("_pack_latents")(layers, 1, 16, 8, 12, 3)
    ours = latent_format("qwen_image").to_decoder(tokens, WIDTH, HEIGHT, layout="layered_tokens_2x2")
    assert torch.equal(ours, layers[0].unsqueeze(1))


@pytest.mark.parametrize(("width", "height"), [(96, 64), (112, 80), (80, 112)])
def test_tokens_of_qwen_image_2_1_are_not_patched(width: int, height: int) -> None:
    """One token a cell, an even number of rows and columns, 64 channels."""
    h, w = 2 * (height // 32), 2 * (width // 32)
    tokens = QWEN_IMAGE21("_pack_latents")(numbered(2, 64, h, w), 2, 64, h, w)
    theirs = QWEN_IMAGE21("_unpack_latents")(tokens, height, width, 16)
    assert torch.equal(latent_format("qwen_image_2_1").to_decoder(tokens, width, height), theirs[:, :, 0])


def test_tokens_of_bria_fibo_in_both_forms() -> None:
    """Bria FIBO's 48 channels come patched or not, on an odd number of rows where not; one latent of video."""
    wan = latent_format("wan2_2")
    patched = BRIA_FIBO("_pack_latents")(numbered(2, 48, 4, 6), 2, 48, 4, 6)
    theirs = BRIA_FIBO("_unpack_latents")(patched, HEIGHT, WIDTH, 16)
    assert torch.equal(wan.to_decoder(patched, WIDTH, HEIGHT), theirs.unsqueeze(1))
    plain = BRIA_FIBO("_pack_latents_no_patch")(numbered(2, 48, 5, 7), 2, 48, 5, 7)
    theirs = BRIA_FIBO("_unpack_latents_no_patch")(plain, 80, 112, 16)
    assert torch.equal(wan.to_decoder(plain, 112, 80), theirs.unsqueeze(1))


@pytest.mark.parametrize(("name", "pipeline"), [("ltx_video", LTX), ("ltx_2", LTX2), ("ltx_2_3", LTX2)])
def test_tokens_of_ltx(name: str, pipeline: Any) -> None:
    """One token a cell and frame; their number tells the frames."""
    latents = numbered(2, 128, 4, 2, 3)
    tokens = pipeline("_pack_latents")(latents)
    theirs = pipeline("_unpack_latents")(tokens, 4, 2, 3)
    assert torch.equal(latent_format(name).to_decoder(tokens, WIDTH, HEIGHT), video_first(theirs))


def test_conditions_of_ltx_lead_and_those_of_ltx_2_trail() -> None:
    """LTXConditionPipeline's extra tokens come first, LTX2ConditionPipeline's last; both are dropped when said."""
    latents = numbered(1, 128, 4, 2, 3)
    tokens, extra = LTX("_pack_latents")(latents), -torch.ones(1, 7, 128)
    first = latent_format("ltx_video").to_decoder(torch.cat([extra, tokens], 1), WIDTH, HEIGHT, leading_tokens=7)
    last = latent_format("ltx_2").to_decoder(torch.cat([tokens, extra], 1), WIDTH, HEIGHT, latent_frames=4)
    assert torch.equal(first, video_first(latents))
    assert torch.equal(last, video_first(latents))
    with pytest.raises(ValueError, match=r"expected video_tokens \(N, T\*6, 128\) for 96x64 pixels, got shape"):
        latent_format("ltx_2").to_decoder(torch.cat([tokens, extra], 1), WIDTH, HEIGHT)


def test_rows_of_minimax_h3() -> None:
    """H3's rows have no batch axis and begin with those of conditions."""
    latents = numbered(1, 24, 2, 4, 6)
    patchify = function_of("modular_pipelines.minimax_h3.before_denoise", "patchify_video_latents")
    rows = torch.cat([-torch.ones(5, 96), patchify(latents, (1, 2, 2))])
    ours = latent_format("minimax_h3").to_decoder(rows, WIDTH, HEIGHT, leading_tokens=5)
    assert torch.equal(ours, video_first(latents))


@pytest.mark.parametrize("convention", ["diffusers", "comfyui"])
def test_frame_pairs_of_the_refiner(convention: Any) -> None:
    """HunyuanImage's refiner holds two frames in doubled channels, and a filler in front."""
    latents = numbered(2, 32, 3, 4, 6)
    held = HUNYUAN_IMAGE_REFINER("_reorder_image_tokens")(latents)
    assert torch.equal(HUNYUAN_IMAGE_REFINER("_restore_image_tokens_order")(held), latents)
    ours = latent_format("hunyuan_image_2_1_refiner").to_decoder(held, WIDTH, HEIGHT, convention=convention)
    assert torch.equal(ours, video_first(latents))


def test_cogvideox_is_frames_first_and_divided() -> None:
    """diffusers holds CogVideoX as NTCHW, ComfyUI as NCTHW; its decoder alone wants the scale taken off."""
    latents = torch.randn(1, 5, 16, 8, 12)
    known = latent_format("cogvideox")
    expected = latents / 1.15258426
    torch.testing.assert_close(known.to_decoder(latents, WIDTH, HEIGHT), expected)
    theirs = known.to_decoder(video_first(latents), WIDTH, HEIGHT, convention="comfyui")
    torch.testing.assert_close(theirs, expected)
    assert torch.equal(known.to_spatial(latents, WIDTH, HEIGHT), latents)


def test_a_checkpoint_of_cogvideox_has_a_scale_of_its_own() -> None:
    """CogVideoX-5b's 0.7 is said: what is published is in the table's scale, what is decoded is z / 0.7."""
    latents = torch.randn(1, 5, 16, 8, 12)
    known = latent_format("cogvideox")
    decoded = known.to_decoder(latents, WIDTH, HEIGHT, scaling_factor=0.7)
    torch.testing.assert_close(decoded, latents / 0.7)
    published = known.to_spatial(latents, WIDTH, HEIGHT, scaling_factor=0.7)
    torch.testing.assert_close(published / 1.15258426, decoded)
    with pytest.raises(ValueError, match="flux1: its decoder takes latents as they are held: no scaling_factor"):
        latent_format("flux1").to_decoder(torch.zeros(1, 16, 8, 12), WIDTH, HEIGHT, scaling_factor=0.3611)


@pytest.mark.parametrize("channels", [16, 33])
def test_kandinsky_has_its_channels_last(channels: int) -> None:
    """Kandinsky 5 and 6 hold NTHWC, with a condition and its mask behind the 16 channels; as a video and a picture."""
    latents = torch.randn(2, 5, 8, 12, channels)
    expected = latents[..., :16].permute(0, 1, 4, 2, 3)
    assert torch.equal(latent_format("hunyuan_video").to_decoder(latents, WIDTH, HEIGHT), expected)
    picture = latent_format("flux1").to_decoder(latents[:, :1], WIDTH, HEIGHT)
    assert torch.equal(picture, expected[:, 0])


def test_kandinsky_6_has_a_condition_frame_behind() -> None:
    """What comes behind the frames that are said is dropped."""
    latents = torch.randn(1, 6, 8, 12, 16)
    ours = latent_format("hunyuan_video").to_decoder(latents, WIDTH, HEIGHT, latent_frames=5)
    assert torch.equal(ours, latents[:, :5].permute(0, 1, 4, 2, 3))


def test_joyimage_shows_its_last_item() -> None:
    """JoyImage-Edit holds condition pictures before the one that it paints."""
    latents = torch.randn(1, 3, 16, 1, 8, 12)
    ours = latent_format("wan2_1").to_decoder(latents, WIDTH, HEIGHT)
    assert torch.equal(ours, video_first(latents[:, -1]))


def test_frames_of_picture_models_are_pictures() -> None:
    """AnimateDiff holds NCTHW and SVD NTCHW; each frame is a picture for taesd."""
    latents = torch.randn(2, 3, 4, 8, 12)
    known = latent_format("sd1")
    assert torch.equal(known.to_decoder(latents, WIDTH, HEIGHT), latents.flatten(0, 1))
    assert torch.equal(known.to_decoder(video_first(latents), WIDTH, HEIGHT), latents.flatten(0, 1))


def test_a_shape_that_fits_two_layouts_is_asked_about() -> None:
    """Four frames of four channels: nobody can tell AnimateDiff's from SVD's, so the caller must."""
    latents, known = torch.randn(2, 4, 4, 8, 12), latent_format("sd1")
    with pytest.raises(ValueError, match=r"sd1: .*say layout='frames_third' or layout='frames_second'; got shape"):
        known.to_decoder(latents, WIDTH, HEIGHT)
    ours = known.to_decoder(latents, WIDTH, HEIGHT, layout="frames_second")
    assert torch.equal(ours, latents.flatten(0, 1))


def test_the_picture_s_size_tells_layouts_apart() -> None:
    """16 frames, or 16 cells of width: rows and columns as many as the picture has decide."""
    known = latent_format("hunyuan_video")
    first, last = torch.randn(1, 16, 5, 8, 16), torch.randn(1, 16, 8, 12, 16)
    assert torch.equal(known.to_decoder(first, 128, 64), video_first(first))
    assert torch.equal(known.to_decoder(last, WIDTH, HEIGHT), last.permute(0, 1, 4, 2, 3))


@pytest.mark.parametrize("name", ["wan2_1", "wan2_2", "hunyuan_video", "hunyuan_video_1_5", "mochi"])
def test_videos_are_turned_to_frames_first(name: str) -> None:
    """NCTHW of either convention becomes NTCHW, its values untouched."""
    known = latent_format(name)
    latents = torch.randn(1, known.channels, 5, 4, 6)
    for convention in ("diffusers", "comfyui"):
        ours = known.to_decoder(latents, WIDTH, HEIGHT, convention=convention)
        assert torch.equal(ours, video_first(latents))


def test_qwen_image_has_a_frame_axis_in_comfyui() -> None:
    """ComfyUI holds Qwen-Image as a video of one frame; the decoder wants it so, a publisher sends a picture."""
    latents = torch.randn(2, 16, 1, 8, 12)
    known = latent_format("qwen_image")
    assert torch.equal(known.to_decoder(latents, WIDTH, HEIGHT, convention="comfyui"), video_first(latents))
    assert torch.equal(known.to_spatial(latents, WIDTH, HEIGHT, convention="comfyui"), latents[:, :, 0])


@dataclass
class Nested:
    """What ComfyUI's NestedTensor looks like."""

    tensors: list[Tensor]


@pytest.mark.parametrize("wrap", [list, tuple, Nested])
@pytest.mark.parametrize("name", ["ltx_2", "minimax_h3"])
def test_comfyui_nests_video_and_audio(name: str, wrap: Any) -> None:
    """Of (video, audio) the video is taken."""
    known = latent_format(name)
    video = torch.randn(1, known.channels, 3, 4, 6)
    ours = known.to_decoder(wrap([video, torch.zeros(1, 8)]), WIDTH, HEIGHT, convention="comfyui")
    assert torch.equal(ours, video_first(video))


@pytest.mark.parametrize("name", LATENT_FORMATS)
def test_every_format_of_comfyui_reaches_its_decoder(name: str) -> None:
    """By ComfyUI's rule each format has a form, and its decoder gets as many axes and channels as it wants."""
    known = latent_format(name)
    shape = [2, known.patchified_channels or known.channels, *([3] if known.temporal_factor else []), 4, 6]
    if name == "qwen_image":
        shape.insert(2, 1)
    if name == "hunyuan_image_2_1_refiner":
        shape[1] *= 2
    ours = known.to_decoder(torch.zeros(shape), WIDTH, HEIGHT, convention="comfyui")
    is_video = known.decoder is not None and TINY_DECODERS[known.decoder].kind == "video"
    assert ours.shape[-3] == known.channels
    assert len(ours.shape) == (5 if is_video or known.temporal_factor else 4)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "sd3", "sana", "flux1", "hunyuan_image_2_1", "stable_cascade_prior"])
def test_spatial_latents_come_as_they_are(name: str) -> None:
    """No scaling factor is taken off: the tiny decoders want z. Their size is their own, whatever was asked for."""
    known = latent_format(name)
    latents = torch.randn(2, known.channels, 5, 9)
    assert torch.equal(known.to_decoder(latents, WIDTH, HEIGHT), latents)


def test_numpy_is_taken_as_torch_is() -> None:
    """Arrays unpack as tensors do, in their own dtype."""
    tokens = numbered(1, 24, 64).half()
    known = latent_format("flux1")
    ours = known.to_decoder(tokens.numpy(), WIDTH, HEIGHT)
    assert ours.dtype == np.float16
    np.testing.assert_array_equal(ours, known.to_decoder(tokens, WIDTH, HEIGHT).numpy())


@pytest.mark.parametrize(
    ("name", "shape", "how", "message"),
    [
        ("flux1", (1, 4096, 64), {}, r"flux1: expected tokens_2x2 \(N, 24, 64\) or spatial \(N, 16, h, w\) or chan"),
        ("flux1", (1, 24, 128), {}, r"96x64 pixels, got shape \(1, 24, 128\)"),
        ("sd1", (1, 16, 8, 12), {}, r"sd1: expected spatial \(N, 4, h, w\) or .*, got shape \(1, 16, 8, 12\)"),
        ("sd1", (1, 4, 0, 12), {}, r"got shape \(1, 4, 0, 12\)"),
        ("sd1", (1, 4, 8, 12), {"convention": "a1111"}, "expected convention 'diffusers' or 'comfyui', got 'a1111'"),
        ("sd1", (1, 4, 8, 12), {"layout": "packed"}, "sd1: no layout 'packed'; there are: spatial, patchified"),
        ("qwen_image", (1, 72, 64), {}, "if they are layered_tokens_2x2, say layout='layered_tokens_2x2'"),
        ("open_sora_1_3", (1, 16, 5, 8, 12), {}, "open_sora_1_3: diffusers has no pipeline for it; say layout="),
        ("minimax_h3", (53, 96), {"leading_tokens": 6}, r"video_rows_2x2 \(6\+T\*6, 96\)"),
    ],
)
def test_what_cannot_be_unpacked_is_refused(name: str, shape: Any, how: dict[str, Any], message: str) -> None:
    """Wrong channels, sizes and words are errors that name the format, the expected and the given."""
    with pytest.raises(ValueError, match=message):
        latent_format(name).to_decoder(torch.zeros(shape), WIDTH, HEIGHT, **how)


@given(st.permutations(["n", "h", "w", "c", "y", "x"]), st.randoms())
def test_any_order_of_axes_is_reached(target: list[str], random: Any) -> None:
    """rearrange moves every element where the letters say, as indexing by hand does."""
    sizes = {"n": 2, "h": 3, "w": 2, "c": 2, "y": 3, "x": 1}
    array = np.arange(72.0).reshape(2, 6, 6)
    moved = rearrange(array, "n (h w) (c y x)", " ".join(target), sizes)
    index = {letter: random.randrange(size) for letter, size in sizes.items()}
    held = array[index["n"], index["h"] * 2 + index["w"], index["c"] * 3 + index["y"]]
    assert moved[tuple(index[letter] for letter in target)] == held


def test_an_axis_that_cannot_be_split_is_refused() -> None:
    """A length that the known letters do not divide is an error with the axis and the shape."""
    with pytest.raises(ValueError, match=r"axis 1 of shape \(2, 7\) cannot be split as \(c y\)"):
        rearrange(np.zeros((2, 7)), "n (c y)", "n c y", {"y": 2})
