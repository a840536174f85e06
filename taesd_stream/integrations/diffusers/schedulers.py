"""x0 of one step of diffusers' schedulers: the picture that the model believes in, whatever it predicts.

A scheduler gets the model's output after guidance, and in its own sign: pipelines whose model has the other one
(Z-Image, Lumina 2, HiDream) turn it round before. One place for all pipelines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from taesd_stream.prediction import Prediction, predicted_x0

if TYPE_CHECKING:
    from torch import Tensor

# Their step() returns (prev_sample, x0): the scheduler's own word, thresholds and second orders included.
SAYS_X0: Final = frozenset(
    {
        "CogVideoXDDIMScheduler",
        "CogVideoXDPMScheduler",
        "DDIMParallelScheduler",
        "DDIMScheduler",
        "DDPMParallelScheduler",
        "DDPMScheduler",
        "DPMSolverSDEScheduler",
        "EDMEulerScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "SCMScheduler",
        "UnCLIPScheduler",
    }
)
# Latents of these are sqrt(a) x0 + sqrt(1 - a) noise, with a from `alphas_cumprod` or, where they have it, `sigmas`.
VARIANCE_PRESERVING: Final = frozenset(
    {
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)
FLOW: Final = frozenset(
    {
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "LTXEulerAncestralRFScheduler",
    }
)
_PREDICTIONS: Final[dict[str, Prediction]] = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "flow_prediction": "flow",
    "sample": "sample",
}


class Schedule:
    """The noise levels of one run, as numbers: a device is waited for once, not at each step."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._names = {base.__name__ for base in type(scheduler).__mro__}
        self._timesteps = _numbers(getattr(scheduler, "timesteps", None))
        self._sigmas = _numbers(getattr(scheduler, "sigmas", None))
        self._config = scheduler.config

    @property
    def steps(self) -> int:
        """How often step() is called in a whole run: of second-order schedulers twice a step."""
        return len(self._timesteps)

    def sigma(self, index: int) -> float | None:
        """The noise level of step `index` in the scheduler's own scale; None where it has none."""
        return self._sigmas[index] if index < len(self._sigmas) else None

    def x0(
        self, index: int, *, output: Tensor, sample: Tensor, result: Any, token_timesteps: Tensor | None = None
    ) -> Tensor:
        """The clean latents of step `index`, in the shape of `sample` and its scale.

        output, sample: what step() was given: the model's output and x_t. result: what it returned.
        token_timesteps: a timestep each token (LTXConditionPipeline); the output then points from the noise away.
        Raises: ValueError for a scheduler that is not known, and where shapes do not fit.
        """
        if self._names & SAYS_X0 and len(result) > 1:
            said: Tensor = result[1]
            # Sana-Sprint's latents are larger by sigma_data during the run alone
            return said / self._config["sigma_data"] if "SCMScheduler" in self._names else said
        output, sample = output.detach().float(), sample.detach().float()
        if hasattr(self._scheduler, "precondition_outputs"):
            known: Tensor = self._scheduler.precondition_outputs(sample, output, self._scheduler.sigmas[index])
            return known
        prediction = self._prediction()
        if prediction == "sample":
            return output
        if token_timesteps is not None:
            levels: Any = token_timesteps[..., None] / self._config["num_train_timesteps"]
            return predicted_x0(sample, output, prediction="flow", sigma=levels, negated=True)
        if prediction == "flow":
            sigma = self._sigmas[index]
            if self._config.get("invert_sigmas"):  # Mochi: from noise at 0 to the picture at 1
                return predicted_x0(sample, output, prediction="flow", sigma=1 - sigma, negated=True)
            return sample - sigma * output  # not by predicted_x0: Cosmos 2's noise levels begin at 80
        return predicted_x0(sample, output, prediction=prediction, alpha=self._alpha(index))

    def _prediction(self) -> Prediction:
        if self._names & FLOW:
            return "flow"
        word = self._config.get("prediction_type")
        is_odd = self._config.get("use_flow_sigmas") and word != "flow_prediction"
        if not self._names & VARIANCE_PRESERVING or word not in _PREDICTIONS or is_odd:
            raise ValueError(f"no x0 is known of {type(self._scheduler).__name__} with prediction_type {word!r}")
        return _PREDICTIONS[word]

    def _alpha(self, index: int) -> float:
        if self._sigmas:
            return float((1 + self._sigmas[index] ** 2) ** -0.5)
        alpha: float = self._scheduler.alphas_cumprod[int(self._timesteps[index])].item()
        return float(alpha**0.5)


def _numbers(values: Any) -> list[float]:
    """A tensor, list or None as numbers."""
    if values is None:
        return []
    return list(values.tolist() if hasattr(values, "tolist") else values)
