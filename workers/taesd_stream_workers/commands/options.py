"""Options and manners that the commands share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer

from taesd_stream.errors import ConfigError
from taesd_stream.fields import quoted
from taesd_stream.frames import NAME_RULE, is_stream_name

T = TypeVar("T")

DEFAULT_WEB: Final = "http://127.0.0.1:8765"
INTERRUPTED: Final = 130  # as a shell says it

ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file; configs/default.toml shows every key.")
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key; may be given many times.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", help="Log messages too.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Log warnings and errors only.")]
NameOption = Annotated[
    str | None, typer.Option("--name", help="What its log lines call it, where several write into one; else its role.")
]
InsecureOption = Annotated[
    bool, typer.Option("--insecure", help="Bind or dial other addresses than loopback though no keys guard them.")
]
KeysOption = Annotated[
    Path | None, typer.Option("--keys", metavar="DIR", help="This client's folder of `taesd-stream keys new`.")
]
WebOption = Annotated[
    str,
    typer.Option(
        "--connect", metavar="URL", envvar="TAESD_STREAM_CONNECT", help="The daemon's web address, or link with token."
    ),
]


def check_stream_name(text: str, what: str = "NAME") -> None:
    """Raises: ConfigError for what cannot name a stream. what: which word of the command it is."""
    if not is_stream_name(text):
        raise ConfigError(f"{what} {quoted(text)}: expected {NAME_RULE}")


def said_insecure(sets: list[str], insecure: bool) -> list[str]:
    """What --insecure stands for, as a --set of its own."""
    return [*sets, "security.insecure=true"] if insecure else sets


def check_output(file: Path) -> None:
    """Before minutes of work: can this file be written? Raises: ConfigError when there is no such place."""
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; name the file to write")
    if not file.parent.is_dir():
        raise ConfigError(f"{file}: there is no folder {file.parent}")


def with_progress(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """The items, with a bar on stderr while they are taken. total: None where nobody knows it before."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=total, description=what)


def say_damaged(file: Path, nbytes: int | None) -> None:
    """That so much of a latent log is left out; nothing where it is whole."""
    if nbytes:
        say(f"{file}: {nbytes:,} bytes are damaged or cut short, and left out", is_error=True)


def say(text: str, *, is_error: bool = False) -> None:
    """A line for a person, on stderr: stdout is for what other programs read. Brackets in it mean nothing."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(
        text, style="red" if is_error else None, markup=False, emoji=False
    )
