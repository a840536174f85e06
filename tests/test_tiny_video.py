"""The video families against the original implementations, and streams against whole clips."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taesd_stream.errors import WeightsError
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.families import families_that_fit
from taesd_stream.models.tiny_video import Memory, VideoDecoder, VideoEncoder
from taesd_stream.models.video_families import CHUNK_LATENTS, VIDEO_FAMILIES, VideoFamily
from tests.test_tiny import formula_weights, golden, needs_shared

ORIGINALS: Final[dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "video_originals.json").read_text())
GOLDEN: Final = ("taehv", "taew2_1", "taecvx", "taew2_2")
CHEAP: Final = {"decoder_time_upscale": (False, False), "decoder_space_upscale": (True, True, True)}
# One of each kind: memory blocks, other growth, all stages growing, none, chunks, super blocks.
KINDS: Final = ("taew2_1", "taem1", "taeltx_2", "taesdv", "taeh3", "taehv1_5_super")
STREAMED: Final = ("taew2_1", "taem1", "taesdv", "taeh3")  # of these the cheaper ones
quick = settings(max_examples=8)


@functools.cache
def video_decoder(family: str, is_cheap: bool = False) -> VideoDecoder:
    """A family's decoder with the weights of the golden vectors."""
    options: dict[str, Any] = CHEAP if is_cheap else {}
    with torch.device("meta"):  # shapes only
        shapes = build_decoder(family, **options)
    network = build_decoder(family, formula_weights(shapes), **options)
    assert isinstance(network, VideoDecoder)
    return network.requires_grad_(False)


@functools.cache
def video_encoder(family: str) -> VideoEncoder:
    """A family's encoder with the weights of the golden vectors."""
    with torch.device("meta"):  # shapes only
        shapes = build_encoder(family)
    network = build_encoder(family, formula_weights(shapes))
    assert isinstance(network, VideoEncoder)
    return network.requires_grad_(False)


