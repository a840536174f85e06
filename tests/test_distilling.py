"""`taesd-stream distill`: a decoder is learned from files, in steps that can stop anywhere, and then it is used."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from taesd_stream.decoding.choice import open_engine
from taesd_stream.errors import ConfigError
from taesd_stream.models import AutoencoderTiny
from taesd_stream.models.nano import NanoDecoder
from taesd_stream.training.distillation import Settings
from taesd_stream.training.quality import psnr_db, sharpness, ssim
from taesd_stream_workers.offline.distilling import distil, from_pairs, from_pictures, measure, save
from tests.commands import run_command
from tests.daemon import COMMAND, clean_environment

CPU = torch.device("cpu")
CHANNELS, FACTOR = 6, 4
STEPS = 60


def pair(number: int) -> tuple[Tensor, Tensor]:
    """Latents (6, 12, 14) and a picture that no linear map of them gives: its contrast is a product of channels."""
    generator = torch.Generator().manual_seed(number)
    rough = torch.randn(1, CHANNELS, 5, 6, generator=generator)
    latents = torch.nn.functional.interpolate(rough, size=(12, 14), mode="bicubic", align_corners=True)[0]
    cells = torch.sigmoid(latents[:3] * latents[3:] * 2)
    picture = torch.nn.functional.interpolate(cells[None], scale_factor=FACTOR, mode="bilinear")[0]
    return latents, picture.clamp(0, 1)


def save_picture(path: Path, picture: Tensor) -> None:
    """As an 8-bit PNG."""
    Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy()).save(path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    for number in range(12):
        latents, picture = pair(number)
        save_file({"latents": latents.contiguous()}, folder / f"{number:02d}.safetensors")
        save_picture(folder / f"{number:02d}.png", picture)
    return folder


def train(folder: Path, checkpoint: Path, steps: int = STEPS, stop_at: int | None = None) -> dict[str, Tensor]:
    """Weights after a training on pairs, or after its first `stop_at` steps."""
    material = from_pairs("born", folder, CPU, pixels=2 * 48 * 48)
    done = 0

    def count(steps_done: int, _: float) -> None:
        nonlocal done
        done = steps_done

    training = distil(
        material,
        Settings(steps=steps, rate=4e-3),
        CPU,
        checkpoint,
        is_stopped=lambda: stop_at is not None and done >= stop_at,
        on_step=count,
    )
    return training.weights()


def test_a_short_training_beats_the_projection(pairs: Path, tmp_path: Path) -> None:
    """Some seconds on a processor: on unseen pairs the decoder is better than the 3x3 projection, and is then used."""
    material = from_pairs("born", pairs, CPU, pixels=4 * 48 * 48)
    settings = Settings(steps=STEPS, rate=4e-3, noisy=0.0)
    training = distil(
        material, settings, CPU, tmp_path / "checkpoint", is_stopped=lambda: False, on_step=lambda *_: None
    )
    report = measure(training, material)
    assert report.pictures == 2
    assert report.psnr_db > report.linear_psnr_db + 1
    save(tmp_path / "born.safetensors", training, material, report)
    engine = open_engine("born", weights_folder=tmp_path, choice="nano")
    assert (engine.decoder, engine.is_full) == ("nano", False)
    assert f"distilled in {tmp_path / 'born.safetensors'}" in engine.reason
    latents, picture = pair(0)
    shown = torch.cat([rgb for _, rgb in engine.decode(latents[None], budget_bytes=1 << 30)])
    assert psnr_db(shown[0], picture) > report.linear_psnr_db


def test_resumed_is_as_uninterrupted(pairs: Path, tmp_path: Path) -> None:
    """Stopped and gone on with from the checkpoint's file, a training ends with the very weights of one in one go."""
    whole = train(pairs, tmp_path / "whole.safetensors", steps=20)
    train(pairs, tmp_path / "parts.safetensors", steps=20, stop_at=10)
    assert int(load_file(tmp_path / "parts.safetensors")["done"]) == 10
    parts = train(pairs, tmp_path / "parts.safetensors", steps=20)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_checkpoint_of_another_training_is_refused(pairs: Path, tmp_path: Path) -> None:
    """Other settings do not go on from it, and a broken file is named."""
    train(pairs, tmp_path / "checkpoint", steps=2)
    with pytest.raises(ConfigError, match=r"checkpoint: is of another training .*; delete it"):
        train(pairs, tmp_path / "checkpoint", steps=3)
    (tmp_path / "checkpoint").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"checkpoint: cannot be read: .*; delete it"):
        train(pairs, tmp_path / "checkpoint", steps=2)


