"""AutoencoderTiny's files: saved and loaded by us and by diffusers, the originals' files, and files that do not fit."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny as TheirAutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor

from taesd_stream.errors import WeightsError
from taesd_stream.models import AutoencoderTiny, build_decoder, build_encoder
from taesd_stream.models.networks import TINY_FAMILIES

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

load_theirs: Any = TheirAutoencoderTiny.from_pretrained
NOTED_BY_DIFFUSERS = ("_diffusers_version", "_name_or_path")


def their_model(**arguments: Any) -> Any:
    """diffusers' model, ready to decode."""
    model: Any = TheirAutoencoderTiny(**arguments)  # type: ignore[no-untyped-call]
    return model.eval()


@torch.inference_mode()
def assert_same(ours: AutoencoderTiny, theirs: Any) -> None:
    """Both models encode and decode alike."""
    latents, pixels = torch.randn(1, ours.config.latent_channels, 2, 3), torch.rand(1, 3, 16, 24) * 2 - 1
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode(pixels).latents, theirs.encode(pixels).latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arguments", [{}, {"latent_channels": 16, "latent_magnitude": 2, "act_fn": "silu"}])
def test_ours_loads_theirs(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """A folder that diffusers wrote gives a model of the same arguments and results."""
    theirs = their_model(**arguments)
    theirs.save_pretrained(tmp_path / "tiny")
    ours = AutoencoderTiny.from_pretrained(tmp_path / "tiny")
    assert {name: ours.config[name] for name in arguments} == arguments
    assert not ours.training
    assert_same(ours, theirs)


@pytest.mark.parametrize("arguments", [{}, {"latent_channels": 16, "shift_factor": 0.0, "act_fn": "gelu"}])
def test_theirs_loads_ours(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """diffusers loads a folder that we wrote, all of its weights, and notes the same config itself."""
    ours = AutoencoderTiny(**arguments).eval()
    ours.save_pretrained(tmp_path / "tiny")
    theirs, report = load_theirs(tmp_path / "tiny", output_loading_info=True)
    assert not any(report.values())
    assert_same(ours, theirs)
    theirs.save_pretrained(tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("tiny", "again")]
    assert configs[0] == {key: value for key, value in configs[1].items() if key not in NOTED_BY_DIFFUSERS}


@pytest.mark.parametrize("family", ["taef2", "taesana"])
def test_families_that_diffusers_lacks_are_saved_and_loaded(tmp_path: Path, family: str) -> None:
    """FLUX.2's pooled blocks and Sana's strided stem come back with their weights."""
    saved = AutoencoderTiny.from_original(
        family, decoder=build_decoder(family).state_dict(), encoder=weights_of(family)
    )
    saved.save_pretrained(tmp_path)
    loaded = AutoencoderTiny.from_pretrained(tmp_path)
    assert loaded.config == saved.config
    assert_same(loaded, saved)


def weights_of(family: str) -> dict[str, Tensor]:
    """A random encoder's state dict."""
    return build_encoder(family).state_dict()


def test_a_dtype_a_variant_and_arguments_are_taken(tmp_path: Path) -> None:
    """torch_dtype, variant, subfolder and constructor arguments go as diffusers' from_pretrained takes them."""
    AutoencoderTiny().half().save_pretrained(tmp_path / "vae", variant="fp16")
    assert (tmp_path / "vae" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    options: dict[str, Any] = {
        "subfolder": "vae",
        "variant": "fp16",
        "use_safetensors": True,
        "low_cpu_mem_usage": True,
    }
    model = AutoencoderTiny.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16, latent_shift=0.25, **options)
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"
    assert model.latent_shift == model.config.latent_shift == 0.25
    assert AutoencoderTiny.from_pretrained(tmp_path, **options).dtype == torch.float32
    with pytest.raises(TypeError, match="latent_shif"):
        AutoencoderTiny.from_pretrained(tmp_path, latent_shif=0.25, **options)


def test_a_pickled_weight_file_is_read_as_plain_tensors(tmp_path: Path) -> None:
    """Where there is no safetensors file the `.bin` is read, unless only safetensors are allowed."""
    saved = AutoencoderTiny().eval()
    saved.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    torch.save(saved.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    assert_same(AutoencoderTiny.from_pretrained(tmp_path), saved)
    with pytest.raises(WeightsError, match=rf"{WEIGHTS_FILE}: no such file"):
        AutoencoderTiny.from_pretrained(tmp_path, use_safetensors=True)


def hub_cache(folder: Path, name: str) -> Path:
    """A Hugging Face cache that holds one repository; its snapshot's folder."""
    repository = folder / f"models--{name.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    return snapshot


def test_a_hub_id_is_loaded_from_the_cache(tmp_path: Path) -> None:
    """A model that huggingface_hub has fetched before is loaded by its id, without the network."""
    saved = AutoencoderTiny(latent_channels=16).eval()
    saved.save_pretrained(hub_cache(tmp_path, "someone/tiny"))
    loaded = AutoencoderTiny.from_pretrained("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert_same(loaded, saved)


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    """An id that is not in the cache, and a path that is no id, are errors with the place and the file."""
    for place in ("someone/other", str(tmp_path / "no" / "such" / "folder")):
        with pytest.raises(
            WeightsError, match=rf"^{place}: no folder here, and from the hub config\.json cannot be had"
        ):
            AutoencoderTiny.from_pretrained(place, cache_dir=tmp_path, local_files_only=True)


def test_saved_weights_that_do_not_fit_name_the_key_and_the_family(tmp_path: Path) -> None:
    """A file that is not of its config names the first key that differs and the families it is of."""
    AutoencoderTiny().save_pretrained(tmp_path)
    save_file(AutoencoderTiny(latent_channels=16).state_dict(), tmp_path / WEIGHTS_FILE)
    expected = r"encoder\.layers\.14\.weight'.*\(4, 64, 3, 3\), got \(16, 64, 3, 3\).*taesd3 decoder or .*taef1 encoder"
    with pytest.raises(WeightsError, match=expected) as caught:
        AutoencoderTiny.from_pretrained(tmp_path)
    assert str(tmp_path / WEIGHTS_FILE) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json: cannot be read"),
        ("[]", r"config\.json: expected an object, got list"),
        (
            '{"_class_name": "AutoencoderKL"}',
            r"config\.json: expected a config of AutoencoderTiny, got one of AutoencoderKL",
        ),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """Broken configs and those of other classes are errors with the file and the reason."""
    AutoencoderTiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=message):
        AutoencoderTiny.from_pretrained(tmp_path)


def test_a_newer_config_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Keys that no version known here has are passed over, and logged."""
    AutoencoderTiny(latent_channels=5).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "from_the_future": 1}))
    with caplog.at_level(logging.WARNING):
        assert AutoencoderTiny.from_pretrained(tmp_path).config.latent_channels == 5
    assert "unknown_config_keys keys=from_the_future" in caplog.text


def test_only_safetensors_are_written(tmp_path: Path) -> None:
    """Asking for a pickle is an error, not another file than was asked for."""
    with pytest.raises(ValueError, match="safe_serialization: expected True"):
        AutoencoderTiny().save_pretrained(tmp_path, safe_serialization=False)


@torch.inference_mode()
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_original_weights_give_the_family(tmp_path: Path, family: str) -> None:
    """A family's `.pth` and `.safetensors` files give a model that is its bare networks in diffusers' range."""
    decoder, encoder = build_decoder(family), build_encoder(family)
    torch.save(decoder.state_dict(), tmp_path / "any_name.pth")
    save_file(encoder.state_dict(), tmp_path / "another.safetensors")
    model = AutoencoderTiny.from_original(
        family, decoder=tmp_path / "any_name.pth", encoder=str(tmp_path / "another.safetensors")
    )
    side = TINY_FAMILIES[family].spatial_factor
    pixels = torch.rand(1, 3, side, 2 * side)
    latents = encoder(pixels)
    torch.testing.assert_close(model.encode(pixels * 2 - 1).latents, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.decode(latents).sample, decoder(latents) * 2 - 1, atol=1e-5, rtol=0)


def test_diffusers_weights_are_taken_apart(tmp_path: Path) -> None:
    """from_original takes a file or state dict of both parts with diffusers' keys too."""
    theirs = their_model()
    theirs.save_pretrained(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    assert_same(AutoencoderTiny.from_original("taesd", decoder=path, encoder=load_file(path)), theirs)


def test_a_part_without_weights_is_not_used(tmp_path: Path) -> None:
    """A model of a decoder alone decodes; its encoder, and saving half a model, are errors that say what lacks."""
    model = AutoencoderTiny.from_original("taesd", decoder=build_decoder("taesd").state_dict())
    assert model.decode(torch.zeros(1, 4, 1, 1)).sample.shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="this model has no encoder"):
        model.encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="has no encoder: none was given"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected decoder, encoder or both, got neither"):
        AutoencoderTiny.from_original("taesd")
    with pytest.raises(ValueError, match="no family 'taesd4'; there are: taesd, "):
        AutoencoderTiny.from_original("taesd4", decoder={})


def test_original_weights_that_do_not_fit_name_the_key_and_the_family() -> None:
    """Mixing up the two parts, or two families, is told as what it is."""
    with pytest.raises(WeightsError, match=r"do not fit taef2 decoder: .*'1\.weight'.*they fit taef2 encoder$"):
        AutoencoderTiny.from_original("taef2", decoder=weights_of("taef2"))
    with pytest.raises(WeightsError, match=r"taesd decoder: key '1\.weight' is missing; they fit no family"):
        AutoencoderTiny.from_original("taesd", decoder={"nothing": torch.zeros(1)})


def test_real_weights_paint_a_real_picture(shared: Path) -> None:
    """FLUX.2's published files load, and a smooth picture comes back through both of them nearly as it was."""
    folder = shared / "weights"
    model = AutoencoderTiny.from_original(
        "taef2", decoder=folder / "taef2_decoder.pth", encoder=folder / "taef2_encoder.pth"
    )
    ramp = torch.linspace(-0.8, 0.8, 64)
    pixels = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, -ramp.expand(64, 64)])[None]
    with torch.inference_mode():
        error = (model(pixels).sample - pixels).square().mean().item()
    assert error < 0.0126  # 25 dB of the range of 2


def test_nothing_is_left_of_an_older_file(tmp_path: Path) -> None:
    """Saving again replaces what was there."""
    first, second = AutoencoderTiny().eval(), AutoencoderTiny().eval()
    first.save_pretrained(tmp_path)
    shutil.copy(tmp_path / WEIGHTS_FILE, tmp_path / "kept.safetensors")
    second.save_pretrained(tmp_path)
    assert_same(AutoencoderTiny.from_pretrained(tmp_path), second)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() != (tmp_path / "kept.safetensors").read_bytes()
