"""Commands that read latents from files: publish them to a daemon, or decode them straight to a video."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from taesd_stream.errors import ConfigError, UnreachableError
from taesd_stream_workers.commands.options import KeysOption, SetOption, check_output, check_stream_name, say

if TYPE_CHECKING:
    from torch import Tensor

    from taesd_stream.config import Config
    from taesd_stream.decoding.engine import Engine
    from taesd_stream.frames import Kind, StreamInfo
    from taesd_stream.publisher import LatentPublisher
    from taesd_stream_workers.offline.latent_files import LogRows, Row

KindWord = Literal["steps", "clip", "live"]
RecordWord = Literal["off", "last", "all"]
MAX_IN_FLIGHT: Final = 64
ACK_S: Final = 30.0
HASTY_FPS: Final = 30.0  # steps that come faster leave a film too short to see


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Latents in files")(publish)
    app.command(rich_help_panel="Latents in files")(decode)


FileArgument = Annotated[Path, typer.Argument(help="Latents: .safetensors, .npy, .pth or .latents.")]


def publish(
    file: FileArgument,
    latent_format: Annotated[str | None, typer.Option("--latent-format", help="As sdxl, flux2, wan2_1.")] = None,
    stream: Annotated[str | None, typer.Option(help="Name of the stream; else the file's.")] = None,
    kind: Annotated[
        KindWord | None, typer.Option(help="A row a step (the default), the whole file as one clip, or video time.")
    ] = None,
    record: Annotated[RecordWord | None, typer.Option(help="What the daemon keeps.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, max=1000, help="Rows a second; else as fast as they are kept.")
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="The first axis is a grid of pictures, not time.")] = False,
    connect: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The broker's; several by commas.")] = None,
    keys: KeysOption = None,
) -> None:
    """Publish latents from a file as a sampler would, and wait until what is kept is safe.

    A .latents file, as a publisher leaves one that found no daemon, says all but the address by itself.

    Example: taesd-stream publish latents.safetensors --latent-format flux2 --record all --fps 8
    """
    from taesd_stream.daemons import addresses_of
    from taesd_stream.publisher import LatentPublisher, keys_in
    from taesd_stream_workers.commands.broker_probe import greet_any_broker
    from taesd_stream_workers.offline.latent_files import info_of_log

    info = info_of_log(file)
    name = latent_format or (info.latent_format if info else None)
    if name is None:
        raise ConfigError(f"{file}: say what its latents are, as in --latent-format flux2")
    if info is not None and record is None:
        record = "last" if info.record == "last" else "all"  # they are in a log because they were to be kept
    word: Kind = kind or (info.kind if info else "steps")
    rows = _rows(file, name, word, info, is_batch=batch)
    if stream is not None:
        check_stream_name(stream, "--stream")
    own_keys = keys_in(keys)
    try:
        greet_any_broker(addresses_of(connect), own_keys)
        publisher = LatentPublisher(
            connect,
            stream=stream or (info.stream.partition("~")[0] if info else _name_from(file)),
            latent_format=name,
            kind=word,
            fps=fps or (info.fps if info else None),
            record=record,
            meta={**(info.meta if info else {}), "file": file.name},
            keys_folder=keys,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pause_s = 0.0 if fps is None else (len(next(iter(rows)).latents) if word == "clip" else 1) / fps
    _publish_rows(publisher, rows, word, pause_s, is_loop=loop)


def _rows(file: Path, name: str, kind: Kind, info: StreamInfo | None, *, is_batch: bool) -> list[Row] | LogRows:
    from taesd_stream_workers.offline.latent_files import LogRows, format_of, load_latents, rows_of

    if info is not None:
        return LogRows(file, format_of(name), kind)
    return rows_of(load_latents(file, format_of(name)), kind, is_batch=is_batch)


def _name_from(file: Path) -> str:
    """The file's name as a stream's: what does not fit becomes a dash."""
    kept = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-" for letter in file.stem
    )
    return kept.lstrip("._-")[:64] or "latents"


def _publish_rows(
    publisher: LatentPublisher, rows: list[Row] | LogRows, kind: Kind, pause_s: float, *, is_loop: bool
) -> None:
    began_s = time.monotonic()
    reason: Literal["done", "stopped"] = "done"
    count = 0
    try:
        for row in _with_progress(_looped(rows) if is_loop else rows, publisher.stream, None if is_loop else len(rows)):
            if publisher.stopped:
                break
            publisher.publish(row.latents, step=row.step, total_steps=row.total_steps, sigma=row.sigma)
            count += 1
            if pause_s:
                time.sleep(pause_s)
            elif count % MAX_IN_FLIGHT == 0 and not publisher.wait_until_acked(ACK_S):
                break  # no faster than they are kept
    except KeyboardInterrupt:
        reason = "stopped"
    is_acked = publisher.wait_until_acked(ACK_S)
    error = publisher.error
    publisher.close(reason=reason)
    if error or not is_acked:
        raise UnreachableError(error or f"{publisher.address}: the broker did not keep all within {ACK_S:.0f} s")
    took_s = time.monotonic() - began_s
    if not pause_s and kind == "steps" and count > 1 and count / took_s > HASTY_FPS:
        say(f"their film lasts {took_s:.1f} s, as they came; with --fps 8 it lasts {count / 8:.0f} s")
    say(f"{publisher.stream}: {count} frames published")


def _looped(rows: list[Row] | LogRows) -> Iterator[Row]:
    """The rows again and again, their steps counted on."""
    from taesd_stream_workers.offline.latent_files import Row

    step = 0
    while True:
        for row in rows:
            yield Row(row.latents, step, None, row.sigma)
            step += 1


def _with_progress(rows: Iterable[Row], stream: str, total: int | None) -> Iterator[Row]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        yield from progress.track(rows, total=total, description=f"publish {stream}")


def decode(
    file: FileArgument,
    latent_format: Annotated[str, typer.Option("--latent-format", help="As sdxl, flux2, wan2_1.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The MP4 to write.")],
    fps: Annotated[float, typer.Option(min=0.01, max=1000, help="Pictures a second of the video.")] = 16.0,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Decode latents straight to a video, without a daemon.

    Latents of a video format are one video; without its decoder a picture stands for all frames of its latent.

    Example: taesd-stream decode latents.pth --latent-format flux2 -o out.mp4 --set weights.folder=~/vae_approx
    """
    import torch

    from taesd_stream.config import load_config
    from taesd_stream.decoding.slicing import decode_budget
    from taesd_stream_workers.offline.latent_files import format_of, info_of_log, load_latents, rows_of_log

    if output.suffix != ".mp4":
        raise ConfigError(f"{output}: expected a name that ends in .mp4")
    check_output(output)
    config = load_config(sets=sets)
    latents = load_latents(file, format_of(latent_format, config.weights_folder))
    info = info_of_log(file)
    videos: Sequence[Tensor] = ()
    if info is None or info.kind == "live":
        videos = [latents]
    elif info.kind == "clip":
        videos = torch.split(latents, [len(row.latents) for row in rows_of_log(file)])
    try:
        engine = open_best_engine(latent_format, config)
        budget_bytes = decode_budget(config.decoder, engine.device)
        count = _decode_to_file(latents, videos, engine, output, fps, budget_bytes)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
    say(f"{output}: {count} pictures, decoder {engine.decoder}")
    if not engine.is_full:
        say(engine.reason)


