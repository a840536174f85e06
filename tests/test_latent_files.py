"""Latents from files: every kind of file, the axes put right, and nothing in a file is executed."""

from __future__ import annotations

import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taesd_stream.errors import ConfigError
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.latent_log import RunLog
from taesd_stream_workers.offline.latent_files import (
    LogRows,
    format_of,
    info_of_log,
    load_latents,
    rows_of,
    rows_of_log,
)
from tests.commands import run_command
from tests.daemon import clean_environment

SD1 = LATENT_FORMATS["sd1"]
RUN = "00112233445566aa"


def some_latents(*shape: int) -> Tensor:
    """Random latents, the same for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def save(path: Path, latents: Tensor) -> Path:
    """Write latents as the suffix says."""
    if path.suffix.lower() == ".npy":
        with path.open("wb") as file:  # of a name in capitals np.save makes another
            np.save(file, latents.numpy())
    elif path.suffix == ".safetensors":
        save_file({"latents": latents.contiguous()}, path)
    else:
        torch.save(latents, path)
    return path


def write_log(folder: Path, frames: list[Tensor], kind: Any = "steps", **options: Any) -> Path:
    """A log as a publisher leaves one. Returns its first file."""
    info = StreamInfo(stream="mine~2", run=RUN, kind=kind, latent_format="sd1", meta={"seed": 5})
    log = RunLog(folder, info, **options)
    for seq, latents in enumerate(frames):
        log.append(
            LatentFrame(
                run=RUN,
                seq=seq,
                index=seq,
                step=2 * seq,
                total_steps=9,
                sigma=1 - seq / 10,
                dtype="float32",
                shape=tuple(latents.shape),
                kept=True,
                sent_ns=1,
                payload=latents.numpy().tobytes(),
            )
        )
    return log.paths[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".pth", ".pt", ".NPY"])
def test_each_kind_of_file_gives_its_latents(suffix: str, tmp_path: Path) -> None:
    """What was saved comes back, bit for bit."""
    latents = some_latents(5, 4, 6, 8)
    assert torch.equal(load_latents(save(tmp_path / f"file{suffix}", latents), SD1), latents)


def test_a_log_gives_its_frames_as_they_were_published(tmp_path: Path) -> None:
    """A .latents file knows its stream and format, and each frame its step and sigma."""
    frames = list(some_latents(3, 4, 6, 8))
    path = write_log(tmp_path, frames)
    info = info_of_log(path)
    assert info is not None
    assert (info.stream, info.latent_format, info.meta["seed"]) == ("mine~2", "sd1", 5)
    rows = list(rows_of_log(path))
    assert [(row.step, row.total_steps, row.sigma) for row in rows] == [(0, 9, 1.0), (2, 9, 0.9), (4, 9, 0.8)]
    assert all(torch.equal(row.latents, frame) for row, frame in zip(rows, frames, strict=True))
    assert torch.equal(load_latents(path, SD1), torch.stack(frames))


def test_a_log_of_clips_is_one_long_clip(tmp_path: Path) -> None:
    """Clips of several lengths decode one after another."""
    clips = [some_latents(2, 4, 6, 8), some_latents(3, 4, 6, 8)]
    assert torch.equal(load_latents(write_log(tmp_path, clips, "clip"), SD1), torch.cat(clips))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((4, 6, 8), (1, 4, 6, 8)),  # one picture
        ((7, 4, 6, 8), (7, 4, 6, 8)),
        ((1, 7, 4, 6, 8), (7, 4, 6, 8)),  # a batch of one
        ((4, 7, 6, 8), (7, 4, 6, 8)),  # channels first, as video models hold them
        ((1, 4, 7, 6, 8), (7, 4, 6, 8)),
        ((4, 4, 6, 8), (4, 4, 6, 8)),  # both would do: time first
    ],
)
def test_time_becomes_the_first_axis(shape: tuple[int, ...], expected: tuple[int, ...], tmp_path: Path) -> None:
    """Shapes that the format tells apart come out as (T, C, h, w), each frame with its own values."""
    latents = some_latents(*shape)
    loaded = load_latents(save(tmp_path / "file.npy", latents), SD1)
    assert loaded.shape == expected
    plain = latents.reshape([size for size in shape if size != 1])
    turned = plain.transpose(0, 1) if len(plain.shape) == 4 and plain.shape[1] != 4 else plain
    assert torch.equal(loaded.reshape(turned.shape), turned)


def test_an_array_of_another_byte_order(tmp_path: Path) -> None:
    """A .npy file from a big-endian machine has the same latents."""
    latents = some_latents(2, 4, 6, 8)
    np.save(tmp_path / "file.npy", latents.numpy().astype(">f4"))
    assert torch.equal(load_latents(tmp_path / "file.npy", SD1), latents)


@pytest.mark.parametrize(
    ("name", "shape", "is_turned"),
    [
        ("wan2_1", (1, 16, 16, 6, 8), True),
        ("wan2_1", (16, 16, 6, 8), False),  # no batch axis: as a publisher sends them
        ("cogvideox", (1, 16, 16, 6, 8), False),  # frames before channels
    ],
)
def test_as_many_frames_as_channels(name: str, shape: tuple[int, ...], is_turned: bool, tmp_path: Path) -> None:
    """What a sampler held, with its batch axis, has the format's own order of axes."""
    latents = some_latents(*shape)
    loaded = load_latents(save(tmp_path / "file.npy", latents), LATENT_FORMATS[name])
    plain = latents.reshape(16, 16, 6, 8)
    assert torch.equal(loaded, plain.transpose(0, 1) if is_turned else plain)


