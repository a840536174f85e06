"""What publishing costs a sampler on an NVIDIA GPU: its thread, its steps, its memory.

    python -m tests.benchmarks.cuda_publish            (about three minutes)
    python -m tests.benchmarks.cuda_publish --daemon --weights FOLDER

The sampler's step is a diffusion transformer's in float16, about 20 ms by wall clock: blocks of width 2048, 1024 tokens
of two prompts, launched one operation after the other and waited for at the end as a sampler that reads its sigma does.
`thread_us`: publish() on the sampler's thread; `bare_us`: the copy, an event and a wake, and nothing else.
`lost_percent`: steps with publishing against steps without, pairs in the order ABBA, by wall clock. `memory_bytes`: how
far the peak of torch's allocator is over that without. The broker is a process that only listens.

With `--daemon` a real one decodes, 512x512, and a page in a process of its own watches `live`: on the processor, on
another GPU where there is one, on the sampler's. FOLDER holds taef2's weights; without it a GPU shows nano.
`lost_percent` as above, the daemon idle in steps without; `pictures_s` is what the streamer had meanwhile, of at most
`broker.max_fps`. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional as F

from taesd_stream import LatentPublisher
from taesd_stream.frames import RecordMode
from tests.benchmarks.publish_cost import Bare, Listener

STEP_S: Final = 0.02
WIDTH: Final = 2048
TOKENS: Final = 1024
SHAPES: Final = {"128 KiB": (4, 128, 128), "2 MiB": (16, 256, 256)}
DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BARS: Final = {"p50": 60.0, "p99": 250.0}  # us
PIECE: Final = 25  # steps in one of ABBA
SHOWN: Final = (32, 64, 64)  # FLUX.2's latents of 512x512 pixels
STEPS: Final = 100_000  # of the run, which a sampler says with each step
STREAM: Final = "cost"
WARM_UP_S: Final = 5.0  # kernels are compiled and decoders measured by then
WHERE: Final = {"the processor": "cpu", "another GPU": "cuda:1", "the sampler's GPU": "cuda:0"}
NEEDED: Final = ("av", "fastapi", "pydantic_settings", "typer", "uvicorn", "websockets")  # of a daemon and its page


class Sampler:
    """Steps of about STEP_S, each some hundred launches."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._tokens = torch.randn(2, TOKENS, WIDTH, device="cuda", dtype=torch.float16)
        self._blocks = [Block()]
        self.step()
        started_s = time.perf_counter()
        for _ in range(20):
            self.step()
        count = max(1, round(STEP_S * 20 / (time.perf_counter() - started_s)))
        self._blocks = [Block() for _ in range(count)]
        self.step()

    def step(self) -> None:
        """One step, waited for."""
        self.launch()
        torch.cuda.synchronize()

    def launch(self) -> None:
        """One step, not waited for."""
        with torch.inference_mode():
            tokens = self._tokens
            for block in self._blocks:
                tokens = block(tokens)


