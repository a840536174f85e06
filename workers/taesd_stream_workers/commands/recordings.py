"""Commands on recorded files, without a daemon: what is in one, and one made into another kind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from taesd_stream.errors import ConfigError
from taesd_stream_workers.commands.options import SetOption, check_output, say, say_damaged, with_progress

if TYPE_CHECKING:
    import av

    from taesd_stream.config import Config

LOG_SUFFIX: Final = ".latents"


def add_commands(app: typer.Typer) -> None:
    """Put the commands on the application."""
    app.command(rich_help_panel="Watch and record")(info)
    app.command(rich_help_panel="Watch and record")(export)


def info(
    file: Annotated[Path, typer.Argument(help="A recording, finished or growing, or a .latents file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a file was painted from: prompt, seed, sampler, model, steps, and which frames it holds.

    Example: taesd-stream info recording.mp4
    """
    import json
    import sys

    from rich.console import Console

    facts = _facts(file)
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
        return
    meta = facts.pop("meta")
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for key, value in [*facts.items(), *meta.items()]:
        shown = _shown(key, value)
        if shown:
            console.print(f"{key:<14}{shown}")


def _shown(key: str, value: Any) -> str:
    if key == "started":
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if value is None or value == []:
        return ""
    return value if isinstance(value, str) else str(value)


def _facts(file: Path) -> dict[str, Any]:
    """Raises: ConfigError for a file that is none of ours."""
    import av

    from taesd_stream.errors import TaesdStreamError
    from taesd_stream.media.file_facts import facts_of

    if not file.is_file():
        raise ConfigError(f"{file}: there is no such file")
    if file.suffix == LOG_SUFFIX:
        return _log_facts(file)
    try:
        return facts_of(file)
    except (OSError, av.FFmpegError, TaesdStreamError) as error:
        raise ConfigError(f"{file}: cannot be read as a recording: {error}") from error


def _log_facts(file: Path) -> dict[str, Any]:
    from taesd_stream.frames import LatentFrame
    from taesd_stream.latent_log import Damaged, read_run, run_paths
    from taesd_stream_workers.offline.latent_files import info_of_log

    info = info_of_log(file)
    assert info is not None
    seqs, damaged_bytes = [], 0
    for message in read_run(file):
        if isinstance(message, LatentFrame):
            seqs.append(message.seq)
        elif isinstance(message, Damaged):
            damaged_bytes += message.nbytes
    return {
        "stream": info.stream,
        "run": info.run,
        "started": file.stat().st_mtime,
        "frames": len(seqs),
        "first_seq": seqs[0] if seqs else None,
        "last_seq": seqs[-1] if seqs else None,
        "bytes": sum(path.stat().st_size for path in run_paths(file)),
        "damaged_bytes": damaged_bytes or None,
        "meta": {**info.meta, "latent_format": info.latent_format, "kind": info.kind},
    }


def export(
    file: Annotated[Path, typer.Argument(help="A recording, finished or growing, or a .latents file.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help=".mp4, .mkv, .webm, .webp, .gif.")],
    codec: Annotated[
        str | None, typer.Option(help="h264, h265, av1, vp9, lossless, webp, gif; else what suits the name.")
    ] = None,
    quality: Annotated[
        int | None,
        typer.Option(help="crf of h264, h265 (0 best to 51), vp9 (0 to 63), av1 (1 to 63); of webp 100 best to 0."),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, max=1000, help="Pictures a second; else each has the time it came at.")
    ] = None,
    part: Annotated[
        int, typer.Option(min=1, help="Which picture of a batch that still grows in one file, from 1.")
    ] = 1,
    sets: SetOption = [],  # noqa: B006 typer copies it
) -> None:
    """Make another kind of file of a recording; of a latent log by the best decoder that is here.

    Example: taesd-stream export recording.mp4 -o recording.webp --fps 12
    """
    import av

    from taesd_stream.config import load_config
    from taesd_stream.frames import CLOCK_HZ
    from taesd_stream.media.export import ExportError, ExportFile, codec_for

    os.environ.setdefault("SVT_LOG", "1")  # errors: libsvtav1 tells its life on stderr
    check_output(output)
    if output.exists() and file.exists() and output.samefile(file):
        raise ConfigError(f"{output}: is the file that is read")
    config, facts = load_config(sets=sets), _facts(file)
    say_damaged(file, facts.get("damaged_bytes"))
    parts = facts.get("parts", 1) if facts.get("state") == "growing" else 1
    if part > parts:
        raise ConfigError(f"--part {part}: {file} has {parts}")
    try:
        chosen = codec_for(output, codec)
        with ExportFile(output, chosen, facts, quality, fps or _mean_fps(facts)) as target:
            count = 0
            pictures = _pictures(file, facts, config, part, is_rgb=chosen.is_rgb)
            for frame, pts in with_progress(pictures, "export", _count_of(facts)):
                target.add(frame, pts if fps is None else round(count * CLOCK_HZ / fps))
                count += 1
    except (ExportError, ValueError) as error:
        raise ConfigError(str(error)) from error
    except (OSError, av.FFmpegError) as error:
        raise ConfigError(f"{output}: {error.strerror or error}") from error
    say(f"{output}: {count} pictures, {chosen.encoder}")


def _count_of(facts: dict[str, Any]) -> int | None:
    """How many pictures a file has; of a log of videos nobody knows before."""
    total: int | None = facts["frames"] if facts["meta"].get("kind", "steps") == "steps" else None
    return facts.get("pictures", total)


def _mean_fps(facts: dict[str, Any]) -> float | None:
    """Of the times that the pictures came at; None for one picture, and a latent log, which is not read for them."""
    count, duration_s = facts.get("pictures", 0), facts.get("duration_s", 0.0)
    return (count - 1) / duration_s if count > 1 and duration_s > 0 else None


def _pictures(
    file: Path, facts: dict[str, Any], config: Config, part: int, *, is_rgb: bool
) -> Iterator[tuple[av.VideoFrame, int]]:
    from taesd_stream.media.export import pictures_of_file

    if file.suffix != LOG_SUFFIX:
        yield from pictures_of_file(file, part)
        return
    import av

    from taesd_stream.decoding.colour import video_planes
    from taesd_stream.decoding.slicing import decode_budget
    from taesd_stream_workers.commands.files import open_best_engine
    from taesd_stream_workers.offline.log_pictures import log_pictures

    engine = open_best_engine(facts["meta"]["latent_format"], config)
    say(f"decoder {engine.decoder}" if engine.is_full else engine.reason)
    for rgb, pts in log_pictures(file, engine, decode_budget(config.decoder, engine.device)):
        if is_rgb:
            values = (rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
            yield av.VideoFrame.from_ndarray(values.cpu().numpy(), "rgb24"), pts
        else:
            yield av.VideoFrame.from_ndarray(video_planes(rgb.unsqueeze(0))[0].cpu().numpy(), "yuv420p"), pts