def test_real_video_latents(shared: Path) -> None:
    """The latents that Wan's own pipeline saved are read: 16 channels, time first."""
    loaded = load_latents(shared / "samples" / "test_latents_wan.pth", LATENT_FORMATS["wan2_1"])
    assert loaded.shape[1] == 16
    assert loaded.shape[0] > 1


def test_the_tensor_is_latents_else_the_only_one_of_its_rank(tmp_path: Path) -> None:
    """Other tensors beside it do not matter: by name, or by the number of axes; values that are no tensors neither."""
    latents = some_latents(3, 4, 6, 8)
    torch.save({"latents": latents, "noise": latents + 1, "step": 3}, tmp_path / "named.pth")
    torch.save({"z": latents, "sigmas": torch.ones(3)}, tmp_path / "ranked.pth")
    for name in ("named.pth", "ranked.pth"):
        assert torch.equal(load_latents(tmp_path / name, SD1), latents)
    torch.save({"a": latents, "b": latents}, tmp_path / "two.pth")
    with pytest.raises(ConfigError, match="a tensor named latents, or only one, got a, b"):
        load_latents(tmp_path / "two.pth", SD1)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npy", ".safetensors", ".latents"])
def test_nothing_in_a_file_is_executed(suffix: str, tmp_path: Path) -> None:
    """A pickle that would run code is refused in one line, under any suffix, and has run nothing."""
    path, sprung = tmp_path / f"file{suffix}", tmp_path / "sprung"
    pickle.loads(pickle.dumps(Trap(sprung)))  # noqa: S301 the trap works
    assert sprung.exists()
    sprung.unlink()
    if suffix == ".npy":
        np.save(path, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    elif suffix in (".pth", ".pt"):
        torch.save({"latents": Trap(sprung)}, path)
    else:
        path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ConfigError, match=str(path)) as refused:
        load_latents(path, SD1)
    assert not sprung.exists()
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".pth", ".npy", ".safetensors", ".latents"])
@pytest.mark.parametrize("content", [b"", b"garbage that is no latents at all", b"PK\x03\x04"])
def test_a_broken_file_is_one_line(suffix: str, content: bytes, tmp_path: Path) -> None:
    """Empty, cut short or not what its suffix says: refused by its path."""
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)) as refused:
        load_latents(path, SD1)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("latents", "expected"),
    [
        (torch.zeros(3, 5, 6, 8), r"sd1 has 4 channels, the file has \(3, 5, 6, 8\)"),
        (torch.zeros(2, 5, 4, 6, 8), r"expected one video, a batch axis of 1, got shape \(2, 5, 4, 6, 8\); save each"),
        (torch.zeros(6, 8), "expected latents of 3 to 5 axes"),
        (torch.zeros(3, 4, 6, 8, dtype=torch.int64), "expected floating point latents, got torch.int64; save them as"),
        (torch.zeros(3, 4, 6, 8, dtype=torch.float8_e4m3fn), "got torch.float8_e4m3fn; save them as one of float16, "),
        (torch.zeros(3, 4, 6, 8, dtype=torch.complex64), "expected floating point latents, got torch.complex64"),
        (torch.zeros(3, 4, 6, 8).to_sparse(), "expected a dense tensor, got a sparse_coo one; save a dense copy"),
        (torch.zeros(3, 4, 6, 8, device="meta"), r"shape \(3, 4, 6, 8\) is 2304 bytes, it holds 0; save"),
        (torch.zeros(1).expand(10**6, 4, 512, 512), "is 4194304000000 bytes, it holds 4; save latents.contiguous"),
        (torch.zeros(0, 4, 6, 8), "holds no latents"),
        (torch.full((3, 4, 6, 8), float("nan")), "3 of 3 frames hold NaN or infinity, the first is 0"),
    ],
)
def test_what_cannot_be_latents_of_the_format(latents: Tensor, expected: str, tmp_path: Path) -> None:
    """Wrong channels, axes, dtype, no frames, NaN: each says what was expected and what came."""
    with pytest.raises(ConfigError, match=expected):
        load_latents(save(tmp_path / "file.pth", latents), SD1)


