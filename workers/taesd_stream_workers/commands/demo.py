"""The built-in samplers of `taesd-stream demo`: each a publisher in a thread, painting one scene after another."""

from __future__ import annotations

import os
import sys
import threading
import time
import webbrowser
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from taesd_stream.demo_sampler import CLIP, CLIP_FPS, LATENT_FORMAT, DemoScene, load_clip, load_scenes, x0_predictions
from taesd_stream.frames import EndReason
from taesd_stream.publisher import LatentPublisher

PAUSE_S: Final = 3.0  # a finished picture stays for a while before the next run
CLOSE_S: Final = 0.5  # for the word that a run was stopped


@dataclass(frozen=True, slots=True)
class _Plan:
    name: str
    steps: int
    pace: float  # of the asked seconds a step
    guidance: float


_PLANS: Final = (
    _Plan("landscapes", 28, 1.0, 4.5),
    _Plan("still-life", 20, 0.7, 3.5),
    _Plan("nights", 32, 0.5, 4.0),
    _Plan("sweep/cfg-2.5", 24, 0.8, 2.5),
    _Plan("sweep/cfg-4.5", 24, 0.9, 4.5),
    _Plan("quick", 40, 0.4, 3.0),
)


class DemoSamplers:
    """Samplers that run until `close`: pictures that are painted step by step, and one video that just plays."""

    def __init__(self, broker: str, step_s: float, keys_folder: Path | None = None) -> None:
        self._publisher = partial(LatentPublisher, broker, latent_format=LATENT_FORMAT, keys_folder=keys_folder)
        self._step_s = step_s
        self._stop = threading.Event()
        self._scenes = load_scenes()
        painters = [threading.Thread(target=self._paint, args=(plan, n)) for n, plan in enumerate(_PLANS)]
        self._threads = [*painters, threading.Thread(target=self._play)]
        for thread in self._threads:
            thread.daemon = True
            thread.start()

    def close(self) -> None:
        """Stop painting; the runs say that they were stopped. Bounded: the daemon's own stop comes after it."""
        self._stop.set()
        deadline_s = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _paint(self, plan: _Plan, number: int) -> None:
        run = 0
        while not self._stop.is_set():
            scene = self._scenes[(number + run * (len(_PLANS) - 1)) % len(self._scenes)]
            self._paint_one(plan, scene, seed=1000 * number + run)
            run += 1
            self._stop.wait(PAUSE_S)

    def _paint_one(self, plan: _Plan, scene: DemoScene, seed: int) -> None:
        meta = {"prompt": scene.prompt, "seed": seed, "sampler": "euler, rectified flow", "guidance": plan.guidance}
        publisher = self._publisher(stream=plan.name, meta=meta)
        reason: EndReason = "done"
        for step, sigma, denoised in x0_predictions(scene, steps=plan.steps, seed=seed):
            publisher.publish(denoised, step=step, total_steps=plan.steps, sigma=sigma)
            if publisher.stopped or self._stop.wait(self._step_s * plan.pace):
                reason = "stopped"
                break
        publisher.close(timeout_s=CLOSE_S, reason=reason)

    def _play(self) -> None:
        while not self._stop.is_set():
            self._play_until_stopped(load_clip())
            self._stop.wait(PAUSE_S)

    def _play_until_stopped(self, scene: DemoScene) -> None:
        meta = {"prompt": scene.prompt}
        publisher = self._publisher(stream=CLIP, kind="live", fps=CLIP_FPS, meta=meta)
        number = 0
        while not (self._stop.wait(1 / CLIP_FPS) or publisher.stopped):
            publisher.publish(scene.latents[number % len(scene.latents)], step=number)
            number += 1
        publisher.close(timeout_s=CLOSE_S, reason="stopped")


def open_browser(url: str) -> None:
    """Open the page, where there is a desktop to open it on. In a thread: some browsers return when they are closed."""
    if sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
