"""`taesd-stream bench`: what this machine can do, and how many streams of what size it holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from taesd_stream.errors import ConfigError
from taesd_stream_workers.commands.options import INTERRUPTED, ConfigOption, SetOption, say

if TYPE_CHECKING:
    from rich.console import Console

    from taesd_stream_workers.bench.benching import Bench, Step

MIN_S: Final = 0.05
MAX_S: Final = 60.0
SIZE_PX: Final = (64, 4096)
SIZE_STEP_PX: Final = 64  # whole cells in every latent format
PIPE_WIDTH: Final = 120  # of tables that nobody's terminal bounds

# Of each table of the report: its title, and its columns with their heads.
TABLES: Final[dict[str, tuple[str, dict[str, str]]]] = {
    "broker": (
        "Broker: frames to a worker; of samplers that nobody watches, into memory; a frame alone",
        {
            "bytes": "bytes",
            "frames_s": "frames/s",
            "thread_ms": "its thread, ms",
            "waiting_s": "unwatched/s",
            "waiting_thread_ms": "its thread, ms",
            "p50_ms": "alone p50 ms",
            "p95_ms": "p95 ms",
        },
    ),
    "decode": (
        "Decode: latents to planes, by batch",
        {
            "format": "format",
            "size_px": "px",
            "decoder": "decoder",
            "batch": "batch",
            "p50_ms": "p50 ms",
            "p95_ms": "p95 ms",
            "ms_per_frame": "ms a frame",
            "frames_s": "frames/s",
        },
    ),
    "encode": (
        "Encode: one encoder's time a picture; frames/s of all processors",
        {
            "format": "format",
            "size_px": "px",
            "decoder": "decoder",
            "rendition": "rendition",
            "kib": "KiB",
            "p50_ms": "p50 ms",
            "p95_ms": "p95 ms",
            "frames_s": "frames/s",
        },
    ),
    "held": (
        "Held: frames/s of all parts together at 70 % load",
        {
            "format": "format",
            "size_px": "px",
            "decoder": "decoder",
            "broker_s": "broker/s",
            "decode_s": "decode/s",
            "encode_s": "encode/s",
            "worker_s": "worker/s",
            "held_s": "held/s",
            "wait_p99_ms": "wait p99 ms",
            "streams_at_2_s": "streams at 2/s",
            "streams_at_5_s": "at 5/s",
            "limit": "limit",
        },
    ),
}


def add_commands(app: typer.Typer) -> None:
    """Put the command on the application."""
    app.command(rich_help_panel="Daemon")(bench)


def bench(
    formats: Annotated[str, typer.Option(metavar="NAME,…", help="Latent formats, of pictures.")] = "flux2,sd1",
    sizes: Annotated[str, typer.Option(metavar="PIXELS,…", help="Sides of square pictures.")] = "512,1024",
    device: Annotated[str, typer.Option(help='Where to decode: "auto", "cpu", "cuda:0".')] = "auto",
    seconds: Annotated[float, typer.Option(help="How long each part is measured.")] = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Measure this machine, about a minute: broker, decoding, encoding, and how many streams it holds.

    Ctrl-C prints what was measured so far. Let nothing else run meanwhile. docs/capacity.md says how to read it.

    Example: taesd-stream bench

    Example: taesd-stream bench --formats sdxl --sizes 1024 --set weights.folder=~/ComfyUI/models/vae_approx
    """
    names, sizes_px = _check_formats(formats), _check_sizes(sizes)
    if not MIN_S <= seconds <= MAX_S:
        raise ConfigError(f"--seconds {seconds:g}: expected {MIN_S:g} to {MAX_S:g}")
    from taesd_stream.config import load_config
    from taesd_stream.log import set_up_logging
    from taesd_stream_workers.bench.benching import Bench

    set_up_logging("bench", is_quiet=True)
    loaded = load_config(config, [*sets, f"decoder.device={device}"])
    whole = Bench(loaded, names, sizes_px, seconds)
    is_whole = _run(whole)
    report = {**whole.report(), "is_whole": is_whole}
    if as_json:
        sys.stdout.write(json.dumps(report) + "\n")
    else:
        _print(report)
    if not is_whole:
        raise typer.Exit(INTERRUPTED)


def _check_formats(text: str) -> list[str]:
    """Names of the table, of pictures. Raises: ConfigError that says which is not."""
    from taesd_stream.latent_formats import latent_format

    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        try:
            known = latent_format(name)
        except ValueError as error:
            raise ConfigError(f"--formats: {error}") from error
        if known.temporal_factor is not None:
            raise ConfigError(f"--formats {name}: is of video; formats of pictures are measured, as flux2, sd1, sdxl")
    if not names:
        raise ConfigError("--formats: expected names of latent formats, as flux2,sd1")
    return list(dict.fromkeys(names))


def _check_sizes(text: str) -> list[int]:
    """Pixels. Raises: ConfigError that says what is none."""
    least, most = SIZE_PX
    allowed = f"expected multiples of {SIZE_STEP_PX} from {least} to {most} pixels, as 512,1024"
    words = [word.strip() for word in text.split(",") if word.strip()]
    found: list[int] = []
    for word in words:
        if not (word.isascii() and word.isdigit() and least <= int(word) <= most) or int(word) % SIZE_STEP_PX:
            raise ConfigError(f"--sizes {word}: {allowed}")
        found.append(int(word))
    if not found:
        raise ConfigError(f"--sizes: {allowed}")
    return list(dict.fromkeys(found))


def _run(whole: Bench) -> bool:
    """Every step, or those before Ctrl-C. Returns: whether all were done."""
    try:
        with ExitStack() as stack, _progress(whole.steps(stack)) as steps:
            for _, step in steps:
                step()
    except KeyboardInterrupt:
        say("Interrupted: this is what was measured so far.")
        return False
    return True


@contextmanager
def _progress(steps: list[Step]) -> Iterator[Iterator[Step]]:
    """The steps, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(steps))

        def one_by_one() -> Iterator[Step]:
            for step in steps:
                progress.update(task, description=step[0])
                yield step
                progress.advance(task)

        yield one_by_one()


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    machine = report["machine"]
    console.print(f"{machine['processors']} processors; decoding on {machine['device']}", markup=False)
    for name, (title, columns) in TABLES.items():
        if report[name]:
            _print_table(console, title, columns, report[name])
        for row in report["hellos"] if name == "broker" else ():
            console.print(f"It answers {row['per_s']:,.0f} HELLOs a second; each sampler says one.")


def _print_table(console: Console, title: str, columns: dict[str, str], rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for key, head in columns.items():
        table.add_column(head, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(_shown(row[key]) for key in columns))
    console.print(f"\n{title}", style="bold", markup=False)
    console.print(table)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return value if isinstance(value, str) else f"{value:,}"
