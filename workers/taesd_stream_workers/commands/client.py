"""Commands that talk to a running daemon's web address: streams, record, health."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from taesd_stream.errors import ConfigError, UnreachableError
from taesd_stream.media.file_names import MAKING_SUFFIX
from taesd_stream_workers.commands.files import RecordWord
from taesd_stream_workers.commands.options import (
    DEFAULT_WEB,
    INTERRUPTED,
    ConfigOption,
    SetOption,
    WebOption,
    check_output,
    check_stream_name,
    say,
)
from taesd_stream_workers.daemon_client import DaemonClient, DaemonError

if TYPE_CHECKING:
    from taesd_stream.config import Config

POLL_S: Final = 0.2
AWAY_S: Final = 30.0  # so long `record` waits for a daemon that does not answer
OVER: Final = ("finished", "finishing")


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Watch and record")(streams)
    app.command(rich_help_panel="Watch and record")(record)
    app.command(rich_help_panel="Watch and record")(push)
    app.command(rich_help_panel="Daemon")(health)
    app.command(rich_help_panel="Daemon")(doctor)


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
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="The MP4 to write; not with --mode off.")
    ] = None,
    mode: Annotated[
        RecordWord, typer.Option(help="Keep every frame from now on, the last one alone, or no more.")
    ] = "all",
    connect: WebOption = DEFAULT_WEB,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Download the first N frames, without waiting for the end.")
    ] = None,
) -> None:
    """Record a stream: wait for it, keep every frame until its end, download the file.

    Of a run that goes on already, what somebody watched before is in the file, too, though not every frame.
    Where it becomes several (recording.batch "each", or another size of picture), they are FILE.1, FILE.2 and so on.
    With --mode off it is recorded no more, what was kept is finished, and nothing is downloaded.

    Example: taesd-stream record my-run -o my-run.mp4
    """
    check_stream_name(name)
    client = DaemonClient(connect)
    if mode == "off":
        if output is not None or frames is not None:
            raise ConfigError("--mode off: expected neither -o nor --frames, for nothing is downloaded")
        _stop_recording(client, name)
        return
    # Before anybody presses Ctrl-C: Python dies of one within an import's exec, whatever is caught.
    import rich.progress
    import rich.status  # noqa: F401

    import taesd_stream.media.finished  # noqa: F401

    if output is None:
        raise ConfigError("-o FILE: expected the MP4 to write")
    check_output(output)
    # What is over already is an earlier recording's: asked for is the one that grows, else the next, of any run.
    old: dict[str, int] = {}
    recordings, streams = client.recordings(), client.streams()
    is_off = any(row["name"] == name and row["record"] == "off" for row in streams)
    living = {row["run"] for row in streams if row["ended"] is None}
    for row in recordings:
        is_stuck = row["state"] == "failed" and row["run"] not in living  # it may wait for ever
        is_switched_off = is_off and row["stream"] == name  # it is over soon
        if row["state"] in OVER or is_stuck or is_switched_off:
            old[row["run"]] = max(row["last_seq"], old.get(row["run"], -1))
    client.record(name, mode)
    try:
        say(f"waiting for {name}")
        _download_all(client, _wait_for_recordings(client, name, old, frames), output, frames)
    except KeyboardInterrupt:
        say(f"left; the daemon goes on recording {name}")
        raise typer.Exit(INTERRUPTED) from None


def _stop_recording(client: DaemonClient, name: str) -> None:
    is_there = any(row["name"] == name for row in client.streams())
    client.record(name, "off")
    say(f"{name} is recorded no more" if is_there else f"{name}: there is no stream of this name; none is waited for")


def _wait_for_recordings(
    client: DaemonClient, name: str, old: Mapping[str, int], frames: int | None
) -> list[dict[str, Any]]:
    """The files of the stream's first run that has what is wanted, one a row; progress on the terminal.

    old: of runs that were recorded before, the last frame there.
    """

    def is_new(row: Mapping[str, Any]) -> bool:
        return row["run"] not in old or (row["first_seq"] is not None and row["first_seq"] > old[row["run"]])

    from rich.console import Console

    told: str | None = None
    heard_s = time.monotonic()
    with Console(stderr=True).status("Ctrl-C leaves it; the daemon goes on") as status:
        while True:
            try:
                found, heard_s = client.recordings(), time.monotonic()
            except UnreachableError:  # the page's process was restarted: what is recorded goes on
                if time.monotonic() - heard_s > AWAY_S:
                    raise
                time.sleep(POLL_S)
                continue
            rows = [row for row in found if row["stream"] == name and is_new(row)]
            first = min(rows, key=lambda row: float(row["started"]), default=None)
            if first is not None:
                rows = [row for row in rows if row["run"] == first["run"]]
                status.update(f"recording {name}: {first['frames']} frames")
                if first["error"] != told and first["error"]:
                    say(f"{name}: recording waits: {first['error']}")  # it goes on when its cause is gone
                told = first["error"]
                if all(row["state"] == "finished" for row in rows):
                    return rows
                if frames is not None and first["state"] != "finished" and first["frames"] >= frames:
                    is_one = first["parts"] == 1
                    return [first] if is_one else [{**first, "part": part + 1} for part in range(first["parts"])]
            time.sleep(POLL_S)


def _download_all(client: DaemonClient, recordings: list[dict[str, Any]], output: Path, frames: int | None) -> None:
    from taesd_stream.media.finished import read_summary

    for number, recording in enumerate(recordings, 1):
        file = output if len(recordings) == 1 else output.with_name(f"{output.stem}.{number}{output.suffix}")
        _download(client, recording, file, frames)
        held = (read_summary(file) or {}).get("frames") or recording["frames"]
        say(f"{file}: {held} frames")
        if frames is not None and held < min(frames, recording["frames"]):
            say("the size of its pictures has changed: all of them are there once the recording is finished")


def _download(client: DaemonClient, recording: dict[str, Any], output: Path, frames: int | None) -> None:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress

    part = output.with_name(output.name + MAKING_SUFFIX)
    columns = (*Progress.get_default_columns(), DownloadColumn())
    try:
        with Progress(*columns, transient=True, console=Console(stderr=True)) as progress, part.open("wb") as file:
            task = progress.add_task("download", total=None)
            for piece, total in client.download(recording["id"], frames, recording["part"]):
                file.write(piece)
                progress.update(task, total=total or None, advance=len(piece))
        part.replace(output)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def push(
    name: Annotated[str, typer.Argument(help="The stream, running already or not yet.")],
    url: Annotated[str, typer.Argument(help="rtsp://host/name, rtmp://host/app/name or rtmps://…")],
    connect: WebOption = DEFAULT_WEB,
) -> None:
    """Send a stream to a media server, until Ctrl-C; it connects again whatever breaks.

    Example: taesd-stream push my-run rtsp://127.0.0.1:8554/my-run
    """
    import threading

    from taesd_stream_workers.streamer.push import Push, source_of

    check_stream_name(name)
    client = DaemonClient(connect)
    one = Push(source_of(client.address, name), url, token=client.token, say=say)
    if name not in {row["name"] for row in client.streams()}:
        say(f"waiting for {name}")
    one.run(threading.Event())


def health(
    connect: WebOption = DEFAULT_WEB,
    role: Annotated[str, typer.Option(help="broker, worker, streamer, or all.")] = "all",
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Exit 0 when the daemon is ready, 69 when it is not.

    Of a broker or a worker whose broker.workers_bind is set, the broker itself is asked; else the web address.

    Example: taesd-stream health --connect 127.0.0.1:8765
    """
    from taesd_stream.config import AUTO, load_config

    if role not in ("all", "broker", "worker", "streamer"):
        raise ConfigError(f"--role {role}: expected broker, worker, streamer or all")
    loaded = load_config(config, sets)
    if role in ("broker", "worker") and loaded.broker.workers_bind != AUTO:
        _ask_broker(loaded, role)
    elif role == "streamer":
        DaemonClient(connect).require_alive()
    else:
        try:
            DaemonClient(connect).require_ready()
        except DaemonError as error:
            raise UnreachableError(f"not ready: {error}") from error


