"""Commands that read latents from files: publish them to a daemon, or decode them straight to a video."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from taesd_stream.errors import ConfigError, UnreachableError
from taesd_stream_workers.commands.options import (
    KeysOption,
    SetOption,
    check_output,
    check_stream_name,
    say,
    say_damaged,
    with_progress,
)

if TYPE_CHECKING:
    from torch import Tensor

    from taesd_stream.config import Config
    from taesd_stream.decoding.engine import Engine
    from taesd_stream.frames import Kind, StreamInfo
    from taesd_stream.latent_formats import LatentFormat
    from taesd_stream.publisher import LatentPublisher
    from taesd_stream_workers.offline.latent_files import LogRows, Row

KindWord = Literal["steps", "clip", "live"]
RecordWord = Literal["off", "last", "all"]
MAX_IN_FLIGHT: Final = 64
ACK_S: Final = 30.0
DEFAULT_FPS: Final = 16.0
HASTY_FPS: Final = 30.0  # steps that come faster leave a film too short to see


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Latents in files")(publish)
    app.command(rich_help_panel="Latents in files")(decode)


FileArgument = Annotated[Path, typer.Argument(help="Latents: .safetensors, .npy, .pth or .latents.")]
LatentFormatOption = Annotated[
    str | None, typer.Option("--latent-format", help="As sdxl, flux2, wan2_1; .latents files say it.")
]


def publish(
    file: FileArgument,
    latent_format: LatentFormatOption = None,
    stream: Annotated[str | None, typer.Option(help="Name of the stream; else the file's.")] = None,
    kind: Annotated[
        KindWord | None, typer.Option(help="A row a step (the default), the whole file as one clip, or video time.")
    ] = None,
    record: Annotated[RecordWord | None, typer.Option(help="What the daemon keeps.")] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1000, help="Rows a second, of video its pictures a second; else as fast as they are kept."
        ),
    ] = None,
    loop: Annotated[bool, typer.Option("--loop", help="Begin again at the end, until Ctrl-C.")] = False,
    batch: Annotated[bool, typer.Option("--batch", help="The first axis is a grid of pictures, not time.")] = False,
    connect: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The broker's; several by commas.")] = None,
    keys: KeysOption = None,
) -> None:
    """Publish latents from a file as a sampler would, and wait until what is kept is safe.

    A .latents file, as a publisher leaves one that found no daemon, says all but the address by itself; of a long run
    that lies in several files the first stands for all.

    Example: taesd-stream publish latents.safetensors --latent-format flux2 --record all --fps 8
    """
    from taesd_stream.config import load_config
    from taesd_stream.daemons import addresses_of
    from taesd_stream.publisher import LatentPublisher, keys_in
    from taesd_stream_workers.commands.broker_probe import greet_any_broker
    from taesd_stream_workers.offline.latent_files import LogRows, format_of, info_of_log

    info = info_of_log(file)
    name = _format_name(file, latent_format, info)
    if info is not None and record is None:
        record = "last" if info.record == "last" else "all"  # they are in a log because they were to be kept
    word: Kind = kind or (info.kind if info else "steps")
    known = format_of(name, load_config().weights_folder)
    rows = _rows(file, known, word, info, is_batch=batch)
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
            wire_dtype=rows.dtype if isinstance(rows, LogRows) else None,  # as its sampler wanted it
            keys_folder=keys,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pause_s = 0.0 if fps is None else pictures_of(next(iter(rows)), word, known) / fps
    _publish_rows(publisher, rows, word, pause_s, is_loop=loop)


def pictures_of(row: Row, kind: Kind, known: LatentFormat) -> int:
    """How many pictures a row is shown as, but for those that a video's first latent hides."""
    return 1 if kind == "steps" else math.prod(row.latents.shape[:-3]) * (known.temporal_factor or 1)


def _format_name(file: Path, asked: str | None, info: StreamInfo | None) -> str:
    """What is asked for, else what a log says. Raises: ConfigError where neither does."""
    name = asked or (info.latent_format if info else None)
    if name is None:
        raise ConfigError(f"{file}: say what its latents are, as in --latent-format flux2")
    return name