def test_float8_in_safetensors_is_named(tmp_path: Path) -> None:
    """torch looks for NaN in no such values: the dtype is said before it is asked to."""
    path = save(tmp_path / "file.safetensors", some_latents(3, 4, 6, 8).to(torch.float8_e5m2))
    environment = clean_environment(tmp_path)
    done = run_command("decode", path, "--latent-format", "sd1", "-o", tmp_path / "a.mp4", environment=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "got torch.float8_e5m2; save them as one of float16, bfloat16, float32, float64" in done.stderr


def test_a_parameter_is_latents_too(tmp_path: Path) -> None:
    """Saved as something to train, they want no gradient here."""
    latents = some_latents(3, 4, 6, 8)
    loaded = load_latents(save(tmp_path / "file.pth", torch.nn.Parameter(latents)), SD1)
    assert torch.equal(loaded, latents)
    assert not loaded.requires_grad


@pytest.mark.parametrize("frames", [10**6, 10**18])
def test_an_array_that_claims_more_than_memory_is_one_line(frames: int, tmp_path: Path) -> None:
    """Of a header alone nothing is made."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({frames}, 4, 512, 512), }}".ljust(117) + "\n"
    (tmp_path / "file.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + header.encode() + bytes(100))
    with pytest.raises(ConfigError, match=r"file\.npy: (is damaged, or larger than this machine's|cannot be read: )"):
        load_latents(tmp_path / "file.npy", SD1)


@pytest.mark.parametrize("is_old", [False, True])
def test_a_damaged_pth_is_one_line(is_old: bool, tmp_path: Path) -> None:
    """Whatever torch's reader stumbles over in either of its formats, and raises: never another error than ours."""
    torch.save({"latents": some_latents(3, 4, 6, 8)}, tmp_path / "whole.pth", _use_new_zipfile_serialization=not is_old)
    whole, refused = (tmp_path / "whole.pth").read_bytes(), []
    for seed in range(300):
        chance = random.Random(seed)  # noqa: S311
        data = bytearray(whole[: chance.choice((len(whole), chance.randrange(len(whole))))])
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(min(len(data), 600))] = chance.randrange(256)
        (tmp_path / "file.pth").write_bytes(data)
        try:
            load_latents(tmp_path / "file.pth", SD1)
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(text.startswith(f"{tmp_path / 'file.pth'}: ") and "\n" not in text for text in refused)


