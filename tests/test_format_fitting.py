"""A latent space that is born here: fitted from pairs, measured, written, and previewed by a real daemon."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from taesd_stream import LatentPublisher
from taesd_stream.decoding.choice import NoDecoderError, open_engine
from taesd_stream.errors import ConfigError, WeightsError
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.linear import FactorProjection
from taesd_stream.user_formats import (
    METADATA_KEY,
    check_format_name,
    find_user_format,
    read_user_format,
    user_formats_folder,
)
from taesd_stream_workers.offline.format_fitting import Fit, find_pairs, fit_format, read_picture
from tests.commands import run_command
from tests.daemon import Daemon, clean_environment, wait_for
from tests.pictures import decode_jpeg

CHANNELS, FACTOR = 6, 8


def truth() -> tuple[Tensor, Tensor]:
    """The colours that our space stands for: factors (6, 3) and a bias, in [-1, 1]."""
    random = torch.Generator().manual_seed(5)
    return torch.randn(CHANNELS, 3, generator=random) * 0.1, torch.tensor([0.1, -0.05, 0.0])


def smooth_latents(seed: int, height: int = 10, width: int = 12) -> Tensor:
    """(6, h, w): clouds, as a picture's latents are."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, CHANNELS, 3, 3, generator=random)
    return F.interpolate(coarse, size=(height, width), mode="bicubic")[0]


