"""One call of a pipeline, from its first step on: each step's x0 goes to whoever shows or saves it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from taesd_stream.frames import EndReason
from taesd_stream.integrations.diffusers.geometry import Geometry
from taesd_stream.integrations.diffusers.schedulers import Schedule


class Sink(Protocol):
    """Where latents go: a LatentPublisher, or a SavedRun."""

    @property
    def wanted(self) -> bool: ...

    @property
    def stopped(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    def publish(
        self, latents: Tensor, *, step: int, total_steps: int | None = None, sigma: float | None = None
    ) -> None: ...

    def close(self, *, reason: EndReason = "done", text: str = "") -> None: ...


class PipelineRun:
    """The steps of one call.

    sinks: a list for each video of a batch; of pictures, which go together, one list.
    timesteps: those that the call walks; None: all of the scheduler's.
    """

    def __init__(
        self, pipe: Any, geometry: Geometry, sinks: Sequence[Sequence[Sink]], *, is_video: bool, timesteps: Any
    ) -> None:
        self.sinks = [sink for row in sinks for sink in row]
        self._rows = sinks
        self._pipe = pipe
        self._scheduler = pipe.scheduler
        self._schedule = Schedule(pipe.scheduler)
        self._geometry = geometry
        self._is_video = is_video
        self._total = self._schedule.steps if timesteps is None else len(timesteps)
        self._step = 0
        self._can_stop = hasattr(type(pipe), "interrupt")

    @property
    def is_complete(self) -> bool:
        """Whether the last step was made."""
        return self._step >= self._total

    def show(self, arguments: dict[str, Any], result: Any) -> None:
        """Publish x0 of a step where anybody wants it. arguments, result: of scheduler.step()."""
        step, self._step = self._step, self._step + 1
        if self.is_complete or any(sink.wanted for sink in self.sinks):
            self._publish(step, arguments, result)
        stops = [sink.stopped for sink in self.sinks] if self._can_stop else []  # each is asked: asking shows Stop
        if any(stops):
            self._pipe._interrupt = True

    def _publish(self, step: int, arguments: dict[str, Any], result: Any) -> None:
        index = self._index(step)
        x0 = self._schedule.x0(
            index,
            output=arguments["model_output"],
            sample=arguments["sample"],
            result=result,
            token_timesteps=arguments.get("per_token_timesteps"),
        )
        spatial = self._geometry.spatial(x0)
        sigma = self._schedule.sigma(index)
        for row, latents in zip(self._rows, spatial if self._is_video else [spatial], strict=True):
            for sink in row:
                sink.publish(latents, step=step, total_steps=self._total, sigma=sigma)

    def _index(self, step: int) -> int:
        """The step's place in the scheduler's own schedule: image to image begins later in it."""
        behind = getattr(self._scheduler, "step_index", None)
        return self._schedule.steps - self._total + step if behind is None else int(behind) - 1