def test_one_bad_frame_is_named(tmp_path: Path) -> None:
    """The first frame that holds infinity is told by its place."""
    latents = some_latents(5, 4, 6, 8)
    latents[3, 1, 2, 2] = float("inf")
    with pytest.raises(ConfigError, match="1 of 5 frames hold NaN or infinity, the first is 3"):
        load_latents(save(tmp_path / "file.npy", latents), SD1)


def test_names_that_are_none(tmp_path: Path) -> None:
    """A missing file, an unknown suffix and an unknown format are refused by name."""
    with pytest.raises(ConfigError, match=r"absent\.pth: there is no such file"):
        load_latents(tmp_path / "absent.pth", SD1)
    (tmp_path / "file.png").touch()
    with pytest.raises(ConfigError, match=r"file\.png: expected a name that ends in \.safetensors, \.npy"):
        load_latents(tmp_path / "file.png", SD1)
    with pytest.raises(ConfigError, match="unknown latent format 'sdx'; nearest: sdxl"):
        format_of("sdx")


def test_rows_by_kind() -> None:
    """Steps and live publish a frame a row; a clip, and a grid, the whole file at once."""
    latents = some_latents(3, 4, 6, 8)
    for kind in ("steps", "live"):
        rows = rows_of(latents, kind, is_batch=False)
        assert [(row.latents.shape, row.step, row.total_steps) for row in rows] == [
            ((4, 6, 8), step, 3) for step in range(3)
        ]
    for kind, is_batch in (("clip", False), ("steps", True)):
        (row,) = rows_of(latents, kind, is_batch=is_batch)  # type: ignore[arg-type]
        assert (row.latents.shape, row.step, row.total_steps) == ((3, 4, 6, 8), 0, 1)


def test_a_torn_log_gives_what_is_whole(tmp_path: Path) -> None:
    """Of a log that ends in the middle of a record all whole frames are read."""
    path = write_log(tmp_path, list(some_latents(3, 4, 6, 8)))
    path.write_bytes(path.read_bytes()[:-100])
    assert len(load_latents(path, SD1)) == 2
    rows = LogRows(path, SD1, "steps")
    assert rows.dtype == "float32"  # in which it is published again
    assert len(rows) == 2
    assert rows.damaged_bytes > 0
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match="no whole record is in it"):
        info_of_log(path)


def test_a_damaged_record_is_counted_and_no_others(tmp_path: Path) -> None:
    """Its bytes are named; of a whole log none are."""
    path = write_log(tmp_path, list(some_latents(3, 4, 6, 8)))
    assert LogRows(path, SD1, "steps").damaged_bytes == 0
    data = bytearray(path.read_bytes())
    data[-100] ^= 0xFF
    path.write_bytes(data)
    rows = LogRows(path, SD1, "steps")
    assert len(rows) == 2
    assert rows.damaged_bytes == pytest.approx(4 * 6 * 8 * 4, abs=300)


def test_a_run_of_several_files_is_one(tmp_path: Path) -> None:
    """The first stands for all of them; a later one names it, and a copy elsewhere stands alone."""
    latents = some_latents(5, 4, 6, 8)
    path = write_log(tmp_path, list(latents), segment_bytes=2000)
    later = sorted(tmp_path.iterdir())[1]
    assert [row.step for row in LogRows(path, SD1, "steps")] == [0, 2, 4, 6, 8]
    assert torch.equal(load_latents(path, SD1), latents)
    with pytest.raises(ConfigError, match=f"{later.name}: is a later part of {path.name}"):
        info_of_log(later)
    alone = later.rename(tmp_path / "alone.latents")
    assert [row.step for row in LogRows(alone, SD1, "steps")] == [6, 8]
