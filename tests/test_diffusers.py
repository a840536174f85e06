"""Previews of diffusers' own pipelines: what arrives at a broker is what the VAE gets, and nobody's picture changes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import av
import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from taesd_stream import LatentPublisher
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.integrations.diffusers import PreviewCallback, preview
from taesd_stream.integrations.diffusers.schedulers import Schedule
from taesd_stream.integrations.diffusers.step_hook import StepHook
from taesd_stream.latent_formats import LATENT_FORMATS
from taesd_stream.media.finished import read_summary
from taesd_stream.messages import End, StopRun
from taesd_stream.user_formats import to_metadata, user_formats_folder
from tests.broker_peer import BrokerPeer
from tests.daemon import Daemon, wait_for
from tests.diffusers_pipelines import (
    GIVEN,
    IMAGES,
    STEPS,
    VIDEOS,
    Case,
    call,
    flux1,
    hunyuan_video_1_5,
    sd1,
    sd3,
    sdxl,
    wan,
    with_prompts,
)

D: Any = diffusers
NOBODY: Final = "tcp://127.0.0.1:9"  # a port that nobody listens on

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*__array__ implementation:DeprecationWarning", "ignore:.*is deprecated:FutureWarning"
)


@pytest.fixture(autouse=True)
def quiet_and_small() -> Iterator[None]:
    """Tiny networks are fastest on one thread; weights are the same in each test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def run(case: Case, **more: Any) -> tuple[Any, list[Tensor]]:
    """A short run of the pipeline, pictures as tensors."""
    case.pipe.set_progress_bar_config(disable=True)
    return call(case, num_inference_steps=STEPS, output_type="pt", **more)