def _ask_broker(config: Config, role: str) -> None:
    from taesd_stream.keys import load_keys
    from taesd_stream_workers.commands.broker_probe import broker_state
    from taesd_stream_workers.role.addresses import dialled, workers_address

    where = dialled(workers_address(config))
    workers = broker_state(where, load_keys(config.keys_folder) if config.keys_folder else None).workers
    if role == "worker" and not workers:
        raise UnreachableError(f"the broker at {where} has no decode worker")


def doctor(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What works on this machine, and the way out of what does not. Exit 2 when `up` would not work.

    Example: taesd-stream doctor --set web.bind=0.0.0.0:8765
    """
    import json
    import sys
    from dataclasses import asdict

    from rich.console import Console

    from taesd_stream.config import load_config
    from taesd_stream_workers.commands.doctor import examine

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    findings = []
    for one in examine(load_config(config, sets)):
        findings.append(one)
        if not as_json:
            style = {"ok": "green", "note": "yellow", "fault": "bold red"}[one.verdict]
            console.print(f"{one.verdict:<6}", style=style, end="")
            console.print(f"{one.what:<18}{one.text}")
            if one.way_out:
                console.print(f"{'':<24}{one.way_out}")
    if as_json:
        sys.stdout.write(json.dumps({"findings": [asdict(one) for one in findings]}) + "\n")
    if any(one.verdict == "fault" for one in findings):
        raise typer.Exit(2)
