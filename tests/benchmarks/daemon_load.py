"""Whole daemons under load: frames/s from ZeroMQ to H.264 packets, how late they are, and where the time goes.

    python -m tests.benchmarks.daemon_load --streams 100 --fps 15
    python -m tests.benchmarks.daemon_load --streams 100 --fps 0 --weights FOLDER      (as many as it takes)
    python -m tests.benchmarks.daemon_load --streams 500 --fps 15 --daemons 4 --set decoder.device=cuda:0,cuda:1

Real daemons (broker, workers, streamer each), publishers in processes of their own, spread by their names where there
are several daemons, and a page's WebSocket at each daemon, in a process of its own, that watches `live` of every stream
there. Latents are the demo's pictures, each melting into the next: noise would be no fair load for an encoder. `--fps
0` asks for 60 a second of each stream, of which the newest are shown. `published_s` is of all frames, also of those
that a newer one replaced, and less than was asked for where a load process cannot keep up; packets are counted by the
streamers. Times are of those that reach a page, each from its own stamps: `wait` is in the broker and in the worker's
queue, `decode` until the planes are in host memory, `encode` with the wait for an encoder. `first_picture_s` is of
daemons that have just started, weights and kernels not loaded. `busy_cores` is of the whole host, `cores_of` of all
processes of a role together. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from taesd_stream import LatentPublisher
from taesd_stream_workers.worker import encoding_child
from tests.benchmarks.figures import cpu_name, percentiles
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

FORMAT: Final = "flux2"
STAGES: Final = ("sent", "received", "started", "decoded", "encoded", "streamed")
NAMES: Final = ("receive", "wait", "decode", "encode", "stream")
MOST_FPS: Final = 60.0
LATENTS: Final = 24  # different ones that a load process publishes in turn
ROLES: Final = {name.encode(): name for name in ("broker", "worker", "streamer", "--load", "--pages")} | {
    encoding_child.__name__.encode(): "worker"
}  # by a word of its command
WARM_UP_S: Final = 8.0
MOST_LATE_S: Final = 0.05  # of a load process
BEGAN_S: Final = time.monotonic()
PACKETS = re.compile(r'^taesd_stream_packets_total\{rendition="live"\} (\S+)', re.M)


def main() -> None:
    """Measure, print the figures and then the JSON."""
    arguments = parse()
    if arguments.load:
        publish(arguments)
        return
    if arguments.pages:
        watch(arguments)
        return
    with tempfile.TemporaryDirectory() as name:
        sets = ["broker.max_fps=240", f"broker.max_streams={max(1000, arguments.streams)}", *arguments.set]
        if arguments.weights:
            sets.append(f"weights.folder={arguments.weights}")
        several = ("--daemons", str(arguments.daemons)) if arguments.daemons > 1 else ()
        with Daemon(Path(name), *sets, options=several) as daemon:
            load = f"{arguments.streams} x {arguments.fps or 'most'}"
            results = {"machine": machine(), "load": load, "daemons": arguments.daemons}
            results |= measure(daemon, arguments, Path(name))
    for key, value in results.items():
        sys.stdout.write(f"{key:<22} {value}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--fps", type=float, default=15.0, help="of each stream; 0: as many as it takes")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4, help="that publish")
    parser.add_argument("--cells", type=int, default=64, help="side of a latent; 64 is 512x512 pixels")
    parser.add_argument("--wire", choices=("float16", "uint8"), default="float16", help="uint8 halves the bytes")
    parser.add_argument("--weights", help="folder of weights; without, the linear projection decodes")
    parser.add_argument("--daemons", type=int, default=1, help="of this host")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of the daemons'")
    parser.add_argument("--load", metavar="ADDRESSES", help=argparse.SUPPRESS)
    parser.add_argument("--pages", metavar="URL", help=argparse.SUPPRESS)
    parser.add_argument("--into", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(daemon: Daemon, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Watch all streams of the load for some seconds, at the daemons that have them."""
    others: list[dict[str, Any]] = daemon.facts.get("others", [])
    brokers = ",".join([daemon.broker, *(one["broker"] for one in others)])
    webs = [daemon.web, *(one["web"] for one in others)]
    progress("daemons ready")
    loads = [start_load(brokers, arguments, part) for part in range(arguments.processes)]
    pages: list[subprocess.Popen[str]] = []
    try:
        names = {f"load/{number}" for number in range(arguments.streams)}
        wait_for(lambda: names <= set(daemon.streams()), 60, of="the load's streams")
        progress("streams open")
        files = [folder / f"page-{place}.npz" for place in range(len(webs))]
        pages = [start_page(web, arguments, file) for web, file in zip(webs, files, strict=True)]
        for page in pages:
            said(page, "warm")
        progress("pages warm")
        busy, of_roles, started_s = cpu_seconds(), role_seconds(), time.monotonic()
        before = [packets(web) for web in webs]
        for page in pages:
            tell(page, "go")
        for page in pages:
            said(page, "over")
        after = [packets(web) for web in webs]
        seconds = time.monotonic() - started_s
        cores = round((cpu_seconds() - busy) / seconds, 1)
        cores_of = {role: round((now - of_roles[role]) / seconds, 2) for role, now in role_seconds().items()}
        progress("measured")
        workers = [row for web in webs for row in answer(web, "/api/v1/workers")["workers"]]
        seen = [np.load(file) for file in files]
    finally:
        for process in (*loads, *pages):
            assert process.stdin is not None
            process.stdin.close()
        for process in (*loads, *pages):
            process.wait(60)
        progress("load ended")
    by_daemon = [round((b - a) / seconds, 1) for a, b in zip(before, after, strict=True)]
    return {
        "frames_s": round(sum(by_daemon), 1),
        "by_daemon": by_daemon,
        **of_pages(seen, seconds),
        "busy_cores": cores,
        "cores_of": cores_of,
        "workers": [{key: row[key] for key in ("device", "engines", "frames")} for row in workers],
    }


