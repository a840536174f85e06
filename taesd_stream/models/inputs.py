"""What a network may be given, checked before it runs: torch's own messages name neither the thing nor the way out."""

from __future__ import annotations

import torch
from torch import Tensor


def check_batch(name: str, batch: Tensor, *, channels: int, dtype: torch.dtype) -> None:
    """Refuse what is no batch of the network's kind.

    batch: (N, channels, height, width), none of them 0, in `dtype` (any floating one under autocast), all finite.
    Raises: ValueError that begins with `name` and says the expected and the given.
    """
    shape = tuple(batch.shape)
    if len(shape) != 4 or shape[1] != channels or 0 in shape:
        raise ValueError(f"{name}: expected a batch of shape (N, {channels}, height, width), got {shape}")
    is_mixed = batch.is_floating_point() and torch.is_autocast_enabled(batch.device.type)
    if batch.dtype != dtype and not is_mixed:
        raise ValueError(f"{name}: expected {dtype}, which is the model's, got {batch.dtype}")
    finite = torch.isfinite(batch).flatten(1).all(dim=1)
    if not finite.all():
        bad = torch.nonzero(~finite).flatten().tolist()
        raise ValueError(f"{name}: expected finite values, got NaN or infinity in items {bad} of the batch")
