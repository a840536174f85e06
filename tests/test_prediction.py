"""x0 from x_t: closed forms, diffusers' schedulers, and both kinds of arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.prediction import Prediction, predicted_x0

LEVELS = st.floats(0.02, 0.98)


def pair() -> tuple[np.ndarray[Any, np.dtype[np.float64]], np.ndarray[Any, np.dtype[np.float64]]]:
    """A clean latent and the noise on it."""
    random = np.random.default_rng(0)
    return random.standard_normal((4, 3, 5)), random.standard_normal((4, 3, 5))


@given(LEVELS, st.booleans())
def test_flow_gives_back_what_was_noised(sigma: float, negated: bool) -> None:
    """For x_t = (1 - s) x0 + s noise, the true velocity gives x0, in either sign."""
    x0, noise = pair()
    velocity = (x0 - noise) if negated else (noise - x0)
    x_t = (1 - sigma) * x0 + sigma * noise
    found = predicted_x0(x_t, velocity, prediction="flow", sigma=sigma, negated=negated)
    np.testing.assert_allclose(found, x0, atol=1e-12)


@given(LEVELS, st.sampled_from(["epsilon", "v"]))
def test_alpha_gives_back_what_was_noised(alpha: float, prediction: Prediction) -> None:
    """For x_t = a x0 + sqrt(1 - a^2) noise, the true noise or v gives x0."""
    x0, noise = pair()
    sigma = (1 - alpha**2) ** 0.5
    output = noise if prediction == "epsilon" else alpha * noise - sigma * x0
    found = predicted_x0(alpha * x0 + sigma * noise, output, prediction=prediction, alpha=alpha)
    np.testing.assert_allclose(found, x0, atol=1e-10)


@given(st.floats(0.03, 80), st.sampled_from(["epsilon", "v"]))
def test_sigma_gives_back_what_was_noised(sigma: float, prediction: Prediction) -> None:
    """For x_t = x0 + s noise, the true noise or v gives x0."""
    x0, noise = pair()
    output = noise if prediction == "epsilon" else (noise - sigma * x0) / (1 + sigma**2) ** 0.5
    found = predicted_x0(x0 + sigma * noise, output, prediction=prediction, sigma=sigma)
    np.testing.assert_allclose(found, x0, atol=1e-9)


@pytest.mark.parametrize(
    ("theirs", "prediction"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "sample")]
)
def test_x0_by_alpha_is_that_of_diffusers_ddim(theirs: str, prediction: Prediction) -> None:
    """For the same latents and model output, DDIM names the same x0."""
    torch.manual_seed(0)
    x_t, output = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    scheduler: Any = DDIMScheduler(prediction_type=theirs, clip_sample=False)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(10)
    step = scheduler.timesteps[3]
    alpha = float(scheduler.alphas_cumprod[step]) ** 0.5
    expected = scheduler.step(output, step, x_t).pred_original_sample
    ours = predicted_x0(x_t, output, prediction=prediction, alpha=alpha)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize(("theirs", "prediction"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_x0_by_sigma_is_that_of_diffusers_euler(theirs: str, prediction: Prediction) -> None:
    """For the same latents and model output, Euler names the same x0."""
    torch.manual_seed(0)
    scheduler: Any = EulerDiscreteScheduler(prediction_type=theirs)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(10)
    x_t, output, step = torch.randn(2, 4, 6, 6) * scheduler.sigmas[3], torch.randn(2, 4, 6, 6), scheduler.timesteps[3]
    scheduler.scale_model_input(x_t, step)  # it wants to be asked before a step
    expected = scheduler.step(output, step, x_t).pred_original_sample
    ours = predicted_x0(x_t, output, prediction=prediction, sigma=float(scheduler.sigmas[3]))
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("index", [0, 4, 9])
@pytest.mark.parametrize("negated", [False, True])
def test_x0_is_where_diffusers_flow_would_end(index: int, negated: bool) -> None:
    """One step of the flow from any noise level to none ends at the x0 we name; Z-Image's models say its opposite."""
    torch.manual_seed(0)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)  # type: ignore[no-untyped-call]
    scheduler.set_timesteps(10)
    x_t, output = torch.randn(2, 16, 6, 6), torch.randn(2, 16, 6, 6)
    sigma = float(scheduler.sigmas[index])
    scheduler.sigmas = torch.tensor([sigma, 0.0])
    scheduler.timesteps = scheduler.timesteps[index : index + 1]
    expected = scheduler.step(-output if negated else output, scheduler.timesteps[0], x_t).prev_sample
    ours = predicted_x0(x_t, output, prediction="flow", sigma=sigma, negated=negated)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("theirs", "prediction", "is_flow"),
    [
        ("epsilon", "epsilon", False),
        ("v_prediction", "v", False),
        ("sample", "sample", False),
        ("flow_prediction", "flow", True),
    ],
)
def test_x0_is_that_of_diffusers_dpm_solver(theirs: str, prediction: Prediction, is_flow: bool) -> None:
    """The solver that works on x0 converts each kind of output to the same x0, in its own scale of latents."""
    torch.manual_seed(0)
    scheduler: Any = DPMSolverMultistepScheduler(  # type: ignore[no-untyped-call]
        prediction_type=theirs, use_flow_sigmas=is_flow, flow_shift=2.0
    )
    scheduler.set_timesteps(10)
    scheduler._step_index = 3
    x_t, output = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    expected = scheduler.convert_model_output(output, sample=x_t)
    level = float(scheduler.sigmas[3])
    # Its latents are alpha x0 + sqrt(1 - alpha^2) noise, its sigmas those of k-diffusion.
    how = {"sigma": level} if is_flow else {"alpha": (1 + level**2) ** -0.5}
    ours = predicted_x0(x_t, output, prediction=prediction, **how)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 999), st.sampled_from(["epsilon", "v"]))
