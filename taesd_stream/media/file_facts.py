"""What a recording says of itself, growing or finished, as one dict: for `info`, and for files made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av

from taesd_stream.frames import CLOCK_HZ
from taesd_stream.media.finished import read_summary, summary_of
from taesd_stream.media.fragments import FragmentError, read_index
from taesd_stream.media.growing_file import PART_SUFFIX


def facts_of(path: Path) -> dict[str, Any]:
    """stream, run, segment, started, meta, missing, frames, first_seq, last_seq, made_by, decoder, and what a player
    sees: state, bytes, pictures, duration_s, width, height, codec.

    Raises: FragmentError for a file that is none of ours; OSError, av.FFmpegError for one that cannot be read.
    """
    is_growing = path.name.endswith(PART_SUFFIX)
    summary = summary_of(read_index(path)) if is_growing else read_summary(path)
    if summary is None:
        raise FragmentError(f"{path}: no recording of ours: it has no tag that says what it is")
    with av.open(path) as container:
        stream = container.streams.video[0]
        times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
        base = float(stream.time_base or 1 / CLOCK_HZ)
        seen = {
            "state": "growing" if is_growing else "finished",
            "bytes": path.stat().st_size,
            "pictures": len(times),
            "duration_s": round((max(times) - min(times)) * base, 3) if times else 0.0,
            "width": stream.width,
            "height": stream.height,
            "codec": stream.codec_context.name,
        }
    return summary | seen
