"""`taesd-stream distill`: a small decoder for any latent space, from pictures and an encoder, or from pairs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from taesd_stream.errors import ConfigError
from taesd_stream_workers.commands.options import INTERRUPTED, say

_BATCH_PX = {"cuda": 64 * 256 * 256, "cpu": 4 * 256 * 256}


def add_commands(app: typer.Typer) -> None:
    """Put the command on the application."""
    app.command(rich_help_panel="Decoders")(distill)


def distill(
    pictures: Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures; without --encoder, pairs as for fit.")],
    name: Annotated[str, typer.Argument(metavar="FORMAT", help="As publishers call it: sdxl, or a name of your own.")],
    encoder: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An encoder's file, or the folder of a saved AutoencoderTiny.")
    ] = None,
    family: Annotated[
        str, typer.Option(metavar="NAME", help="The image family of the encoder's file, as taesdxl, taef2.")
    ] = "",
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the file goes; else where every daemon of yours looks.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="More are better: 20000 take 8 minutes on a large GPU.")] = 4000,
    smallest: Annotated[int, typer.Option(min=32, help="Side of the smallest crops, in pixels.")] = 128,
    batch_px: Annotated[int, typer.Option("--batch-px", min=0, help="Pixels of a batch; else as the device is.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a format of that name.")] = False,
) -> None:
    """Train a nano decoder, small enough for live views on a processor, and measure it on pictures it has not seen.

    Ctrl-C keeps what was learned; the same command goes on from there.

    Example: taesd-stream distill photos/ sdxl --encoder taesdxl_encoder.pth --family taesdxl --steps 20000
    """
    import torch

    from taesd_stream.training.distillation import Settings
    from taesd_stream.user_formats import check_format_name, user_formats_folder
    from taesd_stream_workers.offline.distilling import distil, measure, save
    from taesd_stream_workers.offline.material import from_pairs, from_pictures
    from taesd_stream_workers.worker.devices import choose_device

    check_format_name(name)
    path = (folder or user_formats_folder()) / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: is there already; --overwrite replaces it")
    where, why = choose_device(device, 0) if device != "cpu" else (torch.device("cpu"), "as you said")
    pixels = batch_px or _BATCH_PX["cuda" if where.type == "cuda" else "cpu"]
    if encoder is None:
        material = from_pairs(name, pictures, where, pixels=pixels)
    else:
        if not encoder.exists():
            raise ConfigError(f"--encoder {encoder}: there is no such file")
        material = from_pictures(name, pictures, family, encoder, where, pixels=pixels, smallest=smallest)
    checkpoint = path.with_name(f"{name}.distilling.safetensors")
    with _until_interrupted() as is_stopped, _progress(steps) as on_step:
        say(f"{material.count} pictures to train on, {len(material.held_out)} held out; {where} ({why})")
        for note in material.notes:
            say(note)
        training = distil(material, Settings(steps=steps), where, checkpoint, is_stopped=is_stopped, on_step=on_step)
    if not training.is_over:
        say(f"stopped after {training.done} of {steps} steps, kept in {checkpoint}; the same command goes on")
        raise typer.Exit(INTERRUPTED)
    report = measure(training, material)
    save(path, training, material, report)
    checkpoint.unlink(missing_ok=True)
    say(f"{path}: {path.stat().st_size / 1000:.0f} kB, {report.text()}")


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the step at hand, not in the middle of it; a second one ends at once."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, _: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int, float], None]]:
    import math

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("distil", total=steps)

        def show(done: int, error: float) -> None:
            text = f"distil, {-10 * math.log10(max(error, 1e-10)):.1f} dB"
            progress.update(task, completed=done, description=text)

        yield show
