"""Stands before ComfyUI's one place where every sampler begins, and listens to the sampler's callback there.

KSampler, SamplerCustom, SamplerCustomAdvanced and other packs' samplers end up in `CFGGuider.inner_sample`, after all
wrappers: the callback that arrives there is the last word on previews, ComfyUI's own or that of a pack which has put
itself before it, and goes on as it was. Noise levels, seed and the exception that ends a run are known there, too.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any, Final

from taesd_stream.integrations.comfyui.nodes import OPTIONS_KEY, Options

if TYPE_CHECKING:
    from taesd_stream.integrations.comfyui.runs import SamplerRun

logger = logging.getLogger(__name__)

_MARK: Final = "_taesd_stream_listens"  # on the class: once, however often and by whatever path the node is loaded


def attach() -> None:
    """Show every sampler from now on. More calls do nothing. Raises: ImportError outside of ComfyUI."""
    from comfy.samplers import CFGGuider

    if _MARK in vars(CFGGuider):
        return
    setattr(CFGGuider, _MARK, True)
    inner_sample = CFGGuider.inner_sample

    @functools.wraps(inner_sample)
    def listening(
        guider: Any,
        noise: Any,
        latent_image: Any,
        device: Any,
        sampler: Any,
        sigmas: Any,
        denoise_mask: Any,
        callback: Any,
        disable_pbar: Any,
        seed: Any,
        *more: Any,
        **named: Any,
    ) -> Any:
        shapes = named.get("latent_shapes", more[0] if more else None)
        run = _opened(guider, noise, sampler, sigmas, seed, shapes)
        if run is not None:
            callback = run.listening(callback)
        try:
            result = inner_sample(
                guider, noise, latent_image, device, sampler, sigmas, denoise_mask, callback, disable_pbar, seed,
                *more, **named,
            )  # fmt: skip
        except BaseException as error:
            _end(run, error)
            raise
        _end(run, None)
        return result

    CFGGuider.inner_sample = listening


def _opened(guider: Any, noise: Any, sampler: Any, sigmas: Any, seed: Any, shapes: Any) -> SamplerRun | None:
    """The run, where these latents can be shown. Never raises."""
    try:
        from taesd_stream.integrations.comfyui.runs import open_run

        options = guider.model_options.get(OPTIONS_KEY, Options())
        return open_run(guider, noise=noise, sampler=sampler, sigmas=sigmas, seed=seed, shapes=shapes, options=options)
    except Exception as error:  # noqa: BLE001 the picture is worth more than its preview
        logger.warning("comfyui_preview_failed error=%s (the sampler goes on, unseen)", error)
        return None


def _end(run: SamplerRun | None, error: BaseException | None) -> None:
    """Say that the run is over. Never raises."""
    try:
        if run is not None:
            run.end(error)
    except Exception as fault:  # noqa: BLE001 a publisher that is dropped ends by itself
        logger.warning("comfyui_preview_failed error=%s (the sampler goes on)", fault)
