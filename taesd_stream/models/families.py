"""Networks by name: which families there are, and which of them weights would fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, TypeAlias

import torch
from torch import nn

from taesd_stream.latent_formats import latent_format as format_named
from taesd_stream.models.linear import linear_decoder
from taesd_stream.models.nano import nano_decoder, nano_from_weights
from taesd_stream.models.networks import TINY_FAMILIES, tiny_decoder, tiny_encoder
from taesd_stream.models.strict_loading import StateDict, first_difference, load_strictly, without_weights
from taesd_stream.models.tiny_rgba import RGBA_FAMILY, rgba_decoder, rgba_encoder
from taesd_stream.models.tiny_video import VideoDecoder, VideoEncoder
from taesd_stream.models.video_families import VIDEO_FAMILIES

Part: TypeAlias = Literal["decoder", "encoder"]

_PARTS: Final[tuple[Part, ...]] = ("decoder", "encoder")
FORMAT_FAMILIES: Final = ("nano", "linear")  # a decoder each for one latent format
FAMILIES: Final = (*TINY_FAMILIES, RGBA_FAMILY, *VIDEO_FAMILIES)


def build_decoder(
    family: str,
    state_dict: StateDict | None = None,
    *,
    latent_format: str | None = None,
    decoder_time_upscale: Sequence[bool] | None = None,
    decoder_space_upscale: Sequence[bool] | None = None,
) -> nn.Module:
    """A decoder by its family's name: (N, C, h, w) latents -> (N, 3, H, W), values in [0, 1] but not clamped.

    family: one of FAMILIES, or one of FORMAT_FAMILIES, which come with the package, with the `latent_format` that it
    is for: "nano", "linear". Of VIDEO_FAMILIES it is a VideoDecoder; RGBA_FAMILY has a fourth channel.
    state_dict: as in the original file: of image families `nn.Sequential` indices without a prefix, of video families
    "decoder.N..." (the encoder's keys beside them are passed over); None leaves random weights.
    decoder_time_upscale, decoder_space_upscale: stages of a video decoder that grow (three flags, or two for the last
    two in time); weights of growth in time that is off are cut to their last step.
    Raises: ValueError for an unknown family or option; WeightsError for weights that do not fit.
    """
    if family in FORMAT_FAMILIES:
        return _build_for_format(family, state_dict, latent_format)
    if latent_format is not None:
        raise ValueError(f"latent_format belongs to the families {' and '.join(FORMAT_FAMILIES)}, not to {family!r}")
    if family in VIDEO_FAMILIES:
        video = partial(
            VideoDecoder,
            VIDEO_FAMILIES[family],
            decoder_time_upscale=decoder_time_upscale,
            decoder_space_upscale=decoder_space_upscale,
        )
        return _loaded("decoder", family, video, state_dict)
    if decoder_time_upscale is not None or decoder_space_upscale is not None:
        raise ValueError(f"decoder_time_upscale and decoder_space_upscale belong to video families, not to {family!r}")
    return _loaded("decoder", family, partial(_bare, "decoder", family), state_dict)


def build_encoder(family: str, state_dict: StateDict | None = None) -> nn.Module:
    """An encoder by its family's name: (N, 3, H, W) pixels in [0, 1] -> (N, C, h, w) latents; or a VideoEncoder.

    Raises: ValueError for an unknown family; WeightsError for weights that do not fit.
    """
    return _loaded("encoder", family, partial(_bare, "encoder", family), state_dict)


def _build_for_format(family: str, state_dict: StateDict | None, latent_format: str | None) -> nn.Module:
    if latent_format is None:
        raise ValueError(f"the family {family!r} needs latent_format=NAME: it belongs to one latent space")
    known = format_named(latent_format)
    name = f"{family} {latent_format}"
    if family == "nano" and state_dict is not None:
        return nano_from_weights(state_dict, name)
    network = nano_decoder(known) if family == "nano" else linear_decoder(known)
    if state_dict is not None:
        load_strictly(network, state_dict, name=name)
    return network


def _bare(part: Part, family: str) -> nn.Module:
    """The network with random weights."""
    if family in VIDEO_FAMILIES:
        video = VIDEO_FAMILIES[family]
        return VideoDecoder(video) if part == "decoder" else VideoEncoder(video)
    if family == RGBA_FAMILY:
        return rgba_decoder() if part == "decoder" else rgba_encoder()
    if family not in TINY_FAMILIES:
        raise ValueError(f"no {part} family {family!r}; there are: {', '.join(FAMILIES)}")
    tiny = TINY_FAMILIES[family]
    return tiny_decoder(tiny) if part == "decoder" else tiny_encoder(tiny)


def _loaded(part: Part, family: str, build: Callable[[], nn.Module], state_dict: StateDict | None) -> nn.Module:
    if state_dict is None:
        return build()
    network = without_weights(build)
    weights = _of_part(part, state_dict) if family in VIDEO_FAMILIES else state_dict
    if isinstance(network, VideoDecoder):
        weights = network.cut_growth(weights)
    load_strictly(network, weights, name=f"{family} {part}", hint=lambda: _fit_hint(state_dict))
    return network


def _of_part(part: Part, state_dict: StateDict) -> StateDict:
    """What a video file holds of one part, its prefix on; a file without prefixes is one part alone."""
    other = "encoder." if part == "decoder" else "decoder."
    if any(key.startswith((f"{part}.", other)) for key in state_dict):
        return {key: value for key, value in state_dict.items() if not key.startswith(other)}
    return {f"{part}.{key}": value for key, value in state_dict.items()}


def families_that_fit(state_dict: StateDict) -> list[str]:
    """Families and parts that the weights would fit, as "taef1 decoder"; several share one layout."""
    fitting = []
    with torch.device("meta"):  # shapes only: neither memory nor time
        for part in _PARTS:
            for name in FAMILIES:
                weights = _of_part(part, state_dict) if name in VIDEO_FAMILIES else state_dict
                if first_difference(_bare(part, name).state_dict(), weights) is None:
                    fitting.append(f"{name} {part}")
    return fitting


def _fit_hint(state_dict: StateDict) -> str:
    fitting = families_that_fit(state_dict)
    return f"; they fit {' or '.join(fitting)}" if fitting else "; they fit no family known here"
