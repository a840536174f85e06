"""Our node in a real ComfyUI, headless on the CPU: TAESD_STREAM_COMFYUI names its folder, whose venv has its needs.

That Python needs what ComfyUI's requirements.txt and our own package ask for (numpy, pyzmq, msgpack). Run with 0.3.64
(Comfy-Org/ComfyUI@a125cd8) and 0.33.0 (yzkee/ComfyUI@783545f).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import pytest
import safetensors.numpy
from typer.testing import CliRunner

from taesd_stream.frames import StreamInfo
from taesd_stream.messages import StopRun
from taesd_stream_workers.commands.command_line import app
from tests.broker_peer import BrokerPeer
from tests.daemon import wait_for
from tests.test_comfyui import array, seen

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT: Final = Path(__file__).parent.parent
START_S: Final = 400.0
STEPS: Final = 4
SD1_SCALE: Final = 0.18215


class RealComfyUI:
    """`with RealComfyUI(folder, base) as one:` runs its server; base: where its models, nodes and outputs are."""

    def __init__(self, folder: Path, base: Path, address: str) -> None:
        self._base = base
        self._log = base / "log.txt"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self._url = f"http://127.0.0.1:{one.getsockname()[1]}"
        pythons = [folder / name / "bin" / "python" for name in ("venv", ".venv")]
        python = next((one for one in pythons if one.exists()), Path(sys.executable))
        self._command = [str(python), "main.py", "--cpu", "--base-directory", str(base), "--preview-method"]
        self._command += ["latent2rgb", "--port", self._url.rpartition(":")[2]]
        self._folder = folder
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "TAESD_STREAM_ADDRESS": address}

    def __enter__(self) -> RealComfyUI:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, env=self._environment, stdout=log, stderr=subprocess.STDOUT
            )
        wait_for(self._answers, of="ComfyUI", timeout_s=START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text("utf-8", "replace")

    def queue(self, graph: dict[str, Any]) -> str:
        """Queue a prompt. Returns: its id."""
        return str(self._ask("/prompt", {"prompt": graph, "client_id": "test"})["prompt_id"])

    def finished(self, prompt_id: str) -> dict[str, Any]:
        """The history of a prompt that has ended."""
        found = wait_for(lambda: self._ask(f"/history/{prompt_id}").get(prompt_id), of="the prompt", timeout_s=120)
        assert isinstance(found, dict)
        return found

    def latents(self, prompt_id: str) -> Any:
        """What the prompt's SaveLatent wrote."""
        outputs = self.finished(prompt_id)["outputs"]
        (file,) = (one for node in outputs.values() for one in node["latents"])
        path = self._base / "output" / file["subfolder"] / file["filename"]
        return safetensors.numpy.load_file(path)["latent_tensor"]

    def skip_without(self, model: str) -> None:
        """Skip the test where this version has no such latent format."""
        inputs = self._ask("/object_info/TinyModel")["TinyModel"]["input"]["required"]
        if model not in inputs["unet_name"][0]:
            pytest.skip(f"this ComfyUI has no latents of {model}")

    def _answers(self) -> bool:
        assert self._process.poll() is None, self.log[-3000:]
        try:
            return bool(self._ask("/queue"))
        except OSError:
            return False

    def _ask(self, path: str, message: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if message is None else json.dumps(message).encode()
        try:
            with urllib.request.urlopen(self._url + path, data, timeout=30) as answer:  # noqa: S310 our own server
                found: dict[str, Any] = json.load(answer)
                return found
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()) from error


def graph(model: str = "sd1", *, steps: int = STEPS, stream: dict[str, Any] | None = None) -> dict[str, Any]:
    """A workflow of one sampler; stream: inputs of `Preview stream`."""
    empty = {"width": 64, "height": 48, "batch_size": 3}
    nodes: dict[str, Any] = {
        "1": {"class_type": "TinyModel", "inputs": {"unet_name": model}},
        "2": {"class_type": "TinyText", "inputs": {"text": "a red fox"}},
        "3": {"class_type": "TinyText", "inputs": {"text": "blurry"}},
        "4": {"class_type": "EmptyLatentImage", "inputs": empty},
        "57:8": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["6" if stream else "1", 0],
                "positive": ["2", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
                "seed": 11,
                "steps": steps,
                "cfg": 2.0,
                "sampler_name": "euler_ancestral",
                "scheduler": "karras",
                "denoise": 1.0,
            },
        },
        "9": {"class_type": "SaveLatent", "inputs": {"samples": ["57:8", 0], "filename_prefix": "test"}},
    }
    if model == "wan2_1":
        nodes["4"] = {"class_type": "EmptyHunyuanLatentVideo", "inputs": {**empty, "batch_size": 2, "length": 9}}
    if stream:
        nodes["6"] = {"class_type": "TaesdPreviewStream", "inputs": {"model": ["1", 0], **stream}}
    return nodes


