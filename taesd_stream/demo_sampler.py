"""The sampler of `taesd-stream demo`: a rectified flow from noise to a scene that the package ships, without a model.

The walk, its sigmas and its noise are real; in the model's place stands one that knows the scene. What it believes at
each step is what a denoiser could know by then: the coarse first, the fine last. numpy alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

LATENT_FORMAT: Final = "flux2"
MAGNITUDE: Final = 3.0  # of the uint8 form that the file holds (PROTOCOL 2)
SHIFT: Final = 3.0  # of the schedule, as Stable Diffusion 3 at 1024x1024 (arXiv:2403.03206, 5.3.2)
FIRST_BELIEF: Final = 0.9  # noise level of what is believed at the first step: the coarsest forms, no detail
CLIP: Final = "lighthouse"
CLIP_FPS: Final = 12.0

Latents = NDArray[np.float32]

_PROMPTS: Final = {
    "sunrise": "Sunrise over a mountain lake, mist on the water",
    "alpine": "An alpine valley in early summer, a turquoise lake",
    "aurora": "Northern lights over a snowy forest",
    "city": "A skyline after sunset, its lights in the water",
    "balloons": "Hot-air balloons over a valley in the morning",
    "dunes": "Sand dunes in low sun, long shadows",
    "meadow": "Poppies and daisies up close, a blurred field behind",
    "moonrise": "A boat under a rising moon",
    CLIP: "A lighthouse at dusk, its beam turning",
}


@dataclass(frozen=True, slots=True)
class DemoScene:
    """A finished picture: latents (32, h, w) as a FLUX.2 scheduler holds them; of the clip (T, 32, h, w)."""

    name: str
    prompt: str
    latents: Latents


def load_scenes() -> tuple[DemoScene, ...]:
    """The pictures that come with the package, in a fixed order."""
    stored = _load()
    return tuple(stored[name] for name in _PROMPTS if name != CLIP)


def load_clip() -> DemoScene:
    """The video that comes with the package: 12 frames that loop, CLIP_FPS a second."""
    return _load()[CLIP]


def _load() -> dict[str, DemoScene]:
    data = (resources.files("taesd_stream") / "data" / "demo_flux2.safetensors").read_bytes()
    return {
        name: DemoScene(name, _PROMPTS[name], ((values / 255 - 0.5) * (2 * MAGNITUDE)).astype(np.float32))
        for name, values in load(data).items()
    }


def flow_sigmas(steps: int) -> list[float]:
    """The noise level before each step, from 1 down, and the 0 that the last one reaches: steps + 1 numbers.

    Evenly spaced, then shifted towards noise: sigma' = s sigma / (1 + (s - 1) sigma) (arXiv:2403.03206, eq. 23).
    """
    even = np.linspace(1.0, 0.0, steps + 1)
    return [float(sigma) for sigma in SHIFT * even / (1 + (SHIFT - 1) * even)]


def x0_predictions(scene: DemoScene, *, steps: int, seed: int) -> Iterator[tuple[int, float, Latents]]:
    """Walk from noise to the scene by Euler's method. Yields: (step, the sigma that the model saw, its x0 prediction).

    x_t = (1 - sigma) x0 + sigma noise (arXiv:2209.03003) moves with the velocity noise - x0, where Euler is exact.
    """
    noise = np.random.default_rng(seed).standard_normal(scene.latents.shape).astype(np.float32)
    velocity = noise - scene.latents
    power = _power_by_frequency(scene.latents)
    latents = noise
    sigmas = flow_sigmas(steps)
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
        # A model knows more than x_t shows: believe it part of the way ahead, the rest is a guess by the spectrum.
        ahead = FIRST_BELIEF * sigma**3
        yield step, sigma, _best_guess(latents + (ahead - sigma) * velocity, power, ahead)
        latents = latents + (next_sigma - sigma) * velocity


def _power_by_frequency(latents: Latents) -> NDArray[np.float64]:
    """Power of latents (C, h, w) at each spatial frequency, same shape: means over rings of one frequency."""
    spectrum = np.abs(np.fft.fft2(latents, norm="ortho")) ** 2
    height, width = latents.shape[-2:]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    rings = (radius * max(height, width)).round().astype(int)
    sizes = np.maximum(1, np.bincount(rings.ravel()))
    return np.stack([(np.bincount(rings.ravel(), channel.ravel()) / sizes)[rings] for channel in spectrum])


def _best_guess(latents: Latents, power: NDArray[np.float64], sigma: float) -> Latents:
    """Wiener's estimate of x0 from (1 - sigma) x0 + sigma noise: frequencies drowned in noise stay out."""
    gain = (1 - sigma) * power / ((1 - sigma) ** 2 * power + sigma**2)
    return np.fft.ifft2(np.fft.fft2(latents) * gain).real.astype(np.float32)
