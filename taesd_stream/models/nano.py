"""Our own small decoder: a thirtieth of a tiny decoder's arithmetic, small enough to come with the package.

Most of it works at coarse resolutions, in blocks of a 5x5 depthwise and two 1x1 convolutions (after ConvNeXt, Liu et
al. 2022); the picture appears at the end, by pixel shuffle. What a latent means depends on its whole picture, for the
encoders normalise over all of it: so the network is told the statistics of the whole latent, also where it sees a tile.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import cycle, pairwise
from typing import Final

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import LatentFormat
from taesd_stream.models.networks import Clamp
from taesd_stream.models.strict_loading import StateDict, load_strictly, without_weights

_KERNEL: Final = 5
_LINEAR_PX: Final = 8  # pixels on a side that the linear path makes of a latent cell, at most; it is stretched beyond
_FILM_WIDTH: Final = 48
_POOLED: Final = 64
# Blocks with gates amplify what they were never trained on (latents that are mostly noise) until the picture is lost
# and half precision full. Noise shows in how much neighbouring cells differ, as a deviation: 0.3 to 0.84 in Sana's
# photographs, 1.05 and more with noise of 1 on them. Beyond this limit a latent is drawn to its mean until as calm.
_CALM: Final = 0.78
_OUTLIER: Final = 10.0  # of latents: a few cells beyond any picture's are no noise
# Of a block's values. Pictures and their noisy estimates stay below 14, so a limit here changes none of them.
_LARGEST: Final = 16.0
# What files of one or two stages called their tensors, and what they are called now.
_OLD_NAMES: Final = (
    (r"^blocks\.(\d+)\.spatial\.", r"stages.0.spatial.\1."),
    (r"^blocks\.", "stages.0.mixes."),
    (r"^fine_blocks\.(\d+)\.spatial\.", r"stages.1.spatial.\1."),
    (r"^fine_blocks\.", "stages.1.mixes."),
    (r"^split\.", "splits.0."),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoStage:
    """A part of the network that works at one resolution.

    cell_px: pixels on a side that one of its cells becomes. width: channels. blocks: how many have 1x1 convolutions of
    their own. passes: how often they are gone through, each time with other 5x5 ones: arithmetic without more weights.
    """

    cell_px: int
    width: int
    blocks: int
    passes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NanoLayout:
    """What tells one nano decoder from another.

    stages: from latent resolution to the one whose cells the last layer paints, each stage's cells a fraction of those
    before. gates: whether blocks bend their channels by gates (Dauphin et al. 2017) in place of ReLU.
    Raises: ValueError for no stages, a factor that is neither at most 8 nor a multiple of it, or no such fraction.
    """

    latent_channels: int
    stages: tuple[NanoStage, ...]
    gates: bool = False

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages: expected one at least, got none")
        if self.spatial_factor % self.linear_px:
            expected = f"at most {_LINEAR_PX} pixels a cell, or a multiple of it"
            raise ValueError(f"spatial_factor: expected {expected}, got {self.spatial_factor}")
        for coarse, fine in pairwise(self.stages):
            if coarse.cell_px == fine.cell_px or coarse.cell_px % fine.cell_px:
                raise ValueError(f"cell_px: expected a fraction of {coarse.cell_px}, got {fine.cell_px}")

    @property
    def spatial_factor(self) -> int:
        """Pixels on a side that a latent cell becomes."""
        return self.stages[0].cell_px

    @property
    def linear_px(self) -> int:
        """Pixels on a side that the linear path makes of a latent cell."""
        return min(self.spatial_factor, _LINEAR_PX)

    @property
    def stretch(self) -> int:
        """Pixels of the picture on a side that a pixel of the linear path becomes."""
        return self.spatial_factor // self.linear_px

    @property
    def splits(self) -> list[int]:
        """Cells on a side that a cell of each stage becomes in the next one."""
        return [coarse.cell_px // fine.cell_px for coarse, fine in pairwise(self.stages)]

    @property
    def halo(self) -> int:
        """Latent cells around a tile that its pixels depend on."""
        reach_px = self.spatial_factor + self.stages[-1].cell_px  # of the first and the last layer
        reach_px += sum(stage.blocks * stage.passes * (_KERNEL // 2) * stage.cell_px for stage in self.stages)
        return -(-reach_px // self.spatial_factor)


def default_layout(latent_channels: int, spatial_factor: int) -> NanoLayout:
    """The layout for a latent space: under a thirtieth of a tiny decoder's arithmetic, and for 32 channels of at most
    32 pixels a cell under 1 MB in half precision.
    """
    if spatial_factor <= _LINEAR_PX:
        stages = [NanoStage(cell_px=spatial_factor, width=96, blocks=7)]
        return NanoLayout(latent_channels=latent_channels, stages=tuple(stages))
    stages = [NanoStage(cell_px=spatial_factor, width=128, blocks=2, passes=3)]
    for cell_px, width, passes in ((16, 96, 2), (8, 64, 2), (4, 32, 1)):
        if cell_px < spatial_factor and spatial_factor % cell_px == 0:
            stages.append(NanoStage(cell_px=cell_px, width=width, blocks=4, passes=passes))
    return NanoLayout(latent_channels=latent_channels, stages=tuple(stages), gates=True)


class _Mix(nn.Module):
    """What channels say: a 1x1 convolution widens them, gates or ReLU bend them, another 1x1 narrows them."""

    def __init__(self, width: int, *, gates: bool) -> None:
        super().__init__()
        self.gates = gates
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.narrow = nn.Conv2d(width if gates else 2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) -> the same shape."""
        wide = self.widen(x)
        narrowed: Tensor = self.narrow(F.glu(wide, dim=1) if self.gates else F.relu_(wide))
        return narrowed