def test_what_diffusers_noised_comes_back(step: int, prediction: Prediction) -> None:
    """At every timestep, DDPM's own noise and velocity on its own noisy latents give back the clean ones."""
    scheduler: Any = DDPMScheduler()  # type: ignore[no-untyped-call]
    x0, noise = (torch.from_numpy(values).double() for values in pair())
    steps = torch.tensor([step])
    x_t = scheduler.add_noise(x0, noise, steps)
    output = noise if prediction == "epsilon" else scheduler.get_velocity(x0, noise, steps)
    alpha = float(scheduler.alphas_cumprod[step].double()) ** 0.5
    ours = predicted_x0(x_t, output, prediction=prediction, alpha=alpha)
    torch.testing.assert_close(ours, x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [{"prediction": "flow"}, {"prediction": "epsilon"}, {"prediction": "v"}])
def test_half_precision_stays(dtype: torch.dtype, how: dict[str, Any]) -> None:
    """Latents keep their dtype, whether the level is a number or a tensor of float32."""
    x_t, output = torch.randn(2, 4, 3, 3).to(dtype), torch.randn(2, 4, 3, 3).to(dtype)
    by_number = predicted_x0(x_t, output, sigma=0.5, **how)
    assert by_number.dtype == dtype
    by_tensor = predicted_x0(x_t, output, sigma=torch.tensor(0.5), **how)  # type: ignore[arg-type]
    torch.testing.assert_close(by_tensor, by_number, atol=0.02, rtol=0)


def test_a_level_for_each_picture_broadcasts() -> None:
    """Levels as arrays serve a batch whose pictures are at different steps, in numpy and torch."""
    x0, noise = pair()
    levels = np.array([0.1, 0.5, 0.7, 0.9]).reshape(4, 1, 1)
    x_t = (1 - levels) * x0 + levels * noise
    ours = predicted_x0(x_t, noise - x0, prediction="flow", sigma=levels)  # type: ignore[arg-type]
    np.testing.assert_allclose(ours, x0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prediction": "flow"}, "give either sigma or alpha"),
        ({"prediction": "epsilon", "sigma": 1.0, "alpha": 0.5}, "give either sigma or alpha"),
        ({"prediction": "flow", "alpha": 0.5}, r"a flow's noise level is sigma in \[0, 1\]"),
        ({"prediction": "v", "sigma": 1.0, "negated": True}, "negated velocity belongs to 'flow'"),
        ({"prediction": "velocity", "sigma": 1.0}, "unknown prediction 'velocity'; there are: epsilon, v"),
        ({"prediction": "flow", "sigma": 999}, r"a flow's sigma: expected a noise level from 0 to 1, got 999 \(is it"),
        ({"prediction": "epsilon", "sigma": -0.1}, "sigma: expected a noise level from 0 to inf, got -0.1"),
        ({"prediction": "v", "alpha": 981}, "alpha: expected a noise level from 1e-06 to 1, got 981"),
        ({"prediction": "epsilon", "alpha": 0.0}, "alpha: expected a noise level from 1e-06 to 1, got 0.0"),
    ],
)
def test_what_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    """Levels and predictions that do not belong together are errors that say which do."""
    with pytest.raises(ValueError, match=message):
        predicted_x0(np.zeros(1), np.zeros(1), **arguments)


def test_variances_beside_the_noise_are_refused() -> None:
    """A model that predicts variances too returns twice the channels: an error, not a broadcast."""
    with pytest.raises(ValueError, match=r"expected the shape of x_t, \(1, 4, 3, 5\), got \(1, 8, 3, 5\)"):
        predicted_x0(np.zeros((1, 4, 3, 5)), np.zeros((1, 8, 3, 5)), prediction="epsilon", sigma=1.0)
