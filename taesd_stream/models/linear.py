"""Latents to pictures by one linear map: no weights to fetch, and cheap enough for any processor.

Two forms: three factors a channel, stretched to size; and a 3x3 convolution that paints each cell's pixels itself,
fitted by least squares on pairs of latents and pictures.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Final

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import LatentFormat

# In a file of factors, where every pixel of a cell would take megabytes (Sana: 1024 pixels a cell).
_FACTORS: Final = "rgb_factors"
_BIAS: Final = "rgb_bias"


class FactorProjection(nn.Module):
    """One colour a cell, by rgb factors, stretched: (N, C, h, w) -> (N, 3, H, W) in [0, 1]; smooth, soft."""

    def __init__(self, latent_format: LatentFormat) -> None:
        super().__init__()
        if latent_format.rgb_factors is None:
            raise WeightsError(f"no rgb factors are known for {latent_format.name}")
        self.format = latent_format
        factors = torch.tensor(latent_format.rgb_factors).T  # (3, C)
        bias = torch.tensor(latent_format.rgb_bias or (0.0, 0.0, 0.0))
        # The published factors give [-1, 1]; halved and shifted here once, they give [0, 1].
        self.weight = nn.Parameter(factors[:, :, None, None] / 2)
        self.bias = nn.Parameter((bias + 1) / 2)

    def forward(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W)."""
        size = self.format.picture_size(*latents.shape[-2:])
        return F.interpolate(self.cells(latents), size=size, mode="bilinear", align_corners=False)

    def cells(self, latents: Tensor) -> Tensor:
        """The colour of each cell, (N, C, h, w) -> (N, 3, h, w) in [0, 1]."""
        return F.conv2d(latents, self.weight, self.bias).clamp(0, 1)


class ShuffleProjection(nn.Module):
    """All pixels of a cell from it and its 8 neighbours: (N, C, h, w) -> (N, 3, H, W), in [0, 1] but not clamped."""

    def __init__(self, latent_channels: int, spatial_factor: int) -> None:
        super().__init__()
        self.spatial_factor = spatial_factor
        self.weight = nn.Parameter(torch.zeros(3 * spatial_factor**2, latent_channels, 3, 3))
        self.bias = nn.Parameter(torch.full((3 * spatial_factor**2,), 0.5))

    def forward(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W)."""
        # Repeated edges: zeros would be a colour of their own, and frame the picture.
        bordered = F.pad(latents, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(bordered, self.weight, self.bias), self.spatial_factor)


class _NormalEquations:
    """Least squares with a bias. Holds the normal equations only, in float64: the pairs may be more than memory holds.

    rows: how many cells went in.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        self.rows = 0
        self._gram = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self._moments = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows of (n, inputs) and (n, outputs)."""
        with_bias = torch.cat([inputs.double(), torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
        self._gram += with_bias.T @ with_bias
        self._moments += with_bias.T @ outputs.double()
        self.rows += len(inputs)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(inputs, outputs) weights and (outputs,) bias; `ridge`, relative, keeps rare directions small."""
        scale = self._gram.diagonal().mean()
        if scale == 0:
            raise ValueError("no pairs to fit a projection to")
        damped = self._gram + ridge * scale * torch.eye(len(self._gram), dtype=torch.float64)
        solution = torch.linalg.solve(damped, self._moments).float()
        return solution[:-1], solution[-1]


class LeastSquares:
    """Collects pairs of latents and pictures, and solves for the ShuffleProjection that explains them best."""

    def __init__(self, latent_channels: int, spatial_factor: int) -> None:
        self._channels, self._factor = latent_channels, spatial_factor
        self._equations = _NormalEquations(9 * latent_channels, 3 * spatial_factor**2)

    @property
    def is_determined(self) -> bool:
        """Whether there are more cells than each pixel has unknowns."""
        return self._equations.rows > 9 * self._channels + 1

    def add(self, latents: Tensor, pictures: Tensor) -> None:
        """Add pairs: latents (N, C, h, w), pictures (N, 3, h*factor, w*factor) in [0, 1].

        Raises: ValueError for shapes that do not belong together.
        """
        count, channels, height, width = latents.shape
        expected = (count, 3, height * self._factor, width * self._factor)
        _check_channels(self._channels, channels)
        if tuple(pictures.shape) != expected:
            raise ValueError(f"pictures: expected shape {expected}, got {tuple(pictures.shape)}")
        bordered = F.pad(latents.float(), (1, 1, 1, 1), mode="replicate")
        windows = F.unfold(bordered, 3).transpose(1, 2).reshape(-1, 9 * channels)
        outputs = F.pixel_unshuffle(pictures, self._factor).flatten(2).transpose(1, 2).flatten(0, 1)
        self._equations.add(windows, outputs)

    def solve(self, ridge: float = 1e-6) -> ShuffleProjection:
        """The projection with the least squared error; `ridge`, relative, keeps rare directions small."""
        weight, bias = self._equations.solve(ridge)
        network = ShuffleProjection(self._channels, self._factor)
        with torch.no_grad():
            network.weight.copy_(weight.T.reshape(network.weight.shape))
            network.bias.copy_(bias)
        return network


