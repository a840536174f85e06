"""The CPU's fastest arithmetic: measured, remembered, worth its rounding, and never used for what is kept."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from taesd_stream import LatentPublisher
from taesd_stream.decoding.cpu_choice import CHOICES, CpuChoice, cpu_choice, fastest, measure
from taesd_stream.decoding.engine import Engine, _measured
from taesd_stream.decoding.few_threads import be_guest
from taesd_stream.latent_formats import latent_format
from taesd_stream.models import build_decoder
from taesd_stream.models.checkpoints import load_state_dict
from tests.daemon import Daemon, clean_environment, wait_for

FLOAT32, CONTIGUOUS, BFLOAT16 = CHOICES
DATA = Path(__file__).parent.parent / "taesd_stream" / "data"


def test_every_form_is_measured() -> None:
    """Each form has its time, and measuring leaves threads and random numbers as they were."""
    torch.manual_seed(3)
    expected, threads = torch.rand(1), torch.get_num_threads()
    torch.manual_seed(3)
    times_s = measure()
    assert set(times_s) == set(CHOICES)
    assert all(0 < time_s < float("inf") for time_s in times_s.values())
    assert torch.equal(torch.rand(1), expected)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("times_s", "expected"),
    [
        ((0.030, 0.040, 0.008), BFLOAT16),
        ((0.030, 0.020, 0.300), CONTIGUOUS),
        ((0.030, 0.040, 0.029), FLOAT32),  # not worth its rounding
        ((0.030, 0.021, 0.020), CONTIGUOUS),
    ],
)
def test_the_fastest_is_taken(times_s: tuple[float, float, float], expected: CpuChoice) -> None:
    """The least time wins, but bfloat16 only where it gains a tenth."""
    assert fastest(dict(zip(CHOICES, times_s, strict=True))) == expected


def test_a_measurement_is_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second call measures nothing and gives what the first one wrote."""
    caplog.set_level(logging.INFO)
    file = tmp_path / "cache" / "cpu_choice.json"
    first = cpu_choice(file)
    assert caplog.text.count("cpu_measured") == 1
    assert cpu_choice(file) == first
    assert caplog.text.count("cpu_measured") == 1
    assert list(file.parent.iterdir()) == [file]


def test_another_processor_s_choice_is_not_taken(tmp_path: Path) -> None:
    """A home on many machines: each has its own entry, and what others wrote stays."""
    file = tmp_path / "cpu_choice.json"
    other = {"0123456789abcdef torch 2.4.0": {"dtype": "bfloat16", "layout": "contiguous"}}
    file.write_text(json.dumps(other))
    mine = cpu_choice(file)
    kept = json.loads(file.read_text())
    assert kept.pop(next(iter(other))) == next(iter(other.values()))
    assert list(kept.values()) == [{"dtype": mine.dtype_name, "layout": mine.layout_name}]


@pytest.mark.parametrize("content", ["", "[1]", '{"KEY": 3}', '{"KEY": {"dtype": "int8", "layout": []}}'])
def test_a_broken_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    """What we would not have written is no choice, and is replaced."""
    file = tmp_path / "cpu_choice.json"
    cpu_choice(file)
    (key,) = json.loads(file.read_text())
    file.write_text(content.replace("KEY", key))
    assert cpu_choice(file) in CHOICES
    assert json.loads(file.read_text())[key]["dtype"] in ("float32", "bfloat16")


def test_a_folder_that_cannot_be_made_costs_only_the_memory(tmp_path: Path) -> None:
    """Where nothing can be written the choice is made all the same."""
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert cpu_choice(tmp_path / "cache" / "cpu_choice.json") in CHOICES


def test_a_guest_measures_nothing(tmp_path: Path) -> None:
    """In a sampler's process it takes what is remembered, else float32, and leaves no file."""

    def guest() -> CpuChoice:
        be_guest()
        return cpu_choice(tmp_path / "cpu_choice.json")

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(guest).result() == CHOICES[0]
    assert not [*tmp_path.iterdir()]


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    """The user's cache folder carries the choice from one process to the next."""
    code = (
        "import logging; logging.basicConfig(level='INFO', format='%(message)s')\n"
        "from taesd_stream.decoding.cpu_choice import cpu_choice\ncpu_choice()"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code], env=clean_environment(tmp_path), capture_output=True, text=True, check=True
        ).stderr
        for _ in range(2)
    ]
    assert ["cpu_measured" in text for text in texts] == [True, False]