@pytest.fixture(scope="module")
def folder() -> Path:
    """A checkout of ComfyUI."""
    name = os.environ.get("TAESD_STREAM_COMFYUI")
    if not name:
        pytest.skip("TAESD_STREAM_COMFYUI is not set: no ComfyUI here")
    return Path(name).resolve()


def base_of(path: Path, *, has_ours: bool) -> Path:
    """A base directory for ComfyUI with the test's pack and, installed by the command, our node."""
    for name in ("custom_nodes", "models", "input", "output", "user"):
        (path / name).mkdir(parents=True)
    (path / "custom_nodes" / "other_pack.py").write_bytes((ROOT / "tests" / "comfyui_pack.py").read_bytes())
    if has_ours:
        assert CliRunner().invoke(app, ["comfyui", "install", str(path)]).exit_code == 0
    return path


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerPeer]:
    """The broker that the test speaks for."""
    with BrokerPeer() as one:
        yield one


@pytest.fixture(scope="module")
def real(folder: Path, broker: BrokerPeer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealComfyUI]:
    """ComfyUI with our node."""
    base = base_of(tmp_path_factory.mktemp("with") / "ComfyUI", has_ours=True)
    with RealComfyUI(folder, base, broker.address) as one:
        yield one


def test_pictures(
    real: RealComfyUI, broker: BrokerPeer, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """KSampler's steps arrive as x0, the batch whole; the last is its result; without our node it is the same bits."""
    prompt_id = real.queue(graph())
    info, frames, end = seen(broker)[f"comfy/{prompt_id}/57.8"]
    result = real.latents(prompt_id)
    assert (info.kind, info.latent_format, end.reason) == ("steps", "sd1", "done")
    assert [one.step for one in frames] == list(range(STEPS))
    assert frames[0].sigma is not None
    assert frames[0].sigma > 10
    told = {"prompt": "a red fox", "checkpoint": "sd1", "sampler": "euler_ancestral", "scheduler": "karras", "seed": 11}
    assert told.items() <= info.meta.items()
    assert array(frames[-1]).shape == (3, 4, 6, 8)
    largest = max(1.0, float(np.abs(result).max() * SD1_SCALE))
    np.testing.assert_allclose(array(frames[-1]), result * SD1_SCALE, atol=1e-3 * largest)
    assert real.log.count("the other pack saw step") == STEPS
    assert real.log.count("the other pack saw a preview of (8, 6) pixels") == STEPS
    bare_base = base_of(tmp_path_factory.mktemp("without") / "ComfyUI", has_ours=False)
    with RealComfyUI(folder, bare_base, broker.address) as bare:
        alone = bare.latents(bare.queue(graph()))
    assert alone.tobytes() == result.tobytes()


def test_videos(real: RealComfyUI, broker: BrokerPeer) -> None:
    """Each video of a batch is a clip under the name of the workflow, all its frames at every step."""
    stream = {"name": "fox", "record": "all", "address": broker.address, "prompt": False}
    prompt_id = real.queue(graph("wan2_1", stream=stream))
    runs = seen(broker, runs=2)
    result = real.latents(prompt_id)
    for place in range(2):
        info, frames, end = runs[f"fox/{place}"]
        assert (info.kind, info.latent_format, info.fps, info.record) == ("clip", "wan2_1", 16, "all")
        assert ("prompt" in info.meta, end.reason, len(frames)) == (False, "done", STEPS)
        assert array(frames[-1]).shape == (3, 16, 6, 8)
        assert result[place].shape == (16, 3, 6, 8)


def test_flux2(real: RealComfyUI, broker: BrokerPeer) -> None:
    """FLUX.2's 128 channels go out as ComfyUI holds them, and the last x0 is the result."""
    real.skip_without("flux2")
    nodes = graph("flux2", stream={"name": "flux", "record": "off"})
    nodes["4"] = {"class_type": "EmptyFlux2LatentImage", "inputs": {"width": 64, "height": 48, "batch_size": 2}}
    prompt_id = real.queue(nodes)
    info, frames, _ = seen(broker)["flux"]
    result = real.latents(prompt_id)
    assert (info.kind, info.latent_format, array(frames[-1]).shape) == ("steps", "flux2", (2, 128, 3, 4))
    np.testing.assert_allclose(array(frames[-1]), result, atol=1e-3 * max(1.0, float(np.abs(result).max())))


def test_video_with_sound(real: RealComfyUI, broker: BrokerPeer) -> None:
    """Of video and sound that ComfyUI packs into one, the video is shown: each of the batch, its last x0 the result."""
    real.skip_without("ltx_2")
    nodes = graph("ltx_2", stream={"name": "sound", "record": "off"})
    nodes["4"] = {"class_type": "SoundBehind", "inputs": {"batch_size": 2}}
    nodes["10"] = {"class_type": "OnlyVideo", "inputs": {"samples": ["57:8", 0]}}
    nodes["9"]["inputs"]["samples"] = ["10", 0]
    prompt_id = real.queue(nodes)
    runs = seen(broker, runs=2)
    result = real.latents(prompt_id)
    for place in range(2):
        info, frames, _ = runs[f"sound/{place}"]
        assert (info.kind, info.latent_format, len(frames)) == ("clip", "ltx_2", STEPS)
        video = result[place].swapaxes(0, 1)
        np.testing.assert_allclose(array(frames[-1]), video, atol=1e-3 * max(1.0, float(np.abs(video).max())))


def test_custom_samplers(real: RealComfyUI, broker: BrokerPeer) -> None:
    """SamplerCustomAdvanced, whose guider, noise and sigmas are nodes of their own, is shown as KSampler is."""
    nodes = graph()
    nodes["57:8"] = {
        "class_type": "SamplerCustomAdvanced",
        "inputs": {"noise": ["20", 0], "guider": ["21", 0], "sampler": ["22", 0], "sigmas": ["23", 0]},
    }
    nodes["57:8"]["inputs"]["latent_image"] = ["4", 0]
    nodes["20"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 12}}
    nodes["21"] = {"class_type": "BasicGuider", "inputs": {"model": ["24", 0], "conditioning": ["2", 0]}}
    nodes["22"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}}
    schedule = {"model": ["1", 0], "scheduler": "simple", "steps": STEPS, "denoise": 1.0}
    nodes["23"] = {"class_type": "BasicScheduler", "inputs": schedule}
    named = {"model": ["1", 0], "name": "advanced", "record": "off"}
    nodes["24"] = {"class_type": "TaesdPreviewStream", "inputs": named}
    prompt_id = real.queue(nodes)
    info, frames, end = seen(broker)["advanced"]
    result = real.latents(prompt_id)
    told = {"prompt": "a red fox", "sampler": "dpmpp_2m", "scheduler": "simple", "seed": 12, "steps": STEPS}
    assert told.items() <= info.meta.items()
    assert (len(frames), end.reason) == (STEPS, "done")
    largest = max(1.0, float(np.abs(result).max() * SD1_SCALE))
    np.testing.assert_allclose(array(frames[-1]), result * SD1_SCALE, atol=1e-3 * largest)


def test_stop_is_an_interrupt(real: RealComfyUI, broker: BrokerPeer) -> None:
    """Stop on the page ends the prompt as ComfyUI's own interrupt does, and the next prompt runs."""
    prompt_id = real.queue(graph(steps=10_000))
    info = broker.next(StreamInfo)
    broker.demand(info.run)
    broker.send(StopRun(run=info.run))
    assert broker.finish().reason == "stopped"
    status = real.finished(prompt_id)["status"]
    assert "execution_interrupted" in [name for name, _ in status["messages"]]
    following = real.queue(graph())
    assert seen(broker)[f"comfy/{following}/57.8"][2].reason == "done"


def test_no_daemon(real: RealComfyUI, broker: BrokerPeer) -> None:
    """With nobody at the address a prompt ends well, and its latents are those of a prompt that somebody watched."""
    watched = real.queue(graph(stream={"name": "somebody", "record": "off", "address": broker.address}))
    assert seen(broker)["somebody"][2].reason == "done"
    shown = real.latents(watched)
    alone = real.latents(real.queue(graph(stream={"name": "nobody", "record": "off", "address": "tcp://127.0.0.1:9"})))
    assert alone.tobytes() == shown.tobytes()
    assert "comfyui_preview_failed" not in real.log
