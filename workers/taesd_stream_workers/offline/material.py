"""What a nano decoder is distilled from: pictures and an encoder, or pairs; no more of them than memory can hold."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from taesd_stream.errors import ConfigError
from taesd_stream.latent_formats import TINY_DECODERS
from taesd_stream.models.checkpoints import load_state_dict
from taesd_stream.models.families import build_encoder
from taesd_stream.models.tiny import AutoencoderTiny
from taesd_stream.training.distillation import EncodedPictures, Source
from taesd_stream.training.pairs import PairedLatents
from taesd_stream.training.pictures import LARGEST_PX, PYRAMID, PicturePool, shrunk
from taesd_stream.user_formats import MAX_CHANNELS, MAX_FACTOR
from taesd_stream_workers.offline.format_fitting import Pair, find_pairs, read_pixels

PICTURES: Final = (".png", ".jpg", ".jpeg", ".webp")
SIZES: Final = {128: 0.08, 192: 0.12, 256: 0.35, 384: 0.2, 512: 0.17, 768: 0.08}
HELD_OUT: Final = 10  # one picture of so many is only measured
_MEASURED_PX: Final = 512  # of a held-out picture, its middle
_LEAST_PX: Final = 16  # of a pair's picture: sharpness and SSIM look through windows of 8 and 11 pixels
_SHARE: Final = 0.5  # of the memory, for what is read; the rest is for training, and for others
_CGROUP_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNKNOWN_BYTES: Final = 8 << 30  # of a machine that does not say how much memory it has


@dataclass(frozen=True, slots=True)
class Material:
    """What a decoder is trained on, and the pairs that it is measured on: (1, C, h, w), and (1, 3, H, W) uint8.

    facts: what a checkpoint must have been made of too, in the command's words. notes: lines for who gave the files.
    """

    name: str
    source: Source
    held_out: list[tuple[Tensor, Tensor]]
    count: int
    facts: dict[str, str]
    notes: list[str]


def from_pictures(
    name: str,
    folder: Path,
    family: str,
    weights: Path,
    device: torch.device,
    *,
    pixels: int,
    smallest: int,
    budget_bytes: int | None = None,
) -> Material:
    """Pictures of a folder and an encoder of a known family: its own file, one of both parts, or a model's folder.

    pixels: of one batch. smallest: side of the smallest crop; smaller pictures are left out. budget_bytes: most that
    the pictures may take, else half of the device's memory; what does not fit is left out. Raises: ConfigError.
    """
    paths = sorted(path for path in _folder(folder).rglob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise ConfigError(f"{folder}: expected pictures ({', '.join(PICTURES)}), there are none")
    random.Random(0).shuffle(paths)  # noqa: S311 names sort by kind; a tenth of each kind is to be measured
    encoder, mark = _encoder(family, weights)
    encoder = encoder.float().to(device).eval().requires_grad_(False)
    channels, factor = _space(encoder, device)
    _check_smallest(smallest, factor)
    read = _ReadPictures(smallest, factor, device, _budget(device) if budget_bytes is None else budget_bytes)
    read.read(paths)
    if not read.kept:
        expected = f"pictures of at least {smallest} pixels on the short side (--smallest)"
        raise ConfigError(f"{folder}: expected {expected}, got none among {len(paths)}")
    largest = max(min(picture.shape[-2:]) for picture in read.kept)
    sides = [side for side in SIZES if smallest <= side <= largest and side % factor == 0]
    sizes = {smallest: SIZES[min(SIZES)]} | {side: SIZES[side] for side in sides}
    pool = PicturePool(read.kept, device=device, smallest=smallest)
    source = EncodedPictures(
        pool, encoder, latent_channels=channels, spatial_factor=factor, device=device, pixels=pixels, sizes=sizes
    )
    with torch.inference_mode():
        pairs = [(encoder(picture.to(device).float() / 255).cpu(), picture) for picture in read.held_out]
    facts = _facts(f"by encoder {mark}", pixels, len(pool), family=family, smallest=str(smallest))
    return Material(name, source, pairs, len(pool), facts, read.notes)


def from_pairs(
    name: str, folder: Path, device: torch.device, *, pixels: int, budget_bytes: int | None = None
) -> Material:
    """Pairs of latents and pictures as `taesd-stream fit` takes them; pixels, budget_bytes: as of `from_pictures`.

    Raises: ConfigError.
    """
    found = find_pairs(folder)
    if len(found) < 2:
        raise ConfigError(f"{folder}: expected two pairs at least, one to measure on")
    random.Random(0).shuffle(found)  # noqa: S311 as of pictures
    read = _ReadPairs(_budget(torch.device("cpu")) if budget_bytes is None else budget_bytes)
    read.read(found)
    source = PairedLatents(read.kept, spatial_factor=read.factor, device=device, pixels=pixels)
    held_out = [(latents[None], picture[None]) for latents, picture in read.held_out]
    facts = _facts(f"of pairs {_mark(latents for latents, _ in read.kept)}", pixels, len(read.kept))
    return Material(name, source, held_out, len(read.kept), facts, read.notes)


@dataclass(slots=True)
class _ReadPictures:
    """Pictures, one after another: none is held larger than it is used.

    kept: (3, H, W) uint8, on `device`. held_out: (1, 3, H, W) uint8.
    """

    smallest: int
    factor: int
    device: torch.device
    budget_bytes: int
    kept: list[Tensor] = field(default_factory=list)
    held_out: list[Tensor] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, paths: list[Path]) -> None:
        nbytes = small = 0
        for path in paths:
            pixels = read_pixels(path)
            if min(pixels.shape[-2:]) < self.smallest:
                small += 1
                continue
            picture = shrunk(pixels.to(self.device))
            nbytes += round(picture.nbytes * PYRAMID)
            place = len(self.kept) + len(self.held_out)
            if _is_full(place, nbytes, self.budget_bytes):
                self.notes.append(_full_note(place, len(paths), "pictures", self.budget_bytes))
                break
            if _is_held_out(place):
                self.held_out.append(_middle(pixels, self.factor))
            else:
                self.kept.append(picture)
        if small:
            limit = f"{self.smallest} pixels on the short side (--smallest)"
            self.notes.append(f"{small} of {len(paths)} pictures are left out: smaller than {limit}")


@dataclass(slots=True)
class _ReadPairs:
    """Pairs of one kind, one after another: latents (C, h, w) float32 and pictures (3, H, W) uint8."""

    budget_bytes: int
    channels: int = 0  # of the first one, which the others must be like
    factor: int = 0
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    held_out: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, pairs: list[Pair]) -> None:
        nbytes = 0
        for place, pair in enumerate(pairs):
            latents, picture = pair.read_latents(), read_pixels(pair.picture)
            self._check(pair, latents, picture, is_first=place == 0)
            nbytes += latents.nbytes + picture.nbytes
            if _is_full(place, nbytes, self.budget_bytes):
                self.notes.append(_full_note(place, len(pairs), "pairs", self.budget_bytes))
                break
            (self.held_out if _is_held_out(place) else self.kept).append((latents, picture))

    def _check(self, pair: Pair, latents: Tensor, picture: Tensor, *, is_first: bool) -> None:
        """Raises: ConfigError for a pair that is not as the first one, or that nothing can be learned from."""
        channels, rows, columns = latents.shape
        height, width = picture.shape[-2:]
        if is_first:
            self.channels, self.factor = channels, max(1, width // columns)
        if channels != self.channels or channels > MAX_CHANNELS or self.factor > MAX_FACTOR:
            limits = f"at most {MAX_CHANNELS} channels and {MAX_FACTOR} pixels a cell"
            expected = limits if is_first else f"{self.channels} channels as the others have"
            raise ConfigError(f"{pair.latents}: expected {expected}, got {channels}, {self.factor} pixels a cell")
        if (height, width) != (rows * self.factor, columns * self.factor):
            expected = f"{columns * self.factor}x{rows * self.factor} pixels"
            cells = f"{columns}x{rows} cells of {self.factor} (a whole number, the same of all)"
            raise ConfigError(f"{pair.picture}: expected {expected} for {cells}, got {width}x{height}")
        if min(height, width) < _LEAST_PX:
            raise ConfigError(
                f"{pair.picture}: expected {_LEAST_PX} pixels a side at least, got {width}x{height}; leave the pair out"
            )


def _is_held_out(place: int) -> bool:
    """The second of ten: of one alone none is."""
    return place % HELD_OUT == 1


def _is_full(place: int, nbytes: int, budget_bytes: int) -> bool:
    """Whether one more is too much; one to train on and one to measure there always are."""
    return place >= 2 and nbytes > budget_bytes


def _full_note(taken: int, count: int, what: str, budget_bytes: int) -> str:
    return f"{taken} of {count} {what} are used: more do not fit into {budget_bytes / 1e9:.3g} GB, half of the memory"


def _facts(latents: str, pixels: int, count: int, *, family: str = "", smallest: str = "") -> dict[str, str]:
    """One set of words for every kind of material, so that a checkpoint of another kind differs in values."""
    return {
        "latents": latents,
        "--family": family or "none",
        "--smallest": smallest or "none",
        "--batch-px": str(pixels),
        "pictures": str(count),
    }


def _budget(device: torch.device) -> int:
    """Bytes that pictures may take: by all memory, not by what is free, so that a resumed training has as many."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory * _SHARE)
    if os.name != "posix":
        return int(_UNKNOWN_BYTES * _SHARE)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        limits += [int(text)] if text.isdecimal() else []
    return int(min(limits) * _SHARE)


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of pictures, there is none")
    return folder


