"""Networks that turn latents into pictures."""

from taesd_stream.models.families import build_decoder, build_encoder
from taesd_stream.models.outputs import AutoencoderTinyOutput, DecoderOutput
from taesd_stream.models.tiny import AutoencoderTiny

__all__ = ["AutoencoderTiny", "AutoencoderTinyOutput", "DecoderOutput", "build_decoder", "build_encoder"]
