"""Where 10,000 samplers break: simulated (`farm`) from measured service times, and held against measured daemons.

    python -m tests.benchmarks.capacity            (docs/capacity.md has its tables)
    python -m tests.benchmarks.capacity --samplers 2000 --daemons 2 --workers 1 --watched 0.3

With any of the options it is that one farm alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from tests.benchmarks.farm import Farm, Times, samplers

SAMPLERS: Final = 10_000
WATCHED: Final = 0.1
KEPT: Final = 0.1

# tests/benchmarks/RESULTS.md, TAESD 512x512 with our kernels; how each figure comes of it is in docs/capacity.md.
H200: Final = Times(
    take_s=60e-6,
    give_s=208e-6,
    hello_s=70e-6,
    job_s=0.6e-3,
    frame_s=0.596e-3,
    encode_s=1.6e-3,
    record_s=8e-3,
    serve_s=0.18e-3,
    hop_s=0.5e-3,
    encoders=16,
    credits=4,
)

# Daemons that were measured: GPUs, streams, frames/s published, then frames/s, p50 and p99 ms of what reached a page.
MEASURED: Final = (
    (1, 100, 1310, 1324, 18, 27),
    (2, 100, 1485, 1501, 9, 17),
    (1, 100, 2507, 1579, 36, 58),
    (1, 100, 2818, 1586, 32, 53),
    (2, 200, 3912, 3167, 46, 72),
    (2, 500, 7265, 2547, 56, 98),
)
KNEE: Final = (100, 300, 500, 600, 700, 800, 850, 900, 950, 1000)  # watched samplers of one daemon with one worker
FARMS: Final = ((1, 4), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1), (5, 1), (10, 1))  # daemons, workers of each


def one_farm(count: int, daemons: int, workers: int, *, watched: float, kept: float) -> dict[str, Any]:
    """One farm's figures."""
    streams = samplers(count, watched=watched, kept=kept)
    return Farm(H200, streams, daemons, workers).run().figures()


def against_measured() -> list[dict[str, Any]]:
    """Each measured daemon, and the same one simulated."""
    rows = []
    for gpus, count, published, frames_s, p50_ms, p99_ms in MEASURED:
        pace = count / published
        streams = samplers(count, watched=1.0, kept=0.0, step_s=(pace, pace), max_fps=240.0)
        found = Farm(H200, streams, 1, gpus).run().figures()
        rows.append(
            {
                "gpus": gpus,
                "load": f"{count} streams, {published:,}/s",
                "measured_s": frames_s,
                "measured_ms": (p50_ms, p99_ms),
                "simulated_s": found["frames_s"],
                "simulated_ms": (found["p50_ms"], found["p99_ms"]),
                "p99_off": round(found["p99_ms"] / p99_ms - 1, 2),
            }
        )
    return rows


def knee() -> list[dict[str, Any]]:
    """One daemon, one worker, more and more watched samplers."""
    return [{"watched": count, **one_farm(count, 1, 1, watched=1.0, kept=0.0)} for count in KNEE]


def farms() -> list[dict[str, Any]]:
    """10,000 samplers on more and more daemons and workers."""
    return [
        {"daemons": daemons, "workers": workers, **one_farm(SAMPLERS, daemons, workers, watched=WATCHED, kept=KEPT)}
        for daemons, workers in FARMS
    ]


def simulate() -> dict[str, list[dict[str, Any]]]:
    """All of it."""
    return {"against_measured": against_measured(), "knee": knee(), "farms": farms()}


def tables(results: dict[str, list[dict[str, Any]]]) -> str:
    """What docs/capacity.md shows."""
    measured = _table(
        ("GPUs", "offered", "frames/s measured", "simulated", "p50 / p99 ms measured", "simulated", "p99 is off by"),
        [
            (
                row["gpus"],
                row["load"],
                f"{row['measured_s']:,}",
                f"{row['simulated_s']:,}",
                "{} / {}".format(*row["measured_ms"]),
                "{:.0f} / {:.0f}".format(*row["simulated_ms"]),
                f"{row['p99_off']:+.0%}",
            )
            for row in results["against_measured"]
        ],
    )
    one = _table(
        (
            *("watched samplers", "frames/s", "load of broker / worker / streamer"),
            *("p50 / p99 ms", "replaced", "add first", "`desired_workers`"),
        ),
        [(row["watched"], *_cells(row), row["desired_workers"]) for row in results["knee"]],
    )
    many = _table(
        (
            *("daemons", "workers of each", "frames/s", "load of broker / worker / streamer"),
            *("p50 / p99 ms", "replaced", "kept: p99 s", "add first", "`desired_workers`, all"),
        ),
        [
            (
                row["daemons"],
                row["workers"],
                *_cells(row)[:4],
                "-" if row["kept_p99_ms"] is None else f"{row['kept_p99_ms'] / 1000:.2f}",
                row["add"],
                row["desired_workers"],
            )
            for row in results["farms"]
        ],
    )
    return (
        f"### Simulated beside measured\n\n{measured}\n\n### One daemon, one worker\n\n{one}\n\n"
        f"### {SAMPLERS:,} samplers, {WATCHED:.0%} watched, {KEPT:.0%} kept\n\n{many}"
    )


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str, str]:
    loads = " / ".join(f"{row['loads'][name]:.0%}" for name in ("broker", "worker", "streamer"))
    late = "no live picture" if row["p50_ms"] is None else f"{row['p50_ms']:,.0f} / {row['p99_ms']:,.0f}"
    return f"{row['frames_s']:,}", loads, late, f"{row['replaced']:.1%}", row["add"]


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def main() -> None:
    """Simulate, print the tables and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, kind, default in (
        ("samplers", int, SAMPLERS),
        ("daemons", int, 4),
        ("workers", int, 1),
        ("watched", float, WATCHED),
        ("kept", float, KEPT),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args()
    if len(sys.argv) > 1:
        found = one_farm(given.samplers, given.daemons, given.workers, watched=given.watched, kept=given.kept)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    results = simulate()
    sys.stdout.write(tables(results) + "\n")
    sys.stdout.write(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
