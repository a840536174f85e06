"""The few parts of ComfyUI that our node meets, where ComfyUI itself is not: the same names, arguments and order.

After Comfy-Org/ComfyUI@a125cd8 (comfy/samplers.py, comfy/model_management.py, comfy_execution/) and, for latents that
are packed with sound, @311c014. `test_comfyui_real.py` runs the node in the real one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from taesd_stream.integrations import comfyui

NODE = Path(comfyui.__file__).parent / "custom_node"


class InterruptProcessingException(Exception):
    """As comfy.model_management's."""


class Interrupt:
    """The flag of comfy.model_management."""

    def __init__(self) -> None:
        self.is_set = False

    def interrupt_current_processing(self, value: bool = True) -> None:
        self.is_set = value

    def throw_exception_if_processing_interrupted(self) -> None:
        if self.is_set:
            self.is_set = False
            raise InterruptProcessingException


class ModelPatcher:
    """Holds a model and its options; a clone shares the one and copies the other."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.model_options = dict(self.model_options)
        return other


def model_of(latent_format: str, *bases: str, scale_factor: float = 1.0, blocks: Sequence[Any] = ()) -> ModelPatcher:
    """A model whose latent format is of a class of that name, derived from classes of the others."""
    base: type = object
    for name in reversed(bases):
        base = type(name, (base,), {})
    known = type(latent_format, (base,), {"scale_factor": scale_factor})()
    return ModelPatcher(
        SimpleNamespace(latent_format=known, diffusion_model=SimpleNamespace(transformer_blocks=list(blocks)))
    )


class KSAMPLER:
    """Euler's method, for a model that believes in a smaller x."""

    def __init__(self, sampler_function: Callable[..., Any]) -> None:
        self.sampler_function = sampler_function


def sample_euler(noise: Tensor, sigmas: Tensor, callback: Any) -> Tensor:
    """The callback gets (step, x0, x, total_steps) as comfy.samplers.KSAMPLER.sample gives it."""
    x = noise * sigmas[0]
    for step in range(len(sigmas) - 1):
        denoised = x / (1 + sigmas[step] ** 2)
        if callback is not None:
            callback(step, denoised, x, len(sigmas) - 1)
        x = x + (x - denoised) / sigmas[step] * (sigmas[step + 1] - sigmas[step])
    return x


def pack_latents(latents: Sequence[Tensor]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """As comfy.utils packs video and sound: one behind the other."""
    flat = [one.reshape(one.shape[0], 1, -1) for one in latents]
    return torch.cat(flat, dim=-1), [tuple(one.shape) for one in latents]


def unpack_latents(packed: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """What pack_latents packed."""
    parts = torch.split(packed, [math.prod(shape[1:]) for shape in shapes], dim=-1)
    return [part.reshape(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


class ComfyUI:
    """`with ComfyUI() as comfy:` has its modules in sys.modules; sample() is what a sampler node of it comes to."""

    def __init__(self) -> None:
        self.interrupt = Interrupt()
        self.graph: dict[str, Any] = {}
        self.context: Any = None
        self.guider = self._guider_class()

    def _guider_class(self) -> Any:
        class CFGGuider:
            """As comfy.samplers' is, without the model."""

            def __init__(self, model_patcher: ModelPatcher) -> None:
                self.model_patcher = model_patcher
                self.model_options = model_patcher.model_options
                self.cfg = 7.5

            def inner_sample(
                self,
                noise: Tensor,
                _latent_image: Any,
                _device: Any,
                sampler: KSAMPLER,
                sigmas: Tensor,
                *rest: Any,
                **_: Any,
            ) -> Any:
                _denoise_mask, callback, _disable_pbar, _seed = rest
                return sampler.sampler_function(noise, sigmas, callback)

        return CFGGuider

    @contextlib.contextmanager
    def executing(self, graph: dict[str, Any], prompt_id: str, node_id: str) -> Iterator[None]:
        """As its server executes one node of a prompt, in inference mode."""
        self.graph = graph
        self.context = SimpleNamespace(prompt_id=prompt_id, node_id=node_id)
        try:
            with torch.inference_mode():
                yield
        finally:
            self.graph, self.context = {}, None

    def sample(
        self,
        model: ModelPatcher,
        noise: Tensor,
        sigmas: Tensor,
        callback: Any = None,
        *,
        seed: int = 7,
        shapes: Any = None,
        function: Callable[..., Any] = sample_euler,
    ) -> Tensor:
        """As CFGGuider.outer_sample calls it: by position, with latent_shapes by name."""
        guider = self.guider(model)
        named = {} if shapes is None else {"latent_shapes": shapes}
        result: Tensor = guider.inner_sample(
            noise, None, "cpu", KSAMPLER(function), sigmas, None, callback, True, seed, **named
        )
        return result

    def load(self, folder: Path) -> ModuleType:
        """As ComfyUI's nodes.load_custom_node does: by path, under a name that is the path."""
        name = str(folder).replace(".", "_x_")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
        return module

    def __enter__(self) -> ComfyUI:
        prompt = SimpleNamespace(all_node_ids=lambda: set(self.graph), get_node=lambda name: self.graph[name])
        contents: dict[str, dict[str, Any]] = {
            "comfy": {},
            "comfy.samplers": {"CFGGuider": self.guider},
            "comfy.model_management": {
                "InterruptProcessingException": InterruptProcessingException,
                "interrupt_current_processing": self.interrupt.interrupt_current_processing,
                "throw_exception_if_processing_interrupted": self.interrupt.throw_exception_if_processing_interrupted,
            },
            "comfy.utils": {"unpack_latents": unpack_latents},
            "comfy_execution": {},
            "comfy_execution.progress": {"get_progress_state": lambda: SimpleNamespace(dynprompt=prompt)},
            "comfy_execution.utils": {"get_executing_context": lambda: self.context},
        }
        for name, attributes in contents.items():
            module = ModuleType(name)
            vars(module).update(attributes)
            sys.modules[name] = module
        return self

    def __exit__(self, *_: object) -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in ("comfy", "comfy_execution")]:
            del sys.modules[name]
