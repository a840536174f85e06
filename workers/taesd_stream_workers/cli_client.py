"""Commands that talk to a running daemon's web address: streams, record, health."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from taesd_stream.errors import ConfigError, UnreachableError
from taesd_stream.frames import is_stream_name
from taesd_stream_workers.cli_options import DEFAULT_WEB, WebOption, say
from taesd_stream_workers.daemon_client import DaemonClient

POLL_S: Final = 0.2


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Watch and record")(streams)
    app.command(rich_help_panel="Watch and record")(record)
    app.command(rich_help_panel="Daemon")(health)


def streams(
    connect: WebOption = DEFAULT_WEB,
    once: Annotated[bool, typer.Option("--once", help="Print the table once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and exit.")] = False,
) -> None:
    """A live table of every stream.

    Example: taesd-stream streams --connect 127.0.0.1:8765
    """
    import json
    import sys

    from rich.console import Console
    from rich.live import Live

    client = DaemonClient(connect)
    rows = client.streams()
    if as_json:
        sys.stdout.write(json.dumps({"streams": rows}) + "\n")
    elif once:
        Console().print(_table(rows))
    else:
        try:
            with Live(_table(rows), refresh_per_second=4) as live:
                while True:
                    time.sleep(0.5)
                    live.update(_table(client.streams()))
        except KeyboardInterrupt:
            return


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("Stream", "State", "Step", "Size", "Frames/s", "Latency", "Decoder", "Record"):
        table.add_column(name, justify="right" if name in ("Step", "Size", "Frames/s", "Latency") else "left")
    for row in rows:
        step = "" if row["step"] is None else f"{row['step'] + 1}/{row['total_steps'] or '?'}"
        size = f"{row['width']}x{row['height']}" if row["width"] else ""
        fps = f"{row['fps']:.1f}" if row["fps"] else ""
        latency = f"{row['latency_ms']:.0f} ms" if row["latency_ms"] is not None else ""
        state = " ".join([row["state"], *row["flags"]])
        table.add_row(row["name"], state, step, size, fps, latency, row["decoder"] or "", row["record"])
    if not rows:
        table.add_row("No streams yet")
    return table


def record(
    name: Annotated[str, typer.Argument(help="The stream, running already or not yet.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The MP4 to write.")],
    connect: WebOption = DEFAULT_WEB,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Download the first N frames, without waiting for the end.")
    ] = None,
) -> None:
    """Record a stream: wait for it, keep every frame until its end, download the file.

    Example: taesd-stream record my-run -o my-run.mp4
    """
    if not is_stream_name(name):
        raise ConfigError(
            f"{name}: cannot name a stream: up to 4 parts of letters, digits, '.', '_', '-' joined by '/'"
        )
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}")
    client = DaemonClient(connect)
    old = {row["run"] for row in client.recordings() if row["stream"] == name and row["state"] == "finished"}
    client.record(name, "all")
    say(f"waiting for {name}")
    try:
        recording = _wait_for_recording(client, name, old, frames)
        _download(client, recording, output, frames)
    except KeyboardInterrupt:
        say(f"left; the daemon goes on recording {name}")
        raise typer.Exit(130) from None
    say(f"{output}: {min(frames or recording['frames'], recording['frames'])} frames")


def _wait_for_recording(client: DaemonClient, name: str, old: set[str], frames: int | None) -> dict[str, Any]:
    """The recording of the stream's first run that has what is wanted; progress on the terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"waiting for {name}") as status:
        while True:
            rows = [row for row in client.recordings() if row["stream"] == name and row["run"] not in old]
            rows.sort(key=lambda row: float(row["started"]))
            for row in rows[:1]:
                status.update(f"recording {name}: {row['frames']} frames")
                if row["state"] == "failed":
                    raise UnreachableError(f"{name}: recording failed: {row['error']}")
                if row["state"] == "finished" or (frames is not None and row["frames"] >= frames):
                    return row
            time.sleep(POLL_S)


def _download(client: DaemonClient, recording: dict[str, Any], output: Path, frames: int | None) -> None:
    from rich.progress import DownloadColumn, Progress

    part = output.with_name(output.name + ".part")
    with (
        Progress(*Progress.get_default_columns(), DownloadColumn(), transient=True) as progress,
        part.open("wb") as file,
    ):
        task = progress.add_task("download", total=None)
        for piece, total in client.download(recording["id"], frames):
            file.write(piece)
            progress.update(task, total=total or None, advance=len(piece))
    part.replace(output)


def health(
    connect: WebOption = DEFAULT_WEB,
    role: Annotated[str, typer.Option(help="broker, worker, streamer, or all.")] = "all",
) -> None:
    """Exit 0 when the daemon is ready, 69 when it is not.

    Example: taesd-stream health --connect 127.0.0.1:8765
    """
    if role not in ("all", "broker", "worker", "streamer"):
        raise ConfigError(f"--role {role}: expected broker, worker, streamer or all")
    client = DaemonClient(connect)
    if role == "streamer":
        client.streams()
    elif not client.is_ready():
        raise UnreachableError(f"the daemon at {client.address} is not ready")