def picture_of(latents: Tensor, factor: int = FACTOR) -> Tensor:
    """(3, H, W) in [0, 1] of (6, h, w) latents in our space: flat boxes, as a new model's pictures are not."""
    factors, bias = truth()
    cells = (torch.einsum("chw,cr->rhw", latents, factors) + bias.reshape(3, 1, 1) + 1) / 2
    return cells.clamp(0, 1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write an 8-bit picture."""
    pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=95, subsampling=0)  # of a PNG neither means anything


def write_pairs(folder: Path, count: int = 10) -> Path:
    """A folder of pairs in all the forms that people have."""
    folder.mkdir()
    for number in range(count):
        latents = smooth_latents(number)
        if number % 2:
            np.save(folder / f"pair{number}.npy", latents.numpy())
        else:
            save_file({"latents": latents.unsqueeze(0).contiguous()}, folder / f"pair{number}.safetensors")
        save_picture(picture_of(latents), folder / f"pair{number}.{'jpg' if number % 3 else 'png'}")
    return folder


def fitted(folder: Path, name: str = "born") -> Fit:
    """The fit of a folder, without a progress bar."""
    return fit_format(name, find_pairs(folder), lambda pairs, _: pairs)


def fit_command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`taesd-stream fit` with a home of its own."""
    return run_command("fit", *arguments, environment=clean_environment(folder))


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the formats of this machine's user."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)


def test_a_format_born_here_previews_in_a_daemon(tmp_path: Path) -> None:
    """Fitted by the command while the daemon runs, a new space's latents come out in their colours."""
    pairs = write_pairs(tmp_path / "pairs")
    factors, bias = truth()
    target = torch.tensor([170.0, 105.0, 95.0])
    wanted = target / 255 * 2 - 1
    cell = torch.linalg.lstsq(factors.T, (wanted - bias).unsqueeze(1)).solution[:, 0]
    latents = cell[:, None, None].expand(-1, 8, 8).numpy()
    with Daemon(tmp_path) as daemon:
        done = fit_command(tmp_path, str(pairs), "born")
        assert done.returncode == 0, done.stderr
        assert "6 channels, 8 pixels a cell" in done.stderr
        assert "from 10 pairs; on 2 held-out pairs: flat " in done.stderr
        with LatentPublisher(daemon.broker, stream="new", latent_format="born") as publisher:
            publisher.publish(latents, step=0)
            status, body = wait_for(lambda: _picture(daemon), 60, of="a picture of the new space")
    shown = decode_jpeg(body)
    assert (status, shown.shape) == (200, (64, 64, 3))
    assert np.abs(shown.astype(float) - target.numpy()).max() <= 8


def _picture(daemon: Daemon) -> tuple[int, bytes] | None:
    status, body = daemon.get("/streams/new/latest.jpg")
    return (status, body) if status == 200 else None


def test_a_format_in_the_weights_folder_decodes_from_the_command_line(tmp_path: Path) -> None:
    """With --folder the file goes where weights are, and `decode` and the engine take it from there."""
    pairs, weights = write_pairs(tmp_path / "pairs"), tmp_path / "weights"
    assert fit_command(tmp_path, str(pairs), "born", "--folder", str(weights)).returncode == 0
    engine = open_engine("born", weights_folder=weights)
    assert (engine.decoder, engine.is_full) == ("linear", False)
    assert f"fitted in {weights / 'born.safetensors'}" in engine.reason
    np.save(tmp_path / "film.npy", smooth_latents(3)[None].numpy())
    words = ["decode", str(tmp_path / "film.npy"), "--latent-format", "born", "-o", str(tmp_path / "film.mp4")]
    done = run_command(*words, "--set", f"weights.folder={weights}", environment=clean_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "film.mp4").stat().st_size > 0


def test_the_fit_explains_what_it_has_not_seen(tmp_path: Path) -> None:
    """On held-out pairs the projection is far better than a flat colour; its factors are those of the truth."""
    found = fitted(write_pairs(tmp_path / "pairs"))
    assert (found.pairs, found.held_out, found.explains) == (10, 2, True)
    assert max(found.psnr_db["factors"], found.psnr_db["projection"]) > found.psnr_db["flat"] + 10
    assert (found.format.channels, found.format.spatial_factor) == (CHANNELS, FACTOR)
    factors, bias = truth()
    torch.testing.assert_close(torch.tensor(found.format.rgb_factors), factors, atol=0.02, rtol=0)
    torch.testing.assert_close(torch.tensor(found.format.rgb_bias), bias, atol=0.02, rtol=0)


def test_the_better_decoder_is_kept(tmp_path: Path) -> None:
    """Pairs of sharp boxes are explained better by all pixels of a cell; the file holds that projection."""
    found = fitted(write_pairs(tmp_path / "pairs"))
    assert found.psnr_db["projection"] > found.psnr_db["factors"]
    found.save(tmp_path / "born.safetensors")
    engine = open_engine("born", weights_folder=tmp_path)
    latents = smooth_latents(99)
    ((_, rgb),) = engine.decode(latents.unsqueeze(0), budget_bytes=1 << 30)
    assert -10 * torch.log10((rgb[0] - picture_of(latents)).square().mean()) > 30


def test_few_pairs_give_one_colour_a_cell(tmp_path: Path) -> None:
    """Where the cells are fewer than the unknowns of a 3x3 projection, only the factors are fitted."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(2):
        latents = smooth_latents(number, 4, 5)
        np.save(folder / f"{number}.npy", latents.numpy())
        save_picture(picture_of(latents), folder / f"{number}.png")
    found = fitted(folder)
    assert (found.projection, set(found.psnr_db), found.held_out) == (None, {"flat", "factors"}, 1)
    found.save(tmp_path / "born.safetensors")
    engine = open_engine("born", weights_folder=tmp_path)
    ((_, rgb),) = engine.decode(smooth_latents(0, 4, 5).unsqueeze(0), budget_bytes=1 << 30)
    with torch.no_grad():
        expected = FactorProjection(found.format)(smooth_latents(0, 4, 5).unsqueeze(0)).clamp(0, 1)
    torch.testing.assert_close(rgb, expected, atol=1e-5, rtol=0)


def test_one_pair_is_fitted_and_not_measured(tmp_path: Path) -> None:
    """Of one pair nothing can be held out: there are no figures, and the command says so."""
    pairs = write_pairs(tmp_path / "pairs", 1)
    assert fitted(pairs).psnr_db == {}
    done = fit_command(tmp_path, str(pairs), "born")
    assert done.returncode == 0
    assert "from one pair: nothing is left to measure it on" in done.stderr


def test_pairs_that_do_not_belong_together_are_doubted(tmp_path: Path) -> None:
    """Latents that tell nothing of their pictures give a warning, not silence."""
    folder = write_pairs(tmp_path / "pairs")
    for number, path in enumerate(sorted(folder.glob("*.npy"))):
        np.save(path, torch.randn(CHANNELS, 10, 12, generator=torch.Generator().manual_seed(number)).numpy())
    for path in folder.glob("*.safetensors"):
        path.unlink()
    done = fit_command(tmp_path, str(folder), "born")
    assert done.returncode == 0
    assert "hardly tell anything of these pictures" in done.stderr


def test_a_factor_that_is_no_whole_number_has_factors_only(tmp_path: Path) -> None:
    """Cells of 2.5 pixels: each takes the mean colour of its box."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for number in range(3):
        latents = smooth_latents(number, 8, 12)
        np.save(folder / f"{number}.npy", latents.numpy())
        wide = F.interpolate(picture_of(latents, 5).unsqueeze(0), scale_factor=0.5, mode="area")[0]
        save_picture(wide, folder / f"{number}.png")
    found = fitted(folder)
    assert (found.format.spatial_factor, found.projection) == (2.5, None)
    assert found.explains


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_pictures_are_read_in_their_colours(tmp_path: Path, suffix: str) -> None:
    """White, black and colours of both kinds of file are what was written, within what JPEG loses."""
    patches = torch.tensor([[255, 255, 255], [0, 0, 0], [190, 60, 60], [60, 170, 60], [60, 70, 180], [200, 190, 70]])
    picture = (patches.float() / 255).T.reshape(3, 1, 6).repeat_interleave(16, 1).repeat_interleave(16, 2)
    save_picture(picture, tmp_path / f"patches{suffix}")
    error = (read_picture(tmp_path / f"patches{suffix}") - picture)[:, 4:12, 4::8].abs() * 255
    assert error.max() <= (4 if suffix == ".jpg" else 0.01)


def broken_pair(folder: Path, latents: Any, size: tuple[int, int]) -> Path:
    """A folder whose second pair is of something else."""
    write_pairs(folder, 1)
    np.save(folder / "wrong.npy", latents)
    Image.new("RGB", size).save(folder / "wrong.png")
    return folder


@pytest.mark.parametrize(
    ("latents", "size", "message"),
    [
        (np.zeros((4, 10, 12), np.float32), (96, 80), r"wrong\.npy: expected 6 channels, got 4"),
        (
            np.zeros((6, 10, 12), np.float32),
            (80, 96),
            r"wrong\.png: expected 96x80 pixels for 12x10 cells of 8.*80x96",
        ),
        (np.zeros((120, 6), np.float32), (96, 80), r"expected latents \(C, h, w\), got shape \(120, 6\)"),
        (np.zeros((6, 10, 12), np.int64), (96, 80), r"wrong\.npy: expected floating point latents, got torch\.int64"),
        (np.zeros((6, 0, 12), np.float32), (96, 80), r"expected latents \(C, h, w\), got shape \(6, 0, 12\)"),
        (np.full((6, 10, 12), np.nan, np.float32), (96, 80), r"wrong\.npy: holds NaN or infinity"),
    ],
)
def test_a_pair_of_something_else_is_named(tmp_path: Path, latents: Any, size: tuple[int, int], message: str) -> None:
    """Wrong channels, sizes, axes and values are errors with the file, the expected and the given."""
    with pytest.raises(ConfigError, match=message):
        fitted(broken_pair(tmp_path / "pairs", latents, size))


def test_what_cannot_be_fitted_is_said(tmp_path: Path) -> None:
    """No folder, no pairs, a name that would be a path: errors that name the expected and the given."""
    (tmp_path / "alone.npy").touch()
    with pytest.raises(ConfigError, match="nowhere: expected a folder of latents and pictures, there is none"):
        find_pairs(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="got 1 files of latents and 0 pictures without a common name"):
        find_pairs(tmp_path)
    with pytest.raises(ConfigError, match=r"'\.\./born' cannot name a format: expected 1 to 64 letters"):
        check_format_name("../born")


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    """A format with a projection of its own would be shown by that: exit code 2 and one line."""
    done = fit_command(tmp_path, str(write_pairs(tmp_path / "pairs", 1)), "flux2")
    assert done.returncode == 2
    assert "flux2: has a projection already, which would be taken before yours" in " ".join(done.stderr.split())


def test_an_older_fit_is_kept_unless_told(tmp_path: Path) -> None:
    """A second fit of a name is refused; --overwrite replaces the file."""
    pairs = write_pairs(tmp_path / "pairs", 2)
    assert fit_command(tmp_path, str(pairs), "born").returncode == 0
    path = user_formats_folder() / "born.safetensors"
    before = path.read_bytes()
    np.save(pairs / "pair1.npy", smooth_latents(50).numpy())
    done = fit_command(tmp_path, str(pairs), "born")
    assert (done.returncode, path.read_bytes()) == (2, before)
    assert "--overwrite replaces it" in done.stderr
    assert fit_command(tmp_path, str(pairs), "born", "--overwrite").returncode == 0
    assert path.read_bytes() != before


def test_a_known_format_without_factors_can_be_fitted(tmp_path: Path) -> None:
    """CogVideoX has no published factors: a fit of its 16 channels and 8 pixels fills the gap, another is refused."""
    factors = tuple((0.1, 0.2, 0.3) for _ in range(16))
    for channels, folder in ((16, "right"), (6, "wrong")):
        known = LatentFormat(
            name="cogvideox",
            channels=channels,
            spatial_factor=8,
            normalisation="scale_shift",
            rgb_factors=factors[:channels],
            rgb_bias=(0.0, 0.0, 0.0),
        )
        (tmp_path / folder).mkdir()
        Fit(known, None, 1, 0).save(tmp_path / folder / "cogvideox.safetensors")
    engine = open_engine("cogvideox", weights_folder=tmp_path / "right", choice="linear")
    assert engine.decoder == "linear"
    with pytest.raises(NoDecoderError, match="cogvideox has 16 channels, 8 pixels a cell, the file says 6 channels"):
        open_engine("cogvideox", weights_folder=tmp_path / "wrong", choice="linear")


GOOD: dict[str, Any] = {"channels": 1, "spatial_factor": 8, "rgb_factors": [[0, 0, 0]], "rgb_bias": [0, 0, 0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 0}, "channels: expected 1 to 4096, got 0"),
        ({"channels": True}, "channels: expected 1 to 4096, got True"),
        ({"channels": 2}, "rgb_factors: expected 2 rows, got 1"),
        ({"spatial_factor": 1e9}, "spatial_factor: expected 1 to 256 pixels a cell, got 1000000000.0"),
        ({"rgb_factors": [[0, 0]]}, "rgb_factors: expected rows of 3 finite numbers, got"),
        ({"rgb_bias": [0, 0, float("inf")]}, "rgb_bias: expected rows of 3 finite numbers, got"),
        ({"rgb_bias": None}, "is no format"),
    ],
)
def test_a_format_file_of_nonsense_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """Metadata that cannot be is an error with the file, the expected and the given."""
    path = tmp_path / "born.safetensors"
    save_file({}, path, metadata={METADATA_KEY: json.dumps(GOOD | change)})
    with pytest.raises(WeightsError, match=message):
        read_user_format(path)
    with pytest.raises(NoDecoderError, match=r"No decoder for born: .*born\.safetensors"):
        open_engine("born", weights_folder=tmp_path)


