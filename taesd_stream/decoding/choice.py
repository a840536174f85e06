"""Which decoder shows a latent format: chosen with a reason that a person can read, and the way to a better one."""

from __future__ import annotations

import contextlib
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
from taesd_stream.models.linear import has_linear_decoder, linear_decoder
from taesd_stream.models.nano import NanoDecoder, has_nano_decoder, nano_decoder
from taesd_stream.models.tiny_rgba import RGBA_FAMILY, OverWhite
from taesd_stream.models.tiny_video import VideoDecoder
from taesd_stream.models.user_decoder import user_decoder
from taesd_stream.user_formats import UserFormat, find_user_format, format_files

Choice: TypeAlias = Literal["auto", "tiny", "nano", "linear"]
Kind: TypeAlias = Literal["tiny", "nano", "linear"]

_KINDS: Final = {"image": "an image decoder", "video": "a video decoder"}
_FIT: Final = "`taesd-stream fit` makes a projection from pairs of latents and pictures"
_NO_NANO: Final = "no nano decoder is known; `taesd-stream distill` makes one"
_BEST_FIRST: Final[tuple[Kind, ...]] = ("tiny", "nano", "linear")


class NoDecoderError(TaesdStreamError):
    """No way to show a latent format; the message says how to get one."""


def open_engine(
    latent_format: str,
    *,
    weights_folder: Path | None,
    choice: Choice = "auto",
    device: str = "cpu",
    is_fast: bool = False,
    is_float8: bool = False,
) -> Engine:
    """Choose and load a decoder for the format.

    choice: "tiny" is the format's own decoder, "nano" and "linear" those that come with the package or that a user
    made, each of them or nothing; "auto" takes the first of tiny, nano, linear that can be had, and `reason` says why.
    is_fast: for live views: a processor computes in bfloat16 where that is faster. What is kept is decoded in float32.
    is_float8: for live views too, of pictures: as Engine's.
    Raises: NoDecoderError with the way out; WeightsError if `weights_folder` is no folder.
    """
    known, fitted = _find_format(latent_format, weights_folder)
    order = (choice,) if choice != "auto" else _BEST_FIRST
    refusals: list[str] = []
    for kind in order:
        found = _open(kind, known, fitted, weights_folder)
        if not isinstance(found, str):
            network, reason = found
            why = _why(kind, choice, refusals)
            reason = "; ".join(filter(None, (why, reason)))
            return _engine(kind, known, network, reason, device, is_fast=is_fast, is_float8=is_float8)
        if found != _NO_NANO or choice == "nano":
            refusals.append(found)
    said = [] if choice in ("auto", "tiny") else [f"decoder.choice is {choice}"]
    raise NoDecoderError(f"No decoder for {latent_format}: {', and '.join(said + refusals)}")


def decoder_files(latent_format: str, weights_folder: Path | None) -> list[tuple[Path, int, int]]:
    """The files that a format's decoders would be read from, when each was written (ns), and its bytes.

    Raises: WeightsError if `weights_folder` is no folder.
    """
    known = LATENT_FORMATS.get(latent_format)
    weights = None if known is None or known.decoder is None else find_weights(known.decoder, weights_folder)
    found = []
    for path in (*([] if weights is None else [weights]), *format_files(latent_format, weights_folder)):
        with contextlib.suppress(OSError):  # it went meanwhile
            facts = path.stat()
            found.append((path, facts.st_mtime_ns, facts.st_size))
    return found


def _why(kind: Kind, choice: Choice, refusals: list[str]) -> str:
    """Why this kind, beyond where it comes from."""
    if choice != "auto":
        return "" if kind == "tiny" else f"decoder.choice is {choice}"
    return "; ".join(refusals) if kind != "tiny" else ""


def _open(
    kind: Kind, known: LatentFormat, fitted: UserFormat | None, folder: Path | None
) -> tuple[nn.Module, str] | str:
    """A decoder of that kind and where it comes from, or why there is none."""
    if kind == "tiny":
        tiny, reason = _open_tiny(known, folder)
        return reason if tiny is None else (tiny, reason)
    if kind == "nano":
        return _open_nano(known, fitted, folder)
    if fitted is not None:
        return _open_fitted(fitted), f"fitted in {fitted.path}"
    if has_linear_decoder(known):
        return linear_decoder(known), ""
    return f"no rgb factors are known; {_FIT}"


def _open_nano(known: LatentFormat, fitted: UserFormat | None, folder: Path | None) -> tuple[nn.Module, str] | str:
    """The user's own nano decoder, else the packaged one."""
    refusal = _NO_NANO
    try:
        own = fitted or find_user_format(known.name, folder)
        network = None if own is None else user_decoder(own)
        if own is not None and isinstance(network, NanoDecoder):
            return network, f"distilled in {own.path}"
    except WeightsError as error:
        refusal = str(error)
    if has_nano_decoder(known):
        return nano_decoder(known), "nano comes with the package"
    return refusal


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


def _engine(
    kind: Kind, known: LatentFormat, network: nn.Module, reason: str, device: str, *, is_fast: bool, is_float8: bool
) -> Engine:
    is_full = kind == "tiny"
    decoder = (known.decoder or "") if is_full else "nano" if isinstance(network, NanoDecoder) else "linear"
    if isinstance(network, VideoDecoder):
        return VideoEngine(known, network, decoder=decoder, reason=reason, is_full=True, device=device, is_fast=is_fast)
    if is_full and decoder == RGBA_FAMILY:
        network = nn.Sequential(network, OverWhite())
    return Engine(
        known,
        network,
        decoder=decoder,
        reason=reason,
        is_full=is_full,
        device=device,
        is_fast=is_fast,
        is_float8=is_float8 and is_full,
    )


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
