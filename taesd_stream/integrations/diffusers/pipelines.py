"""`preview` and `PreviewCallback`: a pipeline's runs, shown step by step."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from taesd_stream.frames import EndReason, Kind, RecordMode, WireDtype, name_of_one
from taesd_stream.integrations.diffusers.calls import running_call, told
from taesd_stream.integrations.diffusers.formats import format_named, format_of
from taesd_stream.integrations.diffusers.geometry import Geometry
from taesd_stream.integrations.diffusers.runs import PipelineRun, Sink
from taesd_stream.integrations.diffusers.step_hook import StepHook
from taesd_stream.integrations.frame_rates import usual_fps

if TYPE_CHECKING:
    from taesd_stream.daemons import Addresses

logger = logging.getLogger(__name__)


class Preview:
    """`with Preview(pipe):` shows what the pipeline paints in the block, a run a call; options as of `preview`."""

    def __init__(
        self,
        pipe: Any,
        address: Addresses | None = None,
        *,
        stream: str | None = None,
        save: str | Path | None = None,
        prompt: bool = True,
        latent_format: str | None = None,
        record: RecordMode | None = None,
        fps: float | None = None,
        wire_dtype: WireDtype | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        from taesd_stream.publisher import checked_info

        if not hasattr(getattr(pipe, "scheduler", None), "step"):
            raise ValueError(f"pipe: expected a diffusers pipeline with a scheduler, got {type(pipe).__name__}")
        self._pipe = pipe
        self._address = address
        self._stream = stream or type(pipe).__name__
        self._format = format_named(latent_format or format_of(pipe))
        # here, where somebody reads what is raised: at the first step it would only be logged
        checked_info(self._stream, self._format.name, "steps", fps, record, meta, wire_dtype)
        self._save = None if save is None else _checked_path(Path(save))
        self._files: list[Sink] = []  # of every call
        self._is_published = save is None or address is not None
        self._with_prompt = prompt
        self._record, self._fps, self._wire_dtype, self._meta = record, fps, wire_dtype, dict(meta or {})
        self._hook = StepHook(pipe.scheduler, on_begin=self._on_begin, on_step=self._on_step)
        self._run: PipelineRun | None = None
        self._fault: str | None = None
        _load(is_saved=save is not None)

    @property
    def sinks(self) -> list[Sink]:
        """Publishers of the newest run, one a video of a batch, else one; and its files. None before the first step."""
        return self._run.sinks if self._run else []

    @property
    def is_complete(self) -> bool:
        """Whether the newest run has made its last step."""
        return self._run is not None and self._run.is_complete

    @property
    def error(self) -> str | None:
        """Why nothing is shown; None while all is well."""
        return self._fault or next((one.error for one in (*self.sinks, *self._files) if one.error), None)

    def attach(self) -> None:
        """Listen to the pipeline's scheduler from now on."""
        self._hook.attach()

    def let_go(self) -> None:
        """Listen no more, and let the run end behind our back; the scheduler is as it was."""
        self._hook.detach()
        if self._run is not None and not self._run.is_complete:
            threading.Thread(target=self.close, args=("stopped", "ended before its last step")).start()
            return
        self._run = None
        self._files.clear()

    def check_is_heard(self) -> None:
        """Say it where the pipeline's steps are not this preview's to see: once, and in `error`."""
        if self._fault is None and not self._hook.hears(self._pipe.scheduler):
            self._fail("the pipeline steps by a scheduler that is not listened to: make a new preview for it")

    def close(self, reason: EndReason = "done", text: str = "") -> None:
        """Listen no more, and end the run: waits for what is kept, as LatentPublisher.close does, and for the files."""
        self._hook.detach()
        for sink in (*self.sinks, *self._files):
            sink.close(reason=reason, text=text)

    def __enter__(self) -> Preview:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from taesd_stream.publisher_exit import reason_of

        if self._hook.is_listening:
            self.check_is_heard()
        self.close(*reason_of(error))

    def _on_begin(self) -> None:
        """Another call of the pipeline: the next step opens a run of its own. A sink that is dropped ends by itself."""
        self._run, self._fault = None, None

    def _on_step(self, arguments: dict[str, Any], result: Any) -> None:
        if self._fault is not None:
            return
        try:
            self._run = self._run or self._open(arguments["sample"])
            self._run.show(arguments, result)
        except Exception as error:  # noqa: BLE001 the run is worth more than its preview
            self._fail(str(error))

    def _fail(self, why: str) -> None:
        self._fault = f"preview: {why}"
        logger.warning("preview_failed stream=%s error=%s (the run goes on, unseen)", self._stream, why)

    def _open(self, sample: Tensor) -> PipelineRun:
        pipe, variables = running_call(self._pipe)
        geometry = Geometry(pipe, self._format, variables, sample)
        is_video = self._format.temporal_factor is not None
        count = geometry.spatial(sample.detach()).shape[0] if is_video else 1
        names = [name_of_one(self._stream, place) for place in range(count)] if count > 1 else [self._stream]
        fps = self._fps
        if is_video and fps is None:
            fps = variables.get("frame_rate") or usual_fps(self._format.name)
        meta = {
            "pipeline": type(pipe).__name__,
            "scheduler": type(pipe.scheduler).__name__,
            **told(variables, with_prompt=self._with_prompt),
            **self._meta,
        }
        sinks = [self._sinks(name, "clip" if is_video else "steps", fps, meta) for name in names]
        return PipelineRun(pipe, geometry, sinks, is_video=is_video, timesteps=variables.get("timesteps"))

    def _sinks(self, stream: str, kind: Kind, fps: float | None, meta: dict[str, Any]) -> list[Sink]:
        sinks: list[Sink] = []
        if self._is_published:
            from taesd_stream.publisher import LatentPublisher

            publisher = LatentPublisher(
                self._address,
                stream=stream,
                latent_format=self._format.name,
                kind=kind,
                fps=fps,
                record=self._record,
                meta=meta,
                wire_dtype=self._wire_dtype,
            )
            sinks.append(publisher)
        if self._save is not None:
            from taesd_stream.integrations.saved_run import SavedRun

            count = len(self._files) + 1
            path = self._save if count == 1 else self._save.with_stem(f"{self._save.stem}-{count}")
            self._files.append(SavedRun(path, stream=stream, known=self._format, kind=kind, fps=fps, meta=meta))
            sinks.append(self._files[-1])
        return sinks


