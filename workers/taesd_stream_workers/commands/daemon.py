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

from taesd_stream_workers.commands.options import (
    ConfigOption,
    InsecureOption,
    SetOption,
    VerboseOption,
    said_insecure,
    say,
)

if TYPE_CHECKING:
    from taesd_stream.config import Config
    from taesd_stream_workers.commands.demo import DemoSamplers
    from taesd_stream_workers.host_daemons import HostDaemons
    from taesd_stream_workers.supervisor import Addresses

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
    daemons: Annotated[
        int, typer.Option(min=1, max=64, help="Run so many side by side, for more latents than one broker carries.")
    ] = 1,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
    insecure: InsecureOption = False,
) -> None:
    """Run the whole daemon: broker, decode worker and streamer, until Ctrl-C.

    Example: taesd-stream up --set weights.folder=~/ComfyUI/models/vae_approx --set recording.default=all
    """
    _run_daemons(config, said_insecure(sets, insecure), count=daemons, as_json=as_json, verbose=verbose)


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
        from taesd_stream_workers.commands.demo import DemoSamplers, open_browser
        from taesd_stream_workers.role.addresses import dialled

        samplers = DemoSamplers(dialled(addresses.broker), step_s, config.keys_folder)
        if open_page:
            open_browser(link)
        return samplers

    _run_daemons(config, sets, as_json=as_json, verbose=verbose, start_samplers=start_samplers)


def _run_daemons(
    file: Path | None,
    sets: list[str],
    *,
    count: int = 1,
    as_json: bool,
    verbose: bool,
    start_samplers: Samplers | None = None,
) -> None:
    from taesd_stream.config import load_config
    from taesd_stream.log import set_up_logging
    from taesd_stream_workers.host_daemons import HostDaemons, configs_of
    from taesd_stream_workers.role.web_token import page_link
    from taesd_stream_workers.start_checks import check_start
    from taesd_stream_workers.supervisor import stopped_by_signals

    # On a terminal the greeting says what the log would; later lines would only push the page's address away.
    is_quiet = sys.stderr.isatty() and not verbose
    set_up_logging("up", is_verbose=verbose, is_quiet=is_quiet)
    config = load_config(file, sets)
    check_start(config)
    configs = configs_of(config, count)
    for other in configs[1:]:
        check_start(other)
    daemons = HostDaemons(configs, options=["--verbose"] if verbose else ["--quiet"] if is_quiet else [])
    with stopped_by_signals(daemons.stop), daemons:
        with _starting():
            addresses = daemons.start()
        if addresses is None:  # told to stop before all were ready
            return
        link = page_link(config, addresses[0].web)
        if as_json:
            sys.stdout.write(json.dumps(_facts(addresses, daemons, config)) + "\n")
            sys.stdout.flush()
        else:
            _greet(addresses, link, daemons, configs, is_demo=start_samplers is not None)
        _watch_over(daemons, start_samplers(addresses[0], link, config) if start_samplers else None)


def _facts(addresses: list[Addresses], daemons: HostDaemons, config: Config) -> dict[str, Any]:
    """Of the first daemon; where there are others, of each of them in `others`."""
    from dataclasses import asdict

    from taesd_stream_workers.role.web_token import is_token_needed, token_file

    first, *others = [{**asdict(at), "roles": roles} for at, roles in zip(addresses, daemons.status(), strict=True)]
    token = str(token_file(config)) if is_token_needed(config) else None
    return {**first, "token_file": token, **({"others": others} if others else {})}


def _watch_over(daemons: HostDaemons, samplers: DemoSamplers | None) -> None:
    try:
        daemons.run()
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


def _greet(
    addresses: list[Addresses], link: str, daemons: HostDaemons, configs: list[Config], *, is_demo: bool
) -> None:
    """Who is ready, and last, where to look."""
    from rich.console import Console

    from taesd_stream_workers.host_daemons import share_of
    from taesd_stream_workers.role.addresses import dialled

    brokers = [one.broker for one in addresses]
    workers = [row for roles in daemons.status() for row in roles if "device" in row]
    decoders = [f"{row['device']}: {row['reason']}" for row in workers]
    several = f"export TAESD_STREAM_ADDRESS={','.join(map(dialled, brokers))}"
    lines = {
        "Broker": f"ready at {', '.join(brokers)}",
        "Streamer": f"ready, recordings in {', '.join(str(one.recording_folder) for one in configs)}",
        "Decoder": f"ready on {'; '.join(decoders)}",
        "Share": share_of(len(configs), [row["device"] for row in workers]) if len(configs) > 1 else "",
        "Publish": "" if is_demo else several if len(brokers) > 1 else PUBLISH_LINE.format(brokers[0]),
        "Stop": "Ctrl-C; files are closed properly",
    }
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for name, text in lines.items():
        if text:
            console.print(f"{name:<10}{text}")
    console.print(f"\n{'Watch':<10}", style="bold", end="")
    console.print(link, style="bold cyan underline")
    console.file.flush()
