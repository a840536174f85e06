"""The node for ComfyUI, loaded as ComfyUI loads it, against a broker that the test speaks for."""

from __future__ import annotations

import itertools
import logging
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from typer.testing import CliRunner

from taesd_stream.errors import ConfigError
from taesd_stream.frames import LatentFrame, StreamInfo
from taesd_stream.integrations.comfyui.formats import format_of, published
from taesd_stream.integrations.comfyui.graph import fps_of, told
from taesd_stream.messages import End, StopRun
from taesd_stream_workers.commands.command_line import app
from tests.broker_peer import BrokerPeer
from tests.comfyui_standin import NODE, ComfyUI, InterruptProcessingException, ModelPatcher, model_of, pack_latents
from tests.daemon import clean_environment

SIGMAS: Final = torch.tensor([10.0, 4.0, 1.0, 0.0])
REFINER: Final = "hunyuan_image_2_1_refiner"
PROMPT: Final = "0b6d9b1e-33b5-4d0e-9b7a-2f6f3c1d5a10"
GRAPH: Final[dict[str, Any]] = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": ["9", 0]}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": "blurry"}},
    "9": {"class_type": "PrimitiveString", "inputs": {"value": "a red fox"}},
    "57:8": {
        "class_type": "KSampler",
        "_meta": {"title": "Paint"},
        "inputs": {
            "model": ["1", 0],
            "negative": ["3", 0],
            "positive": ["2", 0],
            "latent_image": ["60", 0],
            "scheduler": "karras",
        },
    },
    "60": {"class_type": "VideoOut", "inputs": {"frame_rate": 12}},
}


@pytest.fixture
def comfy(peer: BrokerPeer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComfyUI]:
    """ComfyUI's parts with our node loaded; its default daemon is the test's broker."""
    monkeypatch.setenv("TAESD_STREAM_ADDRESS", peer.address)
    with ComfyUI() as one:
        node = one.load(NODE)
        assert list(node.NODE_DISPLAY_NAME_MAPPINGS.values()) == ["Preview stream"]
        yield one


def seen(peer: BrokerPeer, runs: int = 1) -> dict[str, tuple[StreamInfo, list[LatentFrame], End]]:
    """Watch and keep every run until so many have ended from now on: what each of them said, by stream."""
    ends: dict[str, End] = {}
    while len(ends) < runs:
        message = peer.receive()
        if isinstance(message, StreamInfo):
            peer.demand(message.run, "every", record="all")
        elif isinstance(message, LatentFrame) and message.kept:
            peer.ack(message.run, message.seq)
        elif isinstance(message, End):
            peer.ack(message.run, message.last_seq, ended=True)
            ends[message.run] = message
    found = {}
    for info in [one for one in peer.heard if isinstance(one, StreamInfo) and one.run in ends]:
        frames = {one.seq: one for one in peer.heard if isinstance(one, LatentFrame) and one.run == info.run}
        found[info.stream] = (info, [frames[seq] for seq in sorted(frames)], ends[info.run])
    return found


def array(frame: LatentFrame) -> NDArray[np.float16]:
    """The latents of a frame."""
    return np.frombuffer(frame.payload, np.float16).reshape(frame.shape)


def named(node: Any, model: ModelPatcher, **options: Any) -> ModelPatcher:
    """The model behind the node `Preview stream`."""
    function: Callable[..., tuple[ModelPatcher]] = getattr(node(), node.FUNCTION)
    (result,) = function(model, **options)
    return result


