"""The normalised detour of FLUX.2's blocks as three matrix products: GroupNorm costs no pass over the wide map.

What GroupNorm needs of W x, its mean and its mean square over each group, are a linear and a quadratic form of the
means and second moments of x, which has a quarter of the channels. With them known, normalising is a change of W.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PooledDetour:
    """x + narrow(ReLU(GroupNorm(wide(x)))), for 1x1 convolutions without bias."""

    def __init__(self, wide: nn.Conv2d, norm: nn.GroupNorm, narrow: nn.Conv2d) -> None:
        self._wide = wide.weight.detach().float().flatten(1)  # (K, C)
        self._narrow = narrow.weight.detach().flatten(1).T.contiguous()  # (K, C)
        self._scale, self._shift = norm.weight.detach().float(), norm.bias.detach().float()
        self._groups, self._eps = norm.num_groups, norm.eps
        groups = self._wide.reshape(norm.num_groups, -1, self._wide.shape[1])
        self._mean_of = groups.mean(1).T.contiguous()  # (C, groups)
        self._square_of = (groups.mT @ groups / groups.shape[1]).flatten(1).T.contiguous()  # (C * C, groups)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, h, w) in channels_last, any floating dtype -> the same shape, dtype and layout."""
        count, channels, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(count, height * width, channels)
        weights, bias = self._normalised(pixels)
        wide = torch.baddbmm(bias[:, None], pixels, weights).relu_()
        added = torch.addmm(pixels.flatten(0, 1), wide.flatten(0, 1), self._narrow)
        return added.reshape(count, height, width, channels).permute(0, 3, 1, 2)

    def _normalised(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, C, K) and bias (N, K) whose product with the pixels is the normalised one, in their dtype."""
        scaled = pixels * pixels.shape[1] ** -0.5  # before they are summed: half precision ends at 65504
        ones = scaled.new_full((len(pixels), 1, pixels.shape[1]), pixels.shape[1] ** -0.5)
        mean = torch.bmm(ones, scaled)[:, 0].float() @ self._mean_of
        square = torch.bmm(scaled.mT, scaled).float().flatten(1) @ self._square_of
        factor = ((square - mean.square()).clamp_min(0) + self._eps).rsqrt()  # (N, groups)
        repeats = len(self._scale) // self._groups
        scale = factor.repeat_interleave(repeats, 1) * self._scale
        bias = self._shift - scale * mean.repeat_interleave(repeats, 1)
        weights = self._wide.T * scale[:, None]
        return weights.to(pixels.dtype), bias.to(pixels.dtype)


def pooled_detour(detour: nn.Module) -> PooledDetour | None:
    """The same as matrix products, or None if the layers are others than it knows."""
    parts = list(detour.children())
    if [type(part) for part in parts] != [nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.Conv2d]:
        return None
    wide, norm, _, narrow = parts
    assert isinstance(wide, nn.Conv2d)
    assert isinstance(norm, nn.GroupNorm)
    assert isinstance(narrow, nn.Conv2d)
    are_plain = all(conv.kernel_size == (1, 1) and conv.bias is None for conv in (wide, narrow))
    return PooledDetour(wide, norm, narrow) if are_plain and norm.affine else None