def _check_smallest(smallest: int, factor: int) -> None:
    """Raises: ConfigError for crops that are no whole cells, or larger than any picture is kept."""
    if smallest % factor:
        near = f"{smallest // factor * factor or factor} or {(smallest // factor + 1) * factor}"
        raise ConfigError(
            f"--smallest {smallest}: expected a multiple of {factor}, this encoder's pixels a cell, as {near}"
        )
    if smallest > LARGEST_PX:
        raise ConfigError(f"--smallest {smallest}: expected at most {LARGEST_PX}, for pictures are scaled down to it")


def _encoder(family: str, weights: Path) -> tuple[nn.Module, str]:
    """Pictures (N, 3, H, W) in [0, 1] -> latents, and the mark of its weights. Raises: ConfigError."""
    if weights.is_dir():
        return _saved_encoder(weights)
    families = [name for name, known in TINY_DECODERS.items() if known.kind == "image"]
    if family not in families:
        fault = f"{family!r} encodes videos, not pictures" if family in TINY_DECODERS else f"no family {family!r}"
        raise ConfigError(f"--family: {fault}; there are: {', '.join(families)}")
    network = build_encoder(family, load_state_dict(weights, "encoder"))
    mark = _mark(network.state_dict().values())
    return (_Opaque(network) if TINY_DECODERS[family].image_channels == 4 else network), mark