def latents_for(family: str, length: int, streams: int = 1, seed: int = 7, size: tuple[int, int] = (1, 2)) -> Tensor:
    """Latents of a size that is decoded in no time, (streams, length, C, h, w)."""
    shape = (streams, length, VIDEO_FAMILIES[family].latent_channels, *size)
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def stepped(decoder: VideoDecoder, latents: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
    """The frames of one latent at a time, and the memory at the end."""
    frames = []
    for latent in latents.unbind(1):
        shown, memory = decoder.step(latent, memory)
        assert isinstance(shown, Tensor)
        frames.append(shown)
    assert memory is not None
    return torch.cat(frames, 1), memory


def assert_equals_original(result: Tensor, expected: dict[str, Any]) -> None:
    """Shape and some evenly spread values are those of the original implementation."""
    assert list(result.shape) == expected["shape"]
    flat = result.flatten()
    places = np.linspace(0, len(flat) - 1, len(expected["values"])).round().astype(int)
    torch.testing.assert_close(flat[torch.from_numpy(places)], torch.tensor(expected["values"]), atol=1e-5, rtol=0)


@needs_shared
@pytest.mark.parametrize("family", GOLDEN)
def test_clips_equal_the_golden_ones(family: str) -> None:
    """With the same weights and latents, every frame of a clip is the original implementation's."""
    expected, shape = golden(f"{family}.decode")
    latents = torch.from_numpy(np.random.RandomState(7).standard_normal(shape).astype(np.float32))
    torch.testing.assert_close(video_decoder(family).decode_clip(latents), expected, atol=1e-4, rtol=0)


@needs_shared
def test_cheap_clips_equal_the_golden_ones() -> None:
    """Without growth in time a clip is the original's: two flags are those of the last two stages."""
    expected, shape = golden("taehv_cheap.decode")
    latents = torch.from_numpy(np.random.RandomState(7).standard_normal(shape).astype(np.float32))
    torch.testing.assert_close(video_decoder("taehv", True).decode_clip(latents), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_decoders_equal_the_originals(family: str) -> None:
    """Every family's decoder has the original's number of parameters and gives its frames."""
    expected, decoder = ORIGINALS[family]["decode"], video_decoder(family)
    assert sum(weight.numel() for weight in decoder.parameters()) == expected["parameters"]
    latents = np.random.RandomState(7).standard_normal(expected["input_shape"]).astype(np.float32)
    assert_equals_original(decoder.decode_clip(torch.from_numpy(latents)), expected)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_encoders_equal_the_originals(family: str) -> None:
    """Every family's encoder has the original's number of parameters and gives its latents."""
    expected, encoder = ORIGINALS[family]["encode"], video_encoder(family)
    assert sum(weight.numel() for weight in encoder.parameters()) == expected["parameters"]
    noise = np.random.RandomState(7).standard_normal(expected["input_shape"]) * 0.3
    pixels = torch.from_numpy(noise.astype(np.float32) + np.float32(0.5))
    assert_equals_original(encoder.encode_clip(pixels), expected)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_steps_give_the_frames_of_the_clip(family: str) -> None:
    """One latent at a time gives the frames of the whole clip."""
    length = 7 if family == "taeh3" else 4  # H3 needs a length that its encoder makes, CogVideoX an even one
    latents, decoder = latents_for(family, length), video_decoder(family)
    torch.testing.assert_close(stepped(decoder, latents)[0], decoder.decode_clip(latents), atol=1e-5, rtol=0)


@given(
    st.sampled_from(STREAMED), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(1, 2)
)
@quick
def test_a_stream_may_come_in_pieces(family: str, pieces: list[int], streams: int, height: int) -> None:
    """However a stream is cut into steps, its frames are the same, at any size and for any number of streams."""
    latents, decoder = latents_for(family, sum(pieces), streams, size=(height, 2)), video_decoder(family)
    memory, frames = None, []
    for piece in torch.split(latents, pieces, 1):
        shown, memory = decoder.step(piece, memory)
        assert isinstance(shown, Tensor)
        frames.append(shown)
    torch.testing.assert_close(torch.cat(frames, 1), stepped(decoder, latents)[0], atol=1e-5, rtol=0)


@given(st.sampled_from(STREAMED), st.lists(st.integers(0, 6), min_size=2, max_size=4), st.integers(1, 2))
@quick
def test_streams_at_different_moments_step_together(family: str, moments: list[int], count: int) -> None:
    """Streams of any age, new ones too, stepped in one call give what each gives alone, now and at the next step."""
    decoder = video_decoder(family)
    latents = [latents_for(family, age + count + 1, seed=seed) for seed, age in enumerate(moments)]
    memories = [
        stepped(decoder, one[:, :age])[1] if age else decoder.start(1, 1, 2)
        for one, age in zip(latents, moments, strict=True)
    ]
    memory = tuple(torch.cat(parts) for parts in zip(*memories, strict=True))
    now = [one[:, age : age + count] for one, age in zip(latents, moments, strict=True)]
    following = [one[:, age + count :] for one, age in zip(latents, moments, strict=True)]
    frames, memory = decoder.step(torch.cat(now), memory)
    later, _ = decoder.step(torch.cat(following), memory)
    for place, alone in enumerate(memories):
        expected, alone = decoder.step(now[place], alone)
        torch.testing.assert_close(frames[place], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(later[place], decoder.step(following[place], alone)[0][0], atol=1e-5, rtol=0)


@given(st.sampled_from(STREAMED), st.integers(1, 6), st.integers(1, 3))
@quick
def test_a_later_latent_changes_no_earlier_frame(family: str, kept: int, more: int) -> None:
    """The frames of a stream do not depend on what comes after."""
    decoder, latents = video_decoder(family), latents_for(family, kept + more)
    changed = latents.clone()
    changed[:, kept:] = 3
    first, _ = stepped(decoder, latents[:, :kept])
    frames, _ = decoder.step(changed)
    assert isinstance(frames, Tensor)
    torch.testing.assert_close(frames[:, : first.shape[1]], first, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "is_cheap"), [*((family, False) for family in KINDS), ("taehv", True)])
def test_history_is_as_long_as_needed_and_no_longer(family: str, is_cheap: bool) -> None:
    """From `history` latents the memory is rebuilt exactly, and the first of them still matters to it."""
    decoder = copy.deepcopy(video_decoder(family, is_cheap)).double()
    for weight in decoder.parameters():
        weight.mul_(1.5)  # else what is long past fades to less than rounding
    latents = latents_for(family, decoder.history + 2, size=(1, 1)).double()
    expected = stepped(decoder, latents)[1]
    rebuilt = decoder.rebuild(latents[:, -decoder.history :], position=latents.shape[1])
    scale = max(float(one.abs().max()) for one in expected[1:])
    for one, other in zip(rebuilt, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-13 * scale, rtol=0)
    latents[:, -decoder.history] += 1
    changed = stepped(decoder, latents)[1]
    difference = max(float((one - other).abs().max()) for one, other in zip(changed, expected, strict=True))
    assert difference > 1e-11 * scale


@pytest.mark.parametrize(
    ("family", "history"), [("taew2_1", 8), ("taem1", 8), ("taeltx_2", 6), ("taesdv", 10), ("taehv1_5_super", 8)]
)
def test_history_follows_from_the_layers(family: str, history: int) -> None:
    """The more a family grows in time, the fewer latents its memory reaches back."""
    assert video_decoder(family).history == history


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("length", [1, 3, 12])
def test_a_rebuilt_stream_goes_on(family: str, length: int) -> None:
    """A stream of any age, new ones too, goes on from its last latents as if it had never been away."""
    decoder, latents = video_decoder(family), latents_for(family, length + 2)
    expected, _ = decoder.step(latents[:, length:], stepped(decoder, latents[:, :length])[1])
    frames, _ = decoder.step(latents[:, length:], decoder.rebuild(latents[:, :length]))
    torch.testing.assert_close(frames, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_picture_is_the_clip_of_one_latent(family: str) -> None:
    """Latents without a time axis give one picture each: what a clip of one latent shows last."""
    latents, decoder = latents_for(family, 1, streams=2), video_decoder(family)
    torch.testing.assert_close(decoder(latents[:, 0]), decoder.decode_clip(latents)[:, -1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("taew2_1", {1: 1, 2: 5, 6: 21}),
        ("taecvx", {1: 1, 2: 8, 3: 9, 6: 24}),
        ("taeltx2_3", {1: 1, 3: 17}),
        ("taem1", {1: 1, 3: 13}),
        ("taesdv", {1: 1, 3: 3}),
        ("taeh3", {1: 1, 2: 5, 5: 5, 7: 22, 12: 39}),
    ],
)
def test_a_clip_has_the_frames_of_the_full_decoder(family: str, lengths: dict[int, int]) -> None:
    """Start-up frames are hidden by each family's own rule."""
    for latents, frames in lengths.items():
        assert video_decoder(family).decode_clip(latents_for(family, latents)).shape[1] == frames


@pytest.mark.parametrize("family", VIDEO_FAMILIES.values(), ids=lambda family: family.name)
def test_a_stream_has_the_frames_that_its_latents_show(family: VideoFamily) -> None:
    """Where a stream's next frame is in time is how many were shown, which is not what a clip of that length shows."""
    shown = 0
    for position in range(3 * CHUNK_LATENTS):
        assert family.frames_of_stream(position, 4) == shown
        shown += 4 - family.hidden_frames(position, 4)


@pytest.mark.parametrize("family", ["taew2_1", "taeltx_2", "taehv1_5_super"])
def test_the_layout_in_memory_changes_nothing(family: str) -> None:
    """Networks in channels_last give the same frames, whole or in steps."""
    latents, decoder = latents_for(family, 3, streams=2, size=(2, 3)), video_decoder(family)
    network = copy.deepcopy(decoder).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with torch.inference_mode():
        clip = network.decode_clip(latents)
        torch.testing.assert_close(clip, decoder.decode_clip(latents), atol=1e-5, rtol=0)
        torch.testing.assert_close(stepped(network, latents)[0], clip, atol=1e-5, rtol=0)


def test_stages_can_stay_small() -> None:
    """Each stage whose upsampling is off halves the picture; its weights are the full decoder's."""
    weights = video_decoder("taew2_1").state_dict()
    small = build_decoder("taew2_1", weights, decoder_space_upscale=(True, False, False))
    assert isinstance(small, VideoDecoder)
    assert small.decode_clip(latents_for("taew2_1", 2)).shape == (1, 5, 3, 2, 4)


def test_weights_of_growth_are_cut_to_their_last_step() -> None:
    """A cheap preview takes the full decoder's weights, of each growth what makes its last frame."""
    weights = video_decoder("taew2_1").state_dict()
    cheap = build_decoder("taew2_1", weights, decoder_time_upscale=(False, False))
    cut = {key: (weights[key], value) for key, value in cheap.state_dict().items() if weights[key].shape != value.shape}
    assert list(cut) == ["decoder.13.conv.weight", "decoder.19.conv.weight"]
    assert all(torch.equal(full[len(full) // 2 :], half) for full, half in cut.values())


def test_a_file_of_both_parts_gives_each() -> None:
    """An original file holds decoder and encoder by prefix; each part takes its own, and names a key without place."""
    whole = {**video_decoder("taem1").state_dict(), **video_encoder("taem1").state_dict()}
    for build, prefix in ((build_decoder, "decoder."), (build_encoder, "encoder.")):
        loaded = build("taem1", whole).state_dict()
        assert all(key.startswith(prefix) and torch.equal(value, whole[key]) for key, value in loaded.items())
    with pytest.raises(WeightsError, match=r"key 'step' has no place"):
        build_decoder("taem1", {**whole, "step": torch.zeros(1)})


def test_weights_of_another_family_are_named() -> None:
    """Weights that do not fit are told as what they fit, whole files too."""
    whole = {**video_decoder("taesdv").state_dict(), **video_encoder("taesdv").state_dict()}
    assert families_that_fit(whole) == ["taesdv decoder", "taesdv encoder"]
    with pytest.raises(WeightsError, match=r"'decoder\.1\.weight': expected shape .* they fit taesdv decoder"):
        build_decoder("taew2_1", whole)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("taesd", {"decoder_time_upscale": (True, True)}, "belong to video families, not to 'taesd'"),
        ("taesdv", {"decoder_time_upscale": (True, True)}, "taesdv has no growth in time"),
        ("taehv", {"decoder_time_upscale": (True,)}, "decoder_time_upscale: expected 3 flags, .* got 1"),
        ("taehv", {"decoder_space_upscale": (True, True)}, "decoder_space_upscale: expected 3 flags, .* got 2"),
    ],
)
def test_options_that_mean_nothing_are_refused(family: str, options: dict[str, Any], message: str) -> None:
    """Upsampling options of another family or of another length are a ValueError that says so."""
    with pytest.raises(ValueError, match=message):
        build_decoder(family, **options)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (torch.zeros(1, 2, 48, 1, 1), r"taew2_1 latents: expected 16 channels, got 48"),
        (torch.zeros(2, 16, 1), r"expected \(N, T, 16, h, w\), none of them 0, got \(2, 16, 1\)"),
        (torch.zeros(1, 0, 16, 1, 1), r"none of them 0, got \(1, 0, 16, 1, 1\)"),
        (torch.zeros(1, 2, 16, 1, 1, dtype=torch.float16), r"expected torch.float32, got torch.float16"),
        (torch.full((1, 2, 16, 1, 1), float("nan")), r"taew2_1 latents: hold NaN or infinity"),
    ],
)
def test_what_are_no_latents_is_refused(latents: Tensor, message: str) -> None:
    """Wrong channels, axes, dtype and NaN are errors that name the expected and the given, in every way to decode."""
    decoder = video_decoder("taew2_1")
    for method in (decoder.decode_clip, decoder.step, decoder.rebuild):
        with pytest.raises(ValueError, match=message):
            method(latents)


def test_what_are_no_pixels_is_refused() -> None:
    """Pixels of three channels whose size the patches do not divide are an error with both sizes."""
    with pytest.raises(ValueError, match=r"taew2_2 pixels: expected multiples of 2 a side, got 16x17"):
        video_encoder("taew2_2").encode_clip(torch.zeros(1, 1, 3, 16, 17))
    with pytest.raises(ValueError, match=r"taew2_2 pixels: expected 3 channels, got 4"):
        video_encoder("taew2_2").encode_clip(torch.zeros(1, 1, 4, 16, 16))


def test_a_memory_of_other_streams_is_refused() -> None:
    """A memory of another family, number of streams or size is an error, before anything is shown."""
    decoder, latents = video_decoder("taew2_1"), latents_for("taew2_1", 1)
    with pytest.raises(ValueError, match=r"taew2_1 expects 10 tensors, got 11"):
        decoder.step(latents, video_decoder("taesdv").start(1, 1, 2))
    with pytest.raises(ValueError, match=r"expected positions \(1,\) torch.int64 first, got \(2,\)"):
        decoder.step(latents, decoder.start(2, 1, 2))
    with pytest.raises(ValueError, match=r"memory: expected \(1, 256, 1, 2\) .* got \(1, 256, 2, 2\)"):
        decoder.step(latents, decoder.start(1, 2, 2))


def test_too_few_latents_rebuild_no_memory() -> None:
    """A memory is not made up from fewer latents than it depends on."""
    decoder = video_decoder("taew2_1")
    with pytest.raises(ValueError, match=r"rebuilt from the last 8 of 9 latents, got 7"):
        decoder.rebuild(latents_for("taew2_1", 7), position=9)
    with pytest.raises(ValueError, match=r"rebuilt from the last 3 of 3 latents, got 7"):
        decoder.rebuild(latents_for("taew2_1", 7), position=3)


def test_a_step_leaves_the_memory_as_it_was() -> None:
    """The memory that a step is given is still good for the same step again."""
    decoder, latents = video_decoder("taew2_1"), latents_for("taew2_1", 3)
    _, memory = stepped(decoder, latents[:, :2])
    first, _ = decoder.step(latents[:, 2], memory)
    again, _ = decoder.step(latents[:, 2], memory)
    assert isinstance(first, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(first, again)


def test_real_latents_decode(shared: Path) -> None:
    """Latents that Wan 2.1 made give as many frames as its own decoder, all of them numbers."""
    path = shared / "samples" / "test_latents_wan.pth"
    latents = torch.load(path, weights_only=True, map_location="cpu").float()[:, :, :3, :12, :12]
    frames = video_decoder("taew2_1").decode_clip(latents.transpose(1, 2))
    assert frames.shape == (1, 9, 3, 96, 96)
    assert frames.isfinite().all()
