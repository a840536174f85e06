"""Weights from the hub: fetched over HTTP, checked, found again by whoever decodes."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import TINY_DECODERS
from taesd_stream.models import build_decoder
from taesd_stream.models.checkpoints import find_weights
from taesd_stream.models.hub_weights import decoder_named, hub_files
from tests.commands import run_command
from tests.daemon import clean_environment
from tests.hub_server import HubServer

TAEF2 = "madebyollin/taef2/taef2.safetensors"
WAN = "Kijai/WanVideo_comfy/taew2_1.safetensors"


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A file as madebyollin/taef2 has one: diffusers' keys, both parts."""
    state = {key: value.half() for key, value in build_decoder("taef2").state_dict().items()}
    renamed = {}
    for key, value in state.items():
        index, _, rest = key.partition(".")
        renamed[f"decoder.layers.{int(index) - 1}.{rest}"] = value
    return save(renamed)


def run(folder: Path, hub: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command of ours, with a home and a hub of its own, and progress as on a terminal."""
    kept = {key: value for key, value in clean_environment(folder).items() if not key.startswith("HF_")}
    own = {"HF_ENDPOINT": hub, "TQDM_POSITION": "-1"}
    return run_command(*arguments, environment=kept | own)


@pytest.mark.parametrize(("name", "is_large"), [("flux2", True), ("taef2", False)])
def test_fetched_weights_are_checked_and_found(
    tmp_path: Path, weights: bytes, monkeypatch: pytest.MonkeyPatch, name: str, is_large: bool
) -> None:
    """By a format's or a decoder's name the file comes, its hash is compared, and the decoder finds it there."""
    with HubServer({TAEF2: weights}, large={TAEF2} if is_large else set()) as hub:
        done = run(tmp_path, hub.url, "weights", "fetch", name)
    assert (done.returncode, done.stdout) == (0, "")
    assert "taef2: madebyollin/taef2/taef2.safetensors, its hash is right: " in done.stderr
    assert "100%" in done.stderr  # the progress bar
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    found = find_weights("taef2", None)
    assert found is not None
    assert found.read_bytes() == weights
    assert found.is_relative_to(tmp_path / "cache" / "huggingface")
    assert find_weights("taesd", None) is None


def test_a_mirror_serves_where_the_author_has_no_repository(tmp_path: Path) -> None:
    """Wan's decoder comes from a mirror, of which the next one is tried where the first has it no more."""
    buffer = io.BytesIO()
    torch.save({"decoder.1.weight": torch.zeros(1)}, buffer)
    with HubServer({"lightx2v/Autoencoders/taew2_1.pth": buffer.getvalue()}) as hub:
        done = run(tmp_path, hub.url, "weights", "fetch", "wan2_1")
    assert done.returncode == 0, done.stderr
    assert "taew2_1: lightx2v/Autoencoders/taew2_1.pth, its hash is right" in done.stderr
    assert any("Kijai/WanVideo_comfy" in line for line in hub.asked)


@pytest.mark.parametrize("is_large", [True, False])
def test_a_damaged_download_is_refused_and_removed(tmp_path: Path, weights: bytes, is_large: bool) -> None:
    """A file that is not what the hub has is an error with both hashes, and no later start finds it."""
    with HubServer({TAEF2: weights}, large={TAEF2} if is_large else set(), damaged={TAEF2}) as hub:
        done = run(tmp_path, hub.url, "weights", "fetch", "flux2")
        assert done.returncode == 2
        kind = "sha256" if is_large else "git sha1"
        assert f"{TAEF2}: expected {kind} {hub.etag(TAEF2)}, got " in done.stderr
        assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.exists()]
        hub.damaged.clear()
        assert run(tmp_path, hub.url, "weights", "fetch", "flux2").returncode == 0


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    """What is no file of plain tensors is said with its path."""
    with HubServer({TAEF2: b"<html>not found</html>"}, large={TAEF2}) as hub:
        done = run(tmp_path, hub.url, "weights", "fetch", "flux2")
    assert done.returncode == 2
    assert "taef2.safetensors: cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("flux-2", 2, "unknown latent format 'flux-2'; nearest: flux2"),
        ("ltx_video", 2, "ltx_video: no tiny decoder is published for it"),
        ("hunyuan_video", 2, "taehv: the Hugging Face hub is not known to have it; get taehv.pth from https://github"),
        ("sdxl", 2, "taesdxl: madebyollin/taesdxl/diffusion_pytorch_model.safetensors: "),
    ],
)
def test_what_cannot_be_fetched_is_said(tmp_path: Path, name: str, code: int, message: str) -> None:
    """Unknown formats, formats without a decoder, decoders that are elsewhere, and repositories that are gone."""
    with HubServer({}) as hub:
        done = run(tmp_path, hub.url, "weights", "fetch", name)
    assert done.returncode == code
    assert message in done.stderr


def test_no_network_is_said(tmp_path: Path) -> None:
    """Where no hub answers the exit code is 69."""
    with HubServer({}) as hub:
        url = hub.url
    done = run(tmp_path, url, "weights", "fetch", "flux2")
    assert done.returncode == 69
    assert "the hub cannot be reached" in done.stderr


def test_the_list_says_where_weights_are_and_how_to_get_the_others(tmp_path: Path) -> None:
    """A file in the given folder is listed with its path; each other decoder with its way."""
    (tmp_path / "taesd_decoder.pth").touch()
    folder = f"weights.folder={tmp_path}"
    done = run(tmp_path, "http://127.0.0.1:9", "weights", "list", "--json", "--set", folder)
    rows = {row["decoder"]: row for row in json.loads(done.stdout)["decoders"]}
    assert list(rows) == list(TINY_DECODERS)
    assert rows["taesd"]["path"] == str(tmp_path / "taesd_decoder.pth")
    assert (rows["taef2"]["path"], rows["taef2"]["hub"]) == (None, TAEF2)
    assert (rows["taew2_1"]["formats"], rows["taehv"]["hub"]) == (["qwen_image", "wan2_1"], None)
    table = run(tmp_path, "http://127.0.0.1:9", "weights", "list", "--set", folder).stdout
    flat = " ".join(table.split())
    assert "not here; weights fetch taef2" in flat
    assert "by hand: https://github.com/madebyollin/taehv" in flat


def test_only_the_part_that_is_asked_for_is_taken() -> None:
    """The decoder's own file holds no encoder; files of both do."""
    names = {part: [file.name for file in hub_files("taesd", part)] for part in ("decoder", "encoder")}
    assert names["decoder"] == ["diffusion_pytorch_model.safetensors", "taesd_decoder.safetensors"]
    assert names["encoder"] == ["diffusion_pytorch_model.safetensors"]


def test_names_of_formats_and_decoders() -> None:
    """Both name a decoder; a format without one is an error."""
    assert [decoder_named(name) for name in ("flux2", "taef2", "qwen_image")] == ["taef2", "taef2", "taew2_1"]
    with pytest.raises(WeightsError, match="cosmos1_cv8x8x8: no tiny decoder is published"):
        decoder_named("cosmos1_cv8x8x8")