def engine(network: torch.nn.Module, *, is_fast: bool) -> Engine:
    """An engine of FLUX.2's decoder on the CPU."""
    return Engine(
        latent_format("flux2"), network, decoder="taef2", reason="", is_full=True, device="cpu", is_fast=is_fast
    )


@pytest.fixture
def remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of this user's choice, in a cache folder of the test's own; forgotten by the engine before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _measured.cache_clear()
    yield tmp_path / "taesd-stream" / "cpu_choice.json"
    _measured.cache_clear()


@pytest.mark.parametrize("choice", [CONTIGUOUS, BFLOAT16], ids=["float32", "bfloat16"])
def test_the_engine_computes_in_what_is_remembered(remembered: Path, choice: CpuChoice) -> None:
    """Live views take the remembered dtype; what is kept takes float32, whatever is fastest."""
    cpu_choice()
    (key,) = json.loads(remembered.read_text())
    remembered.write_text(json.dumps({key: {"dtype": choice.dtype_name, "layout": choice.layout_name}}))
    assert engine(build_decoder("taef2"), is_fast=True).dtype == choice.dtype
    assert engine(build_decoder("taef2"), is_fast=False).dtype == torch.float32


def test_bfloat16_is_good_enough_to_look_at(shared: Path) -> None:
    """With FLUX.2's real weights bfloat16 is within 40 dB of float32, on each of the demo's pictures."""
    state = load_state_dict(shared / "weights" / "taef2_decoder.pth")
    exact, rounded = build_decoder("taef2", state).eval(), build_decoder("taef2", state).eval().bfloat16()
    stored = [one if one.ndim == 3 else one[0] for one in load_file(DATA / "demo_flux2.safetensors").values()]
    latents = (torch.stack([one[:, 12:20, 12:20] for one in stored]).float() / 255 - 0.5) * 6
    with torch.inference_mode():
        error = exact(latents).clamp(0, 1) - rounded(latents.bfloat16()).float().clamp(0, 1)
    psnr_db = -10 * torch.log10(error.square().flatten(1).mean(1))
    assert psnr_db.min() > 40


@pytest.mark.slow
def test_a_daemon_shows_fast_and_records_exactly(tmp_path: Path) -> None:
    """Where bfloat16 is remembered as the fastest, live pictures are decoded in it, recorded ones in float32."""
    weights = tmp_path / "weights"
    weights.mkdir()
    torch.save(build_decoder("taesd").state_dict(), weights / "taesd_decoder.pth")
    file = tmp_path / "cache" / "taesd-stream" / "cpu_choice.json"
    cpu_choice(file)
    (key,) = json.loads(file.read_text())
    file.write_text(json.dumps({key: {"dtype": "bfloat16", "layout": "channels_last"}}))
    latents = np.zeros((4, 8, 8), np.float32)
    with Daemon(tmp_path, f"weights.folder={weights}") as daemon:
        with LatentPublisher(daemon.broker, stream="live", latent_format="sd1", record="off") as publisher:
            publisher.publish(latents, step=0)
            wait_for(lambda: daemon.get("/streams/live/latest.jpg")[0] == 200, 60, of="a picture")
        assert "decoder=taesd dtype=torch.bfloat16" in daemon.log()
        assert "decoder=taesd dtype=torch.float32" not in daemon.log()
        with LatentPublisher(daemon.broker, stream="kept", latent_format="sd1", record="all") as publisher:
            publisher.publish(latents, step=0, total_steps=1)
        assert daemon.recording(publisher.run)["frames"] == 1
        assert "decoder=taesd dtype=torch.float32" in daemon.log()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "spins"), [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "-")]
)
def test_threads_that_wait_soon_sleep(own: dict[str, str], spins: str, tmp_path: Path) -> None:
    """A worker sets how long torch's threads spin, before torch is loaded, unless the user has said it."""
    code = (
        "import os, sys\nfrom taesd_stream_workers.commands.command_line import _role_main\n_role_main('worker')\n"
        "assert 'torch' in sys.modules\nprint(os.environ.get('GOMP_SPINCOUNT', '-'))"
    )
    environment = clean_environment(tmp_path) | own
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == spins
