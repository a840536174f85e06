"""The video autoencoders' layers in a row, numbered as in the original files: the number is in each weight's key.

Layouts follow the code of madebyollin/taehv@1f14a56, taem1@863c0eb and taesdv@1b2655e (all MIT), the super decoders
too: with the same weights every family gave that code's frames and latents. No published video weights were at hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

from torch import nn

from taesd_stream.models.networks import TINY_FAMILIES, Clamp, conv3x3, tiny_encoder
from taesd_stream.models.video_blocks import MemoryBlock, MemoryLayer, SuperMemoryBlock, TimeGrow, TimePool
from taesd_stream.models.video_families import VideoFamily

_WIDTHS: Final = (256, 128, 64, 64)  # channels of the stages, from latent to full resolution
_SUPER_WIDTHS: Final = (512, 256, 128, 64)
_IMAGE_WIDTHS: Final = (64, 64, 64, 64)
_ENCODER_WIDTH: Final = 64


def decoder_layers(family: VideoFamily, growth: tuple[int, int, int], scales: tuple[int, int, int]) -> nn.Sequential:
    """The decoder of a family. growth, scales: frames, and pixels on a side, that a stage makes of one."""
    if family.blocks == "super":
        return _super_decoder(family, growth, scales)
    widths = _IMAGE_WIDTHS if family.blocks == "image" else _WIDTHS
    layers: list[nn.Module] = [Clamp(), conv3x3(family.latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for (width, next_width), factor, scale in zip(itertools.pairwise(widths), growth, scales, strict=True):
        layers += [MemoryBlock(width) for _ in range(3)]
        layers.append(nn.Upsample(scale_factor=scale))
        if family.blocks == "memory":
            layers.append(TimeGrow(width, factor))
        layers.append(conv3x3(width, next_width, bias=False))
    layers.append(nn.ReLU(inplace=True) if family.blocks == "memory" else MemoryBlock(widths[-1]))
    layers.append(conv3x3(widths[-1], _image_channels(family)))
    return nn.Sequential(*layers)


def _super_decoder(family: VideoFamily, growth: tuple[int, int, int], scales: tuple[int, int, int]) -> nn.Sequential:
    widths = _SUPER_WIDTHS
    layers: list[nn.Module] = [nn.Conv2d(family.latent_channels, widths[0], 1, bias=False)]
    for (width, next_width), factor, scale in zip(itertools.pairwise(widths), growth, scales, strict=True):
        layers += [SuperMemoryBlock(width) for _ in range(3)]
        layers += [conv3x3(width, next_width * scale**2), nn.ReLU(inplace=True)]
        layers += [nn.PixelShuffle(scale), TimeGrow(next_width, factor)]
    layers.append(conv3x3(widths[-1], _image_channels(family)))
    return nn.Sequential(*layers)


def encoder_layers(family: VideoFamily) -> nn.Sequential:
    """The encoder of a family; taesdv's is TAESD's."""
    if family.blocks == "image":
        return tiny_encoder(TINY_FAMILIES["taesd"])
    width = _ENCODER_WIDTH
    layers: list[nn.Module] = [conv3x3(_image_channels(family), width), nn.ReLU(inplace=True)]
    for factor in family.pooling:
        layers += [TimePool(width, factor), conv3x3(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(3)]
    layers.append(conv3x3(width, family.latent_channels))
    return nn.Sequential(*layers)


def in_running_order(layers: nn.Sequential) -> list[nn.Module]:
    """The layers as they are best run: growth in time, a 1x1 convolution, before the nearest upsampling.

    The result is the same, at a quarter of the pixels.
    """
    order = list(layers)
    for place, (layer, following) in enumerate(itertools.pairwise(layers)):
        if isinstance(layer, nn.Upsample) and isinstance(following, TimeGrow):
            order[place : place + 2] = following, layer
    return order


def last_memory(layers: list[nn.Module]) -> int:
    """The place of the last layer with a memory."""
    return max(place for place, layer in enumerate(layers) if isinstance(layer, MemoryLayer))


def memory_scales(layers: nn.Sequential) -> Iterator[tuple[int, int]]:
    """(channels, cells on a side for one of the latent's) of each memory, in order."""
    scale = 1
    for layer in layers:
        if isinstance(layer, MemoryLayer):
            yield layer.channels, scale
        elif isinstance(layer, nn.Upsample):
            scale = round(scale * float(layer.scale_factor))  # type: ignore[arg-type]  # one number, as we built it
        elif isinstance(layer, nn.PixelShuffle):
            scale *= layer.upscale_factor


def _image_channels(family: VideoFamily) -> int:
    return 3 * family.patch_size**2