def _saved_encoder(folder: Path) -> tuple[nn.Module, str]:
    try:
        model = AutoencoderTiny.from_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--encoder {folder}: its config is no AutoencoderTiny's: {error}") from error
    if model.config.in_channels != 3:
        raise ConfigError(f"--encoder {folder}: expected one of 3 channels (RGB), got {model.config.in_channels}")
    assert model.encoder is not None  # a saved model has both parts
    return _OfModel(model), _mark(model.encoder.state_dict().values(), repr(sorted(model.config.items())))


class _OfModel(nn.Module):
    """A model's encoder: pictures in [0, 1] -> z as a sampler holds it."""

    def __init__(self, model: AutoencoderTiny) -> None:
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w)."""
        latents: Tensor = self.model.encode(pictures * 2 - 1).latents
        return (latents - self.model.shift_factor) * self.model.scaling_factor


class _Opaque(nn.Module):
    """An encoder of RGBA, told that nothing shines through."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w)."""
        latents: Tensor = self.encoder(torch.cat([pictures, torch.ones_like(pictures[:, :1])], dim=1))
        return latents


def _mark(tensors: Iterable[Tensor], words: str = "") -> str:
    """What tells these values from others."""
    digest = hashlib.sha256(words.encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().float().cpu().flatten().numpy().data)
    return digest.hexdigest()[:12]


@torch.inference_mode()
def _space(encoder: nn.Module, device: torch.device) -> tuple[int, int]:
    """Channels, and pixels a cell."""
    side = 256
    latents = encoder(torch.zeros(1, 3, side, side, device=device))
    return latents.shape[1], side // latents.shape[-1]


def _middle(picture: Tensor, factor: int) -> Tensor:
    """(1, 3, H, W): the middle of a picture, whole cells of it; a copy, for a view would keep the whole picture."""
    height, width = (min(length, _MEASURED_PX) // factor * factor for length in picture.shape[-2:])
    top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
    return picture[None, :, top : top + height, left : left + width].clone()