def preview(pipe: Any, address: Addresses | None = None, **options: Any) -> Preview:
    """`with preview(pipe):` shows every call of a diffusers pipeline in the block: at each step x0, after guidance.

    The pipeline's results are the same bit for bit, whether anybody watches, nobody does, or the daemon dies.
    address: the broker's, as LatentPublisher takes it. stream: by default the pipeline's class; with /0, /1 for the
    videos of a batch. prompt: whether prompts are told.
    save: an MP4 of every step, without a daemon: it is decoded in a thread of this process, which takes processor (or
    GPU) time from the sampler; needs the extra `daemon`. Further calls write NAME-2.mp4. Then `address` must be given
    for the run to be published too.
    latent_format: where neither VAE nor class tell it; also one of your own, from `taesd-stream fit`.
    record, fps, wire_dtype, meta: as LatentPublisher takes them.
    Raises: ValueError for a pipeline whose latent format is not known, a bad name or path; nothing after that.
    """
    return Preview(pipe, address, **options)


class PreviewCallback:
    """`pipe(…, callback_on_step_end=PreviewCallback(pipe))`: the preview of that one call; options as of `preview`.

    A callback alone never sees the model's output: the scheduler is listened to from here to the last step, or until
    this object is dropped where the call fails.
    """

    def __init__(self, pipe: Any, address: Addresses | None = None, **options: Any) -> None:
        self.preview = Preview(pipe, address, **options)
        self.preview.attach()
        self._end = weakref.finalize(self, self.preview.let_go)
        self._end.atexit = False

    def __call__(self, _pipe: Any, _step: int, _timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline calls after each step; it changes nothing."""
        self.preview.check_is_heard()
        if self.preview.is_complete:
            self._end()
        return callback_kwargs


def _checked_path(path: Path) -> Path:
    if path.suffix != ".mp4" or not path.parent.is_dir():
        raise ValueError(f"save: expected a name that ends in .mp4, in a folder that exists, got {str(path)!r}")
    return path


def _load(*, is_saved: bool) -> None:
    """Import what the first step will need: who only imports this package does not pay for it, nor does the step.

    Raises: ModuleNotFoundError that says what to install.
    """
    import taesd_stream.publisher

    if not is_saved:
        return
    try:
        import taesd_stream.integrations.saved_run  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("taesd_stream"):
            raise
        hint = 'save= decodes in this process: pip install "taesd-stream[daemon]"'
        raise ModuleNotFoundError(f"{error}; {hint}", name=error.name) from error
