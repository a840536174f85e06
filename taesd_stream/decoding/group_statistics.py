"""GroupNorm of a map that is never in memory at once: first statistics, part by part, then a norm point by point."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupStatistics:
    """Mean and variance of a pooled Block's GroupNorm over all parts of a map.

    pool: 1x1 convolution, GroupNorm, and what follows.
    """

    def __init__(self, pool: nn.Sequential) -> None:
        widen, norm = pool[0], pool[1]
        if not isinstance(widen, nn.Conv2d) or not isinstance(norm, nn.GroupNorm) or widen.bias is not None:
            raise TypeError(f"expected a 1x1 convolution without bias and a GroupNorm, got {pool}")
        self._pool, self._widen, self._norm = pool, widen, norm
        self._count = 0
        self._mean = torch.zeros(1)  # a channel each
        self._squares = torch.zeros(1)  # sum of squared distances from the mean

    def add(self, part: Tensor) -> None:
        """Take in a part (1, C, rows, columns) of the Block's input: each point once, in any order."""
        values = self._widen(part)
        variance, mean = torch.var_mean(
            values.to(torch.promote_types(values.dtype, torch.float32)), (2, 3), correction=0
        )
        variance, mean = variance[0].double(), mean[0].double()
        count = part.shape[2] * part.shape[3]
        if self._count == 0:
            self._count, self._mean, self._squares = count, mean, variance * count
            return
        # Chan, Golub, LeVeque 1979: two parts' moments merge without loss, where sums of squares would cancel.
        total = self._count + count
        away = mean - self._mean
        self._squares = self._squares + variance * count + away**2 * (self._count * count / total)
        self._mean = self._mean + away * (count / total)
        self._count = total

    def settled(self) -> Callable[[Tensor], Tensor]:
        """The pool with these statistics: norm and first convolution are one convolution with a bias."""
        norm, channels = self._norm, len(self._mean)
        means = self._mean.reshape(norm.num_groups, -1)
        group_mean = means.mean(dim=1, keepdim=True)
        spread = self._squares.reshape(norm.num_groups, -1) / self._count + (means - group_mean) ** 2
        scale = norm.weight.double().reshape(means.shape) / (spread.mean(dim=1, keepdim=True) + norm.eps).sqrt()
        shift = norm.bias.double() - (scale * group_mean).flatten()
        dtype = self._widen.weight.dtype
        weight = (self._widen.weight * scale.reshape(channels, 1, 1, 1)).to(dtype)
        bias, rest = shift.to(dtype), self._pool[2:]

        def pool(rows: Tensor) -> Tensor:
            pooled: Tensor = rest(F.conv2d(rows, weight, bias))
            return pooled

        return pool