def open_best_engine(latent_format: str, config: Config) -> Engine:
    """The decoder that the configuration chooses for a format, in full precision. Raises: ConfigError for none."""
    from taesd_stream.decoding.choice import NoDecoderError, open_engine
    from taesd_stream_workers.start_checks import check_start
    from taesd_stream_workers.worker.devices import choose_device

    check_start(config, ["worker"])
    device, _ = choose_device(config.decoder.device.partition(",")[0], config.decoder.min_free_bytes)
    folder, choice = config.weights_folder, config.decoder.choice
    try:
        return open_engine(latent_format, weights_folder=folder, choice=choice, device=str(device))
    except NoDecoderError as error:
        raise ConfigError(str(error)) from error


def _decode_to_file(
    latents: Tensor, videos: Sequence[Tensor], engine: Engine, output: Path, fps: float, budget_bytes: int
) -> int:
    """videos: which of the latents are a video each, if the format is one's; none: pictures. Returns: how many."""
    from rich.console import Console
    from rich.progress import Progress

    from taesd_stream.decoding.colour import video_planes
    from taesd_stream.decoding.video_engine import VideoEngine
    from taesd_stream.media.video_file import VideoFile

    if videos and isinstance(engine, VideoEngine):
        pieces = (piece for video in videos for piece in engine.decode_clip(video, budget_bytes=budget_bytes))
    else:
        rows = (latents[place : place + 1] for place in range(len(latents)))
        pieces = (piece for row in rows for piece in engine.decode(row, budget_bytes=budget_bytes))
        if videos and engine.temporal_factor is not None:
            fps /= engine.temporal_factor
    count = 0
    with Progress(transient=True, console=Console(stderr=True)) as progress, VideoFile(output, fps) as video:
        task = progress.add_task(f"decode with {engine.decoder}", total=len(latents))
        for place, rgb in pieces:
            for planes in video_planes(rgb).cpu().numpy():
                video.add(planes)
                count += 1
            progress.advance(task, place.stop - place.start)
    return count
