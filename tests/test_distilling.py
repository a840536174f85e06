"""`taesd-stream distill`: a decoder is learned from files, in steps that can stop anywhere, and then it is used."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from taesd_stream.decoding.choice import open_engine
from taesd_stream.errors import ConfigError
from taesd_stream.models import AutoencoderTiny, build_encoder
from taesd_stream.models.nano import NanoDecoder
from taesd_stream.training.distillation import Settings
from taesd_stream.training.quality import psnr_db, sharpness, ssim
from taesd_stream_workers.offline.distilling import distil, measure, save
from taesd_stream_workers.offline.material import from_pairs, from_pictures
from tests.commands import run_command
from tests.daemon import COMMAND, clean_environment

CPU = torch.device("cpu")
CHANNELS, FACTOR = 6, 4
STEPS = 60
ENCODER = ("--encoder", "{}/e.safetensors", "--family", "taesd")
VIDEOS = "encodes videos, not pictures; there are: taesd, taesdxl, taesd3, taef1, taef2, taesana, taeqi2_1"


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


def save_encoder(path: Path, seed: int = 0, family: str = "taesd") -> Path:
    """A file of an encoder's random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        save_file(build_encoder(family).state_dict(), path)
    return path


def save_photos(folder: Path, sides: list[tuple[int, int]]) -> Path:
    """A folder of noisy pictures, each of a height and width."""
    folder.mkdir()
    for number, (height, width) in enumerate(sides):
        save_picture(folder / f"{number:03d}.png", torch.rand(3, height, width))
    return folder


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
    latents, picture = pair(99)
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
    with pytest.raises(ConfigError, match=r"checkpoint: is of another training \(--steps: 2 then, 3 now\).*delete it"):
        train(pairs, tmp_path / "checkpoint", steps=3)
    save_file({}, tmp_path / "older", metadata={"taesd_stream.settings": '{"steps": "2"}'})
    with pytest.raises(ConfigError, match=r"older: is of another version of this command; delete it"):
        train(pairs, tmp_path / "older", steps=2)
    with safe_open(tmp_path / "checkpoint", framework="pt") as file:
        facts = file.metadata()
    save_file({}, tmp_path / "half", metadata=facts)
    with pytest.raises(ConfigError, match=r"half: is not whole: .*; delete it"):
        train(pairs, tmp_path / "half", steps=2)
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
    for number in range(12):
        save_picture(tmp_path / "photos" / f"{number}.png", torch.rand(3, 40, 48))
    material = from_pictures("own", tmp_path / "photos", "", tmp_path / "model", CPU, pixels=4096, smallest=32)
    assert (material.source.latent_channels, material.source.spatial_factor) == (5, 2)
    assert (material.count, len(material.held_out)) == (10, 2)
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
        (["{}/photo", "x", "--encoder", "{}/empty/e.txt", "--family", "taew2_1"], f"'taew2_1' {VIDEOS}"),
        (["{}/photo", "x", "--encoder", "{}/empty/e.txt", "--family", "taeltx2_3_wide"], f"'taeltx2_3_wide' {VIDEOS}"),
        (
            ["{}/photo", "x", *ENCODER],
            "pictures of at least 128 pixels on the short side (--smallest), got none among 1",
        ),
        (["{}/photo", "x", *ENCODER, "--smallest", "36"], "--smallest 36: expected a multiple of 8, .* as 32 or 40"),
        (["{}/photo", "x", *ENCODER, "--smallest", "1160"], "--smallest 1160: expected at most 1152"),
        (["{}/photo", "x", "--encoder", "{}/alpha"], "alpha: expected one of 3 channels (RGB), got 4"),
        (["{}/empty", "../x"], "cannot name a format"),
    ],
)
def test_what_cannot_be_distilled_is_said_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    """Missing folders, files, families and wrong names end with exit code 2 and one line."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "e.txt").touch()
    (tmp_path / "photo").mkdir()
    save_picture(tmp_path / "photo" / "a.png", torch.rand(3, 64, 64))
    save_encoder(tmp_path / "e.safetensors")
    AutoencoderTiny(in_channels=4, out_channels=4).save_pretrained(tmp_path / "alpha")
    done = distill(tmp_path, *(word.format(tmp_path) for word in words))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), done.stderr), done.stderr


def distill(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command, with a home of its own."""
    return run_command("distill", *words, "--device", "cpu", environment=clean_environment(folder))


