"""The built-in samplers of `taesd-stream demo`: each a publisher in a thread, painting one scene after another."""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from dataclasses import dataclass
from typing import Final

from taesd_stream.demo_sampler import DemoScene, load_scenes, x0_predictions

from taesd_stream.publisher import LatentPublisher

PAUSE_S: Final = 3.0  # a finished picture stays for a while before the next run


@dataclass(frozen=True, slots=True)
class _Plan:
    name: str
    steps: int
    pace: float  # of the asked seconds a step
    guidance: float


_PLANS: Final = (
    _Plan("alpine-lake", 28, 1.0, 4.5),
    _Plan("still-life", 20, 0.7, 3.5),
    _Plan("harbour-night", 32, 0.5, 4.0),
    _Plan("sweep/cfg-2.5", 24, 0.8, 2.5),
    _Plan("sweep/cfg-4.5", 24, 0.9, 4.5),
    _Plan("dunes", 40, 0.4, 3.0),
)


class DemoSamplers:
    """Samplers that run until `close`."""

    def __init__(self, broker: str, step_s: float) -> None:
        self._broker = broker
        self._step_s = step_s
        self._stop = threading.Event()
        self._scenes = load_scenes()
        self._threads = [
            threading.Thread(target=self._paint, args=(plan, number), name=f"demo {plan.name}", daemon=True)
            for number, plan in enumerate(_PLANS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop painting; the runs say that they were stopped."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)

    def _paint(self, plan: _Plan, number: int) -> None:
        run = 0
        while not self._stop.is_set():
            self._paint_one(
                plan, self._scenes[(number + run * len(_PLANS)) % len(self._scenes)], seed=1000 * number + run
            )
            run += 1
            self._stop.wait(PAUSE_S)

    def _paint_one(self, plan: _Plan, scene: DemoScene, seed: int) -> None:
        meta = {"prompt": scene.prompt, "seed": seed, "sampler": "euler, rectified flow", "guidance": plan.guidance}
        publisher = LatentPublisher(self._broker, stream=plan.name, latent_format="flux2", meta=meta)
        for step, sigma, denoised in x0_predictions(scene, steps=plan.steps, seed=seed):
            publisher.publish(denoised, step=step, total_steps=plan.steps, sigma=sigma)
            if publisher.stopped or self._stop.wait(self._step_s * plan.pace):
                return publisher.close(timeout_s=1.0, reason="stopped")
        return publisher.close(timeout_s=1.0)


def open_browser(url: str) -> None:
    """Open the page, where there is a desktop to open it on."""
    if sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)
