"""Commands that read latents from files: publish them to a daemon, or decode them straight to a video."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from taesd_stream.errors import ConfigError, UnreachableError
from taesd_stream_workers.cli_options import SetOption, say

if TYPE_CHECKING:
    from torch import Tensor

    from taesd_stream.publisher import LatentPublisher

KindWord = Literal["steps", "clip", "live"]
RecordWord = Literal["off", "last", "all"]
MAX_IN_FLIGHT: Final = 64


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Latents in files")(publish)
    app.command(rich_help_panel="Latents in files")(decode)


FileArgument = Annotated[Path, typer.Argument(help="Latents: .safetensors, .npy, .pth or .latents.")]


def publish(
    file: FileArgument,
    latent_format: Annotated[str | None, typer.Option("--latent-format", help="As sdxl, flux2, wan2_1.")] = None,
    stream: Annotated[str | None, typer.Option(help="Name of the stream; else the file's.")] = None,
    kind: Annotated[KindWord, typer.Option(help="A row a step, the whole file as one clip, or video time.")] = "steps",
    record: Annotated[RecordWord | None, typer.Option(help="What the daemon keeps.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, max=1000, help="Rows a second; else as fast as they are kept.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="The first axis is a grid of pictures, not time.")] = False,
    connect: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The broker's address.")] = None,
) -> None:
    """Publish latents from a file as a sampler would, and wait until what is kept is safe.

    Example: taesd-stream publish latents.safetensors --latent-format flux2 --record all --fps 8
    """
    from taesd_stream.publisher import LatentPublisher
    from taesd_stream_workers.latent_files import format_of, info_of_log, load_latents, rows_to_publish

    info = info_of_log(file)
    name = latent_format or (info.latent_format if info else None)
    if name is None:
        raise ConfigError(f"{file}: say what its latents are, as in --latent-format flux2")
    rows = rows_to_publish(load_latents(file, format_of(name)), kind, is_batch=batch)
    try:
        publisher = LatentPublisher(
            connect,
            stream=stream or (info.stream.partition("~")[0] if info else _name_from(file)),
            latent_format=name,
            kind=kind,
            fps=fps,
            record=record,
            meta={**(info.meta if info else {}), "file": file.name},
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    _publish_rows(publisher, rows, fps if kind != "clip" else None, loop=loop)


def _name_from(file: Path) -> str:
    """The file's name as a stream's: what does not fit becomes a dash."""
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in file.stem
    )
    return kept.lstrip("._-")[:64] or "latents"


def _publish_rows(publisher: LatentPublisher, rows: list[Tensor], fps: float | None, *, loop: bool) -> None:
    from rich.progress import Progress

    pause = threading.Event()
    reason: Literal["done", "stopped"] = "done"
    try:
        with Progress(transient=True) as progress:
            task = progress.add_task(f"publish {publisher.stream}", total=None if loop else len(rows))
            step = 0
            while not publisher.stopped and (loop or step < len(rows)):
                total = None if loop else len(rows)
                publisher.publish(rows[step % len(rows)], step=step, total_steps=total)
                step += 1
                progress.advance(task)
                if fps:
                    pause.wait(1 / fps)
                elif step % MAX_IN_FLIGHT == 0:
                    publisher.wait_until_acked(30.0)  # no faster than they are kept
    except KeyboardInterrupt:
        reason = "stopped"
    is_acked = publisher.wait_until_acked(30.0)
    publisher.close(reason=reason)
    if not is_acked:
        raise UnreachableError(
            publisher.error or f"no broker answered at {publisher.address}: nothing was shown or kept"
        )
    say(f"{publisher.stream}: {step} frames published")


def decode(
    file: FileArgument,
    latent_format: Annotated[str, typer.Option("--latent-format", help="As sdxl, flux2, wan2_1.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The MP4 to write.")],
    fps: Annotated[float, typer.Option(min=0.01, max=1000, help="Pictures a second of the video.")] = 16.0,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Decode latents straight to a video, without a daemon.

    Example: taesd-stream decode latents.pth --latent-format flux2 -o out.mp4 --set weights.folder=~/vae_approx
    """
    from taesd_stream.config import load_config
    from taesd_stream_workers.latent_files import format_of, load_latents

    if output.suffix != ".mp4":
        raise ConfigError(f"{output}: expected a name that ends in .mp4")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no folder {output.parent}")
    latents = load_latents(file, format_of(latent_format))
    count, decoder, reason = _decode_to_file(latents, latent_format, output, fps, load_config(sets=sets))
    say(f"{output}: {count} pictures, decoder {decoder}")
    if reason:
        say(reason)


def _decode_to_file(latents: Tensor, latent_format: str, output: Path, fps: float, config: Any) -> tuple[int, str, str]:
    from rich.progress import Progress

    from taesd_stream.decoding.colour import video_planes
    from taesd_stream.decoding.engine import open_engine
    from taesd_stream.media.video_file import VideoFile
    from taesd_stream_workers.decode_worker import choose_device

    device, _ = choose_device(config.decoder.device, config.decoder.min_free_bytes)
    engine = open_engine(
        latent_format, weights_folder=config.weights_folder, choice=config.decoder.choice, device=str(device)
    )
    count = 0
    with Progress(transient=True) as progress, VideoFile(output, fps) as video:
        task = progress.add_task(f"decode with {engine.decoder}", total=len(latents))
        for row in (latents[place : place + 1] for place in range(len(latents))):
            for _, rgb in engine.decode(row, budget_bytes=config.decoder.memory_bytes):
                for planes in video_planes(rgb).cpu().numpy():
                    video.add(planes)
                    count += 1
            progress.advance(task)
    return count, engine.decoder, "" if engine.is_full else engine.reason