def test_tensors_that_do_not_fit_cost_no_memory(tmp_path: Path) -> None:
    """A small file that claims a projection of 30 GB is refused before anything is made of it."""
    facts = GOOD | {"channels": 4096, "spatial_factor": 256, "rgb_factors": [[0, 0, 0]] * 4096}
    tensors = {"weight": torch.zeros(1), "bias": torch.zeros(1)}
    save_file(tensors, tmp_path / "born.safetensors", metadata={METADATA_KEY: json.dumps(facts)})
    with pytest.raises(NoDecoderError, match=r"'weight': expected shape \(196608, 4096, 3, 3\), got \(1,\)"):
        open_engine("born", weights_folder=tmp_path)


def test_names_from_outside_never_become_paths(tmp_path: Path) -> None:
    """A publisher's format name is compared with the files of the folder, so that no other folder is reached."""
    (tmp_path / "weights").mkdir()
    save_file({}, tmp_path / "born.safetensors", metadata={METADATA_KEY: json.dumps(GOOD)})
    assert find_user_format("../born", tmp_path / "weights") is None
    assert find_user_format("born", tmp_path) is not None


def test_files_of_weights_are_no_formats(tmp_path: Path) -> None:
    """A safetensors file without our metadata is passed over; an unknown name says how to make a format."""
    save_file({"weight": torch.zeros(1)}, tmp_path / "born.safetensors")
    assert find_user_format("born", tmp_path) is None
    with pytest.raises(NoDecoderError, match=r"unknown latent format 'born'.*`taesd-stream fit` makes a projection"):
        open_engine("born", weights_folder=tmp_path)
