"""The engine: the right decoder with a reason, batches in slices, and no picture from what is none."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taesd_stream.decoding.choice import Choice, NoDecoderError, open_engine
from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.live_bytes import LiveBytes
from taesd_stream.decoding.payloads import check_finite, latents_from_payload, rows_not_finite
from taesd_stream.decoding.video_engine import LivePart, VideoEngine
from taesd_stream.errors import WeightsError
from taesd_stream.frames import WireDtype
from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_decoder

SHARED = os.environ.get("TAESD_STREAM_SHARED")
PLENTY = 1 << 30


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the weights that a user of this machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder with random weights of taesd (fp16, as published) and taef2."""
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.manual_seed(0)
    for family in ("taesd", "taef2"):
        state = {key: value.half() for key, value in build_decoder(family).state_dict().items()}
        torch.save(state, folder / f"{family}_decoder.pth")
    return folder


def decoded(engine: Engine, latents: Tensor, budget_bytes: int = PLENTY) -> Tensor:
    """All slices of a batch, in one."""
    return torch.cat([rgb for _, rgb in engine.decode(latents, budget_bytes=budget_bytes)])


def test_the_full_decoder_is_taken_where_its_weights_are(weights: Path) -> None:
    """With weights in the folder "auto" opens the format's own decoder; its pictures are the network's, clamped."""
    engine = open_engine("sd1", weights_folder=weights)
    assert (engine.latent_format, engine.decoder, engine.is_full, engine.history) == ("sd1", "taesd", True, 0)
    network = build_decoder("taesd", torch.load(weights / "taesd_decoder.pth", weights_only=True))
    latents = torch.randn(2, 4, 5, 6)
    with torch.inference_mode():
        expected = network(latents).clamp(0, 1)
    rgb = decoded(engine, latents)
    assert rgb.is_contiguous()
    torch.testing.assert_close(rgb, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "choice", "decoder"),
    [
        ("sd1", "auto", "taesd"),
        ("sd1", "linear", "linear"),
        ("flux2", "auto", "taef2"),
        ("flux2", "nano", "nano"),
        ("wan2_1", "auto", "taew2_1"),
    ],
)
def test_no_random_number_of_the_process_is_drawn(weights: Path, name: str, choice: Choice, decoder: str) -> None:
    """Opening a decoder and decoding leave torch's generator alone: a sampler's noise may come from it meanwhile."""
    torch.save(build_decoder("taew2_1").state_dict(), weights / "taew2_1.pth")
    latents = torch.randn(1, latent_format(name).channels, 4, 4)
    before = torch.get_rng_state()
    engine = open_engine(name, weights_folder=weights, choice=choice, is_fast=True)
    decoded(engine, latents)
    assert engine.decoder == decoder
    assert torch.equal(torch.get_rng_state(), before)


def test_without_weights_the_projection_says_how_to_get_them() -> None:
    """No weights: the linear projection, and a reason that names the file and the setting."""
    engine = open_engine("sd1", weights_folder=None)
    assert (engine.decoder, engine.is_full) == ("linear", False)
    assert "taesd_decoder.pth" in engine.reason
    assert "--set weights.folder=DIR" in engine.reason
    assert "models/vae_approx" in engine.reason


def test_a_video_format_names_the_weights_that_it_lacks() -> None:
    """Without the weights of its video decoder a format is shown by the projection, and the reason names the file."""
    engine = open_engine("wan2_1", weights_folder=None)
    assert engine.decoder == "linear"
    assert "no weights of taew2_1 were found" in engine.reason
    assert "taew2_1.pth" in engine.reason


def test_broken_weights_are_the_reason_for_the_projection(weights: Path) -> None:
    """Weights that are cut short or belong to another family are not used, and the reason names the file."""
    buffer = io.BytesIO()
    torch.save({"1.weight": torch.zeros(2)}, buffer, _use_new_zipfile_serialization=False)
    legacy = buffer.getvalue()
    (weights / "taesd_decoder.pth").write_bytes(b"PK\x03\x04")
    assert "taesd_decoder.pth: cannot be read" in open_engine("sd1", weights_folder=weights).reason
    for length in range(1, 400, 7):  # torch's reader raises IndexError, struct.error and more
        (weights / "taesd_decoder.pth").write_bytes(legacy[:length])
        assert not open_engine("sd1", weights_folder=weights).is_full
    (weights / "taesd_decoder.pth").write_bytes((weights / "taef2_decoder.pth").read_bytes())
    engine = open_engine("sd1", weights_folder=weights)
    assert "taesd_decoder.pth: weights do not fit taesd decoder" in engine.reason
    assert "they fit taef2 decoder" in engine.reason
    assert not engine.is_full