def test_pictures_and_a_saved_model_are_enough(tmp_path: Path) -> None:
    """A folder of pictures and a model's folder give a decoder of the model's space; a tenth is held out."""
    torch.manual_seed(0)
    model = AutoencoderTiny(
        latent_channels=5,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "photos").mkdir()
    for number in range(11):
        save_picture(tmp_path / "photos" / f"{number}.png", torch.rand(3, 40, 48))
    material = from_pictures("own", tmp_path / "photos", "", tmp_path / "model", CPU, pixels=4096, smallest=32)
    assert (material.source.latent_channels, material.source.spatial_factor) == (5, 2)
    assert (material.count, len(material.held_out)) == (9, 2)
    batch = material.source.batch(0)
    assert batch.latents.shape[-1] * 2 == batch.pictures.shape[-1]
    assert torch.equal(batch.pictures, material.source.batch(0).pictures)
    training = distil(
        material, Settings(steps=2), CPU, tmp_path / "checkpoint", is_stopped=lambda: False, on_step=lambda *_: None
    )
    assert measure(training, material).pictures == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/none", "x"], "none: expected a folder"),
        (["{}/empty", "x", "--encoder", "{}/e.pth", "--family", "taesd"], "e.pth: there is no such file"),
        (["{}/empty", "x", "--encoder", "{}/empty/e.txt", "--family", "tae9"], "expected pictures"),
        (["{}/photo", "x", "--encoder", "{}/empty/e.txt", "--family", "tae9"], "no family 'tae9'; there are: taesd"),
        (["{}/empty", "../x"], "cannot name a format"),
    ],
)
def test_what_cannot_be_distilled_is_said_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    """Missing folders, files, families and wrong names end with exit code 2 and one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "e.txt").touch()
    (tmp_path / "photo").mkdir()
    save_picture(tmp_path / "photo" / "a.png", torch.rand(3, 64, 64))
    done = distill(tmp_path, *(word.format(tmp_path) for word in words))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert message in done.stderr


def distill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, with a home of its own."""
    return run_command("distill", *words, "--device", "cpu", environment=clean_environment(folder))


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_learned(pairs: Path, tmp_path: Path) -> None:
    """The command stops between two steps at Ctrl-C, says how far it is, goes on from there, and writes the decoder."""
    words = ["distill", str(pairs), "born", "--folder", str(tmp_path), "--device", "cpu"]
    words += ["--steps", str(STEPS), "--batch-px", "4608"]
    with subprocess.Popen(
        [*COMMAND, *words], env=clean_environment(tmp_path), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert "10 pictures to train on, 2 held out" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert re.search(rf"stopped after \d+ of {STEPS} steps", rest), rest
    done = run_command(*words, environment=clean_environment(tmp_path), timeout_s=250)
    assert done.returncode == 0, done.stderr
    assert "on 2 held-out pictures: " in done.stderr
    assert not (tmp_path / "born.distilling.safetensors").exists()
    assert isinstance(open_engine("born", weights_folder=tmp_path, choice="nano")._network, NanoDecoder)


def test_measures_by_hand() -> None:
    """PSNR of a known error, SSIM of equal and of unlike pictures, sharpness of a ramp."""
    picture = torch.rand(3, 32, 32)
    assert psnr_db(picture + 0.1, picture) == pytest.approx(20, abs=1e-4)
    assert ssim(picture, picture) == pytest.approx(1, abs=1e-5)
    assert ssim(1 - picture, picture) < 0
    ramp = torch.from_numpy(np.linspace(0, 1, 11, dtype=np.float32)).expand(3, 11, 11)
    assert sharpness(ramp) == pytest.approx(0.05, abs=1e-6)