def heard(peer: BrokerPeer, beside: ThreadPoolExecutor, work: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Do something that publishes, beside a broker that keeps all. Returns its result and what the broker heard."""
    doing = beside.submit(work)
    info = peer.opened()
    peer.demand(info.run, "every", record="all")
    peer.finish()
    return doing.result(60), peer.heard


def latents_of(frame: LatentFrame) -> Tensor:
    """A frame's latents; they came as float32."""
    assert frame.dtype == "float32"
    return torch.from_numpy(np.frombuffer(bytes(frame.payload), np.float32).reshape(frame.shape).copy())


def pictures(output: Any) -> Tensor:
    """What a pipeline made."""
    made = output.images if hasattr(output, "images") else output.frames
    return made if isinstance(made, Tensor) else torch.as_tensor(np.asarray(made))


@pytest.mark.parametrize("make", [*IMAGES, *VIDEOS, *GIVEN], ids=lambda make: make.__name__)
def test_what_arrives_is_what_the_vae_gets(
    make: Callable[[], Case], peer: BrokerPeer, beside: ThreadPoolExecutor
) -> None:
    """Of every pipeline each step arrives, the last one equal to what its own VAE is given; no picture changes."""
    case = make()
    alone, _ = run(case)

    def shown() -> Any:
        with preview(case.pipe, peer.address, wire_dtype="float32"):
            return run(case)

    (output, given), messages = heard(peer, beside, shown)
    assert torch.equal(pictures(output), pictures(alone))
    info = next(one for one in messages if isinstance(one, StreamInfo))
    assert (info.stream, info.latent_format) == (type(case.pipe).__name__, case.latent_format)
    assert info.kind == ("clip" if "frames" in output else "steps")
    assert {key: info.meta[key] for key in case.told} == case.told
    assert (info.meta["seed"], info.meta["pipeline"]) == (7, type(case.pipe).__name__)
    frames = {one.seq: one for one in messages if isinstance(one, LatentFrame)}
    count = len(frames)  # from an image it is fewer than the steps that were asked for
    assert count == STEPS or make in GIVEN
    steps = [(frame.step, frame.total_steps) for _, frame in sorted(frames.items())]
    assert steps == [(step, count) for step in range(count)]
    last = frames[count - 1]
    assert last.shape in (case.shape, case.shape[1:] if case.shape[0] == 1 else None)
    expected = given[-1]
    arrived = case.to_vae(latents_of(last))
    assert arrived.shape == expected.shape
    assert float((arrived - expected).abs().max()) <= 1e-3 * max(1.0, float(expected.abs().max()))


SCHEDULERS: Final[dict[str, Callable[[], Any]]] = {
    "ddim": lambda: D.DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction"),
    "ddim sample": lambda: D.DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="sample"),
    "ddpm": lambda: D.DDPMScheduler(clip_sample=False, steps_offset=1),
    "euler": lambda: D.EulerDiscreteScheduler(steps_offset=1),
    "euler ancestral": lambda: D.EulerAncestralDiscreteScheduler(steps_offset=1, prediction_type="v_prediction"),
    "heun": lambda: D.HeunDiscreteScheduler(steps_offset=1),
    "dpm++ 2m": lambda: D.DPMSolverMultistepScheduler(steps_offset=1, final_sigmas_type="zero"),
    "dpm++ 2m v": lambda: D.DPMSolverMultistepScheduler(steps_offset=1, prediction_type="v_prediction"),
    "unipc": lambda: D.UniPCMultistepScheduler(steps_offset=1, final_sigmas_type="zero", prediction_type="sample"),
    "lcm": lambda: D.LCMScheduler(steps_offset=1, timestep_scaling=1e6),
    "flow heun": lambda: D.FlowMatchHeunDiscreteScheduler(shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_prediction_of_a_scheduler(name: str, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Epsilon, v, sample and flow predictions end at what the VAE gets, by schedulers of every kind that end at 0."""
    case = sd3(SCHEDULERS[name]()) if "flow" in name else sd1(SCHEDULERS[name]())

    def shown() -> Any:
        with preview(case.pipe, peer.address, wire_dtype="float32"):
            return run(case)

    (_, given), messages = heard(peer, beside, shown)
    frames = [one for one in messages if isinstance(one, LatentFrame)]
    assert frames[-1].total_steps == frames[-1].step + 1
    arrived, expected = case.to_vae(latents_of(frames[-1])), given[-1]
    assert float((arrived - expected).abs().max()) <= 1e-3 * max(1.0, float(expected.abs().max()))


def test_each_step_shows_x0_and_not_the_noise(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """What is sent of a step is x_t without the noise that the model saw in it, at every step."""
    case = sd3()
    x_t = [torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))]

    def note(_pipe: Any, _step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        x_t.append(kwargs["latents"].clone())
        return kwargs

    def shown() -> Any:
        with preview(case.pipe, peer.address, wire_dtype="float32"):
            return run(case, latents=x_t[0], callback_on_step_end=note)

    _, messages = heard(peer, beside, shown)
    frames = [one for one in messages if isinstance(one, LatentFrame)]
    sigmas = case.pipe.scheduler.sigmas.tolist()
    for step, frame in enumerate(frames):
        assert frame.sigma == pytest.approx(sigmas[step])
        velocity = (x_t[step + 1] - x_t[step]) / (sigmas[step + 1] - sigmas[step])
        expected = x_t[step] - sigmas[step] * velocity
        torch.testing.assert_close(latents_of(frame), expected, atol=1e-4, rtol=1e-4)


def test_the_scheduler_is_as_it_was() -> None:
    """Within the block step() is listened to, and looks as it did; after it, nothing of ours is left."""
    case = sd1()
    scheduler = case.pipe.scheduler
    before = dict(vars(scheduler))
    signature = inspect.signature(scheduler.step)
    with preview(case.pipe, NOBODY):
        assert "step" in vars(scheduler)
        assert inspect.signature(scheduler.step) == signature
    assert vars(scheduler) == before


def test_after_an_exception_too(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """A run that fails gets its own exception, leaves the scheduler as it was, and ends as failed."""
    case = sd1()

    def fail(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise RuntimeError("out of luck")
        return kwargs

    def shown() -> None:
        with preview(case.pipe, peer.address), pytest.raises(RuntimeError, match="out of luck"):
            run(case, callback_on_step_end=fail)
        with pytest.raises(RuntimeError, match="out of luck"), preview(case.pipe, peer.address):
            run(case, callback_on_step_end=fail)

    doing = beside.submit(shown)
    ends = []
    for _ in range(2):
        info = peer.opened()
        peer.demand(info.run)
        ends.append(peer.finish())
    doing.result(60)
    assert [end.reason for end in ends] == ["done", "failed"]
    assert "out of luck" in ends[1].text
    assert "step" not in vars(case.pipe.scheduler)


def test_the_callback_alone(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """PreviewCallback shows every step, the first too, and is gone from the scheduler after the last."""
    case = flux1()

    def shown() -> Any:
        output = run(case, callback_on_step_end=PreviewCallback(case.pipe, peer.address, stream="by/callback"))
        assert "step" not in vars(case.pipe.scheduler)
        return output

    _, messages = heard(peer, beside, shown)
    assert next(one for one in messages if isinstance(one, StreamInfo)).stream == "by/callback"
    assert [one.step for one in messages if isinstance(one, LatentFrame)] == [0, 1, 2]
    assert next(one for one in messages if isinstance(one, End)).reason == "done"


def test_a_callback_whose_call_fails() -> None:
    """Where the call fails, the scheduler is as it was once the callback is dropped."""
    case = sd1()
    with pytest.raises(ValueError, match="height"):
        run(case, height=63, callback_on_step_end=PreviewCallback(case.pipe, NOBODY))
    gc.collect()
    assert "step" not in vars(case.pipe.scheduler)


def test_a_call_that_fails_under_a_callback_is_not_said_done(peer: BrokerPeer) -> None:
    """Its run ends as stopped once the callback is dropped: its last step never came."""
    case = sd1()

    class Failing(PreviewCallback):
        def __call__(self, *args: Any) -> dict[str, Any]:
            super().__call__(*args)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        run(case, callback_on_step_end=Failing(case.pipe, peer.address))
    gc.collect()
    peer.demand(peer.opened().run)
    assert peer.finish().reason == "stopped"
    assert "step" not in vars(case.pipe.scheduler)


def test_steps_that_nobody_listens_to_are_said(caplog: pytest.LogCaptureFixture) -> None:
    """A scheduler that is replaced within the block, and a callback given to a second call, are no silence."""
    case = sd1()
    with preview(case.pipe, NOBODY) as replaced:
        case.pipe.scheduler = D.DDIMScheduler(clip_sample=False, steps_offset=1)
        run(case)
    assert "scheduler that is not listened to" in (replaced.error or "")
    used = PreviewCallback(case.pipe, NOBODY)
    run(case, callback_on_step_end=used)
    assert "not listened to" not in (used.preview.error or "")
    run(case, callback_on_step_end=used)
    assert "not listened to" in (used.preview.error or "")
    assert caplog.text.count("not listened to") == 2


def test_a_loop_of_somebodys_own_is_shown(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """An object with the same scheduler is no pipeline; and a preview that is closed within its block is no fault."""
    case = sd1()

    class Runner:
        scheduler = case.pipe.scheduler

        def __call__(self) -> None:
            self.scheduler.set_timesteps(2)
            latents = torch.randn(1, 4, 8, 8)
            for t in self.scheduler.timesteps:
                latents = self.scheduler.step(torch.randn(1, 4, 8, 8), t, latents).prev_sample

    def shown() -> str | None:
        with preview(case.pipe, peer.address) as view:
            Runner()()
            view.close()
        return view.error

    error, messages = heard(peer, beside, shown)
    assert error is None
    assert sum(isinstance(one, LatentFrame) for one in messages) == 2


def test_a_pipeline_that_shares_the_scheduler_is_shown_as_itself(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """from_pipe()'s own sizes and prompt are read: tokens of another size are unpacked by them."""
    case = flux1()
    other = D.FluxImg2ImgPipeline.from_pipe(case.pipe)
    arguments = {**case.arguments, "height": 96, "width": 64, "image": torch.rand(1, 3, 96, 64), "strength": 1.0}

    def shown() -> Any:
        with preview(case.pipe, peer.address):
            return other(**arguments, num_inference_steps=STEPS, output_type="pt", guidance_scale=2.0)

    _, messages = heard(peer, beside, shown)
    info = next(one for one in messages if isinstance(one, StreamInfo))
    assert (info.stream, info.meta["pipeline"], info.meta["guidance"]) == ("FluxPipeline", "FluxImg2ImgPipeline", 2.0)
    assert {one.shape for one in messages if isinstance(one, LatentFrame)} == {(2, 16, 12, 8)}


def test_stop_interrupts_the_pipeline(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Stop on the page ends the loop by the pipeline's own interrupt: no step after the one that heard it."""
    case = sd1()
    steps: list[int] = []
    has_begun = threading.Event()

    def shown() -> None:
        with preview(case.pipe, peer.address) as view:

            def wait_for_stop(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
                steps.append(step)
                has_begun.set()
                wait_for(lambda: view.sinks[0].stopped, of="STOP")
                return kwargs

            run(case, callback_on_step_end=wait_for_stop)

    doing = beside.submit(shown)
    info = peer.opened()
    peer.demand(info.run)
    assert has_begun.wait(60)  # the first step is over: the second hears of it
    peer.send(StopRun(run=info.run))
    assert peer.finish().reason == "stopped"
    doing.result(60)
    assert steps == [0, 1]


def test_every_call_is_a_run_of_its_own(peer: BrokerPeer, beside: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Each call in a block is a run of the stream, told what it paints; `prompt=False` leaves the prompt out."""
    case = with_prompts(sd1(), tmp_path)

    def shown() -> None:
        with preview(case.pipe, peer.address, stream="often", meta={"note": "mine"}):
            run(case, prompt="a red fox")
            run(case, prompt=["a red fox", "a blue fox"])
        with preview(case.pipe, peer.address, stream="often", prompt=False):
            run(case, prompt="a red fox")

    doing = beside.submit(shown)
    infos = []
    for _ in range(3):
        info = peer.opened()
        infos.append(info)
        peer.demand(info.run)
        peer.finish()
    doing.result(60)
    assert [info.stream for info in infos] == ["often"] * 3
    assert len({info.run for info in infos}) == 3
    assert [info.meta.get("prompt") for info in infos] == ["a red fox", "a red fox\na blue fox", None]
    assert (infos[0].meta["note"], infos[0].meta["guidance"], infos[0].meta["steps"]) == ("mine", 3.0, STEPS)


def test_videos_of_a_batch_are_streams(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """A batch of videos is a stream each, all its frames in it; fps is the model's."""
    case = wan()

    def shown() -> Any:
        with preview(case.pipe, peer.address, stream="two"):
            return run(case, num_videos_per_prompt=2)

    doing = beside.submit(shown)
    infos = []
    for _ in range(2):
        infos.append(peer.opened())
        peer.demand(infos[-1].run)
    for _ in range(2):
        peer.finish()
    doing.result(60)
    assert sorted(info.stream for info in infos) == ["two/0", "two/1"]
    assert [info.fps for info in infos] == [16.0, 16.0]
    last = [one for one in peer.heard if isinstance(one, LatentFrame) and one.step == STEPS - 1]
    assert {frame.run for frame in last} == {info.run for info in infos}
    assert {frame.shape for frame in last} == {case.shape}
    assert last[0].payload != last[1].payload


def test_nobody_there_changes_nothing() -> None:
    """Without a daemon the pictures are the same, bit for bit, and nothing is raised."""
    case = flux1()
    alone, _ = run(case)
    with preview(case.pipe, NOBODY) as view:
        shown, _ = run(case)
    assert torch.equal(pictures(alone), pictures(shown))
    assert view.error is None


@pytest.mark.faults
def test_a_broker_gone_midway_changes_nothing(peer: BrokerPeer) -> None:
    """Pictures are the same, bit for bit, when the broker goes while the pipeline runs."""
    case = flux1()
    alone, _ = run(case)

    def leave(_pipe: Any, step: int, _t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            peer.opened()
            peer.close()
        return kwargs

    with preview(case.pipe, peer.address):
        shown, _ = run(case, callback_on_step_end=leave)
    assert torch.equal(pictures(alone), pictures(shown))


@pytest.mark.faults
@pytest.mark.parametrize("make", [sd1, hunyuan_video_1_5], ids=lambda make: make.__name__)
def test_a_daemon_killed_midway_changes_nothing(make: Callable[[], Case], tmp_path: Path) -> None:
    """Pictures are the same, bit for bit, when the daemon is killed while the pipeline runs and everything is kept."""
    case = make()
    alone, _ = run(case)
    killed: list[int] = []
    daemon = Daemon(tmp_path)
    daemon.start()

    def kill(_module: Any, _arguments: Any) -> None:
        if not killed and view.sinks:
            assert isinstance(view.sinks[0], LatentPublisher)
            assert view.sinks[0].wait_until_acked(20)
            killed.append(daemon.stop(signal.SIGKILL))

    denoiser = case.pipe.unet if hasattr(case.pipe, "unet") else case.pipe.transformer
    with preview(case.pipe, daemon.broker, record="all") as view:
        handle = denoiser.register_forward_pre_hook(kill)
        shown, _ = run(case)
        handle.remove()
    assert killed == [-signal.SIGKILL]
    assert torch.equal(pictures(alone), pictures(shown))


def test_a_scheduler_that_nobody_knows(caplog: pytest.LogCaptureFixture) -> None:
    """A scheduler whose x0 is not known is said once, and the run goes on as it would."""

    class Odd(D.DDIMScheduler):  # type: ignore[misc]
        def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
            return super().step(model_output, timestep, sample, **kwargs)[:1]

    case = sd1(Odd(clip_sample=False, steps_offset=1))
    alone, _ = run(case)
    with preview(case.pipe, NOBODY) as view:
        shown, _ = run(case)
    assert torch.equal(pictures(alone), pictures(shown))
    assert "no x0 is known of Odd" in str(view.error)
    assert caplog.text.count("preview_failed") == 1


def test_the_format_can_be_said() -> None:
    """A VAE that tells nothing is told by the pipeline's class; an unknown space is an error that says what to say."""
    case = sd1()
    case.pipe.vae = D.AutoencoderTiny()
    assert preview(case.pipe)._format.name == "sd1"
    case = sd3()
    case.pipe.vae.register_to_config(scaling_factor=9.0)
    assert preview(case.pipe)._format.name == "sd3"
    pipe = D.AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=case.pipe.vae, transformer=None, scheduler=case.pipe.scheduler
    )
    with pytest.raises(ValueError, match=r"AuraFlowPipeline with VAE AutoencoderKL: .* say latent_format=, one of sd1"):
        preview(pipe)
    assert preview(pipe, latent_format="sdxl")._format.name == "sdxl"
    with pytest.raises(ValueError, match="expected a diffusers pipeline with a scheduler, got UNet2DConditionModel"):
        preview(sd1().pipe.unet)
    with pytest.raises(ValueError, match="stream: expected"):
        preview(case.pipe, stream="no spaces")


def test_a_format_that_was_fitted_can_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the user's own folder is known as the table's are; any other name still gets the nearest ones."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = user_formats_folder() / "my_space.safetensors"
    path.parent.mkdir(parents=True)
    factors: Any = {"rgb_factors": ((0.1, 0.2, 0.3),) * 4, "rgb_bias": (0.0, 0.0, 0.0)}
    fitted = dataclasses.replace(LATENT_FORMATS["sd1"], name="my_space", **factors)
    save_file({}, path, to_metadata(fitted, {}))
    assert preview(sd1().pipe, latent_format="my_space")._format.spatial_factor == 8
    with pytest.raises(ValueError, match="unknown latent format 'my_spac'"):
        preview(sd1().pipe, latent_format="my_spac")


@pytest.mark.parametrize(
    ("option", "value"), [("record", "some"), ("fps", -1.0), ("wire_dtype", "int4"), ("meta", {"x": "y" * 20_000})]
)
def test_a_bad_option_is_said_where_it_is_given(option: str, value: Any) -> None:
    """What no stream can have raises at once, not in a log line at the first step."""
    with pytest.raises(ValueError, match=option):
        preview(sd1().pipe, **{option: value})


# without a video decoder's weights a clip has a picture a latent, for as long as its frames would last
@pytest.mark.parametrize(("make", "count"), [(sdxl, STEPS), (wan, STEPS * 3)], ids=["pictures", "clips"])
def test_saved_without_a_daemon(make: Callable[[], Case], count: int, tmp_path: Path) -> None:
    """`save=` writes every step into an MP4 that says what was painted, without a daemon, and changes no picture."""
    case = make()
    alone, _ = run(case)
    path = tmp_path / "run.mp4"
    with preview(case.pipe, save=path) as view:
        shown, _ = run(case)
        run(case)
    assert view.error is None
    assert torch.equal(pictures(alone), pictures(shown))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run-2.mp4", "run.mp4"]
    with av.open(path) as container:
        times_s = [frame.time for frame in container.decode(video=0)]
    assert len(times_s) == count
    if make is wan:
        assert times_s == pytest.approx([place * 4 / 16 for place in range(count)], abs=0.001)
    summary = read_summary(path)
    assert summary is not None
    assert (summary["frames"], summary["meta"]["seed"], summary["missing"]) == (STEPS, 7, [])


def test_a_saved_run_by_the_callback(tmp_path: Path) -> None:
    """A callback that saves has its file once the call is over and the callback dropped."""
    case = sd1()
    path = tmp_path / "one.mp4"
    run(case, callback_on_step_end=PreviewCallback(case.pipe, save=path))
    gc.collect()
    wait_for(lambda: read_summary(path), of="the file")


@pytest.mark.parametrize("name", ["run.mkv", "nowhere/run.mp4"])
def test_a_path_that_cannot_be(name: str, tmp_path: Path) -> None:
    """Another suffix or a folder that is not there is an error before the run."""
    with pytest.raises(ValueError, match=r"save: expected a name that ends in \.mp4, in a folder that exists"):
        preview(sd1().pipe, save=tmp_path / name)


def test_a_flow_from_a_noise_level_of_80() -> None:
    """Cosmos 2 runs flow matching over sigmas that begin at 80: x0 is found there too."""
    scheduler = D.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.array([0.9, 0.5, 0.1]))
    scheduler.sigmas = torch.tensor([80.0, 10.0, 1.0, 0.0])
    clean, noise = torch.randn(2, 1, 16, 1, 4, 6, generator=torch.Generator().manual_seed(1))
    sample = clean + 80 * noise
    result = scheduler.step(noise, scheduler.timesteps[0], sample, return_dict=False)
    assert torch.allclose(Schedule(scheduler).x0(0, output=noise, sample=sample, result=result), clean, atol=1e-4)


def test_a_step_that_somebody_wrapped_may_take_more() -> None:
    """What a wrapper's caller says beside step()'s own arguments is told with them, and raises nothing."""
    scheduler: Any = diffusers.EulerDiscreteScheduler()  # type: ignore[no-untyped-call]
    original, told = scheduler.step, list[dict[str, Any]]()

    @functools.wraps(original)
    def wrapper(*args: Any, strength: float, **kwargs: Any) -> Any:
        assert strength == 0.5
        return original(*args, **kwargs)

    scheduler.step = wrapper
    hook = StepHook(scheduler, on_begin=lambda: None, on_step=lambda arguments, _: told.append(arguments))
    hook.attach()
    scheduler.set_timesteps(2)
    latents = torch.zeros(1, 4, 2, 2)
    scheduler.step(latents, scheduler.timesteps[0], sample=latents, strength=0.5)
    assert [set(one) for one in told] == [{"model_output", "timestep", "sample", "strength"}]
    hook.detach()
    assert scheduler.step is wrapper
