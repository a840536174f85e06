"""k-diffusion, and every sampler that calls back with its dict {'x', 'i', 'sigma', 'sigma_hat', 'denoised'}."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taesd_stream.publisher import LatentPublisher

logger = logging.getLogger(__name__)


class SamplingStopped(Exception):
    """A viewer pressed Stop; raised out of the sampler's callback where that was asked for."""


def preview_callback(
    publisher: LatentPublisher, *, sigmas: Sized | None = None, can_stop: bool = False
) -> Callable[[dict[str, Any]], None]:
    """What goes to a sampler as `callback=`: it publishes `denoised`, the model's x0, and changes nothing.

    sigmas: the sampler's: they tell how many steps there are. Adaptive samplers have none.
    can_stop: k-diffusion's samplers have no other way to end early: Stop on the page raises SamplingStopped, to be
    caught around the sampler.
    """

    is_said = False

    def callback(info: dict[str, Any]) -> None:
        nonlocal is_said
        try:
            step = int(info["i"])
            total = None if sigmas is None else len(sigmas) - 1
            is_last = total is not None and step >= total - 1
            if publisher.wanted or is_last:
                publisher.publish(info["denoised"], step=step, total_steps=total, sigma=info.get("sigma"))
        except Exception as error:  # noqa: BLE001 the run is worth more than its preview
            if not is_said:
                fields = (publisher.stream, error)
                logger.warning("sampler_not_shown stream=%s error=%r (said once; the run goes on)", *fields)
            is_said = True
        if can_stop and publisher.stopped:
            raise SamplingStopped(publisher.stream)

    return callback
