"""The command line: the roles, each as a command, and the commands of the files beside it.

Imports of what is heavy are inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from taesd_stream import __version__
from taesd_stream.errors import ConfigError, StreamAbsentError, TaesdStreamError, UnreachableError
from taesd_stream_workers.commands import (
    bench,
    client,
    comfyui,
    daemon,
    distill,
    files,
    fit,
    keys,
    ray,
    recordings,
    weights,
)
from taesd_stream_workers.commands.options import (
    INTERRUPTED,
    ConfigOption,
    InsecureOption,
    NameOption,
    QuietOption,
    SetOption,
    VerboseOption,
    said_insecure,
    say,
)

OK: Final = 0
USAGE: Final = 2
UNREACHABLE: Final = 69  # EX_UNAVAILABLE of sysexits.h
INTERNAL: Final = 70
# How often a thread of torch's looks for work before it sleeps. libgomp's own 300,000 keep a core from the sampler, and
# where all cores are busy each step of a decoder waits for a thread that waits for another that spins: measured on two
# cores beside one busy program, nano at 512x512 takes 55 to 70 ms so, up to 380 ms by default; alone 38 and 36.
SPINS: Final = 5000

logger = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Live previews and recordings of what a diffusion sampler is painting.\n\n"
    "Begin with [bold]taesd-stream demo[/bold]; then [bold]taesd-stream up[/bold] beside your sampler.",
)
daemon.add_commands(app)
client.add_commands(app)
files.add_commands(app)
bench.add_commands(app)
weights.add_commands(app)
fit.add_commands(app)
distill.add_commands(app)
recordings.add_commands(app)
keys.add_commands(app)
comfyui.add_commands(app)
ray.add_commands(app)


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"taesd-stream {__version__}")
        raise typer.Exit(OK)


def _run_role(role: str, config: Path | None, sets: list[str], *, name: str | None, verbose: bool, quiet: bool) -> None:
    """Run one role in this process, with its config from a file or, supervised, from stdin."""
    from taesd_stream.config import load_config
    from taesd_stream.log import set_up_logging
    from taesd_stream_workers.role.lifecycle import Lifecycle
    from taesd_stream_workers.start_checks import check_start

    set_up_logging(name or role, is_verbose=verbose, is_quiet=quiet)
    is_supervised = config is not None and str(config) == "-"
    loaded = load_config(values=_config_from_stdin()) if is_supervised else load_config(config, sets)
    if not is_supervised:  # else the supervisor has checked
        check_start(loaded, [role])
    lifecycle = Lifecycle(role, is_supervised=is_supervised)
    lifecycle.start()
    try:
        _role_main(role)(loaded, lifecycle)
    except ConfigError as error:
        if not is_supervised:
            raise
        lifecycle.refuse(str(error))  # the supervisor says it, when the other roles have said their last
        _exit_at_once(USAGE)
    if is_supervised:
        _exit_at_once(OK)


def _exit_at_once(code: int) -> None:
    """End the process now: all is closed, and freeing torch's memory bit by bit would take of the stop's 5 s."""
    logging.shutdown()
    os._exit(code)


def _config_from_stdin() -> dict[str, Any]:
    """The first line; read byte by byte, for what comes after it belongs to the lifeline."""
    line = bytearray()
    while (byte := os.read(sys.stdin.fileno(), 1)) not in (b"", b"\n"):
        line += byte
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"--config -: expected one line of JSON on stdin: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError("--config -: expected a JSON object on stdin")
    return values


def _role_main(role: str) -> Callable[..., None]:
    if role == "broker":
        from taesd_stream_workers.broker.broker import run_broker

        return run_broker
    if role == "worker":
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            os.environ["GOMP_SPINCOUNT"] = str(SPINS)  # read when torch is imported
        from taesd_stream_workers.worker.decode_worker import run_worker

        return run_worker
    from taesd_stream_workers.streamer.streamer import run_streamer

    return run_streamer


@app.command(rich_help_panel="Roles, each alone")
def broker(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
    name: NameOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    insecure: InsecureOption = False,
) -> None:
    """Take latents in, keep them, give workers their jobs.

    Example: taesd-stream broker --set broker.workers_bind=tcp://127.0.0.1:5761
    """
    _run_role("broker", config, said_insecure(sets, insecure), name=name, verbose=verbose, quiet=quiet)


@app.command(rich_help_panel="Roles, each alone")
def worker(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006
    name: NameOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    insecure: InsecureOption = False,
) -> None:
    """Decode latents and encode pictures, on one device.

    Example: taesd-stream worker --set decoder.device=cuda:0 --set broker.workers_bind=tcp://127.0.0.1:5761
    """
    _run_role("worker", config, said_insecure(sets, insecure), name=name, verbose=verbose, quiet=quiet)


@app.command(rich_help_panel="Roles, each alone")
def streamer(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006
    name: NameOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
    insecure: InsecureOption = False,
) -> None:
    """Serve the page, viewers and recordings.

    Example: taesd-stream streamer --set web.bind=127.0.0.1:9000
    """
    _run_role("streamer", config, said_insecure(sets, insecure), name=name, verbose=verbose, quiet=quiet)


def run() -> None:
    """Run the command line: every error on purpose becomes one line and the exit code that says whose it is."""
    try:
        code = app(prog_name="taesd-stream", standalone_mode=False)
        sys.exit(code if isinstance(code, int) else OK)  # typer.Exit comes back as its code
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except (ConfigError, StreamAbsentError) as error:
        if str(error):
            say(f"taesd-stream: {error}", is_error=True)
        sys.exit(USAGE)
    except TaesdStreamError as error:
        say(f"taesd-stream: {error}", is_error=True)
        sys.exit(UNREACHABLE if isinstance(error, UnreachableError) else INTERNAL)
    except PermissionError as error:
        say(f"taesd-stream: {error.filename or 'a file'}: {error.strerror or error}", is_error=True)
        sys.exit(USAGE)
    except ModuleNotFoundError:
        raise  # cli.py says what to install
    except Exception as error:
        show = getattr(error, "show", None)  # click's own errors of usage
        if show is not None:
            show()
            sys.exit(USAGE)
        logger.exception("internal_error")
        sys.exit(INTERNAL)
