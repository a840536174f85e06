"""What the pipeline's running call knows: sizes as it has rounded them, prompt, seed, frames.

They are variables of its `__call__` and nowhere else: arguments alone lack the sizes that it computes from images.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

MAX_DEPTH: Final = 40  # frames between scheduler.step and the pipeline's __call__: wrappers of ours and of others
MAX_PROMPT_CHARS: Final = 2000  # a run's meta holds 16 KiB

# by their names in all of diffusers' pipelines
NAMES: Final = (
    "additional_frames",
    "condition",
    "extra_conditioning_num_latents",
    "first_frame_mask",
    "frame_rate",
    "generator",
    "guidance_scale",
    "height",
    "image_latents",
    "latent_num_frames",
    "latents",
    "mask",
    "num_inference_steps",
    "prompt",
    "timesteps",
    "true_cfg_scale",
    "width",
)
_INPAINTING_NAME: Final = "init_latents_proper"  # what only those calls have that put the image back around the mask


def running_call(pipe: Any) -> tuple[Any, dict[str, Any]]:
    """The pipeline whose `__call__` the caller of this function runs in, and that call's variables.

    It is this one, or one that shares its scheduler, as from_pipe() makes them; in a loop of somebody's own this one,
    without variables. `is_inpainting` is one of them: a call that puts `image_latents` back around `mask`.
    References only; nothing of the frame is kept alive by them once the caller drops them.
    """
    frame = sys._getframe(1)
    for _ in range(MAX_DEPTH):
        if frame.f_code.co_name == "__call__" and "self" in frame.f_code.co_varnames:
            variables = frame.f_locals
            found: dict[str, Any] = {name: variables[name] for name in NAMES if name in variables}
            found["is_inpainting"] = _INPAINTING_NAME in frame.f_code.co_varnames
            caller = variables.get("self")
            # until Python 3.12 the frame keeps this copy, and with it old tensors, as long as the call runs
            if isinstance(variables, dict):
                variables.clear()
            shares = getattr(caller, "scheduler", None) is pipe.scheduler and hasattr(type(caller), "from_pipe")
            if caller is pipe or shares:
                return caller, found
        if frame.f_back is None:
            break
        frame = frame.f_back
    return pipe, {}


def told(variables: Mapping[str, Any], *, with_prompt: bool) -> dict[str, Any]:
    """What people want to read beside the picture, of a call's variables."""
    meta: dict[str, Any] = {}
    prompt = variables.get("prompt")
    if with_prompt and prompt:
        text = prompt if isinstance(prompt, str) else "\n".join(str(one) for one in prompt)
        meta["prompt"] = text[:MAX_PROMPT_CHARS]
    seed = _seed(variables.get("generator"))
    if seed is not None:
        meta["seed"] = seed
    for name, word in (("num_inference_steps", "steps"), ("guidance_scale", "guidance"), ("true_cfg_scale", "cfg")):
        value = variables.get(name)
        if isinstance(value, int | float):
            meta[word] = value
    return meta


def _seed(generator: Any) -> Any:
    """The seed of a torch.Generator, of a list of them all."""
    if isinstance(generator, list | tuple):
        seeds = [_seed(one) for one in generator]
        return seeds[0] if len(seeds) == 1 else seeds
    return generator.initial_seed() if hasattr(generator, "initial_seed") else None
