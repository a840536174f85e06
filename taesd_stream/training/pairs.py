"""Batches from latents that are there already, each with its picture: for spaces whose encoder cannot be had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from taesd_stream.training.distillation import Batch


class PairedLatents:
    """Cuts of pairs; the network is told the statistics of the whole latent that a cut comes from.

    pairs: latents (C, h, w) and the picture (3, h * factor, w * factor) uint8 each, a quarter of the bytes of floats.
    cells: side of a cut, at most. pixels: of one batch, all its cuts together.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        spatial_factor: int,
        device: torch.device,
        pixels: int,
        cells: int = 32,
        seed: int = 0,
    ) -> None:
        self.latent_channels, self.spatial_factor = pairs[0][0].shape[0], spatial_factor
        self._pairs, self._device, self._seed = pairs, device, seed
        self._cells = min(cells, *(min(latents.shape[-2:]) for latents, _ in pairs))
        self._count = max(1, round(pixels / (self._cells * spatial_factor) ** 2))

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        chosen = torch.randint(len(self._pairs), (self._count,), generator=generator).tolist()
        cuts = [self._cut(self._pairs[index], generator) for index in chosen]
        latents, pictures, whole = zip(*cuts, strict=True)
        return Batch(
            torch.stack(latents).to(self._device),
            torch.stack(pictures).to(self._device),
            [one.unsqueeze(0).to(self._device) for one in whole],
        )

    def _cut(self, pair: tuple[Tensor, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A cut of the latents, the same of the picture, and the whole latents. Mirrored, latents mean nothing."""
        latents, picture = pair
        side, factor = self._cells, self.spatial_factor
        top, left = (int(torch.randint(length - side + 1, (), generator=generator)) for length in latents.shape[-2:])
        rows, columns = slice(top, top + side), slice(left, left + side)
        pixels = picture[:, top * factor : (top + side) * factor, left * factor : (left + side) * factor]
        return latents[:, rows, columns], pixels.float() / 255, latents
