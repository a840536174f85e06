"""Weight files: found where people have them, read in every layout, refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor

from taesd_stream.errors import WeightsError
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.checkpoints import find_weights, load_state_dict, weights_cache


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the weights that a user of this machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def touch(path: Path) -> Path:
    """An empty file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    "name",
    [
        "taef1_decoder.pth",
        "taef1_decoder.safetensors",
        "taef1.safetensors",
        "vae_approx/taef1_decoder.pth",
        "models/vae_approx/taef1_decoder.safetensors",
        "taef1/diffusion_pytorch_model.safetensors",
        "taef1/taef1_decoder.pth",
    ],
)
def test_weights_are_found_where_people_have_them(tmp_path: Path, name: str) -> None:
    """The original's, ComfyUI's and diffusers' layouts are looked through."""
    path = touch(tmp_path / "weights" / name)
    assert find_weights("taef1", tmp_path / "weights") == path


def test_the_given_folder_goes_before_the_cache(tmp_path: Path) -> None:
    """Weights of the named folder win; without them the cache's are found; without both, None."""
    (tmp_path / "weights").mkdir()
    assert find_weights("taesd", tmp_path / "weights") is None
    cached = touch(weights_cache() / "taesd_decoder.pth")
    assert find_weights("taesd", None) == find_weights("taesd", tmp_path / "weights") == cached
    given = touch(tmp_path / "weights" / "taesd_decoder.pth")
    assert find_weights("taesd", tmp_path / "weights") == given


def test_the_encoder_is_not_taken_for_the_decoder(tmp_path: Path) -> None:
    """Each part has its own file; another family's name that begins alike is not taken."""
    encoder = touch(tmp_path / "taesd_encoder.pth")
    touch(tmp_path / "taesdxl_decoder.pth")
    assert find_weights("taesd", tmp_path) is None
    assert find_weights("taesd", tmp_path, "encoder") == encoder


def test_only_known_names_become_paths(tmp_path: Path) -> None:
    """An id that is not in the table is refused, whatever file it might point to."""
    touch(tmp_path / "secret.pth")
    with pytest.raises(ValueError, match=r"no decoder '\.\./secret'"):
        find_weights("../secret", tmp_path / "weights")


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    """A misspelt weights.folder is an error, not a silent fall back."""
    with pytest.raises(WeightsError, match=r"weights\.folder: .*nowhere is not a folder"):
        find_weights("taesd", tmp_path / "nowhere")


def assert_equal(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same keys with the same values."""
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[key], expected[key]) for key in expected)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_original_file_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    """A decoder's own file, pickled or not, gives the decoder's state dict."""
    weights, path = build_decoder("taesd").state_dict(), tmp_path / f"taesd_decoder{suffix}"
    torch.save(weights, path) if suffix == ".pth" else save_file(weights, path)
    assert_equal(load_state_dict(path), weights)


def test_a_diffusers_folder_gives_both_parts(tmp_path: Path) -> None:
    """What AutoencoderTiny.save_pretrained wrote loads strictly into our decoder and encoder, with equal output."""
    torch.manual_seed(0)
    theirs: Any = AutoencoderTiny()  # type: ignore[no-untyped-call]
    theirs.save_pretrained(tmp_path / "taesd")
    path = find_weights("taesd", tmp_path)
    assert path is not None
    decoder = build_decoder("taesd", load_state_dict(path, "decoder"))
    encoder = build_encoder("taesd", load_state_dict(path, "encoder"))
    latents, pixels = torch.randn(1, 4, 3, 2), torch.rand(1, 3, 16, 24)
    with torch.inference_mode():
        torch.testing.assert_close(decoder(latents) * 2 - 1, theirs.decode(latents).sample, atol=1e-5, rtol=0)
        torch.testing.assert_close(encoder(pixels), theirs.encode(pixels * 2 - 1).latents, atol=1e-5, rtol=0)


def test_a_file_of_one_part_has_not_the_other(tmp_path: Path) -> None:
    """Asking a file for a part that it lacks is an error that says so."""
    save_file({"decoder.1.weight": torch.zeros(1)}, tmp_path / "both.safetensors")
    with pytest.raises(WeightsError, match=r"both\.safetensors: has no encoder"):
        load_state_dict(tmp_path / "both.safetensors", "encoder")


PICKLED_CALL = b"cos\nsystem\n(S'false'\ntR."


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", bytes(range(256)) * 8, b"PK\x03\x04" + bytes(99), PICKLED_CALL])
def test_a_broken_file_is_refused_with_its_path(tmp_path: Path, suffix: str, content: bytes) -> None:
    """Empty, garbled, cut and malicious files are one kind of error, with the path and one line of reason."""
    path = tmp_path / f"taesd_decoder{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"taesd_decoder\{suffix}: ") as caught:
        load_state_dict(path)
    assert "\n" not in str(caught.value)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """A readable file without named tensors, and no file at all, are refused too."""
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"list\.pth: holds list, not named tensors"):
        load_state_dict(tmp_path / "list.pth")
    with pytest.raises(WeightsError, match=r"none\.pth: cannot be read"):
        load_state_dict(tmp_path / "none.pth")