class Block(torch.nn.Module):
    """Attention and a network of two layers, each on what a prompt's scale and shift leave of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = torch.nn.Parameter(torch.randn(6, WIDTH) / 8)
        self.qkv, self.proj = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.up, self.down = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)
        self.to("cuda", torch.float16).requires_grad_(requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(prompts, tokens, width) to the same."""
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.modulation
        normed = F.layer_norm(tokens, (WIDTH,)) * (1 + scale) + shift
        q, k, v = self.qkv(normed).unflatten(-1, (3, WIDTH // 64, 64)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + gate * self.proj(attended)
        normed = F.layer_norm(tokens, (WIDTH,)) * (1 + mlp_scale) + mlp_shift
        tokens += mlp_gate * self.down(F.gelu(self.up(normed), approximate="tanh"))
        return tokens


def main() -> None:
    """Measure, print a table and then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300, help="for each figure of the thread")
    parser.add_argument("--pairs", type=int, default=20, help="of ABBA")
    parser.add_argument("--daemon", action="store_true", help="beside a daemon that decodes, and nothing else")
    parser.add_argument("--weights", help="folder of weights for --daemon")
    parser.add_argument("--where", choices=WHERE, help="measure this alone of what --daemon does")
    parser.add_argument("--watch", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        watch(arguments.watch)
    sampler = Sampler()
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bars_us": BARS}
    if arguments.daemon:
        places = [arguments.where] if arguments.where else list(WHERE)
        results["beside_daemon"] = beside_daemons(sampler, arguments.weights, arguments.pairs, places)
        sys.stdout.write(json.dumps(results) + "\n")
        return
    with Listener() as listener:
        results["thread_us"] = {
            f"{size} from {dtype}, record {record}": thread_cost(
                listener, sampler, size, dtype, record, arguments.steps
            )
            for size in SHAPES
            for dtype in DTYPES
            for record in ("off", "all")
        }
        results["bare_us"] = {size: bare_cost(sampler, size, arguments.steps) for size in SHAPES}
        results["lost_percent"] = {size: lost(listener, sampler, size, arguments.pairs) for size in SHAPES}
        results["memory_bytes"] = {size: memory(listener, sampler, size) for size in SHAPES}
    for part in ("thread_us", "bare_us", "lost_percent", "memory_bytes"):
        for name, value in results[part].items():
            sys.stdout.write(f"{part:<14} {name:<36} {value}\n")
    sys.stdout.write(json.dumps(results) + "\n")


def opened(listener: Listener, record: RecordMode) -> LatentPublisher:
    """A publisher that is watched."""
    return LatentPublisher(listener.address, stream="cost", latent_format="unknown", record=record)


def thread_cost(
    listener: Listener, sampler: Sampler, size: str, dtype: str, record: RecordMode, steps: int
) -> dict[str, float]:
    """publish() while the GPU is in the middle of a step, microseconds."""
    latents = torch.randn(SHAPES[size], device="cuda", dtype=DTYPES[dtype])
    times_us = []
    with opened(listener, record) as publisher:
        for step in range(steps + 10):
            sampler.launch()
            started_ns = time.perf_counter_ns()
            publisher.publish(latents, step=step, total_steps=STEPS, sigma=1.0)
            times_us.append((time.perf_counter_ns() - started_ns) / 1000)
            torch.cuda.synchronize()
        if publisher.error:
            raise RuntimeError(publisher.error)
    return percentiles(times_us[10:])


def bare_cost(sampler: Sampler, size: str, steps: int) -> dict[str, float]:
    """The least that it could be: the copy, an event, and an eventfd that a thread waits for."""
    latents = torch.randn(SHAPES[size], device="cuda", dtype=torch.float32)
    staged: deque[Any] = deque(maxlen=1)
    new_event: Any = torch.cuda.Event

    def snapshot(one: torch.Tensor) -> bytes:
        event = new_event()
        staged.append((one.to(torch.float16, copy=True), event.record()))
        return b""

    bare = Bare(snapshot)
    times_us = []
    for step in range(steps + 10):
        sampler.launch()
        started_ns = time.perf_counter_ns()
        bare.publish(latents, step)
        times_us.append((time.perf_counter_ns() - started_ns) / 1000)
        torch.cuda.synchronize()
    return percentiles(times_us[10:])


def percentiles(times_us: list[float]) -> dict[str, float]:
    """p50, p95 and p99."""
    return {f"p{one}": round(float(np.percentile(times_us, one)), 1) for one in (50, 95, 99)}


def lost(listener: Listener, sampler: Sampler, size: str, pairs: int) -> dict[str, Any]:
    """How much longer steps with publishing are."""
    latents = torch.randn(SHAPES[size], device="cuda", dtype=torch.float16)
    with opened(listener, "off") as publisher:
        return longer(sampler, publisher, [latents], pairs)


def longer(sampler: Sampler, publisher: LatentPublisher, latents: list[torch.Tensor], pairs: int) -> dict[str, Any]:
    """Steps that publish the latents in turn against steps that do not: percent, mean and ends of its 95 % interval.

    median: of the pairs, which a busy host hurts less. step_ms: of those that do not. publish_us: of the calls.
    """
    differences, alone_ms, calls_us = [], [], []

    def piece(*, is_published: bool) -> float:
        started_s = time.perf_counter()
        for step in range(PIECE):
            sampler.step()
            if is_published:
                called_ns = time.perf_counter_ns()
                publisher.publish(latents[step % len(latents)], step=step, total_steps=STEPS, sigma=1.0)
                calls_us.append((time.perf_counter_ns() - called_ns) / 1000)
        return time.perf_counter() - started_s

    piece(is_published=True)
    for _ in range(pairs):
        times = [piece(is_published=one) for one in (False, True, True, False)]
        alone_s = (times[0] + times[3]) / 2
        alone_ms.append(1000 * alone_s / PIECE)
        differences.append(100 * ((times[1] + times[2]) / 2 - alone_s) / alone_s)
    half = 1.96 * float(np.std(differences, ddof=1)) / len(differences) ** 0.5
    mean = float(np.mean(differences))
    ends = {"low": round(mean - half, 3), "high": round(mean + half, 3)}
    return {
        "mean": round(mean, 3),
        **ends,
        "median": round(float(np.median(differences)), 3),
        "step_ms": round(float(np.median(alone_ms)), 2),
        "publish_us": {"mean": round(float(np.mean(calls_us)), 1), **percentiles(calls_us)},
    }


def beside_daemons(sampler: Sampler, weights: str | None, pairs: int, places: list[str]) -> dict[str, Any]:
    """Where the worker decodes -> what the sampler's steps lose; or why it is not measured."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.stderr.write(f"skipped: a daemon needs {', '.join(missing)}\n")
        return {"skipped": f"a daemon needs {', '.join(missing)}"}
    found = {}
    for name in places:
        if name == "another GPU" and torch.cuda.device_count() < 2:
            continue
        found[name] = beside_daemon(sampler, WHERE[name], weights, pairs)
        sys.stdout.write(f"{name:<20} {found[name]}\n")
        sys.stdout.flush()
    return found


def beside_daemon(sampler: Sampler, device: str, weights: str | None, pairs: int) -> dict[str, Any]:
    """One daemon, one page."""
    from taesd_stream_workers.bench.worker_load import melting_latents
    from tests.benchmarks.daemon_load import FORMAT, packets
    from tests.daemon import Daemon, wait_for

    sets = [f"decoder.device={device}", *([f"weights.folder={weights}"] if weights else [])]
    latents = list(melting_latents(SHOWN, PIECE).to("cuda", torch.float16))
    with (
        tempfile.TemporaryDirectory() as folder,
        Daemon(Path(folder), *sets) as daemon,
        watched(daemon.web),
        LatentPublisher(daemon.broker, stream=STREAM, latent_format=FORMAT, record="off") as publisher,
    ):

        def publish_until_shown() -> bool:
            sampler.step()
            publisher.publish(latents[0], step=0, total_steps=STEPS, sigma=1.0)
            return packets(daemon.web) > 0

        wait_for(publish_until_shown, 60, of="a picture")
        step, until_s = 0, time.monotonic() + WARM_UP_S
        while time.monotonic() < until_s:
            sampler.step()
            publisher.publish(latents[step % len(latents)], step=step, total_steps=STEPS, sigma=1.0)
            step += 1
        before, started_s = packets(daemon.web), time.monotonic()
        figures = longer(sampler, publisher, latents, pairs)
        shown_s = (packets(daemon.web) - before) / (time.monotonic() - started_s)
        if publisher.error:
            raise RuntimeError(publisher.error)
        rows = daemon.json("/api/v1/workers")["workers"]
    workers = [{key: row[key] for key in ("device", "engines")} for row in rows]
    return {"lost_percent": figures, "pictures_s": round(2 * shown_s, 1), "workers": workers}  # of half of the steps


@contextlib.contextmanager
def watched(web: str) -> Iterator[None]:
    """A page in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.cuda_publish", "--watch", web]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def watch(web: str) -> None:
    """The watching process: takes pictures until it is killed."""
    from tests.page_socket import PageSocket

    with PageSocket(SimpleNamespace(web=web)) as page:  # type: ignore[arg-type]
        page.watch({STREAM: "live"})
        sys.stdout.write("watching\n")
        sys.stdout.flush()
        while True:
            with contextlib.suppress(TimeoutError):
                page.picture()


def memory(listener: Listener, sampler: Sampler, size: str) -> dict[str, int]:
    """How much of the GPU's memory publishing takes at its peak, beside what one staged latent is."""
    latents = torch.randn(SHAPES[size], device="cuda", dtype=torch.float32)
    torch.cuda.reset_peak_memory_stats()
    sampler.step()
    alone = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with opened(listener, "off") as publisher:
        for step in range(100):
            sampler.step()
            publisher.publish(latents, step=step, sigma=1.0)
    return {"grown": torch.cuda.max_memory_allocated() - alone, "staged": latents.numel() * 2}


if __name__ == "__main__":
    main()
