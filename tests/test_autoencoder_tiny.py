"""AutoencoderTiny against diffusers' class of that name, and where that one is wrong, against what is right."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny as TheirAutoencoderTiny
from torch import Tensor, nn

from taesd_stream.decoding.tiling import BudgetError
from taesd_stream.models import AutoencoderTiny, AutoencoderTinyOutput, DecoderOutput

FLOAT32, BFLOAT16 = 1e-5, 2e-2  # of the largest value, or of 1


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test has its own latents and pictures, the same in every run."""
    torch.manual_seed(0)


def with_random_weights(model: Any, seed: int = 0) -> Any:
    """Weights that keep values near 1 through all layers: torch's own shrink them until any two networks agree."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        scale = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.05
        weight.data = torch.randn(weight.shape, generator=generator) * scale
    return model.eval()


def pair(**arguments: Any) -> tuple[AutoencoderTiny, Any]:
    """Our model and diffusers', of the same arguments and random weights."""
    theirs = with_random_weights(TheirAutoencoderTiny(**arguments))  # type: ignore[no-untyped-call]
    ours = AutoencoderTiny(**arguments).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def assert_near(given: Tensor, expected: Tensor, tolerance: float = FLOAT32) -> None:
    """The same shape and dtype, and values within the tolerance of the largest."""
    assert given.shape == expected.shape
    assert given.dtype == expected.dtype
    limit = tolerance * max(1.0, expected.abs().max().item())
    assert (given.double() - expected.double()).abs().max().item() <= limit


def test_arguments_and_config_are_those_of_diffusers() -> None:
    """Constructor arguments, their order and defaults, and the config's public values are diffusers'."""
    ours = {name: value.default for name, value in inspect.signature(AutoencoderTiny).parameters.items()}
    theirs = {name: value.default for name, value in inspect.signature(TheirAutoencoderTiny).parameters.items()}
    assert list(ours.items())[: len(theirs)] == list(theirs.items())
    assert list(ours)[len(theirs) :] == ["pooled_blocks", "strided_stem"]
    theirs_built: Any = TheirAutoencoderTiny(force_upcast=True)  # type: ignore[no-untyped-call]
    public = {key: value for key, value in theirs_built.config.items() if not key.startswith("_")}
    assert AutoencoderTiny(force_upcast=True).config == public
    assert AutoencoderTiny().config.scaling_factor == 1.0


VARIANTS: list[dict[str, Any]] = [
    {},
    {"latent_channels": 16},
    {"in_channels": 4, "out_channels": 1, "latent_channels": 7},
    {"act_fn": "silu", "upsample_fn": "bilinear"},
    {"act_fn": "gelu", "upsample_fn": "nearest-exact"},
    {"act_fn": "mish", "upsampling_scaling_factor": 3},
    {
        "encoder_block_out_channels": (16, 16),
        "num_encoder_blocks": (0, 2),
        "decoder_block_out_channels": (24, 24, 24),
        "num_decoder_blocks": (1, 2, 0),
    },
]


@pytest.mark.parametrize("arguments", VARIANTS)
@pytest.mark.parametrize("has_gradients", [False, True])
def test_encode_decode_and_forward_equal_diffusers(arguments: dict[str, Any], has_gradients: bool) -> None:
    """With the same weights all three give what diffusers' class gives, in float32, odd sizes too."""
    ours, theirs = pair(**arguments)
    pixels = torch.rand(2, ours.config.in_channels, 21, 26) * 2 - 1
    latents = torch.randn(2, ours.config.latent_channels, 2, 3) * 2
    with torch.set_grad_enabled(has_gradients):
        assert_near(ours.encode(pixels).latents, theirs.encode(pixels).latents)
        assert_near(ours.decode(latents).sample, theirs.decode(latents).sample)
        assert_near(ours(pixels).sample, theirs(pixels).sample)


