"""Train a nano decoder on latents and the pictures that they stand for, step by step, so that it can stop anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taesd_stream.models.nano import NanoDecoder, NanoLayout
from taesd_stream.training.pictures import PicturePool
from taesd_stream.training.quality import gradients

_EMA: Final = 0.999
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")
# The mean logarithm of each picture's squared error, near to mean dB: no hard picture outweighs many easy ones. Of the
# error alone it would never end (a plain picture's is almost nothing): hence the floor. At an error of 0.0027, 25.7 dB,
# it pulls as the squared error itself does, which is what `sharp` and `seen` are weighed against.
_LOG_SCALE: Final = 3e-3
_LOG_FLOOR: Final = 3e-4
_LINEAR_BATCHES: Final = 8  # that the linear path is fitted to before the first step
_SHARP_WINDOW: Final = 8


@dataclass(frozen=True, slots=True)
class Batch:
    """latents (N, C, h, w) that may be cut out of larger ones; pictures (N, 3, H, W) in [0, 1].

    whole: the whole latents, where `latents` are cut out of them; else None.
    """

    latents: Tensor
    pictures: Tensor
    whole: list[Tensor] | None = None


class Source(Protocol):
    """Where batches come from: the same step, the same batch."""

    latent_channels: int
    spatial_factor: int

    def batch(self, step: int) -> Batch:
        """The batch of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to train. steps: in all. rate: the highest learning rate. noisy, noise: share of pictures whose latents get
    noise, and its largest deviation. sharp_from: the share of the steps after which sharpness counts too, with the
    weight `sharp`; alike with it counts what the encoder sees in the result, with the weight `seen`.
    """

    steps: int
    rate: float = 2e-3
    warm_up: int = 200
    noisy: float = 0.25
    noise: float = 0.5
    sharp_from: float = 0.7
    sharp: float = 0.02
    seen: float = 0.0
    seed: int = 0


class EncodedPictures:
    """Batches of crops that an encoder turns into latents as they are needed: every batch is new.

    encoder: (N, 3, H, W) in [0, 1] -> (N, C, h, w), on `device`, frozen. pixels: of one batch, all its crops together.
    """

    def __init__(
        self,
        pool: PicturePool,
        encoder: nn.Module,
        *,
        latent_channels: int,
        spatial_factor: int,
        device: torch.device,
        pixels: int,
        sizes: Mapping[int, float],
        seed: int = 0,
    ) -> None:
        self.latent_channels, self.spatial_factor = latent_channels, spatial_factor
        self._pool, self.encoder, self._device = pool, encoder, device
        self._pixels, self._seed = pixels, seed
        self._sides = list(sizes)
        self._chances = torch.tensor([sizes[side] for side in self._sides])

    def batch(self, step: int) -> Batch:
        """The batch of a step: one size a batch, square or 3:4, and as many crops as fill it."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        side = self._sides[int(torch.multinomial(self._chances, 1, generator=generator))]
        other = round(side * 0.75 / self.spatial_factor) * self.spatial_factor
        shape = ((side, side), (side, other), (other, side))[int(torch.randint(3, (), generator=generator))]
        count = max(1, round(self._pixels / (shape[0] * shape[1])))
        pictures = self._pool.batch(count, shape, generator)
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
            latents = self.encoder(pictures.contiguous(memory_format=torch.channels_last))
        return Batch(latents.float().clone(), pictures)