def test_pictures_too_small_are_left_out_before_any_is_held_out(tmp_path: Path) -> None:
    """A few icons among photographs are counted and passed over, whichever of them would have been measured on."""
    folder = save_photos(tmp_path / "photos", [(6, 6), (40, 48)] * 10)
    words = ("--encoder", str(save_encoder(tmp_path / "e.safetensors")), "--family", "taesd", "--smallest", "32")
    done = distill(
        tmp_path, str(folder), "own", *words, "--folder", str(tmp_path), "--steps", "1", "--batch-px", "1024"
    )
    assert done.returncode == 0, done.stderr
    assert "9 pictures to train on, 1 held out" in done.stderr
    assert "10 of 20 pictures are left out: smaller than 32 pixels on the short side (--smallest)" in done.stderr
    assert "on 1 held-out pictures: " in done.stderr


def test_an_encoder_of_pictures_with_alpha(tmp_path: Path) -> None:
    """Of the image family that takes RGBA the pictures are opaque."""
    encoder = save_encoder(tmp_path / "e.safetensors", family="taeqi2_1")
    folder = save_photos(tmp_path / "photos", [(48, 64)] * 2)
    material = from_pictures("own", folder, "taeqi2_1", encoder, CPU, pixels=1024, smallest=32)
    assert (material.source.latent_channels, material.source.spatial_factor) == (64, 16)
    batch = material.source.batch(0)
    opaque = torch.cat([batch.pictures, torch.ones(len(batch.pictures), 1, 32, 32)[..., : batch.pictures.shape[-1]]], 1)
    network = build_encoder("taeqi2_1", load_file(encoder))
    with torch.inference_mode():
        torch.testing.assert_close(batch.latents, network(opaque[..., : batch.pictures.shape[-2], :]))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos, encoders, and the checkpoint of a training that was stopped after no step."""
    folder = tmp_path_factory.mktemp("stopped")
    for name, seed in (("own", 0), ("copy", 0), ("other", 1)):
        save_encoder(folder / f"{name}.safetensors", seed)
    photos = save_photos(folder / "photos", [(40, 48)] * 3)
    encoder, checkpoint = folder / "own.safetensors", folder / "born.distilling.safetensors"
    material = from_pictures("born", photos, "taesd", encoder, CPU, pixels=1024, smallest=32)
    distil(material, Settings(steps=1), CPU, checkpoint, is_stopped=lambda: True, on_step=lambda *_: None)
    return folder


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"--encoder": "other.safetensors"}, r"latents: by encoder [0-9a-f]{12} then, by encoder [0-9a-f]{12} now"),
        ({"--family": "taesdxl"}, "--family: taesd then, taesdxl now"),
        ({"--smallest": "40"}, "--smallest: 32 then, 40 now"),
        ({"--batch-px": "2048"}, "--batch-px: 1024 then, 2048 now"),
        ({"--encoder": "copy.safetensors"}, None),
    ],
)
def test_a_checkpoint_goes_on_with_its_own_encoder_alone(
    changed: dict[str, str], told: str | None, stopped: Path, tmp_path: Path
) -> None:
    """Another encoder's weights, family, crops or batches are refused, by what differs; a moved file goes on."""
    checkpoint = Path(shutil.copy(stopped / "born.distilling.safetensors", tmp_path))
    words = {"--encoder": "own.safetensors", "--family": "taesd", "--smallest": "32", "--batch-px": "1024"} | changed
    words["--encoder"] = str(stopped / words["--encoder"])
    given = [part for word in words.items() for part in word]
    done = distill(tmp_path, str(stopped / "photos"), "born", *given, "--folder", str(tmp_path), "--steps", "1")
    if told is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2, done.stderr
        expected = rf"{re.escape(str(checkpoint))}: is of another training \({told}\): .* delete it to begin anew"
        assert re.search(expected, done.stderr), done.stderr
        assert checkpoint.exists()


def test_a_checkpoint_of_other_pairs_is_refused(pairs: Path, tmp_path: Path) -> None:
    """As many pairs of the same shapes, but of another space."""
    train(pairs, tmp_path / "checkpoint", steps=2)
    (tmp_path / "others").mkdir()
    for number in range(12):
        latents, picture = pair(number)
        save_file({"latents": (latents + 1).contiguous()}, tmp_path / "others" / f"{number:02d}.safetensors")
        save_picture(tmp_path / "others" / f"{number:02d}.png", picture)
    with pytest.raises(ConfigError, match=r"another training \(latents: of pairs \w{12} then, of pairs \w{12} now\)"):
        train(tmp_path / "others", tmp_path / "checkpoint", steps=2)


# --- memory ---


