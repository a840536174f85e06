"""AutoencoderTiny: pictures to latents and back by a tiny network, with the interface that diffusers' class has.

Names, defaults and files are those of diffusers 0.42 (Apache-2.0), models/autoencoders/autoencoder_tiny.py; the code is
our own, and diffusers need not be installed.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, overload

import torch
from torch import Tensor, nn

from taesd_stream.models.autoencoder import Autoencoder, given_part
from taesd_stream.models.checkpoints import has_parts, load_state_dict, part_of
from taesd_stream.models.families import Part, families_that_fit
from taesd_stream.models.inputs import check_batch
from taesd_stream.models.outputs import AutoencoderTinyOutput, DecoderOutput
from taesd_stream.models.saved import FrozenConfig, Source, read_config, read_weights, write_model
from taesd_stream.models.strict_loading import StateDict, load_strictly
from taesd_stream.models.tiny_parts import (
    DecoderTiny,
    EncoderTiny,
    decoder_layout,
    encoder_layout,
    family_arguments,
)

logger = logging.getLogger(__name__)

Weights: TypeAlias = Path | str | StateDict

_PARTS: Final[tuple[Part, ...]] = ("decoder", "encoder")
_CLASS_NAME: Final = "AutoencoderTiny"
_DERIVED: Final = ("block_out_channels",)  # in a config, but no argument: pipelines read the latents' scale off it
_OURS: Final = ("pooled_blocks", "strided_stem")  # left out of a config where False: diffusers warns of what it lacks


class AutoencoderTiny(Autoencoder):
    """Encoder and decoder of one latent space, pictures in [-1, 1].

    The arguments are diffusers', but for the last two; stages may differ in width, as Sana's do.

    scaling_factor, shift_factor: how a pipeline turns latents into the z of its sampler: (latents - shift) * scale,
    undone before `decode`. The networks know z alone, so `decode` makes z of what it is given, and `encode` gives what
    becomes z: with any values a pipeline that reads `config` shows the right picture; by default latents are z.
    force_upcast: taken for old configs; `config` says False, as in diffusers: these networks never need it.
    pooled_blocks: the blocks at latent resolution normalise over the whole picture (FLUX.2).
    strided_stem: the encoder halves twice before its first block (Sana).
    Raises: ValueError for arguments that no network can be built of.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: float = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        *,
        pooled_blocks: bool = False,
        strided_stem: bool = False,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if scaling_factor == 0:
            raise ValueError("scaling_factor: expected a number other than 0, got 0")
        config = _as_config(given)
        super().__init__(encoder=EncoderTiny(encoder_layout(config)), decoder=DecoderTiny(decoder_layout(config)))
        self.config = config
        self.latent_magnitude, self.latent_shift = latent_magnitude, latent_shift
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **arguments: Any) -> AutoencoderTiny:
        """A model with random weights from another one's config, ours or diffusers'; `arguments` go before it.

        What neither knows is passed over with a warning, as diffusers does: newer versions note more.
        """
        public = {key: value for key, value in config.items() if key not in _DERIVED and not key.startswith("_")}
        unknown = public.keys() - inspect.signature(cls).parameters.keys()
        if unknown:
            logger.warning("unknown_config_keys keys=%s", ",".join(sorted(unknown)))
        known = {key: value for key, value in public.items() if key not in unknown}
        return cls(**{**known, **arguments})

    @classmethod
    def from_original(
        cls, family: str, *, decoder: Weights | None = None, encoder: Weights | None = None, **arguments: Any
    ) -> AutoencoderTiny:
        """A model of a known family with its original weights; a part that is not given cannot be used.

        family: "taesd", "taef1", ...: by name, never guessed from a file's. arguments: as the constructor's.
        decoder, encoder: a `.pth` or `.safetensors` file, or the state dict; keys as the original's or diffusers'.
        Raises: ValueError for an unknown family, or no weights at all; WeightsError for those that do not fit.
        """
        if decoder is None and encoder is None:
            raise ValueError("from_original: expected decoder, encoder or both, got neither")
        model = cls(**{**family_arguments(family), **arguments})
        for name, weights in zip(_PARTS, (decoder, encoder), strict=True):
            if weights is None:
                setattr(model, name, None)
            else:
                _load_part(getattr(model, name).bare(), weights, name, family)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,  # noqa: ARG003  # code for diffusers says it; this loads in 10 MiB anyway
        **options: Any,
    ) -> AutoencoderTiny:
        """A saved model: a folder of config.json and weights that we or diffusers wrote, or a hub id of such.

        torch_dtype, dtype: the model's, whatever the file's; float32 by default. variant: "fp16" for "*.fp16.*".
        use_safetensors: True or False allows only it or only `.bin`. options: those of `Source` (subfolder, revision,
        cache_dir, local_files_only, force_download, token), and constructor arguments that go before the config's.
        Raises: WeightsError, with the place and the reason, for files that are not there or do not fit.
        """
        of_source = {name: options.pop(name) for name in Source.options() if name in options}
        source = Source(place=str(pretrained_model_name_or_path), **of_source)
        model = cls.from_config(read_config(source, _CLASS_NAME), **options)
        path, weights = read_weights(source, variant, use_safetensors)
        load_strictly(model, weights, name=str(path), hint=lambda: _hint(weights))
        return model.to(dtype=torch_dtype or dtype or torch.float32).eval()

    def save_pretrained(
        self, save_directory: str | Path, *, variant: str | None = None, safe_serialization: bool = True
    ) -> None:
        """Write config.json and the weights into a folder, made if need be, that diffusers loads too.

        Raises: ValueError for a model that lacks a part, and for safe_serialization=False: we write no pickles.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: expected True, got False: only safetensors are written")
        given_part(self.decoder, "decoder"), given_part(self.encoder, "encoder")
        write_model(Path(save_directory), _CLASS_NAME, self.config, self.state_dict(), variant)

    @property
    def spatial_scale_factor(self) -> int:
        """Pixels per latent cell, on one side."""
        return decoder_layout(self.config).spatial_factor

    def scale_latents(self, x: Tensor) -> Tensor:
        """z within +-latent_magnitude -> [0, 1]; what lies beyond is cut."""
        return x.div(2 * self.latent_magnitude).add(self.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """[0, 1] -> z, the way back of scale_latents."""
        return x.sub(self.latent_shift).mul(2 * self.latent_magnitude)

    @overload
    def encode(self, x: Tensor, return_dict: Literal[True] = True) -> AutoencoderTinyOutput: ...
    @overload
    def encode(self, x: Tensor, return_dict: Literal[False]) -> tuple[Tensor]: ...
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Pictures to latents.

        x: (N, in_channels, H, W) in [-1, 1], the model's dtype. A side that is no multiple of spatial_scale_factor is
        rounded up: no border is lost, and past it the network sees zeros, as at every edge.
        Returns: `latents`, (N, latent_channels, h, w); as a tuple if not `return_dict`.
        Raises: ValueError for a wrong shape, dtype or NaN, with the expected and the given.
        """
        check_batch("encode", x, channels=self.config.in_channels, dtype=self.dtype)
        latents = self.run_encoder(x) / self.scaling_factor + self.shift_factor
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    @overload
    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, return_dict: Literal[True] = True
    ) -> DecoderOutput: ...
    @overload
    def decode(
        self, x: Tensor, generator: torch.Generator | None = None, *, return_dict: Literal[False]
    ) -> tuple[Tensor]: ...
    def decode(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,  # noqa: ARG002  # diffusers takes one too, and needs none
        return_dict: bool = True,
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents to pictures.

        x: (N, latent_channels, h, w), as `encode` gives them, the model's dtype.
        Returns: `sample`, (N, out_channels, H, W) in [-1, 1] but not clamped; as a tuple if not `return_dict`.
        Raises: ValueError for a wrong shape, dtype or NaN, with the expected and the given.
        """
        check_batch("decode", x, channels=self.config.latent_channels, dtype=self.dtype)
        sample = self.run_decoder(self._to_z(x))
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """There and back, through latents of 8 bits as a picture file would hold them. Shapes as `encode`, `decode`."""
        z = self._to_z(self.encode(sample).latents).float()  # bfloat16 has fewer than the 8 bits
        stored = self.scale_latents(z).mul(255).round().byte()
        restored = self.unscale_latents(stored / 255.0).to(self.dtype)
        decoded = self.decode(restored / self.scaling_factor + self.shift_factor)
        return decoded if return_dict else (decoded.sample,)

    def _to_z(self, latents: Tensor) -> Tensor:
        """What a pipeline hands to `decode` as its scheduler held it."""
        return (latents - self.shift_factor) * self.scaling_factor


def _as_config(given: dict[str, Any]) -> FrozenConfig:
    """The arguments as diffusers registers them."""
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    kept = {name: value for name, value in tuples.items() if value or name not in _OURS}
    return FrozenConfig(kept, force_upcast=False, block_out_channels=tuples["decoder_block_out_channels"])


def _load_part(part: nn.Sequential, weights: Weights, name: Part, family: str) -> None:
    """Copy one part's original weights, from a file or not, into the bare network."""
    if isinstance(weights, (Path, str)):
        weights = load_state_dict(Path(weights), name)
    elif has_parts(weights):
        weights = part_of(weights, name)
    load_strictly(part, weights, name=f"{family} {name}", hint=lambda: _hint(weights))


def _hint(weights: StateDict) -> str:
    """The end of a message on weights that do not fit: which families they would."""
    parts = [part_of(weights, name) for name in _PARTS] if has_parts(weights) else [weights]
    fitting = [name for part in parts if part for name in families_that_fit(part)]
    return f"; they fit {' or '.join(fitting)}" if fitting else "; they fit no family known here"