@pytest.mark.parametrize(
    ("name", "choice", "message"),
    [
        ("sd1", "tiny", "No decoder for sd1: no weights of taesd were found"),
        (
            "sd1",
            "nano",
            "No decoder for sd1: decoder.choice is nano, and no nano decoder is known; .*distill. makes one",
        ),
        (
            "open_sora_1_3",
            "auto",
            "No decoder for open_sora_1_3: no weights of taeos1_3 .*, and no rgb factors are known",
        ),
        ("cogvideox", "linear", "No decoder for cogvideox: decoder.choice is linear, and no rgb factors are known"),
        ("sd9", "auto", "No decoder for sd9: unknown latent format 'sd9'; nearest: sd"),
    ],
)
def test_no_decoder_is_said_with_the_way_out(name: str, choice: Choice, message: str) -> None:
    """A format that cannot be shown is an error that names it and why."""
    with pytest.raises(NoDecoderError, match=message):
        open_engine(name, weights_folder=None, choice=choice)


def test_a_weights_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A misspelt folder is said, not shown as a missing file."""
    with pytest.raises(WeightsError, match="is not a folder"):
        open_engine("sd1", weights_folder=tmp_path / "nowhere")


def test_linear_can_be_chosen_against_the_weights(weights: Path) -> None:
    """decoder.choice = linear takes the projection although the weights are there."""
    assert open_engine("sd1", weights_folder=weights, choice="linear").decoder == "linear"


def test_a_batch_in_slices_is_the_batch_at_once(weights: Path) -> None:
    """A budget for two frames gives slices of at most two, in order, with the pictures of the whole batch."""
    engine = open_engine("flux2", weights_folder=weights)
    latents = torch.randn(5, 32, 4, 6)
    budget_bytes = 2 * 4 * 6 * engine.bytes_per_latent_px
    pieces = [piece for piece, _ in engine.decode(latents, budget_bytes=budget_bytes)]
    assert pieces == [slice(0, 1), slice(1, 3), slice(3, 5)]
    torch.testing.assert_close(decoded(engine, latents, budget_bytes), decoded(engine, latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames_in_budget", [10.0, 2.0, pytest.param(0.25, marks=pytest.mark.slow)])
def test_planes_are_those_of_the_pictures(weights: Path, frames_in_budget: float) -> None:
    """decode_planes gives the planes of decode's pictures, for a whole batch, in slices and in tiles."""
    engine = open_engine("sd1", weights_folder=weights)
    latents = torch.randn(3, 4, 8, 10)
    budget_bytes = int(frames_in_budget * 8 * 10 * engine.bytes_per_latent_px)
    parts = list(engine.decode_planes(latents, budget_bytes=budget_bytes))
    planes = torch.cat([planes for _, planes in parts])
    assert [part for part, _ in parts] == [part for part, _ in engine.decode(latents, budget_bytes=budget_bytes)]
    height, width = engine.picture_size(latents)
    assert planes.shape == (3, height * 3 // 2, width)
    assert torch.equal(planes, video_planes(decoded(engine, latents, budget_bytes)))


@pytest.mark.parametrize("name", ["sd1", "wan2_2", "stable_cascade_prior", "flux2"])
def test_planes_of_projections_are_those_of_their_pictures(name: str) -> None:
    """To one code: rgb factors of whole and of broken sizes of a cell, and a fitted projection."""
    engine = open_engine(name, weights_folder=None, choice="linear")
    noise = torch.Generator().manual_seed(1)
    latents = 2 * torch.randn(2, latent_format(name).channels, 5, 7, generator=noise)
    planes = torch.cat([planes for _, planes in engine.decode_planes(latents, budget_bytes=1 << 30)])
    off = planes.int() - video_planes(decoded(engine, latents)).int()
    assert off.abs().max() <= 1
    assert off.float().abs().mean() < 0.001


@pytest.mark.parametrize(("name", "channels"), [("flux2", 32), pytest.param("sd1", 4, marks=pytest.mark.slow)])
def test_a_frame_over_the_budget_is_decoded_in_tiles(weights: Path, name: str, channels: int) -> None:
    """Frames that alone need more than the budget keep to it in tiles, and have the pictures of a larger budget."""
    engine = open_engine(name, weights_folder=weights)
    latents = torch.randn(2, channels, 24, 20)
    budget_bytes = 24 * 20 * engine.bytes_per_latent_px // 4
    with LiveBytes(beside=(latents,)) as live:
        pieces = [piece for piece, _ in engine.decode(latents, budget_bytes=budget_bytes)]
    assert pieces == [slice(0, 1), slice(1, 2)]
    held_bytes = 3 * latents[0].nbytes  # the frame in the network's dtype, and the steps to it
    assert live.peak <= budget_bytes + held_bytes
    rgb = decoded(engine, latents, budget_bytes)
    assert rgb.is_contiguous()
    torch.testing.assert_close(rgb, decoded(engine, latents), atol=1e-5, rtol=0)


def test_a_frame_that_no_tile_is_small_enough_for_is_decoded(weights: Path) -> None:
    """A budget under the least possible gives the picture all the same: what is kept must be shown."""
    engine = open_engine("sd1", weights_folder=weights)
    latents = torch.randn(1, 4, 3, 5)
    torch.testing.assert_close(decoded(engine, latents, 1), decoded(engine, latents), atol=1e-5, rtol=0)


def test_patchified_flux2_gives_the_same_picture() -> None:
    """ComfyUI's 128-channel latents give the picture of the 32-channel ones that they are made of."""
    engine = open_engine("flux2", weights_folder=None)
    spatial = torch.randn(1, 32, 4, 6)
    patchified = spatial.reshape(1, 32, 2, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 128, 2, 3)
    assert torch.equal(decoded(engine, patchified), decoded(engine, spatial))


def test_numpy_and_half_precision_are_taken(weights: Path) -> None:
    """Latents as numpy float16 give a float32 picture."""
    engine = open_engine("sd1", weights_folder=weights)
    ((piece, rgb),) = engine.decode(np.zeros((1, 4, 2, 3), np.float16), budget_bytes=PLENTY)
    assert (piece, rgb.shape, rgb.dtype) == (slice(0, 1), (1, 3, 16, 24), torch.float32)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 16, 2, 2), "sd1: expected 4 channels, got 16"),
        (torch.zeros(4, 2, 2), r"sd1: expected latents \(N, C, h, w\) in floating point, got \(4, 2, 2\)"),
        (torch.zeros(1, 4, 2, 2, dtype=torch.uint8), "in floating point, got .* torch.uint8"),
        (torch.tensor([0.0, float("nan")])[:, None, None, None].expand(2, 4, 2, 2), r"NaN or infinity in frames \[1\]"),
    ],
)
def test_what_is_no_batch_of_latents_is_refused_at_once(latents: Tensor, message: str) -> None:
    """Wrong channels, axes, dtype and NaN are errors before anything is decoded."""
    engine = open_engine("sd1", weights_folder=None)
    with pytest.raises(ValueError, match=message):
        engine.decode(latents, budget_bytes=PLENTY)


