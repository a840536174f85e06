"""What a preview costs a sampler's step: ours, and AutoencoderTiny in the callback as diffusers' documentation has it.

    python -m tests.benchmarks.sampler_cost [--rounds 12] [--steps 12]       (about eight minutes)

A real StableDiffusionPipeline with a small random UNet samples 512x512 on one thread of the CPU. In each round every
way of previewing runs once, in a new order; a run counts by its median step, and a way by the mean of its rounds'
differences to the run without a preview, with a 95 % bootstrap interval: of wall time, and of processor time of the
sampler's thread, which other programs disturb less. The daemon has TAESD with random weights (they change no time) and
the other cores. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file

from taesd_stream.integrations.diffusers import preview
from taesd_stream.models import build_decoder
from tests.benchmarks.figures import cpu_name
from tests.benchmarks.in_process import in_process_preview
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

D: Any = diffusers
SIDE_PX: Final = 512
WATCHED: Final = "cost/watched"
NOBODY: Final = "tcp://127.0.0.1:9"
WAYS: Final = {
    "none": "no preview",
    "absent": "`preview(pipe)`, no daemon",
    "idle": "`preview(pipe)`, nobody watches",
    "watched": "`preview(pipe)`, a page watches",
    "kept": '`preview(pipe, record="all")`, every step kept',
    "saved": '`preview(pipe, save="run.mp4")`, no daemon: decoded in another thread of the process',
    "linear": "in the callback: latents to RGB by 3 factors, JPEG",
    "tiny": "in the callback: diffusers' `AutoencoderTiny`, JPEG",
}

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Measure, print the table, then the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--watch", metavar="WEB", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.watch:
        watch(arguments.watch)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), arguments.rounds, arguments.steps)
    print(table(result))
    print(json.dumps(result))


def watch(web: str) -> None:
    """The watching process: takes pictures until stdin ends the process."""
    with PageSocket(SimpleNamespace(web=web)) as page:  # type: ignore[arg-type]
        page.watch({WATCHED: "live"})
        print("watching", flush=True)
        while True:
            with contextlib.suppress(TimeoutError):
                page.picture()


@contextlib.contextmanager
def watched(daemon: Daemon) -> Iterator[None]:
    """A page in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.sampler_cost", "--watch", daemon.web]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        wait_for(process.stdout.readline, 60, of="the page")
        try:
            yield
        finally:
            process.kill()


def measure(folder: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Every way in every round; step times in ms, as (rounds, 2): wall and the thread's own."""
    weights = folder / "weights"
    weights.mkdir()
    torch.manual_seed(0)
    save_file(build_decoder("taesd").state_dict(), weights / "taesd_decoder.safetensors")
    os.environ["TAESD_STREAM_WEIGHTS__FOLDER"] = str(weights)  # for save=, which decodes here
    pipe = small_pipeline()
    step_ms: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    order = random.Random(0)  # noqa: S311 a shuffle
    with Daemon(folder, f"weights.folder={weights}") as daemon, watched(daemon):
        run(pipe, nullcontext(), None, steps)  # what torch loads at first use
        for number in range(rounds):
            ways = list(WAYS)
            order.shuffle(ways)
            for way in ways:
                step_ms[way].append(run(pipe, *preview_of(way, pipe, daemon, folder), steps))
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
    base = np.array(step_ms["none"])
    extra = {way: np.array(times) - base for way, times in step_ms.items() if way != "none"}
    kinds = {"wall_ms": 0, "thread_ms": 1}
    costs = {way: {key: interval(one[:, place]) for key, place in kinds.items()} for way, one in extra.items()}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__, "diffusers": D.__version__}
    return {
        "machine": machine,
        "rounds": rounds,
        "steps": steps,
        "pixels": f"{SIDE_PX}x{SIDE_PX}",
        "step_ms": round(float(np.mean(base[:, 0])), 2),
        "step_thread_ms": round(float(np.mean(base[:, 1])), 2),
        "extra_ms": costs,
    }