def of_pages(seen: list[Any], seconds: float) -> dict[str, Any]:
    """What the pages' files say of the pictures that came within so long."""
    times_ms = np.diff(np.concatenate([one["stamps"] for one in seen]), axis=1) / 1000
    return {
        "first_picture_s": round(max(float(one["first_s"]) for one in seen), 2),
        "published_s": round(sum(float(one["published_s"]) for one in seen), 1),
        "page_frames_s": round(len(times_ms) / seconds, 1),
        "publish_to_packet_ms": percentiles(list(times_ms.sum(axis=1))),
        "stages_ms": {name: percentiles(list(column)) for name, column in zip(NAMES, times_ms.T, strict=True)},
        "packet_kib": round(float(np.concatenate([one["sizes"] for one in seen]).mean()) / 1024, 1),
    }


def watch(arguments: argparse.Namespace) -> None:
    """The page's process: says "warm", waits for a line, takes pictures for the time, writes them, says "over"."""
    names = [row["name"] for row in answer(arguments.pages, "/api/v1/streams")["streams"] if not row.get("daemon")]
    mine = {name: "live" for name in names if name.startswith("load/")}
    with PageSocket(SimpleNamespace(web=arguments.pages)) as page:  # type: ignore[arg-type]
        watched_s = time.monotonic()
        page.watch(mine)
        page.picture(60)
        first_s = time.monotonic() - watched_s
        take(page, WARM_UP_S)
        say("warm")
        sys.stdin.readline()
        stamps, sizes, seqs = take(page, arguments.seconds)
        np.savez(arguments.into, stamps=np.array(stamps), sizes=sizes, first_s=first_s, published_s=published_s(seqs))
        say("over")
        sys.stdin.read()


def take(page: PageSocket, seconds: float) -> tuple[list[list[int]], list[int], dict[str, list[tuple[int, int]]]]:
    """The stamps (us) and bytes of every picture that comes within so long; each stream's (when sent in us, seq)."""
    stamps, sizes = [], []
    seqs: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        header, payload = page.picture(60)
        stamps.append([header["stamps"][f"{name}_us"] for name in STAGES])
        sizes.append(len(payload))
        seqs[header["stream"]].append((stamps[-1][0], header["seq"]))
    return stamps, sizes, seqs


def published_s(seqs: dict[str, list[tuple[int, int]]]) -> float:
    """Frames/s that were published, by the samplers' clocks: the first pictures may have waited for this page."""
    spans = [(seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]) for seen in seqs.values()]
    return sum(frames * 1e6 / us for us, frames in spans if us)


def answer(web: str, path: str) -> Any:
    """What a daemon's API says."""
    with urllib.request.urlopen(web + path, timeout=30) as reply:  # noqa: S310 our own daemon
        return json.loads(reply.read())


def progress(word: str) -> None:
    """A line for who waits: a run takes half a minute."""
    sys.stderr.write(f"{time.monotonic() - BEGAN_S:6.1f} s: {word}\n")