def test_a_sampler_node_is_a_stream(comfy: ComfyUI, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Each step's x0, the whole batch, arrives under prompt and node id, with what the graph says; nothing changes."""
    noise = torch.randn(3, 4, 8, 6)
    model = model_of("SD15")
    own: list[int] = []

    def preview(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        own.append(step)

    def node() -> Tensor:
        with comfy.executing(GRAPH, PROMPT, "57:8"):
            return comfy.sample(model, noise, SIGMAS, preview, seed=11)

    doing = beside.submit(node)
    runs = seen(peer)
    result = doing.result(30)
    assert list(runs) == [f"comfy/{PROMPT}/57.8"]
    info, frames, end = runs[f"comfy/{PROMPT}/57.8"]
    assert (info.kind, info.latent_format, info.record, end.reason) == ("steps", "sd1", None, "done")
    assert {name: info.meta[name] for name in ("prompt", "checkpoint", "scheduler", "node", "sampler", "seed")} == {
        "prompt": "a red fox",
        "checkpoint": "v1-5.safetensors",
        "scheduler": "karras",
        "node": "Paint",
        "sampler": "euler",
        "seed": 11,
    }
    assert [(one.step, one.total_steps, one.sigma) for one in frames] == [(0, 3, 10), (1, 3, 4), (2, 3, 1)]
    np.testing.assert_allclose(array(frames[-1]), result.numpy(), atol=2e-3, rtol=1e-3)
    assert own == [0, 1, 2]
    with ComfyUI() as bare:
        assert torch.equal(result, bare.sample(model, noise, SIGMAS))


def test_a_name_of_the_workflow(comfy: ComfyUI, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """`Preview stream` names the stream, says what is kept, and keeps the prompt at home; the model stays as it was."""
    node = comfy.load(NODE).NODE_CLASS_MAPPINGS["TaesdPreviewStream"]
    assert set(node.INPUT_TYPES()["required"]) == {"model", "name", "record"}
    assert node.VALIDATE_INPUTS(name="cat/hires") is True
    assert "got 'a cat'" in node.VALIDATE_INPUTS(name="a cat")
    model = model_of("SD15")
    options = {"name": "cat/hires", "record": "last", "address": peer.address, "prompt": False}

    def run() -> None:
        with comfy.executing(GRAPH, PROMPT, "57:8"):
            comfy.sample(named(node, model, **options), torch.randn(1, 4, 8, 8), SIGMAS)

    doing = beside.submit(run)
    runs = seen(peer)
    doing.result(30)
    info, _, _ = runs["cat/hires"]
    assert (info.record, "prompt" in info.meta) == ("last", False)
    assert "taesd_stream" not in model.model_options


def test_videos_with_sound(comfy: ComfyUI, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Of video that is packed with sound, each video of the batch is a clip of its own with all its frames."""
    video, sound = torch.randn(2, 128, 3, 4, 5), torch.randn(2, 8, 7)
    packed, shapes = pack_latents([video, sound])

    def run() -> None:
        with comfy.executing(GRAPH, PROMPT, "57:8"):
            comfy.sample(model_of("LTXAV", "LTXV"), packed, SIGMAS, shapes=shapes)

    doing = beside.submit(run)
    runs = seen(peer, runs=2)
    doing.result(30)
    last = video * SIGMAS[0]
    for sigma, following in itertools.pairwise(SIGMAS):
        last = last + (last - last / (1 + sigma**2)) / sigma * (following - sigma)
    for place in range(2):
        info, frames, _ = runs[f"comfy/{PROMPT}/57.8/{place}"]
        assert (info.kind, info.latent_format, info.fps, len(frames)) == ("clip", "ltx_2", 12, 3)
        np.testing.assert_allclose(array(frames[-1]), last[place].transpose(0, 1).numpy(), atol=2e-3, rtol=1e-3)


def test_stop_interrupts_comfyui(comfy: ComfyUI, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Stop on the page is ComfyUI's own interrupt, and the run has ended as stopped."""

    def run() -> int:
        steps = torch.linspace(10, 0, 100_000)
        with comfy.executing(GRAPH, PROMPT, "57:8"):
            try:
                comfy.sample(model_of("SD15"), torch.randn(1, 4, 8, 8), steps)
            except InterruptProcessingException:
                return 1
        return 0

    doing = beside.submit(run)
    info = peer.opened()
    peer.demand(info.run)
    peer.send(StopRun(run=info.run))
    assert peer.finish().reason == "stopped"
    assert doing.result(30) == 1
    assert not comfy.interrupt.is_set


@pytest.mark.parametrize(
    ("error", "reason"), [(InterruptProcessingException(), "stopped"), (MemoryError("no room"), "failed")]
)
def test_how_a_sampler_ended(
    error: Exception, reason: str, comfy: ComfyUI, peer: BrokerPeer, beside: ThreadPoolExecutor
) -> None:
    """What ends a sampler goes on as it was, and is the end of its run: an interrupt, a failure."""

    def broken(*_: Any) -> None:
        raise error

    def run() -> BaseException | None:
        try:
            comfy.sample(model_of("SD15"), torch.randn(1, 4, 8, 8), SIGMAS, broken)
        except Exception as caught:  # noqa: BLE001 the test's own
            return caught
        return None

    doing = beside.submit(run)
    _, _, end = seen(peer)["comfy"]
    assert doing.result(30) is error
    assert end.reason == reason


def test_other_packs(peer: BrokerPeer, beside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs that wrap the same function before us and after us are called, and however often we are loaded, we once."""
    monkeypatch.setenv("TAESD_STREAM_ADDRESS", peer.address)
    called: list[str] = []

    def wrap(comfy: ComfyUI, name: str) -> None:
        original = comfy.guider.inner_sample

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(self, *args, **kwargs)

        comfy.guider.inner_sample = wrapped

    with ComfyUI() as comfy:
        wrap(comfy, "before")
        comfy.load(NODE)
        wrap(comfy, "after")
        comfy.load(NODE)
        doing = beside.submit(comfy.sample, model_of("SD15"), torch.randn(1, 4, 8, 8), SIGMAS)
        runs = seen(peer)
        doing.result(30)
    assert called == ["after", "before"]
    assert [(name, len(frames)) for name, (_, frames, _) in runs.items()] == [("comfy", 3)]


def test_what_is_not_shown(comfy: ComfyUI, caplog: pytest.LogCaptureFixture) -> None:
    """Sound, a bad name and a bad address are each a line in the log, and the picture is the same as ever."""
    node = comfy.load(NODE).NODE_CLASS_MAPPINGS["TaesdPreviewStream"]
    noise = torch.randn(1, 4, 8, 8)
    result = comfy.sample(model_of("ACEAudio"), noise, SIGMAS)
    for options in ({"name": "a/b/c/d/e"}, {"name": "a", "address": "nowhere"}):
        model = named(node, model_of("SD15"), record="as the daemon says", **options)
        assert torch.equal(comfy.sample(model, noise, SIGMAS), result)
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["a/b/c/d/e" in lines[0], "nowhere" in lines[1], len(lines)] == [True, True, 2]


def test_without_a_daemon(comfy: ComfyUI, peer: BrokerPeer, caplog: pytest.LogCaptureFixture) -> None:
    """With nobody at the address a sampler gives what it gives, and no step complains."""
    peer.close()
    noise = torch.randn(1, 4, 8, 8)
    shown = comfy.sample(model_of("SD15"), noise, SIGMAS)
    with ComfyUI() as bare:
        assert torch.equal(shown, bare.sample(model_of("SD15"), noise, SIGMAS))
    assert [record for record in caplog.records if "comfyui" in record.getMessage()] == []


def test_a_daemon_that_is_killed_midway(comfy: ComfyUI, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """The sampler goes on without it, to the same bits."""
    noise, sigmas = torch.randn(2, 4, 16, 16), torch.linspace(10, 0, 200)
    is_dead = threading.Event()

    def preview(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
        assert step != 100 or is_dead.wait(20)

    doing = beside.submit(comfy.sample, model_of("SD15"), noise, sigmas, preview)
    info = peer.opened()
    peer.demand(info.run, "every", record="all")
    peer.frame(20)
    peer.close()
    is_dead.set()
    shown = doing.result(30)
    with ComfyUI() as bare:
        assert torch.equal(shown, bare.sample(model_of("SD15"), noise, sigmas))


@pytest.mark.parametrize(
    ("model", "shape", "name", "sent"),
    [
        (model_of("SDXL"), (2, 4, 8, 6), "sdxl", (2, 4, 8, 6)),
        (model_of("Flux", "SD3"), (1, 16, 8, 6), "flux1", (1, 16, 8, 6)),
        (model_of("TheirOwn", "Flux", "SD3"), (1, 16, 8, 6), "flux1", (1, 16, 8, 6)),
        (model_of("Flux2"), (2, 128, 4, 3), "flux2", (2, 128, 4, 3)),
        (model_of("Wan21"), (2, 16, 1, 8, 6), "qwen_image", (2, 16, 8, 6)),
        (model_of("Wan21"), (2, 16, 5, 8, 6), "wan2_1", (2, 5, 16, 8, 6)),
        (model_of("Wan22", "Wan21"), (1, 48, 5, 8, 6), "wan2_2", (1, 5, 48, 8, 6)),
        (model_of("CogVideoX1_5", "CogVideoX", scale_factor=0.7), (1, 16, 2, 8, 6), "cogvideox", (1, 2, 16, 8, 6)),
        (model_of("HunyuanImage21Refiner"), (1, 64, 2, 4, 4), REFINER, (1, 3, 32, 4, 4)),
        (model_of("MiniMaxH3AV", "MiniMaxH3Video"), (1, 24, 2, 4, 4), "minimax_h3", (1, 2, 24, 4, 4)),
        (model_of("LTXAV", "LTXV"), (1, 128, 2, 4, 4), "ltx_2", (1, 2, 128, 4, 4)),
        (
            model_of("LTXAV", "LTXV", blocks=[type("Block", (), {"cross_attention_adaln": True})]),
            (1, 128, 2, 4, 4),
            "ltx_2_3",
            (1, 2, 128, 4, 4),
        ),
        (model_of("Hunyuan3Dv2_1Paint", "SD15"), (1, 4, 6, 8, 8), "sd1", (6, 4, 8, 8)),
    ],
)
def test_formats(model: ModelPatcher, shape: tuple[int, ...], name: str, sent: tuple[int, ...]) -> None:
    """Each latent format of ComfyUI is one of ours by its class, and its latents go out spatial, in our scale."""
    known = format_of(model.model, shape[2] if len(shape) == 5 else None)
    assert known is not None
    assert known.name == name
    x0 = torch.randn(shape)
    latents = published(x0, known, model.model.latent_format.scale_factor)
    assert latents.shape == sent
    kind, one = ("clip", latents[0]) if known.temporal_factor else ("steps", latents)
    known.check_shape(kind, one.shape)  # type: ignore[arg-type]
    expected = x0 if x0.ndim == 4 else x0.transpose(1, 2).reshape(sent if name != REFINER else (1, 4, 32, 4, 4))
    if name == REFINER:  # pairs of frames, the first a filler: as its process_out has it
        expected = expected[:, 1:]
    if name == "cogvideox":  # a checkpoint of another scale than the table's
        assert known.decoder_scale is not None
        expected = expected / 0.7 * known.decoder_scale
    torch.testing.assert_close(latents, expected)


def test_what_the_graph_tells() -> None:
    """Words are those of the positive side through links; a graph with loops, odd nodes and two rates says less."""
    assert told(GRAPH, "57:8", with_prompt=False) == {
        "node": "Paint",
        "checkpoint": "v1-5.safetensors",
        "scheduler": "karras",
    }
    odd: dict[str, Any] = {"1": {"class_type": "A", "inputs": {"positive": ["2", 0]}}, "2": {"inputs": {"x": ["1", 0]}}}
    assert told(odd, "1", with_prompt=True) == {"node": "A"}
    assert told({}, "5", with_prompt=True) == {}
    assert fps_of(GRAPH) == 12
    assert fps_of({**GRAPH, "61": {"inputs": {"fps": 24.0}}}) is None


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    """Where ComfyUI's Python lacks the package, the node adds nothing, raises nothing, and says how to get it."""
    code = (
        "import logging, runpy, sys, types\n"
        "logging.basicConfig(format='%(message)s')\n"
        "sys.modules['comfy'] = types.ModuleType('comfy')\n"
        "sys.modules['taesd_stream'] = None\n"
        "print(runpy.run_path(sys.argv[1])['NODE_CLASS_MAPPINGS'])\n"
    )
    command = [sys.executable, "-c", code, str(NODE / "__init__.py")]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "{}\n")
    assert len(done.stderr.splitlines()) == 1
    assert f"{sys.executable} -m pip install -U taesd-stream" in done.stderr


def test_install_and_uninstall(tmp_path: Path) -> None:
    """The command puts the node into custom_nodes, renews it, and takes it out; nothing else there is touched."""
    home = tmp_path / "ComfyUI"
    other = home / "custom_nodes" / "other.py"
    (home / "comfy").mkdir(parents=True)
    other.parent.mkdir()
    other.write_text("")
    node = home / "custom_nodes" / "taesd-stream" / "__init__.py"
    for _ in range(2):
        assert CliRunner().invoke(app, ["comfyui", "install", str(home)]).exit_code == 0
        assert node.read_bytes() == (NODE / "__init__.py").read_bytes()
    with ComfyUI() as comfy:
        assert list(comfy.load(node.parent).NODE_CLASS_MAPPINGS) == ["TaesdPreviewStream"]
    assert CliRunner().invoke(app, ["comfyui", "uninstall", str(home)]).exit_code == 0
    assert list(other.parent.iterdir()) == [other]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """What the file system denies (here by the size that a file may have) is an error that names the folder."""
    for name in ("custom_nodes", "models"):
        (tmp_path / name).mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signals = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        result = CliRunner().invoke(app, ["comfyui", "install", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signals)
    assert isinstance(result.exception, ConfigError)
    assert str(tmp_path / "custom_nodes" / "taesd-stream") in str(result.exception)


@pytest.mark.parametrize(
    ("path", "command", "words"),
    [
        ("nowhere", "install", "there is no such folder"),
        (".", "install", "did you mean"),
        ("ComfyUI", "uninstall", "nothing to take out"),
        ("taken", "install", "is not from this command"),
        ("taken", "uninstall", "is not from this command"),
    ],
)
def test_where_it_cannot_be_installed(path: str, command: str, words: str, tmp_path: Path) -> None:
    """No ComfyUI, none of ours, somebody else's folder of that name: an error that says so, and no file changes."""
    for home in ("ComfyUI", "taken"):
        (tmp_path / home / "custom_nodes").mkdir(parents=True)
        (tmp_path / home / "models").mkdir()
    theirs = tmp_path / "taken" / "custom_nodes" / "taesd-stream" / "__init__.py"
    theirs.parent.mkdir()
    theirs.write_text("NODE_CLASS_MAPPINGS = {}\n")
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["comfyui", command, str(tmp_path / path)])
    assert result.exit_code != 0
    assert words in str(result.exception)
    assert (sorted(tmp_path.rglob("*")), theirs.read_text()) == (before, "NODE_CLASS_MAPPINGS = {}\n")
