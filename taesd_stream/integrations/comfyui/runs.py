"""One sampler of ComfyUI at work: each step's x0 goes to a publisher, of a batch of videos to one each."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from taesd_stream.frames import name_of_one
from taesd_stream.integrations.comfyui.formats import format_of, published
from taesd_stream.integrations.comfyui.graph import Graph, fps_of, told
from taesd_stream.integrations.comfyui.nodes import Options
from taesd_stream.integrations.frame_rates import usual_fps
from taesd_stream.publisher import LatentPublisher
from taesd_stream.publisher_exit import reason_of

logger = logging.getLogger(__name__)

MAX_PART_CHARS: Final = 64
INTERRUPT: Final = "InterruptProcessingException"  # comfy.model_management's


class SamplerRun:
    """Listens to one sampler. Nothing of it raises into the sampler but ComfyUI's own interrupt, after Stop.

    publishers: one; of several videos one each. is_video: x0 becomes (N, T, C, h, w), else (N, C, h, w).
    """

    def __init__(
        self,
        publishers: Sequence[LatentPublisher],
        *,
        to_published: Callable[[Any], Any],
        sigmas: Sequence[float],
        is_video: bool,
    ) -> None:
        self._publishers = publishers
        self._to_published = to_published
        self._sigmas = sigmas
        self._is_video = is_video
        self._is_stopped = False
        self._is_failed = False

    def listening(self, callback: Any) -> Callable[..., Any]:
        """The sampler's callback, with us before it; `callback` may be None."""
        from comfy.model_management import throw_exception_if_processing_interrupted

        def listened(step: int, x0: Any, x: Any, total_steps: int) -> Any:
            self._show(step, x0, total_steps)
            result = callback(step, x0, x, total_steps) if callback is not None else None
            if self._is_stopped:  # ComfyUI's progress bar looks for it too, but not at every step
                throw_exception_if_processing_interrupted()
            return result

        return listened

    def end(self, error: BaseException | None) -> None:
        """Say why it ended, without waiting for anybody."""
        is_interrupted = type(error).__name__ == INTERRUPT
        reason, text = ("stopped", "interrupted in ComfyUI") if is_interrupted else reason_of(error)
        for publisher in self._publishers:
            threading.Thread(target=publisher.close, kwargs={"reason": reason, "text": text}, daemon=True).start()

    def _show(self, step: int, x0: Any, total_steps: int) -> None:
        if self._is_failed:
            return
        try:
            latents = self._to_published(x0)
            sigma = self._sigmas[step] if 0 <= step < len(self._sigmas) else None
            for publisher, one in zip(self._publishers, latents if self._is_video else [latents], strict=True):
                publisher.publish(one, step=step, total_steps=max(total_steps, step + 1), sigma=sigma)
            self._heed_stop()
        except Exception as error:  # noqa: BLE001 the picture is worth more than its preview
            self._is_failed = True
            stream = self._publishers[0].stream
            logger.warning("comfyui_preview_failed stream=%s error=%s (the sampler goes on, unseen)", stream, error)

    def _heed_stop(self) -> None:
        """Interrupt ComfyUI, once, when somebody has pressed Stop."""
        stops = [publisher.stopped for publisher in self._publishers]  # each is asked: asking shows Stop
        if any(stops) and not self._is_stopped:
            from comfy.model_management import interrupt_current_processing

            self._is_stopped = True
            interrupt_current_processing()


def open_run(
    guider: Any, *, noise: Any, sampler: Any, sigmas: Any, seed: Any, shapes: Any, options: Options
) -> SamplerRun | None:
    """The run of a guider that begins to sample; None for latents that have no picture (sound, 3D).

    noise: as the sampler gets it. shapes: of latents that are packed into one (video and sound), the picture's first.
    Raises: ValueError for a name or an address that is none.
    """
    model = guider.model_patcher.model
    shape = tuple(shapes[0]) if shapes else tuple(noise.shape)
    known = format_of(model, shape[2] if len(shape) == 5 else None)
    if known is None:
        logger.info("comfyui_not_shown latents=%s (no picture is known of them)", type(model.latent_format).__name__)
        return None
    is_video = known.temporal_factor is not None
    prompt_id, node_id, graph = _executing()
    stream = options.name or "/".join(["comfy", *(_part(one) for one in (prompt_id, node_id) if one)])
    count = shape[0] if is_video else 1
    publishers = [
        LatentPublisher(
            options.address,
            stream=name_of_one(stream, place) if count > 1 else stream,
            latent_format=known.name,
            kind="clip" if is_video else "steps",
            fps=(fps_of(graph) or usual_fps(known.name)) if is_video else None,
            record=options.record,
            meta={
                **told(graph, node_id, with_prompt=options.prompt),
                "prompt_id": prompt_id,
                "model": type(model).__name__,
                "sampler": _sampler_name(sampler),
                "seed": seed,
                "steps": len(sigmas) - 1,
                "guidance": getattr(guider, "cfg", None),
            },
        )
        for place in range(count)
    ]

    def to_published(x0: Any) -> Any:
        return published(_picture(x0, shapes), known, model.latent_format.scale_factor)

    return SamplerRun(publishers, to_published=to_published, sigmas=sigmas.tolist(), is_video=is_video)


def _executing() -> tuple[str, str, Graph]:
    """Prompt id, node id and prompt graph of what ComfyUI executes; empty outside of its server."""
    from comfy_execution.progress import get_progress_state
    from comfy_execution.utils import get_executing_context

    context = get_executing_context()
    if context is None:
        return "", "", {}
    prompt = get_progress_state().dynprompt
    graph = {name: prompt.get_node(name) for name in prompt.all_node_ids()}
    return str(context.prompt_id), str(context.node_id), graph


def _picture(x0: Any, shapes: Any) -> Any:
    """The picture's or video's latents, where the sound's are packed behind them."""
    if getattr(x0, "is_nested", False):  # somebody's callback has unpacked them already
        return x0.tensors[0]
    if shapes is None or len(shapes) < 2:
        return x0
    from comfy.utils import unpack_latents

    return unpack_latents(x0, shapes)[0]


def _part(text: str) -> str:
    """An id of ComfyUI as a part of a stream's name: 57:8 is 57.8."""
    return re.sub(r"[^A-Za-z0-9._-]", ".", text).lstrip("._-")[:MAX_PART_CHARS] or "0"


def _sampler_name(sampler: Any) -> str:
    function = getattr(sampler, "sampler_function", None)
    return str(getattr(function, "__name__", type(sampler).__name__)).removeprefix("sample_")
