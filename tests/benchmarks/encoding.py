"""Encodes a second on one core, ours against ffmpeg's own command line, on the same frames with the same options.

    python -m tests.benchmarks.encoding            (about a minute)

Ours: `VideoEncoder`, planes in, packets out, as the decode worker calls it. Theirs: `ffmpeg -threads 1`, raw video from
a file to nothing, its own start-up measured apart and taken off. Both turn by turn; the ratio is of the medians. The
bar: at least 0.85. `many` is a `live` encoder beside others, and previews that melt into each other, as daemon_load has
them: there ours makes keyframes where predicting saves little; `predicted` is ours where it may not. KiB are of ours.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from taesd_stream.decoding.colour import video_planes
from taesd_stream.media.encoder import VIDEO_RENDITIONS, VideoEncoder, VideoRendition
from taesd_stream.models import build_decoder
from tests.benchmarks.daemon_load import melting

SIZES: Final = (256, 512, 1024)
COMMON: Final = ["-tune", "zerolatency", "-threads", "1", "-x264-params", "scenecut=0:weightp=0"]
SHOWN: Final = ["-preset", "superfast", "-x264-params", "scenecut=0:weightp=0:partitions=i8x8:subme=0"]
QUICK: Final = ["-preset", "ultrafast", "-crf", "23", "-g", "600"]
OPTIONS: Final = {
    "live": [*SHOWN, "-crf", "23", "-g", "600"],
    "many": QUICK,
    "predicted": QUICK,
    "record": ["-preset", "veryfast", "-crf", "14", "-g", "30"],
    "film": [*SHOWN, "-crf", "14", "-g", "30"],
}


def frames_of(size: int, count: int) -> NDArray[np.uint8]:
    """(count, size*3//2, size) planes: a soft moving picture under noise that fades, as previews are."""
    rng = np.random.default_rng(size)
    rows, columns = np.mgrid[:size, :size] / size
    made = np.full((count, size * 3 // 2, size), 128, np.uint8)
    for number in range(count):
        waves = np.sin(9 * rows + number / 9) + np.cos(7 * columns - number / 7)
        noise = rng.standard_normal((size, size)) * 30 * (1 - number / count)
        made[number, :size] = np.clip(120 + 45 * waves + noise, 16, 235)
    return made


def melting_frames(size: int, count: int) -> NDArray[np.uint8]:
    """(count, size*3//2, size) planes of the load's previews, decoded by nano."""
    network = build_decoder("nano", latent_format="flux2")
    with torch.inference_mode():
        made = [video_planes(network(torch.from_numpy(one).float()[None]))[0].numpy() for one in melting(size // 8)]
    return np.stack([made[number % len(made)] for number in range(count)])


def ours(way: str, frames: NDArray[np.uint8]) -> tuple[float, float]:
    """Frames a second of our encoder, and KiB a frame."""
    rendition: VideoRendition = next((one for one in VIDEO_RENDITIONS if one == way), "live")
    encoder = VideoEncoder(rendition, is_one_of_many=OPTIONS[way] is QUICK, is_clip=way == "predicted")
    began_s, nbytes = time.perf_counter(), 0
    for number, planes in enumerate(frames):
        nbytes += len(encoder.encode(planes, number * 9000).payload)
    fps = len(frames) / (time.perf_counter() - began_s)
    encoder.close()
    return fps, nbytes / len(frames) / 1024


def theirs_s(way: str, file: Path, size: int, count: int) -> float:
    """Seconds that ffmpeg takes for the first `count` frames."""
    source = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-s", f"{size}x{size}", "-i", str(file), "-frames:v", str(count)]
    command = [
        "ffmpeg",
        "-loglevel",
        "error",
        "-threads",
        "1",
        *source,
        "-c:v",
        "libx264",
        *COMMON,
        *OPTIONS[way],
    ]
    began_s = time.perf_counter()
    subprocess.run([*command, "-f", "null", "-"], check=True)
    return time.perf_counter() - began_s


def measure(way: str, size: int, count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Both, turn by turn."""
    frames = (melting_frames if OPTIONS[way] is QUICK else frames_of)(size, count)
    file = folder / f"{size}.yuv"
    frames.tofile(file)
    ours(way, frames[: count // 4])  # warm
    mine, other, kib = [], [], 0.0
    for _ in range(rounds):
        fps, kib = ours(way, frames)
        mine.append(fps)
        start_s = theirs_s(way, file, size, 1)
        other.append((count - 1) / (theirs_s(way, file, size, count) - start_s))
    fps, other_fps = statistics.median(mine), statistics.median(other)
    row = {"ours_fps": fps, "ffmpeg_fps": other_fps, "ratio": fps / other_fps, "kib": kib}
    return {key: round(value, 2) for key, value in row.items()}


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for way in OPTIONS:
            for size in SIZES:
                count = max(20, arguments.frames * 512 // size // 2)
                row = measure(way, size, count, arguments.rounds, Path(name))
                results[f"{way}_{size}"] = row
                sys.stdout.write(f"{way:<8}{size:>5}  {row}\n")
    results["least_ratio"] = min(row["ratio"] for name, row in results.items() if not name.startswith("predicted"))
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
