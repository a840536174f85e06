"""What every autoencoder has around its two networks: switches for memory, one batch in slices, dtype and device."""

from __future__ import annotations

from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from taesd_stream.models.tiny_parts import CheckpointFunction, DecoderTiny, EncoderTiny

_TILE_BUDGET_BYTES: Final = 1 << 30  # 1 GiB: a picture of 1024x1024 in float32 still runs in one piece


class Autoencoder(nn.Module):
    """A decoder, an encoder and how they run; slicing and tiling change the memory, never the result.

    A part that is None cannot be used: its weights were not given.
    """

    def __init__(self, *, encoder: EncoderTiny, decoder: DecoderTiny) -> None:
        super().__init__()
        self.encoder: EncoderTiny | None = encoder
        self.decoder: DecoderTiny | None = decoder
        self.use_slicing = False
        self.use_tiling = False
        self.tile_budget_bytes = _TILE_BUDGET_BYTES

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the weights are."""
        return sum(weight.numel() for weight in self.parameters() if weight.requires_grad or not only_trainable)

    def enable_slicing(self) -> None:
        """From now on a batch is worked off one item after the other: the memory of one, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """A batch runs at once again."""
        self.use_slicing = False

    def enable_tiling(self, budget_bytes: int | None = None) -> None:
        """From now on a picture is worked off in tiles: memory within a budget, the same result as in one piece.

        budget_bytes: for all tensors of a call at a time; None leaves `tile_budget_bytes` as it is, 1 GiB at first.
        A budget under the least that a picture needs is an error of the call, which names the least. What is tiled
        carries no gradients.
        """
        self.use_tiling = True
        if budget_bytes is not None:
            self.tile_budget_bytes = budget_bytes

    def disable_tiling(self) -> None:
        """A picture runs in one piece again."""
        self.use_tiling = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether training computes blocks twice to save memory."""
        return any(part.gradient_checkpointing for part in (self.decoder, self.encoder) if part is not None)

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: CheckpointFunction | None = None) -> None:
        """From now on training keeps each block's input alone, and computes the rest again going back.

        gradient_checkpointing_func: called with a block and its input instead of torch's own `checkpoint`.
        """
        for part in (self.decoder, self.encoder):
            if part is not None:
                part.gradient_checkpointing = True
                part.checkpoint_function = gradient_checkpointing_func

    def disable_gradient_checkpointing(self) -> None:
        """Training keeps all it needs again."""
        for part in (self.decoder, self.encoder):
            if part is not None:
                part.gradient_checkpointing = False

    def run_encoder(self, pixels: Tensor) -> Tensor:
        """(N, C, H, W) pixels in [-1, 1] -> latents as the scheduler holds them, as the switches say."""
        return self._run(given_part(self.encoder, "encoder"), pixels)

    def run_decoder(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) latents as the scheduler holds them -> pixels in [-1, 1], as the switches say."""
        return self._run(given_part(self.decoder, "decoder"), latents)

    def _run(self, part: DecoderTiny | EncoderTiny, batch: Tensor) -> Tensor:
        hook = getattr(self, "_hf_hook", None)
        if hook is not None and hasattr(hook, "pre_forward"):
            hook.pre_forward(self)  # accelerate's, which brings offloaded weights to the device before forward() alone
        if batch.device.type == "cpu":
            batch = batch.contiguous(memory_format=torch.channels_last)  # a fifth faster with oneDNN's convolutions
        results = [
            part.tiled(one, self.tile_budget_bytes) if self.use_tiling else part(one)
            for one in (torch.split(batch, 1) if self.use_slicing else (batch,))
        ]
        return (results[0] if len(results) == 1 else torch.cat(results)).contiguous()


_P = TypeVar("_P", DecoderTiny, EncoderTiny)


def given_part(part: _P | None, name: str) -> _P:
    """The part, or a ValueError that names it."""
    if part is None:
        raise ValueError(f"this model has no {name}: none was given")
    return part
