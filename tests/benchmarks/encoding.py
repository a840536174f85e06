"""Encodes a second on one core, ours against ffmpeg's own command line, on the same frames with the same options.

    python -m tests.benchmarks.encoding            (about a minute)

Ours: `VideoEncoder`, planes in, packets out, as the decode worker calls it. Theirs: `ffmpeg -threads 1`, raw video from
a file to nothing, its own start-up measured apart and taken off. Both turn by turn; the ratio is of the medians. The
bar: at least 0.85. The last line is one JSON object.
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
from numpy.typing import NDArray

from taesd_stream.media.encoder import VideoEncoder, VideoRendition

SIZES: Final = (256, 512, 1024)
OPTIONS: Final[dict[VideoRendition, list[str]]] = {
    "live": ["-preset", "superfast", "-crf", "23", "-g", "600"],
    "record": ["-preset", "veryfast", "-crf", "14", "-g", "30"],
}
COMMON: Final = ["-tune", "zerolatency", "-x264-params", "scenecut=0", "-threads", "1"]


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


def ours_fps(rendition: VideoRendition, frames: NDArray[np.uint8]) -> float:
    """Frames a second of our encoder."""
    encoder = VideoEncoder(rendition)
    began_s = time.perf_counter()
    for number, planes in enumerate(frames):
        encoder.encode(planes, number * 9000)
    fps = len(frames) / (time.perf_counter() - began_s)
    encoder.close()
    return fps


def theirs_s(rendition: VideoRendition, file: Path, size: int, count: int) -> float:
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
        *OPTIONS[rendition],
        *COMMON,
    ]
    began_s = time.perf_counter()
    subprocess.run([*command, "-f", "null", "-"], check=True)
    return time.perf_counter() - began_s


def measure(rendition: VideoRendition, size: int, count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Both, turn by turn."""
    frames = frames_of(size, count)
    file = folder / f"{size}.yuv"
    frames.tofile(file)
    ours_fps(rendition, frames[: count // 4])  # warm
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(ours_fps(rendition, frames))
        start_s = theirs_s(rendition, file, size, 1)
        theirs.append((count - 1) / (theirs_s(rendition, file, size, count) - start_s))
    mine, other = statistics.median(ours), statistics.median(theirs)
    return {"ours_fps": round(mine, 1), "ffmpeg_fps": round(other, 1), "ratio": round(mine / other, 3)}


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for rendition in OPTIONS:
            for size in SIZES:
                count = max(20, arguments.frames * 512 // size // 2)
                row = measure(rendition, size, count, arguments.rounds, Path(name))
                results[f"{rendition}_{size}"] = row
                sys.stdout.write(f"{rendition:<8}{size:>5}  {row}\n")
    results["least_ratio"] = min(row["ratio"] for row in results.values())
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