def test_of_a_held_out_photograph_its_middle_alone_is_kept(tmp_path: Path) -> None:
    """Not a view, whose memory would be the whole photograph's."""
    folder = save_photos(tmp_path / "photos", [(600, 900)] * 2)
    encoder = save_encoder(tmp_path / "e.safetensors")
    material = from_pictures("own", folder, "taesd", encoder, CPU, pixels=1024, smallest=32)
    ((_, middle),) = material.held_out
    assert (tuple(middle.shape), middle.dtype) == ((1, 3, 512, 512), torch.uint8)
    assert middle.untyped_storage().nbytes() == 3 * 512 * 512


def test_no_more_is_read_than_memory_holds(pairs: Path, tmp_path: Path) -> None:
    """Past the bytes that pictures and pairs may take the rest is left out, and that is said."""
    folder = save_photos(tmp_path / "photos", [(64, 64)] * 30)
    encoder = save_encoder(tmp_path / "e.safetensors")
    some = from_pictures("own", folder, "taesd", encoder, CPU, pixels=1024, smallest=32, budget_bytes=12 * 30_000)
    assert (some.count, len(some.held_out)) == (10, 2)
    assert some.notes == ["12 of 30 pictures are used: more do not fit into 0.00036 GB, half of the memory"]
    least = from_pairs("born", pairs, CPU, pixels=1024, budget_bytes=0)
    assert (least.count, len(least.held_out)) == (1, 1)
    assert least.notes == ["2 of 12 pairs are used: more do not fit into 0 GB, half of the memory"]
    assert from_pairs("born", pairs, CPU, pixels=1024).notes == []


PEAK = """
import resource, sys
from pathlib import Path
import torch
from taesd_stream_workers.offline.material import from_pairs, from_pictures

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

folder, encoder = map(Path, sys.argv[1:])
one, many = folder / "one", folder / "many"
sizes = []
for place in (one, many):
    if encoder.exists():
        kept = from_pictures("x", place, "taesd", encoder, torch.device("cpu"), pixels=1024, smallest=128)
    else:
        kept = from_pairs("x", place, torch.device("cpu"), pixels=1024)
    sizes.append(peak())
print(sizes[1] - sizes[0])
"""


def grown_bytes(folder: Path, encoder: Path) -> int:
    """How much more memory the folder `many` takes at its worst moment than the folder `one` did."""
    words = [sys.executable, "-c", PEAK, str(folder), str(encoder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
def test_photographs_are_held_as_small_as_they_are_used(tmp_path: Path) -> None:
    """Each more of 4000x3000 takes what the pool keeps of it, 12 MB, and not 36 MB besides for itself."""
    encoder = save_encoder(tmp_path / "e.safetensors")
    for name, count in (("one", 2), ("many", 14)):
        (tmp_path / name).mkdir()
        for number in range(count):
            Image.new("RGB", (4000, 3000), (number, 60, 120)).save(tmp_path / name / f"{number}.png")
    assert grown_bytes(tmp_path, encoder) < 12 * 36e6


@pytest.mark.slow
def test_pairs_are_held_as_bytes(tmp_path: Path) -> None:
    """Each more of 1024x1024 takes 3 MB for its picture, and its latents, not the 12 MB of floats."""
    for name, count in (("one", 2), ("many", 42)):
        (tmp_path / name).mkdir()
        for number in range(count):
            save_file({"latents": torch.randn(4, 128, 128)}, tmp_path / name / f"{number}.safetensors")
            Image.new("RGB", (1024, 1024), (number, 60, 120)).save(tmp_path / name / f"{number}.png")
    assert grown_bytes(tmp_path, tmp_path / "none") < 40 * 8e6


@pytest.mark.parametrize(
    ("latents", "size", "message"),
    [
        (torch.zeros(5, 12, 14), (56, 48), "expected 6 channels as the others have, got 5"),
        (torch.zeros(6, 12, 14), (56, 44), "expected 56x48 pixels for 14x12 cells of 4 .*, got 56x44"),
        (torch.zeros(6, 3, 14), (56, 12), "expected 16 pixels a side at least, got 56x12; leave the pair out"),
        (torch.zeros(6, 0, 14), (56, 48), r"expected latents \(C, h, w\), got shape \(6, 0, 14\)"),
    ],
)
def test_a_pair_unlike_the_others_is_named(
    latents: Tensor, size: tuple[int, int], message: str, pairs: Path, tmp_path: Path
) -> None:
    """Wrong channels, sizes, and pictures that nothing can be measured on: an error with the file."""
    for path in pairs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    save_file({"latents": latents}, tmp_path / "wrong.safetensors")
    Image.new("RGB", size).save(tmp_path / "wrong.png")
    with pytest.raises(ConfigError, match=rf"wrong\.\w+: {message}"):
        from_pairs("born", tmp_path, CPU, pixels=1024)


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
