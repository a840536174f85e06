"""`taesd-stream bench` as a real process: what it measures hangs together, and it can be broken off."""

from __future__ import annotations

import json
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from taesd_stream.capacity import LOAD_FACTOR, wait_s
from taesd_stream.config import load_config
from taesd_stream.models import build_decoder
from taesd_stream_workers.bench.benching import Bench
from taesd_stream_workers.bench.worker_load import Case
from tests.daemon import COMMAND, clean_environment, wait_for
from tests.processes import children_of, lives
from tests.test_cli import refusal, run

RATES = ("broker_s", "decode_s", "encode_s", "worker_s")


def numbers(value: Any) -> list[float]:
    """Every number within nested figures."""
    if isinstance(value, dict):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, list):
        return [number for one in value for number in numbers(one)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.slow
def test_what_is_held_is_70_percent_of_the_slowest_part(tmp_path: Path) -> None:
    """One line of JSON: every figure above 0, and the frames that are held are the least of the parts' at 70 %."""
    done = run(*["bench", "--formats", "sd1", "--sizes", "256", "--seconds", "0.2", "--json"], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["is_whole"]
    found = [report[part] for part in ("broker", "hellos", "decode", "encode", "worker")]
    assert all(min(numbers(part)) > 0 for part in found)
    assert {row["rendition"] for row in report["encode"]} == {"live", "thumb"}
    (held,) = report["held"]
    assert min(held[name] for name in RATES) > 0
    assert held["held_s"] == pytest.approx(LOAD_FACTOR * min(held[name] for name in RATES), rel=1e-3, abs=0.01)
    assert held["streams_at_2_s"] == int(held["held_s"] / 2)
    assert held["wait_p99_ms"] == pytest.approx(
        1000 * wait_s(LOAD_FACTOR, 1.0) * LOAD_FACTOR / held["held_s"], rel=0.02
    )
    assert held["limit"] in ("broker", "decode", "encode")
    (broker,) = report["broker"]
    assert (broker["bytes"], broker["frames_s"]) == (2 * 4 * 32 * 32, held["broker_s"])
    assert max(row["frames_s"] for row in report["decode"]) == held["decode_s"]
    for row in report["decode"]:
        assert row["frames_s"] == pytest.approx(1000 / row["ms_per_frame"], rel=0.05)
        assert row["p50_ms"] == pytest.approx(row["batch"] * row["ms_per_frame"], rel=0.05)
        assert row["p50_ms"] <= row["p95_ms"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--sizes 500", "--sizes 500: expected multiples of 64"),
        ("--formats sd9", "--formats: "),
        ("--formats wan2_1", "--formats wan2_1: is of video"),
        ("--seconds nan", "--seconds nan: expected 0.05 to 60"),
        pytest.param("--sizes 8192", "expected multiples of 64 from 64 to 4096", marks=pytest.mark.slow),
        pytest.param("--sizes ,", "--sizes: expected multiples of 64", marks=pytest.mark.slow),
        pytest.param("--formats ,", "--formats: expected names", marks=pytest.mark.slow),
        pytest.param("--seconds 0", "--seconds 0: expected", marks=pytest.mark.slow),
        pytest.param("--device cuda:77", "decoder.device = cuda:77: ", marks=pytest.mark.slow),
    ],
)
def test_bad_values_are_refused(words: str, told: str, tmp_path: Path) -> None:
    """A value that is none is one line that says what is allowed, and exit code 2, before anything is measured."""
    code, line = refusal("bench", *words.split(), folder=tmp_path)
    assert code == 2
    assert told in line


def test_float8_is_measured_where_it_is_used(tmp_path: Path) -> None:
    """With decoder.float8 a bench's full decoder computes in it, as a daemon's live views do."""
    save_file(build_decoder("taef2").state_dict(), tmp_path / "taef2_decoder.safetensors")
    sets = ["decoder.float8=true", "decoder.device=cpu", f"weights.folder={tmp_path}"]
    bench = Bench(load_config(None, sets), ["flux2"], [64], 0.1)
    with ExitStack() as stack:
        bench.steps(stack)
    assert bench._engine(Case("flux2", 64, "tiny")).is_float8


@pytest.mark.slow
def test_it_can_be_broken_off(tmp_path: Path) -> None:
    """Ctrl-C in the midst: what was measured so far is printed, the exit code is 130, and no process stays."""
    words = [*COMMAND, *["bench", "--formats", "sd1", "--sizes", "256", "--seconds", "3", "--json"]]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment(tmp_path)
    ) as process:
        brokers = wait_for(lambda: children_of(process.pid), 60, of="the broker")
        wait_for(lambda: not any(lives(pid) for pid in brokers), 60, of="the end of the broker's part")
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines() == ["Interrupted: this is what was measured so far."]
    report = json.loads(stdout)
    assert not report["is_whole"]
    assert report["broker"][0]["frames_s"] > 0
    assert report["held"] == []
    assert not any(lives(pid) for pid in brokers)


@pytest.mark.slow
def test_people_get_tables(tmp_path: Path) -> None:
    """Without --json: a table a part, and last the streams that are held; two decoders and two sizes are four rows."""
    done = run(*["bench", "--formats", "flux2", "--sizes", "64,128", "--seconds", "0.05"], folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    *parts, held = done.stdout.split("\n\n")
    assert [part.partition(":")[0] for part in parts[1:]] == ["Broker", "Decode", "Encode"]  # and then Held
    title, head, *rows = held.splitlines()
    assert title.startswith("Held: frames/s of all parts together at 70 % load")
    assert head.split()[:3] == ["format", "px", "decoder"]
    assert [row.split()[:3] for row in rows] == [
        ["flux2", str(size), decoder] for decoder in ("nano", "linear") for size in (64, 128)
    ]
