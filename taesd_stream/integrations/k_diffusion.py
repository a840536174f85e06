"""k-diffusion, and every sampler that calls back with its dict {'x', 'i', 'sigma', 'sigma_hat', 'denoised'}."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taesd_stream.publisher import LatentPublisher


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

    def callback(info: dict[str, Any]) -> None:
        step = int(info["i"])
        total = None if sigmas is None else len(sigmas) - 1
        is_last = total is not None and step >= total - 1
        if publisher.wanted or is_last:
            publisher.publish(info["denoised"], step=step, total_steps=total, sigma=info.get("sigma"))
        if can_stop and publisher.stopped:
            raise SamplingStopped(publisher.stream)

    return callback
