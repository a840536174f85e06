"""Decoder and encoder of AutoencoderTiny: the bare networks with diffusers' picture range and layer numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taesd_stream.decoding.folding import fold_upsampling
from taesd_stream.models.networks import (
    TINY_FAMILIES,
    Block,
    Clamp,
    DecoderLayout,
    EncoderLayout,
    tiny_decoder,
    tiny_encoder,
)

CheckpointFunction: TypeAlias = Callable[..., Tensor]


class _Part(nn.Module):
    """One half of the autoencoder: a row of layers that may run with checkpointed gradients."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        self.gradient_checkpointing = False
        self.checkpoint_function: CheckpointFunction | None = None

    def run_layers(self, x: Tensor) -> Tensor:
        """The layers in a row; checkpointed, a block keeps its input alone and computes the rest again going back."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            result: Tensor = self.layers(x)
            return result
        for layer in self.layers:
            x = self._checkpointed(layer, x) if isinstance(layer, Block) else layer(x)
        return x

    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpoint_function is not None:
            return self.checkpoint_function(block, x)
        result: Tensor = checkpoint(block, x, use_reentrant=False)
        return result


class DecoderTiny(_Part):
    """(N, C, h, w) latents as the scheduler holds them -> (N, 3, H, W) in [-1, 1], not clamped.

    Its layers are numbered as in diffusers, where the clamp at their head, the original's layer 0, is none of them.
    """

    def __init__(self, layout: DecoderLayout) -> None:
        super().__init__(nn.Sequential(*list(tiny_decoder(layout))[1:]))
        self._clamp = Clamp()
        self._bare: list[nn.Sequential] = []  # one or none; in a list torch does not count its weights twice

    def bare(self) -> nn.Sequential:
        """The network as build_decoder gives it, [0, 1] out; its layers are this module's own.

        The same one each time, for tiling remembers what it measured of a network.
        """
        layers = [self._clamp, *self.layers]
        if not self._bare or list(self._bare[0]) != layers:
            self._bare = [nn.Sequential(*layers)]
        return self._bare[0]

    def forward(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, H, W)."""
        clamped: Tensor = self._clamp(latents)
        is_exact = latents.dtype in (torch.float32, torch.float64)  # half precision would round the sums of weights
        if is_exact and latents.device.type == "cpu" and not torch.is_grad_enabled():
            # A tenth less to compute. Made anew each time, for weights may change between two calls; it takes 1 ms.
            picture: Tensor = fold_upsampling(self.layers)(clamped)
        else:
            picture = self.run_layers(clamped)
        return picture.mul(2).sub(1)

    def tiled(self, latents: Tensor, budget_bytes: int) -> Tensor:
        """What forward() gives, without gradients, with all tensors at a time within `budget_bytes`."""
        from taesd_stream.decoding.tiling import decode_tiled  # here: it imports the networks beside us

        return decode_tiled(self.bare(), latents, budget_bytes=budget_bytes).mul_(2).sub_(1)


class EncoderTiny(_Part):
    """(N, 3, H, W) pixels in [-1, 1] -> (N, C, h, w) latents as the scheduler holds them."""

    def __init__(self, layout: EncoderLayout) -> None:
        super().__init__(tiny_encoder(layout))

    def bare(self) -> nn.Sequential:
        """The network as build_encoder gives it, [0, 1] in; its layers are this module's own."""
        return self.layers

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, h, w)."""
        return self.run_layers(pixels.add(1).div(2))

    def tiled(self, pixels: Tensor, budget_bytes: int) -> Tensor:
        """What forward() gives, without gradients, with all tensors at a time within `budget_bytes`."""
        from taesd_stream.decoding.tiling import encode_tiled  # here: it imports the networks beside us

        return encode_tiled(self.bare(), pixels.add(1).div(2), budget_bytes=budget_bytes)


def decoder_layout(config: Mapping[str, Any]) -> DecoderLayout:
    """The decoder that AutoencoderTiny's arguments describe."""
    return DecoderLayout(
        latent_channels=config["latent_channels"],
        out_channels=config["out_channels"],
        widths=config["decoder_block_out_channels"],
        blocks=config["num_decoder_blocks"],
        activation=config["act_fn"],
        upsample_mode=config["upsample_fn"],
        upsample_factor=config["upsampling_scaling_factor"],
        has_pooled_blocks=config.get("pooled_blocks", False),
    )


def encoder_layout(config: Mapping[str, Any]) -> EncoderLayout:
    """The encoder that AutoencoderTiny's arguments describe."""
    return EncoderLayout(
        latent_channels=config["latent_channels"],
        in_channels=config["in_channels"],
        widths=config["encoder_block_out_channels"],
        blocks=config["num_encoder_blocks"],
        activation=config["act_fn"],
        has_pooled_blocks=config.get("pooled_blocks", False),
        has_strided_stem=config.get("strided_stem", False),
    )


def family_arguments(name: str) -> dict[str, Any]:
    """The arguments of AutoencoderTiny that describe a family. Raises: ValueError for an unknown one."""
    if name not in TINY_FAMILIES:
        raise ValueError(f"no family {name!r}; there are: {', '.join(TINY_FAMILIES)}")
    family = TINY_FAMILIES[name]
    decoder, encoder = family.decoder_layout, family.encoder_layout
    return {
        "latent_channels": family.latent_channels,
        "encoder_block_out_channels": encoder.widths,
        "decoder_block_out_channels": decoder.widths,
        "num_encoder_blocks": encoder.blocks,
        "num_decoder_blocks": decoder.blocks,
        "pooled_blocks": family.has_pooled_blocks,
        "strided_stem": family.has_strided_stem,
    }
