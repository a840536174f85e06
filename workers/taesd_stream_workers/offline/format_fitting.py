"""A linear projection from pairs of latents and pictures in a folder, measured on pairs that it was not fitted on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeAlias

import av
import torch
from torch import Tensor, nn

from taesd_stream.errors import ConfigError
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.linear import FactorProjection, FactorSquares, LeastSquares
from taesd_stream.user_formats import MAX_CHANNELS, MAX_FACTOR, to_metadata
from taesd_stream_workers.offline.latent_files import load_tensor
from taesd_stream_workers.offline.tensor_file import write_tensors

LATENTS: Final = (".safetensors", ".npy", ".pth", ".pt")
PICTURES: Final = (".png", ".jpg", ".jpeg")
HELD_OUT: Final = 5  # one pair of so many is only measured
MAX_WEIGHTS: Final = 1 << 26  # of a 3x3 projection; 256 MiB in float32 is more than a preview is worth
_LEAST_GAIN_DB: Final = 1.0

Track: TypeAlias = Callable[[Iterable["Pair"], str], Iterable["Pair"]]


@dataclass(frozen=True, slots=True)
class Pair:
    """Latents and the picture that they stand for, two files of one stem."""

    latents: Path
    picture: Path

    def read(self) -> tuple[Tensor, Tensor]:
        """(1, C, h, w) float32 latents and the (1, 3, H, W) picture in [0, 1]. Raises: ConfigError."""
        return self.read_latents().unsqueeze(0), read_picture(self.picture).unsqueeze(0)

    def read_latents(self) -> Tensor:
        """(C, h, w) float32, finite. Raises: ConfigError."""
        latents = load_tensor(self.latents)
        if latents.ndim == 4 and len(latents) == 1:
            latents = latents[0]
        if latents.ndim != 3 or not latents.numel():
            raise ConfigError(f"{self.latents}: expected latents (C, h, w), got shape {tuple(latents.shape)}")
        if not latents.isfinite().all():
            raise ConfigError(f"{self.latents}: holds NaN or infinity")
        return latents.float()


@dataclass(slots=True)
class Quality:
    """Squared errors of a decoder's pixels, added up over pairs."""

    squares: float = 0.0
    pixels: int = 0

    def add(self, shown: Tensor, picture: Tensor) -> None:
        """Both (1, 3, H, W)."""
        self.squares += float((shown.clamp(0, 1) - picture).square().double().sum())
        self.pixels += picture.numel()

    @property
    def psnr_db(self) -> float:
        """Over all pixels at once."""
        return -10 * torch.log10(torch.tensor(max(self.squares / self.pixels, 1e-10))).item()


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted format. psnr_db: on the held-out pairs, by decoder; "flat" is one colour for all, the least one can do.

    projection: all pixels of a cell, where that was better than one colour a cell, else None.
    """

    format: LatentFormat
    projection: nn.Module | None
    pairs: int
    held_out: int
    psnr_db: dict[str, float] = field(default_factory=dict)

    @property
    def explains(self) -> bool:
        """Whether the latents tell anything of the pictures; True where nothing was measured."""
        best = max((value for name, value in self.psnr_db.items() if name != "flat"), default=float("inf"))
        return best >= self.psnr_db.get("flat", 0.0) + _LEAST_GAIN_DB

    def save(self, path: Path) -> None:
        """Write the format file. Raises: ConfigError when it cannot be written."""
        notes = {"pairs": self.pairs, "held_out": self.held_out, "psnr_db": self.psnr_db}
        state = {} if self.projection is None else self.projection.state_dict()
        tensors = {key: value.half().contiguous() for key, value in state.items()}
        write_tensors(path, tensors, to_metadata(self.format, notes))


def find_pairs(folder: Path) -> list[Pair]:
    """The pairs in a folder, by name. Raises: ConfigError where there are none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder of latents and pictures, there is none")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    pictures = {path.stem: path for path in files if path.suffix.lower() in PICTURES}
    latents = [path for path in files if path.suffix.lower() in LATENTS]
    pairs = [Pair(path, pictures[path.stem]) for path in latents if path.stem in pictures]
    if not pairs:
        found = f"{len(latents)} files of latents and {len(pictures)} pictures"
        expected = f"expected NAME{'|'.join(LATENTS)} beside NAME{'|'.join(PICTURES)}"
        raise ConfigError(f"{folder}: {expected}, got {found} without a common name")
    return pairs


def read_picture(path: Path) -> Tensor:
    """(3, H, W) in [0, 1]. Raises: ConfigError for a file that is no picture."""
    return read_pixels(path).float() / 255


