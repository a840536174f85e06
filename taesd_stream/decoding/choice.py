"""Which decoder shows a latent format: chosen with a reason that a person can read, and the way to a better one."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, TypeAlias

from torch import nn

from taesd_stream.decoding.engine import Engine
from taesd_stream.decoding.video_engine import VideoEngine
from taesd_stream.errors import TaesdStreamError, WeightsError
from taesd_stream.latent_formats import LATENT_FORMATS, TINY_DECODERS, LatentFormat
from taesd_stream.latent_formats import latent_format as format_named
from taesd_stream.models import build_decoder
from taesd_stream.models.checkpoints import find_weights, load_state_dict
from taesd_stream.models.families import FAMILIES
from taesd_stream.models.hub_weights import hub_files
from taesd_stream.models.linear import has_linear_decoder, linear_decoder, user_decoder
from taesd_stream.models.tiny_rgba import RGBA_FAMILY, OverWhite
from taesd_stream.models.tiny_video import VideoDecoder
from taesd_stream.user_formats import UserFormat, find_user_format

Choice: TypeAlias = Literal["auto", "tiny", "linear"]

_KINDS: Final = {"image": "an image decoder", "video": "a video decoder"}
_FIT: Final = "`taesd-stream fit` makes a projection from pairs of latents and pictures"


class NoDecoderError(TaesdStreamError):
    """No way to show a latent format; the message says how to get one."""


def open_engine(
    latent_format: str,
    *,
    weights_folder: Path | None,
    choice: Choice = "auto",
    device: str = "cpu",
    is_fast: bool = False,
) -> Engine:
    """Choose and load a decoder for the format.

    choice: "tiny" is the format's own decoder or nothing, "linear" the projection or nothing; "auto" takes the
    projection where the tiny decoder cannot be had, and `reason` says why.
    is_fast: for live views: a processor computes in bfloat16 where that is faster. What is kept is decoded in float32.
    Raises: NoDecoderError with the way out; WeightsError if `weights_folder` is no folder.
    """
    known, fitted = _find_format(latent_format, weights_folder)
    reason = "decoder.choice is linear"
    if choice != "linear":
        tiny, reason = _open_tiny(known, weights_folder)
        if tiny is not None:
            return _full_engine(known, tiny, reason, device, is_fast=is_fast)
    if choice == "tiny" or (fitted is None and not has_linear_decoder(known)):
        lacks = "" if choice == "tiny" else f", and no rgb factors are known; {_FIT}"
        raise NoDecoderError(f"No decoder for {latent_format}: {reason}{lacks}")
    linear = linear_decoder(known) if fitted is None else _open_fitted(fitted)
    reason = reason if fitted is None else f"{reason}; fitted in {fitted.path}"
    return Engine(known, linear, decoder="linear", reason=reason, is_full=False, device=device)


def _find_format(name: str, folder: Path | None) -> tuple[LatentFormat, UserFormat | None]:
    """The format of that name; the file that a user fitted for it, where the package has no projection itself."""
    known = LATENT_FORMATS.get(name)
    if known is not None and has_linear_decoder(known):
        return known, None
    try:
        fitted = find_user_format(name, folder)
        if fitted is not None:
            return known or fitted.format, fitted
        return format_named(name), None
    except WeightsError as error:
        raise NoDecoderError(f"No decoder for {name}: {error}") from error
    except ValueError as error:
        is_alias = any(name in one.aliases for one in LATENT_FORMATS.values())
        raise NoDecoderError(f"No decoder for {name}: {error}{'' if is_alias else f'; {_FIT}'}") from error


def _open_fitted(fitted: UserFormat) -> nn.Module:
    try:
        return user_decoder(fitted)
    except WeightsError as error:
        raise NoDecoderError(f"No decoder for {fitted.format.name}: {error}") from error


def _full_engine(known: LatentFormat, network: nn.Module, reason: str, device: str, *, is_fast: bool) -> Engine:
    decoder = known.decoder or ""
    if isinstance(network, VideoDecoder):
        return VideoEngine(known, network, decoder=decoder, reason=reason, is_full=True, device=device, is_fast=is_fast)
    if decoder == RGBA_FAMILY:
        network = nn.Sequential(network, OverWhite())
    return Engine(known, network, decoder=decoder, reason=reason, is_full=True, device=device, is_fast=is_fast)


def _open_tiny(known: LatentFormat, folder: Path | None) -> tuple[nn.Module | None, str]:
    """The format's own decoder with its weights, or None; and the reason."""
    decoder = known.decoder
    if decoder is None:
        return None, f"no tiny decoder is published for {known.name}"
    facts = TINY_DECODERS[decoder]
    if decoder not in FAMILIES:
        return None, f"its {decoder} is {_KINDS[facts.kind]} that this version cannot run yet"
    path = find_weights(decoder, folder)
    if path is None:
        fetch = f"`taesd-stream weights fetch {decoder}`, or " if hub_files(decoder) else ""
        way = f"{fetch}fetch {facts.files[0]} from {facts.source} and say --set weights.folder=DIR"
        return None, f"no weights of {decoder} were found: {way} (ComfyUI's models/vae_approx works as DIR)"
    try:
        return build_decoder(decoder, load_state_dict(path)), f"weights {path}"
    except WeightsError as error:
        text = str(error)
        return None, text if str(path) in text else f"{path}: {text}"
