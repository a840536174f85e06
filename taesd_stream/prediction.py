"""The picture that a model believes in: x0 from the noisy x_t and the model's output.

A sampler's callback holds x_t, noise and all; showing that instead of x0 is the commonest fault of preview code.
Operators only: numpy arrays and torch tensors alike, on their own device, and neither is imported.
"""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Prediction: TypeAlias = Literal["epsilon", "v", "flow", "sample"]
Latents = TypeVar("Latents", "NDArray[Any]", "Tensor")


def predicted_x0(
    x_t: Latents,
    output: Latents,
    *,
    prediction: Prediction,
    sigma: float | None = None,
    alpha: float | None = None,
    negated: bool = False,
) -> Latents:
    """The clean latents that `output` stands for, in the shape and scale of the sampler's z.

    x_t: the latents that the model saw, before the step; output: what it returned, after guidance.
    prediction: what it returns: the noise, the v of Salimans and Ho (arXiv:2202.00512), a flow's velocity, or x0.
    Give exactly one noise level; numbers, or arrays that broadcast:
      sigma: for "flow" x_t = (1 - sigma) x0 + sigma noise, else x_t = x0 + sigma noise (k-diffusion, Euler).
      alpha: x_t = alpha x0 + sqrt(1 - alpha^2) noise: DDPM and DDIM, alpha = sqrt(alphas_cumprod[t]).
    negated: the velocity points to the picture, x0 - noise (Z-Image, Lumina 2, HiDream); "flow" alone.
    Raises: ValueError for a combination that means nothing, and for shapes that differ.
    """
    if (sigma is None) == (alpha is None):
        given = "neither" if sigma is None else "both"
        raise ValueError(f"give either sigma or alpha: the noise level in the sampler's own scale; got {given}")
    if tuple(x_t.shape) != tuple(output.shape):  # a model that predicts variances too returns twice the channels
        raise ValueError(f"output: expected the shape of x_t, {tuple(x_t.shape)}, got {tuple(output.shape)}")
    if prediction == "flow":
        return _from_flow(x_t, output, sigma, negated)
    if negated:
        raise ValueError(f"negated velocity belongs to 'flow', not to {prediction!r}")
    if prediction == "sample":
        return output
    if prediction not in ("epsilon", "v"):
        raise ValueError(f"unknown prediction {prediction!r}; there are: epsilon, v, flow, sample")
    _check_level("sigma", sigma, 0, float("inf"))
    _check_level("alpha", alpha, 1e-6, 1)
    if sigma is not None:  # to the scale in which signal and noise have squares that sum to 1
        alpha = (1 + sigma**2) ** -0.5
        x_t = x_t * alpha
    assert alpha is not None
    noise: float = (1 - alpha**2) ** 0.5
    return (x_t - noise * output) / alpha if prediction == "epsilon" else alpha * x_t - noise * output


def _from_flow(x_t: Latents, velocity: Latents, sigma: float | None, negated: bool) -> Latents:
    if sigma is None:
        raise ValueError("a flow's noise level is sigma in [0, 1], not alpha")
    _check_level("a flow's sigma", sigma, 0, 1)
    return x_t + sigma * velocity if negated else x_t - sigma * velocity


def _check_level(name: str, level: object, low: float, high: float) -> None:
    """Timesteps are given for noise levels often enough. Of arrays nothing is read: a device would have to be waited
    for.
    """
    if isinstance(level, Real) and not low <= float(level) <= high:
        raise ValueError(f"{name}: expected a noise level from {low:g} to {high:g}, got {level} (is it a timestep?)")
