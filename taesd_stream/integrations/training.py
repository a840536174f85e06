"""Samples of a training run: the trainer sends latents, the daemon decodes them, their film is the model learning."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from taesd_stream.frames import Kind

if TYPE_CHECKING:
    from taesd_stream.daemons import Addresses
    from taesd_stream.publisher import LatentPublisher

DEFAULT_PAGE: Final = "http://127.0.0.1:8765"


@dataclass(slots=True)
class _Film:
    publisher: LatentPublisher
    samples: int = 0


# by address, stream and process, for a forked child's are its own; they end with the program
_films: Final[dict[tuple[tuple[str, ...], str, int], _Film]] = {}


def publish_sample(
    latents: Any,
    *,
    step: int,
    stream: str,
    latent_format: str,
    kind: Kind = "steps",
    fps: float | None = None,
    address: Addresses | None = None,
    page: str = DEFAULT_PAGE,
    meta: Mapping[str, Any] | None = None,
) -> str:
    """Add a sample to the stream's film, and return the link to it for wandb, TensorBoard or a log.

    Every sample is kept; the first call of a program opens the stream, the program's end ends it. Call it from one
    process of a distributed run, and from one thread. Never raises for a daemon that is not there.
    latents: what the sampler ended with, as LatentPublisher.publish takes them: a batch is shown as a grid.
    step: the trainer's global step. meta: of the stream, the first call's. address: as LatentPublisher takes it; the
        link is to the run of now, which a sample leaves whose daemon is gone before it has it.
    page: the address at which people reach the page. Of a sample that was not taken (the log says why) the link is to
        the one before.
    Raises: ValueError for a bad name of the stream, at the first call. What format there is the daemon knows: the page
        says `No decoder for NAME`.
    """
    from taesd_stream.daemons import addresses_of
    from taesd_stream.publisher import LatentPublisher

    key = (addresses_of(address), stream, os.getpid())
    if key not in _films:
        publisher = LatentPublisher(
            address,
            stream=stream,
            latent_format=latent_format,
            kind=kind,
            fps=fps,
            record="all",
            meta={"sampled by": "a trainer", **(meta or {})},
        )
        _films[key] = _Film(publisher)
    film = _films[key]
    film.publisher.publish(latents, step=step)
    film.samples += film.publisher.fault is None
    return f"{page.rstrip('/')}/#/s/{film.publisher.run}/{max(0, film.samples - 1)}"