def read_pixels(path: Path) -> Tensor:
    """(3, H, W) uint8. Raises: ConfigError for a file that is no picture."""
    try:
        with av.open(path) as container:
            frame = next(container.decode(video=0))
            # A JPEG has its full range, and BT.601: the converter is told, for it guesses by the size.
            pixels = frame.to_ndarray(format="rgb24", src_colorspace="ITU601")
    except (av.FFmpegError, OSError, IndexError, StopIteration) as error:
        raise ConfigError(f"{path}: is no picture that can be read: {error or type(error).__name__}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def fit_format(name: str, pairs: Sequence[Pair], track: Track) -> Fit:
    """Fit on most of the pairs, measure on the others, then take those in too.

    track: passes pairs on and shows how far it is. Raises: ConfigError for pairs of different spaces.
    """
    held_out = list(pairs[HELD_OUT // 2 :: HELD_OUT]) or list(pairs[1:])  # of a handful the last is measured
    measured = set(held_out)
    fitting = _Fitting(name, pairs[0])
    for pair in track([pair for pair in pairs if pair not in measured], "fit"):
        fitting.add(pair)
    psnr_db = fitting.measure(track(held_out, "measure")) if held_out else {}
    for pair in track(held_out, "fit the rest"):
        fitting.add(pair)
    is_better = psnr_db.get("projection", 0.0) > psnr_db.get("factors", 0.0)
    projection = fitting.projection() if is_better else None
    return Fit(fitting.solve(), projection, len(pairs), len(held_out), psnr_db)


class _Fitting:
    """Both kinds of projection at once, from pair to pair."""

    def __init__(self, name: str, first: Pair) -> None:
        latents, picture = first.read()
        self._name, self._channels = name, latents.shape[1]
        self._factor = _pixels_per_cell(latents, picture, first)
        if self._channels > MAX_CHANNELS:
            raise ConfigError(f"{first.latents}: expected at most {MAX_CHANNELS} channels, got {self._channels}")
        self._factors = FactorSquares(self._channels)
        weights = 27 * self._channels * self._factor**2
        is_whole = self._factor == int(self._factor) and weights <= MAX_WEIGHTS
        self._pixels = LeastSquares(self._channels, int(self._factor)) if is_whole else None
        self._sum, self._count = torch.zeros(3, dtype=torch.float64), 0

    def add(self, pair: Pair) -> None:
        latents, picture = self._read(pair)
        self._factors.add(latents, picture)
        if self._pixels is not None:
            self._pixels.add(latents, picture)
        self._sum += picture.double().sum((0, 2, 3))
        self._count += picture[0, 0].numel()

    def solve(self) -> LatentFormat:
        factors, bias = self._factors.solve()
        red, green, blue = (float(value) for value in bias)
        return LatentFormat(
            name=self._name,
            channels=self._channels,
            spatial_factor=self._factor,
            normalisation="scale_shift",
            rgb_factors=tuple((float(r), float(g), float(b)) for r, g, b in factors),
            rgb_bias=(red, green, blue),
        )

    def projection(self) -> nn.Module | None:
        """All pixels of a cell, where the pairs are enough for its unknowns."""
        return self._pixels.solve() if self._pixels is not None and self._pixels.is_determined else None

    @torch.inference_mode()
    def measure(self, pairs: Iterable[Pair]) -> dict[str, float]:
        flat = (self._sum / self._count).float().reshape(1, 3, 1, 1)
        decoders: dict[str, Callable[[Tensor], Tensor]] = {"factors": FactorProjection(self.solve())}
        projection = self.projection()
        if projection is not None:
            decoders["projection"] = projection
        qualities = {name: Quality() for name in ("flat", *decoders)}
        for pair in pairs:
            latents, picture = self._read(pair)
            qualities["flat"].add(flat.expand_as(picture), picture)
            for name, decoder in decoders.items():
                qualities[name].add(decoder(latents), picture)
        return {name: round(quality.psnr_db, 2) for name, quality in qualities.items()}

    def _read(self, pair: Pair) -> tuple[Tensor, Tensor]:
        latents, picture = pair.read()
        if latents.shape[1] != self._channels:
            raise ConfigError(f"{pair.latents}: expected {self._channels} channels, got {latents.shape[1]}")
        size = tuple(picture.shape[-2:])
        expected = tuple(round(cells * self._factor) for cells in latents.shape[-2:])
        if size != expected:
            cells = f"{latents.shape[-1]}x{latents.shape[-2]} cells of {self._factor:g} pixels"
            raise ConfigError(
                f"{pair.picture}: expected {expected[1]}x{expected[0]} pixels for {cells}, got {size[1]}x{size[0]}"
            )
        return latents, picture


def _pixels_per_cell(latents: Tensor, picture: Tensor, pair: Pair) -> float:
    """Pixels a cell, a whole number where it can be."""
    (height, width), (rows, columns) = picture.shape[-2:], latents.shape[-2:]
    factor = round(height / rows, 2)
    factor = int(factor) if factor == int(factor) else factor
    if not 1 <= factor <= MAX_FACTOR or abs(columns * factor - width) >= 1:
        sizes = f"{width}x{height} pixels for {columns}x{rows} cells"
        raise ConfigError(f"{pair.picture}: expected as many pixels a cell in width as in height, got {sizes}")
    return factor