def _rows(
    file: Path, known: LatentFormat, kind: Kind, info: StreamInfo | None, *, is_batch: bool
) -> list[Row] | LogRows:
    from taesd_stream_workers.offline.latent_files import LogRows, load_latents, rows_of

    if info is not None:
        log = LogRows(file, known, kind)
        say_damaged(file, log.damaged_bytes)
        return log
    return rows_of(load_latents(file, known), kind, is_batch=is_batch)


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
        shown, total = (_looped(rows), None) if is_loop else (rows, len(rows))
        for row in with_progress(shown, f"publish {publisher.stream}", total):
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


def decode(
    file: FileArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The MP4 to write.")],
    latent_format: LatentFormatOption = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, max=1000, help="Pictures a second of the video; else the file's, or 16.")
    ] = None,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Decode latents straight to a video, without a daemon.

    Latents of a video format are one video; without its decoder a picture stands for all frames of its latent. A
    .latents file says by itself what it holds.

    Example: taesd-stream decode latents.pth --latent-format flux2 -o out.mp4 --set weights.folder=~/vae_approx
    """
    from taesd_stream.config import load_config
    from taesd_stream.decoding.slicing import decode_budget
    from taesd_stream.decoding.video_engine import VideoEngine
    from taesd_stream_workers.offline.latent_files import LogRows, format_of, info_of_log, load_latents
    from taesd_stream_workers.offline.log_pictures import log_pictures

    if output.suffix != ".mp4":
        raise ConfigError(f"{output}: expected a name that ends in .mp4")
    check_output(output)
    config, info = load_config(sets=sets), info_of_log(file)
    name = _format_name(file, latent_format, info)
    known = format_of(name, config.weights_folder)
    content = load_latents(file, known) if info is None else LogRows(file, known, info.kind)
    engine = open_best_engine(name, config)
    budget_bytes = decode_budget(config.decoder, engine.device)
    rate = fps or (info and info.fps) or DEFAULT_FPS
    is_video = info is None or info.kind != "steps"
    if is_video and not isinstance(engine, VideoEngine):
        rate /= engine.temporal_factor or 1
    if isinstance(content, LogRows):
        say_damaged(file, content.damaged_bytes)
        pictures: Iterator[Tensor] = (rgb for rgb, _ in log_pictures(file, engine, budget_bytes))
        total = None if is_video else len(content)
    else:
        pictures, total = _pictures_of(content, engine, budget_bytes)
    try:
        count = _write_video(with_progress(pictures, f"decode with {engine.decoder}", total), output, rate)
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written: {error.strerror or error}") from error
    say(f"{output}: {count} pictures, decoder {engine.decoder}")
    if not engine.is_full:
        say(engine.reason)


def open_best_engine(latent_format: str, config: Config) -> Engine:
    """The decoder that the configuration chooses for a format, in full precision. Raises: ConfigError for none.

    torch computes on `decoder.threads` from here on.
    """
    import torch

    from taesd_stream.decoding.choice import NoDecoderError, open_engine
    from taesd_stream_workers.start_checks import check_start
    from taesd_stream_workers.worker.devices import choose_device

    check_start(config, ["worker"])
    if config.decoder.threads:
        torch.set_num_threads(config.decoder.threads)
    device, _ = choose_device(config.decoder.device.partition(",")[0], config.decoder.min_free_bytes)
    folder, choice = config.weights_folder, config.decoder.choice
    try:
        return open_engine(latent_format, weights_folder=folder, choice=choice, device=str(device))
    except NoDecoderError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error


def _pictures_of(latents: Tensor, engine: Engine, budget_bytes: int) -> tuple[Iterator[Tensor], int]:
    """Pictures, (3, H, W) RGB in [0, 1], and how many."""
    from taesd_stream.decoding.video_engine import VideoEngine

    if isinstance(engine, VideoEngine):
        pieces, total = engine.decode_clip(latents, budget_bytes=budget_bytes), engine.frames_of_clip(len(latents))
    else:
        rows = (latents[place : place + 1] for place in range(len(latents)))
        pieces, total = (piece for row in rows for piece in engine.decode(row, budget_bytes=budget_bytes)), len(latents)
    return (picture for _, rgb in pieces for picture in rgb), total


def _write_video(pictures: Iterable[Tensor], output: Path, fps: float) -> int:
    from taesd_stream.decoding.colour import video_planes
    from taesd_stream.media.video_file import VideoFile

    count = 0
    with VideoFile(output, fps) as video:
        for rgb in pictures:
            video.add(video_planes(rgb.unsqueeze(0))[0].cpu().numpy())
            count += 1
    return count
