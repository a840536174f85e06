"""What a preview costs and how late it is, beside the same preview done inside the sampler, in one run on the CPU.

    python -m tests.benchmarks.preview_cost            (about two minutes)

End to end: a real daemon, real publishers in a process of their own, a page's WebSocket. `fps`: pictures a second that
reach the page from 8 streams that publish as fast as they are asked; `packet_ms`: publish() -> packet at the streamer
at 2 streams x 10 steps/s. In process: diffusers' AutoencoderTiny in the step callback, PIL, JPEG, as its documentation
shows it. Weights are random: they change no time. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import save_file

from taesd_stream import LatentPublisher
from taesd_stream.models import build_decoder
from tests.benchmarks.figures import cpu_name, percentiles
from tests.benchmarks.in_process import in_process_preview
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

SHAPE: Final = (4, 32, 32)  # 256x256 pixels
STEP_S: Final = 0.05  # of the sampler that is slowed down
STEPS: Final = 60
WARM_UP: Final = 5
MEASURE_S: Final = 8.0

Preview = Callable[[torch.Tensor, int], None]


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--load", nargs=3, metavar=("ADDRESS", "STREAMS", "HZ"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        publish_load(arguments.load[0], int(arguments.load[1]), float(arguments.load[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        results = measure_all(Path(name))
    for key, value in flat(results):
        sys.stdout.write(f"{key:<44} {value}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def measure_all(folder: Path) -> dict[str, Any]:
    """Every figure, with the machine that gave it."""
    weights = folder / "weights"
    weights.mkdir()
    torch.manual_seed(0)
    save_file(build_decoder("taesd").state_dict(), weights / "taesd_decoder.safetensors")
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}
    results: dict[str, Any] = {"machine": machine, "pixels": "256x256"}
    for decoder in ("linear", "taesd"):
        (folder / decoder).mkdir()
        sets = [f"weights.folder={weights}"] if decoder == "taesd" else []
        with Daemon(folder / decoder, "broker.max_fps=240", *sets) as daemon:
            results[decoder] = {
                "fps": end_to_end_fps(daemon),
                "packet_ms": packet_latency(daemon),
                "sampler": sampler_cost(daemon),
            }
    results["in_process"] = in_process_cost()
    theirs = results["in_process"]["callback_ms"]["p50"]
    for decoder in ("linear", "taesd"):
        ours = results[decoder]["sampler"]["watched"]["callback_ms"]["p50"]
        results[decoder]["times_cheaper_in_callback"] = round(theirs / ours, 1)
    return results


def publish_load(address: str, streams: int, hz: float) -> None:
    """The load process: publish to some streams at a pace until stdin ends."""
    publishers = [LatentPublisher(address, stream=f"load/{n}", latent_format="sd1") for n in range(streams)]
    latents = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    done = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        done.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    step = 0
    while not done.wait(1 / hz):
        for publisher in publishers:
            publisher.publish(latents, step=step)
        step += 1
    for publisher in publishers:
        publisher.close()


class Load:
    """Publishers in a process of their own, for a `with`."""

    def __init__(self, daemon: Daemon, streams: int, hz: float) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.preview_cost",
            "--load",
            daemon.broker,
            str(streams),
            str(hz),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        self.names = [f"load/{number}" for number in range(streams)]
        wait_for(lambda: set(self.names) <= set(daemon.streams()), 60, of="the load's streams")

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def end_to_end_fps(daemon: Daemon) -> float:
    """Pictures a second that reach a page, of 8 streams, as H.264."""
    with Load(daemon, 8, 60.0) as load, PageSocket(daemon) as page:
        page.watch(dict.fromkeys(load.names, "live"))
        for _ in range(WARM_UP * len(load.names)):
            page.picture()
        count, started_s = 0, time.monotonic()
        while time.monotonic() - started_s < MEASURE_S:
            page.picture()
            count += 1
        return round(count / (time.monotonic() - started_s), 1)


def packet_latency(daemon: Daemon) -> dict[str, float]:
    """publish() -> packet at the streamer, 2 streams x 10 steps/s."""
    with Load(daemon, 2, 10.0) as load, PageSocket(daemon) as page:
        page.watch(dict.fromkeys(load.names, "live"))
        for _ in range(WARM_UP * 2):
            page.picture()
        times_ms = []
        for _ in range(round(2 * 10 * MEASURE_S)):
            stamps = page.picture()[0]["stamps"]
            times_ms.append((stamps["streamed_us"] - stamps["sent_us"]) / 1000)
        return percentiles(times_ms)


def sampler_cost(daemon: Daemon) -> dict[str, Any]:
    """What publishing takes from a sampler: nobody watches, a page watches, everything is kept."""
    costs: dict[str, Any] = {}
    for name in ("idle", "watched", "kept"):
        with PageSocket(daemon) as page:
            if name == "watched":
                page.watch({f"cost/{name}": "live"})
            record: Any = "all" if name == "kept" else "off"
            with LatentPublisher(daemon.broker, stream=f"cost/{name}", latent_format="sd1", record=record) as publisher:
                costs[name] = run_sampler(partial(_publish, publisher))
    return costs


def _publish(publisher: LatentPublisher, latents: torch.Tensor, step: int) -> None:
    publisher.publish(latents, step=step)


def in_process_cost() -> dict[str, Any]:
    """The preview of diffusers' documentation."""
    preview = in_process_preview()
    return run_sampler(lambda latents, _step: preview(latents.unsqueeze(0)))


def run_sampler(preview: Preview) -> dict[str, Any]:
    """A sampler whose step is STEP_S of matrix products on one thread, with a preview after each."""
    threads = torch.get_num_threads()
    size = 512
    matrix, latents = torch.randn(size, size), torch.randn(SHAPE)
    callback_ms, step_ms = [], []
    products = products_of(matrix)
    for step in range(STEPS + WARM_UP):
        started_s = time.perf_counter()
        torch.set_num_threads(1)
        for _ in range(products):
            torch.mm(matrix, matrix)
        torch.set_num_threads(threads)
        worked_s = time.perf_counter()
        preview(latents, step)
        if step >= WARM_UP:
            callback_ms.append((time.perf_counter() - worked_s) * 1000)
            step_ms.append((time.perf_counter() - started_s) * 1000)
    return {"callback_ms": percentiles(callback_ms), "step_ms": percentiles(step_ms)}


def products_of(matrix: torch.Tensor) -> int:
    """How many products make one step on a quiet machine; measured once, so that all runs do the same work."""
    global _products
    if not _products:
        torch.set_num_threads(1)
        started_s = time.perf_counter()
        for _ in range(50):
            torch.mm(matrix, matrix)
        _products = max(1, round(STEP_S / ((time.perf_counter() - started_s) / 50)))
    return _products


_products = 0


def flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Nested figures as lines."""
    if not isinstance(value, dict):
        return [(path, value)]
    return [row for key, item in value.items() for row in flat(item, f"{path}.{key}".lstrip("."))]


if __name__ == "__main__":
    main()
