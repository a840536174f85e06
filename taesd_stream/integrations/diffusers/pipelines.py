"""A pipeline's run, shown: the scheduler's steps become publishes of x0, a call a run."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor

from taesd_stream.frames import EndReason, Kind, RecordMode, WireDtype, is_stream_name
from taesd_stream.integrations.diffusers.calls import told, variables_of_call
from taesd_stream.integrations.diffusers.formats import format_of, fps_of
from taesd_stream.integrations.diffusers.geometry import Geometry
from taesd_stream.integrations.diffusers.schedulers import Schedule
from taesd_stream.integrations.diffusers.step_hook import StepHook
from taesd_stream.latent_formats import latent_format as format_named
from taesd_stream.publisher import LatentPublisher
from taesd_stream.publisher_exit import reason_of

logger = logging.getLogger(__name__)


class Preview:
    """`with Preview(pipe):` shows what the pipeline paints in there; see `preview`."""

    def __init__(
        self,
        pipe: Any,
        address: str | None = None,
        *,
        stream: str | None = None,
        prompt: bool = True,
        latent_format: str | None = None,
        record: RecordMode | None = None,
        fps: float | None = None,
        wire_dtype: WireDtype | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self._pipe = pipe
        self._address = address
        self._stream = stream or type(pipe).__name__
        if not is_stream_name(self._stream):
            raise ValueError(f"stream: expected up to 4 names joined by '/', got {self._stream!r}")
        self._format = format_named(latent_format or format_of(pipe))
        self._with_prompt = prompt
        self._record, self._fps, self._wire_dtype, self._meta = record, fps, wire_dtype, dict(meta or {})
        self._hook = StepHook(pipe.scheduler, on_begin=self._on_begin, on_step=self._on_step)
        self._run: _Run | None = None
        self._fault: str | None = None

    @property
    def publishers(self) -> list[LatentPublisher]:
        """Those of the newest run, one a video of a batch, else one; none before the first step."""
        return self._run.publishers if self._run else []

    @property
    def is_complete(self) -> bool:
        """Whether the newest run has made its last step."""
        return self._run is not None and self._run.is_complete

    @property
    def error(self) -> str | None:
        """Why nothing is shown; None while all is well."""
        return self._fault or next((one.error for one in self.publishers if one.error), None)

    def attach(self) -> None:
        """Listen to the pipeline's scheduler from now on."""
        self._hook.attach()

    def let_go(self) -> None:
        """Listen no more, and let the run end behind our back; the scheduler is as it was."""
        self._hook.detach()
        self._run = None

    def close(self, reason: EndReason = "done", text: str = "") -> None:
        """Listen no more, and end the run: waits for what is kept, as LatentPublisher.close does."""
        self._hook.detach()
        for publisher in self.publishers:
            publisher.close(reason=reason, text=text)

    def __enter__(self) -> Preview:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(*reason_of(error))

    def _on_begin(self) -> None:
        """Another call of the pipeline: the next step opens a run of its own. A publisher that is dropped ends."""
        self._run, self._fault = None, None

    def _on_step(self, arguments: dict[str, Any], result: Any) -> None:
        if self._fault is not None:
            return
        try:
            self._run = self._run or self._open(arguments["sample"])
            self._run.show(arguments, result)
        except Exception as error:  # noqa: BLE001 the run is worth more than its preview
            self._fault = f"preview: {error}"
            logger.warning("preview_failed stream=%s error=%s (the run goes on, unseen)", self._stream, error)

    def _open(self, sample: Tensor) -> _Run:
        pipe, known = self._pipe, self._format
        variables = variables_of_call(pipe)
        geometry = Geometry(pipe, known, variables, sample)
        is_video = known.temporal_factor is not None
        count = geometry.spatial(sample.detach()).shape[0] if is_video else 1
        names = [f"{self._stream}/{place}" for place in range(count)] if count > 1 else [self._stream]
        meta = {
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
            **told(variables, with_prompt=self._with_prompt),
            **self._meta,
        }
        kind: Kind = "clip" if is_video else "steps"
        fps = (self._fps or variables.get("frame_rate") or fps_of(known.name)) if is_video else self._fps
        publishers = [
            LatentPublisher(
                self._address,
                stream=name,
                latent_format=known.name,
                kind=kind,
                fps=fps,
                record=self._record,
                meta=meta,
                wire_dtype=self._wire_dtype,
            )
            for name in names
        ]
        return _Run(pipe, geometry, publishers, is_video=is_video, timesteps=variables.get("timesteps"))


class _Run:
    """One call of a pipeline, from its first step on."""

    def __init__(
        self, pipe: Any, geometry: Geometry, publishers: list[LatentPublisher], *, is_video: bool, timesteps: Any
    ) -> None:
        self.publishers = publishers
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
        """Publish x0 of a step, where anybody wants it."""
        step, self._step = self._step, self._step + 1
        if any(one.wanted for one in self.publishers) or self.is_complete:
            index = self._index(step)
            x0 = self._schedule.x0(
                index,
                output=arguments["model_output"],
                sample=arguments["sample"],
                result=result,
                token_timesteps=arguments.get("per_token_timesteps"),
            )
            spatial = self._geometry.spatial(x0)
            for publisher, latents in zip(self.publishers, spatial if self._is_video else [spatial], strict=True):
                publisher.publish(latents, step=step, total_steps=self._total, sigma=self._schedule.sigma(index))
        stops = [one.stopped for one in self.publishers] if self._can_stop else []  # each is asked: asking shows Stop
        if any(stops):
            self._pipe._interrupt = True

    def _index(self, step: int) -> int:
        """The step's place in the scheduler's own schedule: image to image begins later in it."""
        behind = getattr(self._scheduler, "step_index", None)
        return self._schedule.steps - self._total + step if behind is None else int(behind) - 1


def preview(pipe: Any, address: str | None = None, **options: Any) -> Preview:
    """`with preview(pipe):` shows every run of a diffusers pipeline in the block, at every step, as x0."""
    return Preview(pipe, address, **options)


class PreviewCallback:
    """`pipe(…, callback_on_step_end=PreviewCallback(pipe))`: the preview of one call. Options as `preview` has them.

    The scheduler is listened to from here to the last step, or until this object is dropped where the call fails.
    """

    def __init__(self, pipe: Any, address: str | None = None, **options: Any) -> None:
        self.preview = Preview(pipe, address, **options)
        self.preview.attach()
        self._end = weakref.finalize(self, self.preview.let_go)
        self._end.atexit = False

    def __call__(self, _pipe: Any, _step: int, _timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls after each step; it changes nothing."""
        if self.preview.is_complete:
            self._end()
        return callback_kwargs