class FactorSquares:
    """Collects pairs of latents and pictures, and solves for the rgb factors that explain each cell's mean colour best.

    One colour a cell has few unknowns: it needs few pairs, and sizes whose ratio is no whole number.
    """

    def __init__(self, latent_channels: int) -> None:
        self._channels = latent_channels
        self._equations = _NormalEquations(latent_channels, 3)

    def add(self, latents: Tensor, pictures: Tensor) -> None:
        """Add pairs: latents (N, C, h, w), pictures (N, 3, H, W) in [0, 1], of which each cell takes its box's mean.

        Raises: ValueError for shapes that do not belong together.
        """
        _check_channels(self._channels, latents.shape[1])
        if len(pictures) != len(latents) or pictures.shape[1] != 3:
            raise ValueError(f"pictures: expected ({len(latents)}, 3, H, W), got {tuple(pictures.shape)}")
        boxes = F.interpolate(pictures.float(), size=latents.shape[-2:], mode="area")
        rows, colours = (values.movedim(1, -1).flatten(0, -2) for values in (latents, boxes))
        self._equations.add(rows, 2 * colours - 1)

    def solve(self, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """(C, 3) factors and (3,) bias: rgb = z @ factors + bias in [-1, 1], as ComfyUI's tables have them."""
        return self._equations.solve(ridge)


def _check_channels(expected: int, given: int) -> None:
    if given != expected:
        raise ValueError(f"latents: expected {expected} channels, got {given}")


def fit(latents: Tensor, pictures: Tensor) -> ShuffleProjection:
    """The 3x3 projection that maps `latents` (N, C, h, w) to `pictures` (N, 3, H, W) best, by least squares.

    pictures: [0, 1]; H is a whole multiple of h. Raises: ValueError for shapes that do not belong together.
    """
    equations = LeastSquares(latents.shape[1], pictures.shape[-2] // latents.shape[-2])
    equations.add(latents, pictures)
    return equations.solve()


def fit_factors(latents: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The rgb factors (C, 3) and bias (3,) that map `latents` (N, C, h, w) to the mean colours of their cells best.

    pictures: (N, 3, H, W) in [0, 1], any size. Raises: ValueError for shapes that do not belong together.
    """
    equations = FactorSquares(latents.shape[1])
    equations.add(latents, pictures)
    return equations.solve()


def has_linear_decoder(latent_format: LatentFormat) -> bool:
    """Whether a projection of that format is known."""
    return latent_format.rgb_factors is not None or _fitted_file(latent_format).is_file()


def linear_decoder(latent_format: LatentFormat) -> nn.Module:
    """The best projection known for the format: the fitted one that comes with this package, else the rgb factors.

    Raises: WeightsError if there is neither.
    """
    fitted = _fitted_file(latent_format)
    if not fitted.is_file():
        return FactorProjection(latent_format)
    state = load(fitted.read_bytes())
    if _FACTORS in state:
        rows = [tuple(row) for row in torch.cat([state[_FACTORS], state[_BIAS][None]]).tolist()]
        return FactorProjection(replace(latent_format, rgb_factors=tuple(rows[:-1]), rgb_bias=rows[-1]))
    network = ShuffleProjection(latent_format.channels, round(latent_format.spatial_factor))
    network.load_state_dict(state)
    return network


def _fitted_file(latent_format: LatentFormat) -> Traversable:
    return resources.files("taesd_stream") / "data" / f"linear_{latent_format.name}.safetensors"