def small_pipeline() -> Any:
    """Stable Diffusion's pipeline with a UNet that takes some 100 ms a step on one thread."""
    unet = D.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=SIDE_PX // 8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    vae = D.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=1,
        latent_channels=4,
    )
    pipe = D.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=D.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def preview_of(
    way: str, pipe: Any, daemon: Daemon, folder: Path
) -> tuple[AbstractContextManager[Any], Callback | None]:
    """What stands around the call, and what is called in it."""
    if way == "absent":
        return preview(pipe, NOBODY), None
    if way in ("idle", "watched"):
        return preview(pipe, daemon.broker, stream=WATCHED if way == "watched" else "cost/idle"), None
    if way == "kept":
        return preview(pipe, daemon.broker, stream="cost/kept", record="all"), None
    if way == "saved":
        return preview(pipe, save=folder / "run.mp4"), None
    callbacks: dict[str, Callback | None] = {"none": None, "linear": linear_callback(), "tiny": tiny_callback()}
    return nullcontext(), callbacks[way]


def linear_callback() -> Callback:
    """The rough preview of diffusers' documentation: three factors a channel."""
    factors = torch.tensor([[60.0, -60.0, 25.0], [-70.0, -5.0, 15.0], [-80.0, 8.0, -20.0], [5.0, -40.0, 60.0]])

    def callback(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        from PIL import Image

        rgb = torch.einsum("nchw,cd->nhwd", kwargs["latents"], factors).clamp(-127, 127) + 127
        Image.fromarray(rgb[0].byte().numpy()).save(io.BytesIO(), "JPEG")
        return kwargs

    return callback


def tiny_callback() -> Callback:
    """AutoencoderTiny in the callback."""
    preview = in_process_preview()

    def callback(_pipe: Any, _step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        preview(kwargs["latents"])
        return kwargs

    return callback


def run(pipe: Any, around: AbstractContextManager[Any], callback: Callback | None, steps: int) -> tuple[float, float]:
    """The median step of one call, ms, wall and thread: from one UNet's call to the next, previews in between."""
    begins_s: list[tuple[float, float]] = []

    def stamp(_module: Any, _arguments: Any) -> None:
        begins_s.append((time.perf_counter(), time.thread_time()))

    generator = torch.Generator().manual_seed(0)
    handle = pipe.unet.register_forward_pre_hook(stamp)
    try:
        with around:
            pipe(
                prompt_embeds=torch.randn(1, 16, 32, generator=generator),
                negative_prompt_embeds=torch.zeros(1, 16, 32),
                height=SIDE_PX,
                width=SIDE_PX,
                num_inference_steps=steps + 1,
                output_type="latent",
                generator=generator,
                callback_on_step_end=callback,
            )
    finally:
        handle.remove()
    wall, thread = np.median(np.diff(np.array(begins_s), axis=0), axis=0) * 1000
    return float(wall), float(thread)


def interval(differences: Any) -> dict[str, float]:
    """Mean of paired differences, ms, and the 95 % interval of the mean by bootstrap."""
    chance = np.random.default_rng(0)
    means = chance.choice(differences, (10_000, len(differences))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return {"mean": round(float(differences.mean()), 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def table(result: dict[str, Any]) -> str:
    """The rows of README's table."""
    base = result["step_ms"]
    lines = [
        "| preview | longer a step, 95 % interval | of the step | processor time of its thread |",
        "|---|---|---|---|",
    ]
    for way, words in WAYS.items():
        if way == "none":
            lines.append(f"| {words} | ({base:.0f} ms a step) | | |")
            continue
        wall, thread = result["extra_ms"][way]["wall_ms"], result["extra_ms"][way]["thread_ms"]
        share = 100 * wall["mean"] / base
        spread = f"{wall['mean']:.1f} ms ({wall['low']:.1f} to {wall['high']:.1f})"
        lines.append(f"| {words} | {spread} | {share:.0f} % | {thread['mean']:.1f} ms |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