def say(word: str) -> None:
    """A line for the process that started this one."""
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


def said(process: subprocess.Popen[str], word: str) -> None:
    """Wait until a process says this. Raises: RuntimeError when it ends instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if line.strip() != word:
        raise RuntimeError(f"a page's process: expected {word}, got {line!r}")


def tell(process: subprocess.Popen[str], word: str) -> None:
    """A line for a process that this one started."""
    assert process.stdin is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()


def packets(web: str) -> float:
    """Live packets that a daemon's streamer has had."""
    with urllib.request.urlopen(f"{web}/metrics", timeout=30) as reply:  # noqa: S310 our own daemon
        found = PACKETS.search(reply.read().decode())
    return float(found.group(1)) if found else 0.0


def cpu_seconds() -> float:
    """Seconds that all cores of this host have worked; 0 where the system does not say."""
    facts = Path("/proc/stat")
    if not facts.exists():
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = (int(word) for word in facts.read_text().split()[1:11])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def role_seconds() -> dict[str, float]:
    """Seconds that the daemons' roles and this benchmark's own processes have worked, by the word they start with."""
    seconds = dict.fromkeys(ROLES.values(), 0.0)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            role = next((ROLES[word] for word in words if word in ROLES), None)
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if role is not None:
                seconds[role] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def start_load(brokers: str, arguments: argparse.Namespace, part: int) -> subprocess.Popen[str]:
    """One process of publishers; it ends with its stdin."""
    first = arguments.streams * part // arguments.processes
    count = arguments.streams * (part + 1) // arguments.processes - first
    options = {"fps": arguments.fps, "cells": arguments.cells, "wire": arguments.wire}
    return start(load=brokers, first=first, streams=count, **options)


def start_page(web: str, arguments: argparse.Namespace, into: Path) -> subprocess.Popen[str]:
    """One process that watches a daemon; it ends with its stdin."""
    return start(pages=web, into=into, seconds=arguments.seconds)


def start(**options: Any) -> subprocess.Popen[str]:
    """This module as a process with these options."""
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "tests.benchmarks.daemon_load", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def publish(arguments: argparse.Namespace) -> None:
    """The load process: its streams publish one after the other, evenly over the time, until stdin ends."""
    streams = range(arguments.first, arguments.first + arguments.streams)
    publishers = [
        LatentPublisher(arguments.load, stream=f"load/{one}", latent_format=FORMAT, wire_dtype=arguments.wire)
        for one in streams
    ]
    latents = melting(arguments.cells)
    done = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        done.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    pause_s = 1 / (arguments.fps or MOST_FPS) / max(1, len(publishers))
    started_s, count = time.monotonic(), 0
    while not done.is_set():
        step, number = divmod(count, len(publishers))
        publishers[number].publish(latents[(step + number) % len(latents)], step=step)
        count += 1
        late_s = time.monotonic() - started_s - count * pause_s
        if late_s < -0.0005:
            done.wait(-late_s)
        elif late_s > MOST_LATE_S:
            started_s += late_s  # samplers do not make up for lost time: it would be more load than was asked for
    for publisher in publishers:
        publisher.close(0)


def melting(cells: int) -> list[NDArray[np.float16]]:
    """Latents (C, cells, cells) of the demo's pictures, each melting into the next, then back."""
    from safetensors.numpy import load_file

    import taesd_stream

    demo = load_file(Path(taesd_stream.__file__).parent / "data" / "demo_flux2.safetensors")
    pictures = [tiled(words, cells) for words in demo.values() if words.ndim == 3]
    there = []
    for way in np.linspace(0, len(pictures) - 1, LATENTS // 2):
        before, after = pictures[int(np.floor(way))], pictures[int(np.ceil(way))]
        there.append((before + (way % 1) * (after - before)).astype(np.float16))
    return [*there, *reversed(there)]


def tiled(words: NDArray[np.uint8], cells: int) -> NDArray[np.float32]:
    """A picture's latents from their bytes, mirrored or cut to a square of cells."""
    latents = (words / np.float32(255) - np.float32(0.5)) * np.float32(6)
    missing = [(0, 0), *((0, max(0, cells - side)) for side in latents.shape[1:])]
    whole: NDArray[np.float32] = np.pad(latents, missing, mode="symmetric").astype(np.float32)
    return whole[:, :cells, :cells]


def machine() -> dict[str, Any]:
    """What gave the figures."""
    return {"cpu": cpu_name(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
