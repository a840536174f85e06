"""The commands that run a whole daemon: `up`, and `demo` with samplers of its own."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from taesd_stream_workers.cli_options import ConfigOption, InsecureOption, SetOption, VerboseOption, said_insecure, say

if TYPE_CHECKING:
    from taesd_stream.config import Config
    from taesd_stream_workers.demo import DemoSamplers
    from taesd_stream_workers.supervisor import Addresses, Supervisor

logger = logging.getLogger(__name__)

JsonOption = Annotated[bool, typer.Option("--json", help="Print the bound addresses as one line of JSON.")]
Samplers = Callable[["Addresses", str, "Config"], "DemoSamplers"]  # where the daemon is, the link to its page
PUBLISH_LINE: Final = "LatentPublisher({!r}, stream='my-run', latent_format='flux2')"


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Daemon")(up)
    app.command(rich_help_panel="Daemon")(demo)


def up(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    insecure: InsecureOption = False,
) -> None:
    """Run the whole daemon: broker, decode worker and streamer, until Ctrl-C.

    Example: taesd-stream up --set weights.folder=~/ComfyUI/models/vae_approx --set recording.default=all
    """
    _run_daemon(config, said_insecure(sets, insecure), as_json=as_json, verbose=verbose, start_samplers=None)


def demo(
    config: ConfigOption = None,
    sets: SetOption = [],  # noqa: B006
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page where there is a desktop.")] = True,
    step_s: Annotated[float, typer.Option(min=0.01, max=10, help="Seconds a step takes.")] = 0.4,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the daemon with built-in samplers: no weights, no network, no GPU.

    Example: taesd-stream demo --step-s 0.1
    """

    def start_samplers(addresses: Addresses, link: str, config: Config) -> DemoSamplers:
        from taesd_stream_workers.addresses import dialled
        from taesd_stream_workers.demo import DemoSamplers, open_browser

        samplers = DemoSamplers(dialled(addresses.broker), step_s, config.keys_folder)
        if open_page:
            open_browser(link)
        return samplers

    _run_daemon(config, sets, as_json=as_json, verbose=verbose, start_samplers=start_samplers)


def _run_daemon(
    file: Path | None, sets: list[str], *, as_json: bool, verbose: bool, start_samplers: Samplers | None
) -> None:
    from taesd_stream.config import load_config
    from taesd_stream.log import set_up_logging
    from taesd_stream_workers.start_checks import check_start
    from taesd_stream_workers.supervisor import Supervisor, stopped_by_signals
    from taesd_stream_workers.web_token import is_token_needed, page_link, token_file

    # On a terminal the greeting says what the log would; later lines would only push the page's address away.
    is_quiet = sys.stderr.isatty() and not verbose
    set_up_logging("up", is_verbose=verbose, is_quiet=is_quiet)
    config = load_config(file, sets)
    check_start(config)
    supervisor = Supervisor(config, options=["--verbose"] if verbose else ["--quiet"] if is_quiet else [])
    with stopped_by_signals(supervisor.stop), supervisor:
        with _starting():
            addresses = supervisor.start()
        if addresses is None:  # told to stop before all were ready
            return
        link = page_link(config, addresses.web)
        if as_json:
            facts = {name: getattr(addresses, name) for name in ("web", "broker", "workers", "packets")}
            facts["token_file"] = str(token_file(config)) if is_token_needed(config) else None
            sys.stdout.write(json.dumps({**facts, "roles": supervisor.status()}) + "\n")
            sys.stdout.flush()
        else:
            _greet(addresses, link, supervisor, config, is_demo=start_samplers is not None)
        _watch_over(supervisor, start_samplers(addresses, link, config) if start_samplers else None)


def _watch_over(supervisor: Supervisor, samplers: DemoSamplers | None) -> None:
    try:
        supervisor.run()
    finally:
        if sys.stderr.isatty():
            say("Stopping: closing every file.")
        logger.info("stopping")
        if samplers is not None:
            samplers.close()


def _starting() -> AbstractContextManager[Any]:
    """On a terminal something that moves while imports and devices take their seconds."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status("Starting broker, streamer and decode worker") if console.is_terminal else nullcontext()


def _greet(addresses: Addresses, link: str, supervisor: Supervisor, config: Config, *, is_demo: bool) -> None:
    """Who is ready, and last, where to look."""
    from rich.console import Console

    decoders = [f"{row['device']}: {row['reason']}" for row in supervisor.status() if "device" in row]
    lines = {
        "Broker": f"ready at {addresses.broker}",
        "Streamer": f"ready, recordings in {config.recording_folder}",
        "Decoder": f"ready on {'; '.join(decoders)}",
        "Publish": "" if is_demo else PUBLISH_LINE.format(addresses.broker),
        "Stop": "Ctrl-C; files are closed properly",
    }
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for name, text in lines.items():
        if text:
            console.print(f"{name:<10}{text}")
    console.print(f"\n{'Watch':<10}", style="bold", end="")
    console.print(link, style="bold cyan underline")
    console.file.flush()
