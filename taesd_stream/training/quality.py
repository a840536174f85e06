"""How good a decoder is: PSNR, SSIM and sharpness of its pictures beside the originals."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW: Final = 11
_SIGMA: Final = 1.5


def psnr_db(shown: Tensor, picture: Tensor) -> float:
    """Of pictures (3, H, W) in [0, 1]."""
    return -10 * math.log10(max(float((shown - picture).square().double().mean()), 1e-10))


def ssim(shown: Tensor, picture: Tensor) -> float:
    """Structural similarity of pictures (3, H, W) in [0, 1], each channel for itself.

    Wang et al. 2004: Gaussian window of 11 pixels, deviation 1.5; borders that the window does not fill are left out.
    """
    offsets = torch.arange(_WINDOW, dtype=torch.float32, device=shown.device) - _WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(values[:, None].float(), window)

    mean_a, mean_b = mean(shown), mean(picture)
    variance_a, variance_b = mean(shown**2) - mean_a**2, mean(picture**2) - mean_b**2
    covariance = mean(shown * picture) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return float((luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)).mean())


def sharpness(picture: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels of (3, H, W)."""
    down, across = gradients(picture)
    return float((down.abs().mean() + across.abs().mean()) / 2)


def gradients(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels of (..., H, W), down and across."""
    return pictures[..., 1:, :] - pictures[..., :-1, :], pictures[..., :, 1:] - pictures[..., :, :-1]