@pytest.mark.parametrize(("name", "channels"), [("sd1", 4), ("flux2", 32)])
@pytest.mark.parametrize("choice", ["auto", "tiny", "linear"])
def test_wild_latents_give_colours(weights: Path, name: str, channels: int, choice: Choice) -> None:
    """Finite latents, however large, give values in [0, 1]: no NaN gets through."""
    engine = open_engine(name, weights_folder=weights, choice=choice)
    rgb = decoded(engine, torch.randn(1, channels, 4, 4) * 1e37)
    assert rgb.isfinite().all()
    assert 0 <= rgb.min() <= rgb.max() <= 1


def test_frames_without_a_picture_are_counted_out() -> None:
    """check_finite names the frames with NaN or infinity, so that the others can be shown."""
    latents = torch.zeros(4, 4, 2, 2)
    latents[1, 0, 0, 0], latents[3, 3, 1, 1] = float("nan"), float("-inf")
    assert check_finite(latents) == [1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_words_without_a_picture_are_counted_out(dtype: torch.dtype) -> None:
    """Looked at as bits, NaN and both infinities are found in every dtype, and the largest finite values are not."""
    latents = torch.zeros(5, 4, 2, 2, dtype=dtype)
    largest = torch.finfo(dtype).max
    latents[0], latents[1, 0, 0, 0], latents[2, 3, 1, 1], latents[4, 1, 0, 1] = (
        -largest,
        float("nan"),
        largest,
        -torch.inf,
    )
    latents[3, 2, 1, 0] = torch.inf
    assert rows_not_finite(latents) == check_finite(latents) == [1, 3, 4]
    assert rows_not_finite(torch.full((2, 4), 255, dtype=torch.uint8)) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_payloads_become_float32_latents(dtype: WireDtype) -> None:
    """The bytes of a tensor in any float dtype of the wire give back its values."""
    latents = torch.randn(2, 4, 3, 5).to(getattr(torch, dtype))
    payload = latents.contiguous().view(torch.uint8).numpy().tobytes()
    back = latents_from_payload(memoryview(payload), dtype, (2, 4, 3, 5), 3.0)
    assert back.dtype == torch.float32
    assert torch.equal(back, latents.float())


def test_quantised_payloads_span_the_magnitude() -> None:
    """uint8 0, 255 and the middle are -m, m and about 0."""
    back = latents_from_payload(bytes([0, 255, 127, 128]), "uint8", (1, 2, 2), magnitude=3)
    torch.testing.assert_close(back.flatten(), torch.tensor([-3, 3, -0.0118, 0.0118]), atol=1e-4, rtol=0)


def test_a_payload_of_another_size_is_refused() -> None:
    """Bytes that are not as many as shape and dtype say are an error with both numbers."""
    with pytest.raises(ValueError, match=r"expected 96 bytes for \(4, 3, 4\) float16, got 95"):
        latents_from_payload(bytes(95), "float16", (4, 3, 4), 3.0)


@pytest.mark.skipif(SHARED is None, reason="TAESD_STREAM_SHARED is not set: no real weights")
def test_the_published_flux2_weights_open() -> None:
    """A folder with the published taef2 files gives the full decoder, and a picture that is not flat."""
    engine = open_engine("flux2", weights_folder=Path(SHARED or "") / "weights")
    assert engine.is_full
    assert decoded(engine, torch.randn(1, 32, 8, 8)).std() > 0.05


def test_rgba_pictures_are_shown_over_white(weights: Path) -> None:
    """The RGBA decoder's pictures have three channels, whatever its alpha says."""
    save_file(build_decoder("taeqi2_1").state_dict(), weights / "taeqi2_1_decoder.safetensors")
    engine = open_engine("qwen_image_2_1", weights_folder=weights)
    assert engine.is_full
    assert decoded(engine, torch.randn(2, 64, 1, 2)).shape == (2, 3, 16, 32)


def test_cogvideox_is_decoded_with_its_scale_taken_off(tmp_path: Path) -> None:
    """CogVideoX's decoder wants the full VAE's latents: as pictures, clips and live video z is divided first."""
    torch.manual_seed(0)
    network = build_decoder("taecvx")
    torch.save(network.state_dict(), tmp_path / "taecvx.pth")
    engine = open_engine("cogvideox", weights_folder=tmp_path)
    assert isinstance(engine, VideoEngine)
    latents = torch.randn(3, 16, 4, 5)
    wanted = latents / 1.15258426
    with torch.inference_mode():
        pictures, clip = network(wanted).clamp(0, 1), network.decode_clip(wanted.unsqueeze(0))[0]  # type: ignore[operator]
    torch.testing.assert_close(decoded(engine, latents), pictures, atol=1e-5, rtol=0)
    frames = torch.cat([part for _, part in engine.decode_clip(latents, budget_bytes=PLENTY)])
    torch.testing.assert_close(frames, clip, atol=1e-5, rtol=0)
    ((live,),) = list(engine.decode_live([LivePart(run="a", index=0, latents=latents)], budget_bytes=PLENTY))
    torch.testing.assert_close(live.frames[-len(clip) :], clip, atol=1e-5, rtol=0)