class _Stage(nn.Module):
    """Blocks: what neighbours say by a depthwise convolution, then what channels say, beside an identity."""

    def __init__(self, stage: NanoStage, *, gates: bool) -> None:
        super().__init__()
        self.gates = gates
        width = stage.width
        self.spatial = nn.ModuleList(
            nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
            for _ in range(stage.blocks * stage.passes)
        )
        self.mixes = nn.ModuleList(_Mix(width, gates=gates) for _ in range(stage.blocks))

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, h, w) -> the same shape."""
        for spatial, mix in zip(self.spatial, cycle(self.mixes), strict=False):
            x = mix(spatial(x)).add_(x)
            if self.gates:
                x = F.hardtanh_(x, -_LARGEST, _LARGEST)
        return x


class NanoDecoder(nn.Module):
    """(N, C, h, w) latents as the scheduler holds them -> (N, 3, H, W), in [0, 1] but not clamped."""

    def __init__(self, layout: NanoLayout) -> None:
        super().__init__()
        self.layout = layout
        channels, first, last = layout.latent_channels, layout.stages[0], layout.stages[-1]
        self.clamp = Clamp()
        self.stem = nn.Conv2d(channels, first.width, 3, padding=1)
        self.pooled = nn.Conv2d(channels, _POOLED, 1)
        self.film_in = nn.Linear(2 * channels + _POOLED, _FILM_WIDTH)
        self.film_out = nn.Linear(_FILM_WIDTH, 2 * first.width)
        self.stages = nn.ModuleList(_Stage(stage, gates=layout.gates) for stage in layout.stages)
        self.splits = nn.ModuleList(
            nn.Conv2d(coarse.width, fine.width * split**2, 1)
            for (coarse, fine), split in zip(pairwise(layout.stages), layout.splits, strict=True)
        )
        self.head = nn.Conv2d(last.width, 3 * last.cell_px**2, 3, padding=1)
        self.linear = nn.Conv2d(channels, 3 * layout.linear_px**2, 1)  # the picture as far as a linear map can tell
        nn.init.zeros_(self.film_out.weight)  # no gain and no bias from the statistics at first
        nn.init.zeros_(self.film_out.bias)

    def statistics(self, latents: Tensor) -> Tensor:
        """What the network wants to know of whole latents (N, C, h, w): (N, K), one row a picture."""
        calm = _calm(latents) if self.layout.gates else latents.new_empty(len(latents), 0)
        latents = self.limited(latents, calm)
        deviation, mean = torch.std_mean(latents.float(), dim=(2, 3), correction=0)
        pooled = F.relu(self.pooled(latents)).float().mean(dim=(2, 3))
        return torch.cat([mean, deviation, pooled, calm], dim=1).to(latents.dtype)

    def limited(self, latents: Tensor, statistics: Tensor) -> Tensor:
        """Latents (N, C, h, w) as the layers take them, of the whole latents' statistics (N, K): the same shape."""
        if self.layout.gates:
            mean, share = statistics[:, -latents.shape[1] - 1 :, None, None].tensor_split((-1,), dim=1)
            latents = mean.lerp(latents.clamp(-_OUTLIER, _OUTLIER), share)
        limited: Tensor = self.clamp(latents)
        return limited

    def forward(self, latents: Tensor, statistics: Tensor | None = None) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W).

        statistics: (N, K), what `statistics` says of the pictures that the latents are tiles of; None for whole ones.
        """
        if statistics is None:
            statistics = self.statistics(latents)
        latents = self.limited(latents, statistics)
        told = statistics[:, : self.film_in.in_features]
        gain, bias = self.film_out(F.relu(self.film_in(told)))[:, :, None, None].chunk(2, dim=1)
        x = self.stages[0](self.stem(latents) * (1 + gain) + bias)
        for fold, split, stage in zip(self.splits, self.layout.splits, self.stages[1:], strict=True):
            x = stage(F.pixel_shuffle(fold(x), split))
        details = F.pixel_shuffle(self.head(F.relu(x)), self.layout.stages[-1].cell_px)
        base = F.pixel_shuffle(self.linear(latents), self.layout.linear_px)
        if self.layout.stretch > 1:
            base = F.interpolate(base, scale_factor=self.layout.stretch, mode="bilinear", align_corners=False)
        return base + details


def _calm(latents: Tensor) -> Tensor:
    """What calms whole latents (N, C, h, w), (N, C + 1): their mean, and the share of the way from it that is kept."""
    values = latents.float().clamp(-_OUTLIER, _OUTLIER)
    apart = (values - values.roll(1, dims=3)).square().mean(dim=(1, 2, 3)).div(2).sqrt()
    share = (_CALM / apart).clamp(max=1)
    return torch.cat([values.mean(dim=(2, 3)), share[:, None]], dim=1).to(latents.dtype)


def with_current_names(state: StateDict) -> dict[str, Tensor]:
    """A decoder's weights by the names that its network gives them, whenever the file was made."""

    def renamed(key: str) -> str:
        for old, new in _OLD_NAMES:
            key = re.sub(old, new, key)
        return key

    return {renamed(key): value for key, value in state.items()}


