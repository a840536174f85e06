"""`taesd-stream weights`: which decoders' weights are here, and fetching the others from the Hugging Face hub."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from taesd_stream.errors import ConfigError
from taesd_stream_workers.commands.options import ConfigOption, SetOption, say


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    words = "Weights of the tiny decoders: list them, fetch them.\n\nExample: taesd-stream weights fetch flux2"
    weights = typer.Typer(no_args_is_help=True, help=words)
    weights.command("list")(list_weights)
    weights.command("fetch")(fetch)
    app.add_typer(weights, name="weights", rich_help_panel="Decoders")


def list_weights(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and exit.")] = False,
) -> None:
    """Every decoder, the latent formats that it shows, and where its weights are.

    Example: taesd-stream weights list --set weights.folder=ComfyUI/models/vae_approx
    """
    from taesd_stream.config import load_config
    from taesd_stream.models.checkpoints import find_weights
    from taesd_stream.models.hub_weights import all_decoders, hub_files

    folder = load_config(config, sets).weights_folder
    rows: list[dict[str, Any]] = []
    for decoder, formats in all_decoders():
        path, places = find_weights(decoder, folder), hub_files(decoder)
        hub = str(places[0]) if places else None
        rows.append({"decoder": decoder, "formats": formats, "path": str(path) if path else None, "hub": hub})
    if as_json:
        sys.stdout.write(json.dumps({"decoders": rows}) + "\n")
    else:
        _print(rows)


def _print(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    from taesd_stream.latent_formats import TINY_DECODERS

    table = Table(box=None, pad_edge=False)
    for name in ("Decoder", "Latent formats", "Weights"):
        table.add_column(name, overflow="fold")
    for row in rows:
        source = f"weights fetch {row['decoder']}" if row["hub"] else f"by hand: {TINY_DECODERS[row['decoder']].source}"
        table.add_row(row["decoder"], ", ".join(row["formats"]), row["path"] or f"not here; {source}")
    Console().print(table)


def fetch(
    name: Annotated[str, typer.Argument(metavar="FORMAT", help="A latent format, as flux2, or a decoder, as taef2.")],
) -> None:
    """Fetch the weights for a latent format from the Hugging Face hub, and check them.

    They go to the Hugging Face cache (HF_HOME), where the decode worker looks too.

    Example: taesd-stream weights fetch flux2
    """
    from taesd_stream.models.checkpoints import load_state_dict
    from taesd_stream.models.hub_weights import decoder_named, fetch_weights

    try:
        decoder = decoder_named(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    file, path = fetch_weights(decoder)
    load_state_dict(path)  # plain tensors, or an error that says what came instead
    say(f"{decoder}: {file}, its hash is right: {path}")
