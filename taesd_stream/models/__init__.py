"""Networks that turn latents into pictures."""

from taesd_stream.models.families import build_decoder, build_encoder

__all__ = ["build_decoder", "build_encoder"]