class Distillation:
    """A training run: the decoder being trained, its running average, the optimiser, and how far it is.

    Raises: ValueError for a layout that does not belong to the source.
    """

    def __init__(self, source: Source, layout: NanoLayout, settings: Settings, device: torch.device) -> None:
        if (layout.latent_channels, layout.spatial_factor) != (source.latent_channels, source.spatial_factor):
            raise ValueError(f"layout: {layout} does not fit latents of {source.latent_channels} channels")
        self.source, self.settings, self._device = source, settings, device
        self.done = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            network = NanoDecoder(layout)
        self._network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._fit_linear()
        self._average = {key: value.detach().clone() for key, value in network.state_dict().items()}
        self._optimiser = torch.optim.AdamW(
            network.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=device.type == "cuda"
        )

    @property
    def is_over(self) -> bool:
        """Whether all steps are done."""
        return self.done >= self.settings.steps

    def step(self) -> Tensor:
        """One step of the optimiser. Returns: the squared error, a scalar on the device."""
        settings, step = self.settings, self.done
        batch = self.source.batch(step)
        latents = self._noisy(batch.latents, step)
        for group in self._optimiser.param_groups:
            group["lr"] = settings.rate * _schedule(step, settings)
        statistics = None if batch.whole is None else self._statistics(batch.whole)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            shown = self._network(latents.contiguous(memory_format=torch.channels_last), statistics)
        shown = shown.float()
        errors: Tensor = (shown - batch.pictures).square().mean(dim=(1, 2, 3))
        loss = _LOG_SCALE * (errors + _LOG_FLOOR).log().mean()
        if step >= settings.sharp_from * settings.steps:
            if settings.sharp:
                loss = loss + settings.sharp * _sharpness_error(shown, batch.pictures)
            if settings.seen and isinstance(self.source, EncodedPictures):
                with torch.autocast(self._device.type, enabled=self._device.type == "cuda"):
                    seen = self.source.encoder(shown)
                loss = loss + settings.seen * F.mse_loss(seen.float(), batch.latents)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._network.parameters(), 1.0)
        self._optimiser.step()
        self.done += 1
        self._follow()
        return errors.detach().mean()

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights so far, float16 on the CPU: what a decoder file holds."""
        return {key: value.half().cpu().contiguous() for key, value in self._average.items()}

    def checkpoint(self) -> dict[str, Tensor]:
        """All that `restore` needs, as named tensors on the CPU."""
        tensors = {f"network.{key}": value for key, value in self._network.state_dict().items()}
        tensors |= {f"average.{key}": value for key, value in self._average.items()}
        for index, state in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": state[name] for name in ("step", *_MOMENTS)}
        tensors["done"] = torch.tensor(self.done)
        return {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    def restore(self, checkpoint: Mapping[str, Tensor]) -> None:
        """Go on where a checkpoint of the same layout and settings was made. Raises: ValueError if it is of another."""
        ours = self._network.state_dict()
        for key, value in ours.items():
            given = checkpoint.get(f"network.{key}")
            if given is None or given.shape != value.shape:
                raise ValueError(f"the checkpoint is of another network: {key} does not fit")
        self._network.load_state_dict({key: checkpoint[f"network.{key}"] for key in ours})
        self._average = {key: checkpoint[f"average.{key}"].to(self._device) for key in ours}
        state = self._optimiser.state_dict()
        for index, _ in enumerate(self._network.parameters()):
            if f"optimiser.{index}.step" in checkpoint:
                state["state"][index] = {name: checkpoint[f"optimiser.{index}.{name}"] for name in ("step", *_MOMENTS)}
        self._optimiser.load_state_dict(state)
        self.done = int(checkpoint["done"])

    def _statistics(self, whole: Sequence[Tensor]) -> Tensor:
        return torch.cat([self._network.statistics(one) for one in whole])

    def _noisy(self, latents: Tensor, step: int) -> Tensor:
        """Noise in some of the latents: what a sampler estimates is not clean."""
        generator = torch.Generator(self._device).manual_seed(self.settings.seed * 1_000_003 + step)
        draw = torch.rand(2, len(latents), 1, 1, 1, device=self._device, generator=generator)
        noise = torch.randn(latents.shape, device=self._device, generator=generator)
        return latents + noise * (draw[0] < self.settings.noisy) * draw[1] * self.settings.noise

    @torch.no_grad()
    def _follow(self) -> None:
        """The running average, which forgets quicker at first."""
        keep = min(_EMA, (1 + self.done) / (10 + self.done))
        averages, values = list(self._average.values()), list(self._network.state_dict().values())
        torch._foreach_lerp_(averages, values, 1 - keep)

    @torch.no_grad()
    def _fit_linear(self) -> None:
        """The linear path by least squares, and nothing from the rest: training begins where linear ends."""
        network = self._network
        channels, side, stretch = network.layout.latent_channels, network.layout.linear_px, network.layout.stretch
        gram = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
        moments = torch.zeros(channels + 1, 3 * side**2, dtype=torch.float64)
        for step in range(_LINEAR_BATCHES):
            batch = self.source.batch(step)
            pictures = batch.pictures
            if stretch > 1:
                pictures = F.avg_pool2d(pictures, stretch)
            statistics = self._statistics(batch.whole or [batch.latents])
            inputs = network.limited(batch.latents, statistics).movedim(1, -1).flatten(0, 2).double()
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], dim=1)
            outputs = F.pixel_unshuffle(pictures, side).movedim(1, -1).flatten(0, 2).double()
            gram += (inputs.T @ inputs).cpu()
            moments += (inputs.T @ outputs).cpu()
        gram += 1e-5 * gram.diagonal().mean() * torch.eye(channels + 1, dtype=torch.float64)
        solution = torch.linalg.solve(gram, moments).float()
        network.linear.weight.copy_(solution[:-1].T[:, :, None, None])
        network.linear.bias.copy_(solution[-1])
        network.head.weight.mul_(0.1)
        nn.init.zeros_(network.head.bias)


def _schedule(step: int, settings: Settings) -> float:
    """The learning rate's share of its highest: up in a line, down in a cosine."""
    warm_up = min(settings.warm_up, max(1, settings.steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, settings.steps - warm_up))


def _sharpness_error(shown: Tensor, pictures: Tensor) -> Tensor:
    """How much the pixels differ from their neighbours, window by window, against how much they should."""
    return sum(
        (
            (F.avg_pool2d(a.abs(), _SHARP_WINDOW, 4) - F.avg_pool2d(b.abs(), _SHARP_WINDOW, 4)).abs().mean()
            for a, b in zip(gradients(shown), gradients(pictures), strict=True)
        ),
        start=shown.new_zeros(()),
    )


def settings_text(settings: Settings, layout: NanoLayout) -> dict[str, str]:
    """Settings and layout as a checkpoint's metadata."""
    return {key: str(value) for key, value in {**asdict(settings), **asdict(layout)}.items()}
