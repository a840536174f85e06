"""The video autoencoders by name: channels, growth in time and space, and which first frames the originals hide.

Facts from madebyollin/taehv@1f14a56, taem1@863c0eb and taesdv@1b2655e (all MIT), which know a family by its file's
name. Of H3 the chunks are the original's for the lengths that its encoder makes, 5n + 2 latents. Other clips end where
the original's do, but for 5n + 1, which it fills up with black frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Flags: TypeAlias = tuple[bool, bool, bool]  # one a stage, from latent to full resolution

CHUNK_LATENTS: Final = 5  # of MiniMax H3, which decodes its video in chunks of its own
CHUNK_FRAMES: Final = 17  # what the encoder makes such a chunk of
_CHUNK_END_LATENTS: Final = 2  # the last chunk shows no more than these: its encoder drops the others


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFamily:
    """What tells one video autoencoder from another.

    blocks: "memory" three 3x3 convolutions on [x, x before]; "super" a 7x7 depthwise one and a bottleneck;
    "image" is "memory" without layers that grow or pool in time, and an encoder that sees each frame alone (taesdv).
    growth, pooling: frames of a stage for one before it, in decoder and encoder; time_upscale: the stages that grow.
    hides: "start" the first frames of a stream, up to the last one of the first latent, which show what the full
    decoder does not; "odd clip" the same, but never for an even number of latents; "chunk" the same in every chunk.
    """

    name: str
    latent_channels: int
    blocks: Literal["memory", "super", "image"] = "memory"
    patch_size: int = 1  # side of the pixel shuffle at full resolution
    growth: tuple[int, int, int] = (2, 2, 2)
    pooling: tuple[int, int, int] = (2, 2, 1)
    time_upscale: Flags = (False, True, True)
    hides: Literal["start", "odd clip", "chunk"] = "start"

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent cell, on one side."""
        return 8 * self.patch_size

    def growth_of(self, time_upscale: Sequence[bool] | None) -> tuple[int, int, int]:
        """Frames of each stage for one before it. time_upscale: of the last two stages, or of all three.

        Raises: ValueError for another number of flags, and for growth where the family has none.
        """
        flags = self.time_upscale if time_upscale is None else flags_of_stages("decoder_time_upscale", time_upscale)
        if self.blocks == "image":
            if time_upscale is not None and any(flags):
                raise ValueError(f"{self.name} has no growth in time: decoder_time_upscale cannot turn it on")
            return 1, 1, 1
        first, second, third = (factor if flag else 1 for factor, flag in zip(self.growth, flags, strict=True))
        return first, second, third

    def hidden_frames(self, position: int, frames_per_latent: int, clip_length: int | None = None) -> int:
        """How many of the frames of latent number `position` are not shown; they are its first.

        clip_length: latents of the whole clip; None for a stream, whose end nobody knows.
        """
        if self.hides == "chunk":
            hides = position % CHUNK_LATENTS == 0
        elif self.hides == "odd clip":  # a stream hides nothing: it may yet become even, as in the original
            hides = position == 0 and clip_length is not None and clip_length % 2 == 1
        else:
            hides = position == 0
        return frames_per_latent - 1 if hides else 0

    def frames_of_stream(self, latents: int, frames_per_latent: int) -> int:
        """How many frames the first latents of a stream show: where the next one's are in time."""
        hiding = {"start": min(latents, 1), "odd clip": 0, "chunk": -(-latents // CHUNK_LATENTS)}[self.hides]
        return latents * frames_per_latent - hiding * (frames_per_latent - 1)

    def shown_latents(self, clip_length: int) -> int:
        """How many latents of a clip are shown, from its first on; all, but for the end of H3's last chunk."""
        if self.hides != "chunk":
            return clip_length
        whole = (clip_length - 1) // CHUNK_LATENTS * CHUNK_LATENTS
        return whole + min(_CHUNK_END_LATENTS, clip_length - whole)


def flags_of_stages(option: str, flags: Sequence[bool]) -> Flags:
    """Three flags, one a stage; two are those of the last two stages, as in the original.

    Raises: ValueError for another number of them.
    """
    if len(flags) not in (2, 3):
        raise ValueError(f"{option}: expected 3 flags, one a stage, or 2 for the last two, got {len(flags)}")
    first, second, third = (False, *flags) if len(flags) == 2 else flags
    return bool(first), bool(second), bool(third)


VIDEO_FAMILIES: Final[dict[str, VideoFamily]] = {
    family.name: family
    for family in (
        VideoFamily(name="taehv", latent_channels=16),  # HunyuanVideo
        VideoFamily(name="taew2_1", latent_channels=16),  # Wan 2.1, Qwen-Image
        VideoFamily(name="taew2_2", latent_channels=48, patch_size=2),  # Wan 2.2 5B
        VideoFamily(name="taehv1_5", latent_channels=32, patch_size=2),  # HunyuanVideo 1.5
        VideoFamily(name="taecvx", latent_channels=16, hides="odd clip"),  # CogVideoX
        VideoFamily(name="taeos1_3", latent_channels=16),  # Open-Sora 1.3
        VideoFamily(name="taeh3", latent_channels=24, patch_size=2, hides="chunk"),  # MiniMax H3
        VideoFamily(name="taew2_2_super", latent_channels=48, patch_size=2, blocks="super"),
        VideoFamily(name="taehv1_5_super", latent_channels=32, patch_size=2, blocks="super"),
        *(
            VideoFamily(name=name, latent_channels=128, patch_size=4, pooling=(2, 2, 2), time_upscale=(True,) * 3)
            for name in ("taeltx_2", "taeltx2_3")
        ),
        VideoFamily(name="taem1", latent_channels=12, growth=(1, 2, 3), pooling=(3, 2, 1)),  # Mochi 1
        VideoFamily(name="taesdv", latent_channels=4, blocks="image"),  # Stable Diffusion, frame by frame
    )
}
