"""`taesd-stream fit`: a latent space that nobody knows yet gets a preview, from a folder of examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from taesd_stream.errors import ConfigError
from taesd_stream_workers.commands.options import say, with_progress

if TYPE_CHECKING:
    from taesd_stream_workers.offline.format_fitting import Fit, Pair


def add_commands(app: typer.Typer) -> None:
    """Put the command on the application."""
    app.command(rich_help_panel="Decoders")(fit)


def fit(
    pairs: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="NAME.safetensors or .npy, (C, h, w), beside NAME.png or .jpg.")
    ],
    name: Annotated[str, typer.Argument(metavar="FORMAT", help="What publishers will call it.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the file goes; else where every daemon of yours looks.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a format of that name.")] = False,
) -> None:
    """Make a latent format from pairs of latents and pictures, so that a new latent space has a preview.

    A linear projection is fitted by least squares, and measured on a fifth of the pairs, which it has not seen.

    Example: taesd-stream fit examples/ my_space
    """
    from taesd_stream.user_formats import check_format_name, user_formats_folder
    from taesd_stream_workers.offline.format_fitting import find_pairs, fit_format

    check_format_name(name)
    _check_is_new(name)
    path = (folder or user_formats_folder()) / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: is there already; --overwrite replaces it")
    found = find_pairs(pairs)
    fitted = fit_format(name, found, _track)
    if not fitted.explains:
        say(f"{pairs}: these latents hardly tell anything of these pictures: do they belong together?")
    fitted.save(path)
    say(f"{path}: {_summary(fitted)}")
    say(
        f'publish with latent_format="{name}"'
        + ("" if folder is None else f", the daemon with weights.folder={folder}")
    )


def _check_is_new(name: str) -> None:
    from taesd_stream.latent_formats import LATENT_FORMATS
    from taesd_stream.models.linear import has_linear_decoder

    known = LATENT_FORMATS.get(name)
    if known is not None and has_linear_decoder(known):
        raise ConfigError(f"{name}: has a projection already, which would be taken before yours; choose another name")


def _summary(fitted: Fit) -> str:
    known = fitted.format
    shape = f"{known.channels} channels, {known.spatial_factor:g} pixels a cell"
    kind = "one colour a cell" if fitted.projection is None else "every pixel of a cell"
    if not fitted.held_out:
        return f"{shape}, {kind}, from one pair: nothing is left to measure it on"
    words = {"flat": "flat", "factors": "one colour a cell", "projection": "every pixel of a cell"}
    quality = ", ".join(f"{words[key]} {value:.1f} dB" for key, value in fitted.psnr_db.items())
    return f"{shape}, {kind}, from {fitted.pairs} pairs; on {fitted.held_out} held-out pairs: {quality}"


def _track(pairs: Iterable[Pair], what: str) -> Iterator[Pair]:
    todo = list(pairs)
    return with_progress(todo, what, len(todo))
