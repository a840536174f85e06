"""`taesd-stream keys`: keys for samplers and decode workers of other hosts."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from taesd_stream_workers.commands.options import ConfigOption, SetOption, say

NameArgument = Annotated[str, typer.Argument(help="Whose key it is: a host, a person.")]


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    words = "Keys for samplers and decode workers of other hosts.\n\nExample: taesd-stream keys new laptop"
    keys = typer.Typer(no_args_is_help=True, help=words)
    keys.command("new")(new)
    keys.command("list")(list_keys)
    keys.command("revoke")(revoke_key)
    app.add_typer(keys, name="keys", rich_help_panel="Daemon")


def new(
    name: NameArgument,
    purpose: Annotated[
        Literal["sampler", "worker"], typer.Option("--for", help="What it may do: publish, or decode.")
    ] = "sampler",
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Make a client's key, and allow it. The first one makes the daemon's own too.

    Example: taesd-stream keys new gpu-2 --for worker
    """
    from taesd_stream.keys import KEYS_VARIABLE
    from taesd_stream_workers.role.key_files import make_client

    folder = _folder(config, sets)
    issued = make_client(folder, name, "workers" if purpose == "worker" else "samplers")
    use = f"--set security.keys_folder={name}" if purpose == "worker" else f"{KEYS_VARIABLE}={name}"
    say(f"{name}: move its folder to its host, as by: scp -rp {issued} HOST: && rm -r {issued}")
    say(f"there: {use}   here: --set security.keys_folder={folder}")
    sys.stdout.write(f"{issued}\n")


def list_keys(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and exit.")] = False,
) -> None:
    """Who may connect.

    Example: taesd-stream keys list
    """
    from taesd_stream_workers.role.key_files import clients_in

    folder = _folder(config, sets)
    rows = [
        {
            "name": client.name,
            "for": client.purpose.removesuffix("s"),
            "public": client.public.decode(),
            "made": time.strftime("%Y-%m-%d %H:%M", time.localtime(client.made_unix)),
            "is_here": (folder / "issued" / client.name).exists(),
        }
        for client in clients_in(folder)
    ]
    if as_json:
        sys.stdout.write(json.dumps({"folder": str(folder), "keys": rows}) + "\n")
        return
    _print(folder, rows)


def _print(folder: Path, rows: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("Name", "For", "Public key", "Made", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        is_here = "not yet moved to its host" if row["is_here"] else ""
        table.add_row(*(str(row[key]) for key in ("name", "for", "public", "made")), is_here)
    if not rows:
        table.add_row(f"No keys in {folder}")
    Console(markup=False, highlight=False).print(table)


def revoke_key(
    name: NameArgument,
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006
) -> None:
    """Allow a client no longer: a running daemon drops its messages within a second.

    Example: taesd-stream keys revoke laptop
    """
    from taesd_stream_workers.role.key_files import revoke

    revoke(_folder(config, sets), name)
    say(f"{name}: revoked")


def _folder(config: Path | None, sets: list[str]) -> Path:
    """The daemon's folder of keys: the one that is configured, else one in the user's configuration."""
    import platformdirs

    from taesd_stream.config import load_config

    return load_config(config, sets).keys_folder or platformdirs.user_config_path("taesd-stream") / "keys"