def layout_of(state: StateDict) -> NanoLayout:
    """The layout of a decoder by its weights, of current names. Raises: WeightsError if they are none."""
    try:
        widths = [
            state[f"stages.{index}.spatial.0.weight"].shape[0]
            for index in range(1 + _count(state, r"splits\.\d+\.weight"))
        ]
        cells_px = [round((state["head.weight"].shape[0] / 3) ** 0.5)]
        for index, width in reversed(list(enumerate(widths[1:]))):
            split = round((state[f"splits.{index}.weight"].shape[0] / width) ** 0.5)
            cells_px.insert(0, cells_px[0] * split)
        stages = []
        for index, (cell_px, width) in enumerate(zip(cells_px, widths, strict=True)):
            blocks = _count(state, rf"stages\.{index}\.mixes\.\d+\.widen\.weight")
            passes = _count(state, rf"stages\.{index}\.spatial\.\d+\.weight") // blocks
            stages.append(NanoStage(cell_px=cell_px, width=width, blocks=blocks, passes=passes))
        return NanoLayout(
            latent_channels=state["stem.weight"].shape[1],
            stages=tuple(stages),
            gates=state["stages.0.mixes.0.narrow.weight"].shape[1] == widths[0],
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise WeightsError(f"these weights are no nano decoder: {error}") from error


def is_nano(state: StateDict) -> bool:
    """Whether weights look like a nano decoder's."""
    return "film_in.weight" in state


def _count(state: StateDict, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in state)


def nano_from_weights(state: StateDict, name: str) -> NanoDecoder:
    """The decoder that weights are of. Raises: WeightsError if they are none."""
    state = with_current_names(state)
    layout = layout_of(state)
    network = without_weights(lambda: NanoDecoder(layout))
    load_strictly(network, state, name=name)
    return network.eval()


def has_nano_decoder(latent_format: LatentFormat) -> bool:
    """Whether the package has a nano decoder of that format."""
    return _packaged(latent_format).is_file()


def nano_decoder(latent_format: LatentFormat) -> NanoDecoder:
    """The nano decoder that comes with the package. Raises: WeightsError if there is none for the format."""
    file = _packaged(latent_format)
    if not file.is_file():
        raise WeightsError(
            f"the package has no nano decoder for {latent_format.name}; `taesd-stream distill` makes one"
        )
    return nano_from_weights(load(file.read_bytes()), f"nano {latent_format.name}")


def _packaged(latent_format: LatentFormat) -> Traversable:
    return resources.files("taesd_stream") / "data" / f"nano_{latent_format.name}.safetensors"