def test_bfloat16_is_as_near_to_float32_as_the_format_allows() -> None:
    """In bfloat16 encode and decode give what diffusers' class gives in float32, but for the format's own rounding.

    Not what it gives in bfloat16: that has a rounding of its own, which differs from processor to processor.
    """
    ours, theirs = pair()
    pixels, latents = torch.rand(1, 3, 32, 24).bfloat16() * 2 - 1, torch.randn(1, 4, 4, 3).bfloat16()
    weights = {name: weight.bfloat16().float() for name, weight in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours = ours.to(torch.bfloat16)
    with torch.inference_mode():
        encoded, decoded = ours.encode(pixels).latents, ours.decode(latents).sample
        assert encoded.dtype == decoded.dtype == torch.bfloat16
        assert_near(encoded.float(), theirs.encode(pixels.float()).latents, BFLOAT16)
        assert_near(decoded.float(), theirs.decode(latents.float()).sample, BFLOAT16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_works_in_half_precision(dtype: torch.dtype) -> None:
    """The round trip through 8-bit latents gives the model's dtype; diffusers' fails there."""
    model = with_random_weights(AutoencoderTiny()).to(dtype)
    sample = model(torch.rand(1, 3, 16, 16).to(dtype)).sample
    assert sample.dtype == dtype
    assert sample.shape == (1, 3, 16, 16)


@torch.inference_mode()
def test_slicing_decodes_each_item_once() -> None:
    """Sliced, every item goes through the networks once and alone, and the result equals the whole batch's."""
    model, _ = pair()
    latents, pixels = torch.randn(3, 4, 3, 2), torch.rand(3, 3, 24, 16) * 2 - 1
    decoded, encoded = model.decode(latents).sample, model.encode(pixels).latents
    assert model.decoder is not None
    assert model.encoder is not None
    batches: list[int] = []
    for part in (model.decoder, model.encoder):
        part.layers[0].register_forward_hook(lambda _module, inputs, _output: batches.append(len(inputs[0])))
    model.enable_slicing()
    assert_near(model.decode(latents).sample, decoded)
    assert batches == [1, 1, 1]
    assert_near(model.encode(pixels).latents, encoded)
    assert batches == [1] * 6
    model.disable_slicing()
    model.decode(latents)
    assert batches[6:] == [3]


def test_slicing_equals_diffusers() -> None:
    """Sliced, both classes give the same pictures and latents."""
    ours, theirs = pair()
    ours.enable_slicing()
    theirs.enable_slicing()
    latents, pixels = torch.randn(2, 4, 3, 2), torch.rand(2, 3, 24, 16) * 2 - 1
    with torch.inference_mode():
        assert_near(ours.decode(latents).sample, theirs.decode(latents).sample)
        assert_near(ours.encode(pixels).latents, theirs.encode(pixels).latents)


TILED: list[Any] = [  # arguments, dtype, tolerance
    ({}, torch.float32, FLOAT32),
    ({}, torch.bfloat16, 2 * BFLOAT16),  # each is off what float32 gives by its own rounding
    pytest.param(
        {"in_channels": 4, "out_channels": 1, "latent_channels": 7}, torch.float32, FLOAT32, marks=pytest.mark.slow
    ),
    pytest.param({"latent_channels": 32, "pooled_blocks": True}, torch.float32, FLOAT32, marks=pytest.mark.slow),
]


@torch.inference_mode()
@pytest.mark.parametrize(("arguments", "dtype", "tolerance"), TILED)
def test_tiled_equals_whole(arguments: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Within a small budget encode and decode give the whole picture's values, dtype and channels, at odd sizes too."""
    model = with_random_weights(AutoencoderTiny(**arguments)).to(dtype)
    latents = torch.randn(2, model.config.latent_channels, 13, 7).to(dtype)
    pixels = (torch.rand(1, model.config.in_channels, 101, 53) * 2 - 1).to(dtype)
    decoded, encoded = model.decode(latents).sample, model.encode(pixels).latents
    assert encoded.shape[-2:] == (13, 7)
    model.enable_tiling(2 << 20)  # half of what float32 takes in one piece
    assert_near(model.decode(latents).sample, decoded, tolerance)
    assert_near(model.encode(pixels).latents, encoded, tolerance)
    model.enable_slicing()
    assert_near(model.decode(latents).sample, decoded, tolerance)
    model.disable_tiling()
    assert_near(model.decode(latents[:1]).sample, decoded[:1], tolerance)


def test_a_budget_that_nothing_fits_names_the_least() -> None:
    """With a budget under the least possible a tiled call is an error that names the least."""
    model = AutoencoderTiny()
    model.enable_tiling(budget_bytes=1000)
    assert model.tile_budget_bytes == 1000
    with pytest.raises(BudgetError, match=r"\d{4,}"):
        model.decode(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("out_channels", [1, 3, 4])
def test_the_scale_is_that_of_the_stages(out_channels: int) -> None:
    """Pixels per latent follow from the stages, whatever the channels; diffusers takes 2 ** out_channels."""
    model = AutoencoderTiny(out_channels=out_channels)
    assert model.spatial_scale_factor == 8
    assert model.decode(torch.zeros(1, 4, 2, 3)).sample.shape == (1, out_channels, 16, 24)
    stages = AutoencoderTiny(decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1), upsampling_scaling_factor=3)
    assert stages.spatial_scale_factor == 3


@torch.inference_mode()
def test_a_pipeline_shows_the_right_picture_with_any_scaling() -> None:
    """What a pipeline does with config's scaling and shift, and what the model does with them, cancel out exactly."""
    plain = with_random_weights(AutoencoderTiny())
    scaled = with_random_weights(AutoencoderTiny(scaling_factor=0.13025, shift_factor=0.6))
    z, pixels = torch.randn(1, 4, 3, 2), torch.rand(1, 3, 24, 16) * 2 - 1
    handed_over = z / scaled.config.scaling_factor + scaled.config.shift_factor
    assert_near(scaled.decode(handed_over).sample, plain.decode(z).sample)
    encoded = scaled.encode(pixels).latents
    assert_near((encoded - scaled.config.shift_factor) * scaled.config.scaling_factor, plain.encode(pixels).latents)
    assert_near(scaled(pixels).sample, plain(pixels).sample)


def test_a_scaling_of_zero_is_refused() -> None:
    """A pipeline would divide by it."""
    with pytest.raises(ValueError, match="scaling_factor: expected a number other than 0"):
        AutoencoderTiny(scaling_factor=0)


def test_scale_latents_equals_diffusers() -> None:
    """scale_latents and unscale_latents are diffusers', with other magnitudes and shifts too."""
    ours, theirs = pair(latent_magnitude=2, latent_shift=0.25)
    latents = torch.randn(1, 4, 3, 3) * 3
    assert torch.equal(ours.scale_latents(latents), theirs.scale_latents(latents))
    assert torch.equal(ours.unscale_latents(latents), theirs.unscale_latents(latents))


def test_checkpointed_gradients_equal_plain_ones() -> None:
    """Gradient checkpointing changes no result and no gradient, with torch's function or another; it can end."""
    narrow: dict[str, Any] = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    model, latents = with_random_weights(AutoencoderTiny(**narrow)).train(), torch.randn(1, 4, 2, 3)
    pixels = torch.rand(1, 3, 16, 8) * 2 - 1

    def results() -> list[Tensor]:
        model.zero_grad()
        decoded, encoded = model.decode(latents).sample, model.encode(pixels).latents
        (decoded.square().sum() + encoded.square().sum()).backward()
        return [decoded, encoded, *(weight.grad.clone() for weight in model.parameters())]

    plain = results()
    called: list[nn.Module] = []

    def own_function(block: nn.Module, x: Tensor) -> Any:
        called.append(block)
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    for function in (None, own_function):
        model.enable_gradient_checkpointing(function)
        assert model.is_gradient_checkpointing
        for given, expected in zip(results(), plain, strict=True):
            assert_near(given, expected)
    assert len(called) == 20
    model.disable_gradient_checkpointing()
    results()
    assert not model.is_gradient_checkpointing
    assert len(called) == 20


def test_outputs_are_read_as_those_of_diffusers() -> None:
    """A result's field is an attribute, a key and an index; return_dict=False gives a plain tuple."""
    model, pixels = AutoencoderTiny(), torch.zeros(1, 3, 8, 8)
    encoded = model.encode(pixels)
    assert isinstance(encoded, AutoencoderTinyOutput)
    assert encoded[0] is encoded["latents"] is encoded.latents is encoded.to_tuple()[0]
    decoded = model.decode(encoded.latents)
    assert isinstance(decoded, DecoderOutput)
    assert list(decoded) == ["sample"]
    assert decoded.commit_loss is None
    for call in (
        model.encode,
        model,
        lambda x, return_dict: model.decode(x[:, :1].expand(-1, 4, -1, -1), None, return_dict),
    ):
        (result,) = call(pixels, return_dict=False)
        assert isinstance(result, Tensor)


def test_outputs_and_models_are_copied_whole() -> None:
    """Outputs and models survive copy and pickle: averaged weights and worker processes need it."""
    model = AutoencoderTiny(latent_channels=5)
    output = model.decode(torch.zeros(1, 5, 1, 1))
    again = pickle.loads(pickle.dumps(DecoderOutput(sample=output.sample.detach())))  # noqa: S301
    assert torch.equal(again.sample, output.sample)
    twin = copy.deepcopy(model)
    assert twin.config == model.config
    assert all(torch.equal(weight, twin.state_dict()[key]) for key, weight in model.state_dict().items())


def test_the_config_cannot_be_changed() -> None:
    """Writing to a model's config is an error: it would change nothing."""
    config = AutoencoderTiny().config
    with pytest.raises(TypeError, match="cannot be changed"):
        config["latent_channels"] = 16
    with pytest.raises(TypeError, match="cannot be changed"):
        config.latent_channels = 16  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="the config has no 'latent_chanels'; it has: in_channels"):
        _ = config.latent_chanels


BAD_INPUTS: list[tuple[str, Tensor, str]] = [
    (
        "decode",
        torch.zeros(1, 3, 8, 8),
        r"decode: expected a batch of shape \(N, 4, height, width\), got \(1, 3, 8, 8\)",
    ),
    ("decode", torch.zeros(4, 8, 8), r"decode: .*\(N, 4, height, width\), got \(4, 8, 8\)"),
    ("decode", torch.zeros(0, 4, 8, 8), r"decode: .*got \(0, 4, 8, 8\)"),
    ("encode", torch.zeros(1, 8, 8, 3), r"encode: .*\(N, 3, height, width\), got \(1, 8, 8, 3\)"),
    ("encode", torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"encode: expected torch\.float32.*, got torch\.uint8"),
    ("decode", torch.zeros(1, 4, 8, 8).half(), r"decode: expected torch\.float32.*, got torch\.float16"),
    ("decode", torch.full((2, 4, 1, 1), torch.nan), r"decode: expected finite values, got NaN .* items \[0, 1\]"),
    (
        "encode",
        torch.full((1, 3, 1, 1), torch.inf),
        r"encode: expected finite values, got NaN or infinity in items \[0\]",
    ),
]


@pytest.mark.parametrize(("method", "batch", "message"), BAD_INPUTS)
def test_a_wrong_input_names_the_expected_and_the_given(method: str, batch: Tensor, message: str) -> None:
    """Shapes, channels, dtypes and values that a network cannot take are refused in words, before it runs."""
    with pytest.raises(ValueError, match=message):
        getattr(AutoencoderTiny(), method)(batch)


def test_autocast_may_mix_dtypes() -> None:
    """Under autocast a float32 picture goes into half-precision weights, as torch allows there."""
    model = AutoencoderTiny().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(torch.zeros(1, 3, 8, 8)).latents.shape == (1, 4, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act_fn": "tanh"}, "act_fn: expected one of relu, .*, got 'tanh'"),
        ({"upsample_fn": "lanczos"}, "upsample_fn: expected one of nearest, .*, got 'lanczos'"),
        ({"num_decoder_blocks": (3, 3)}, "num_decoder_blocks: expected as many of one as the other, got 4 and 2"),
        ({"num_encoder_blocks": ()}, "num_encoder_blocks: expected as many"),
    ],
)
def test_arguments_that_build_no_network_are_refused(arguments: dict[str, Any], message: str) -> None:
    """A layout that does not exist is an error with the expected and the given."""
    with pytest.raises(ValueError, match=message):
        AutoencoderTiny(**arguments)


def test_offloaded_weights_are_fetched_first() -> None:
    """encode and decode call accelerate's hook before they touch the weights, as diffusers' do."""

    class Hook:
        """What accelerate sets on a model whose weights wait elsewhere."""

        calls = 0

        def pre_forward(self, module: nn.Module) -> None:
            assert isinstance(module, AutoencoderTiny)
            Hook.calls += 1

    model = AutoencoderTiny()
    model._hf_hook = Hook()  # type: ignore[assignment]
    model.decode(model.encode(torch.zeros(1, 3, 8, 8)).latents)
    assert Hook.calls == 2
