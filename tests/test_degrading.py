"""Worse pictures where memory or time is short, of a real worker: said, counted, and better again at the next step."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from taesd_stream import LatentPublisher
from taesd_stream.models import build_decoder
from taesd_stream_workers.worker.degrading import CHEAPER, LEAST_BYTES, Pace, is_out_of_memory, ways
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket

KEEPS_UP = "decoder.max_job_s=10"  # however busy this machine is, "auto" takes the full decoder
SIDE = 96  # of the latents: one map of 64 channels at full size is 144 MiB


def test_the_ways_go_from_the_best_to_the_cheapest() -> None:
    """Whole, in smaller and smaller pieces, then by cheaper decoders; only "auto" takes those, and no recording."""
    live = list(ways("auto", 1 << 30, is_recorded=False))
    assert [way.budget_bytes for way in live[:3]] == [1 << 30, 1 << 28, LEAST_BYTES]
    assert [way.choice for way in live] == [None, None, None, *CHEAPER]
    assert [way.code for way in live] == ["", "small_pieces", "small_pieces", *CHEAPER]
    for exact in (ways("auto", 1 << 30, is_recorded=True), ways("tiny", 1 << 30, is_recorded=False)):
        assert [way.choice for way in exact] == [None] * 3
    late = list(ways("auto", 1 << 30, is_recorded=False, is_late=True))
    assert [way.choice for way in late] == [*CHEAPER, None]


def test_words_for_no_memory_are_known() -> None:
    """What torch really says of an allocation that this host cannot give counts as out of memory; a bug does not."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert not is_out_of_memory(caught.value)


def test_a_slow_engine_gets_its_chance_again() -> None:
    """One that took too long is spared for some jobs, then tried, without another measurement."""
    pace = Pace()
    pace.measured("taesd", 100, 10.0)
    assert not pace.is_over("taesd", 100, 0.0)
    spared = 0
    while pace.is_over("taesd", 100, 4.0):
        spared += 1
    assert 1 <= spared <= 10
    pace.measured("taesd", 100, 1.0)
    pace.measured("taesd", 100, 1.0)
    assert not pace.is_over("taesd", 100, 4.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a TAESD decoder, weights of our own."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(5)
    save_file(build_decoder("taesd").state_dict(), folder / "taesd_decoder.safetensors")
    return folder


@pytest.fixture
def slow_daemon(tmp_path: Path, weights: Path) -> Iterator[Daemon]:
    """A daemon whose full decoder is over every latency budget."""
    with Daemon(tmp_path, f"weights.folder={weights}", "decoder.latency_budget_s=0.000001", KEEPS_UP) as one:
        yield one


def publish_and_see(publisher: LatentPublisher, page: PageSocket, step: int, side: int) -> dict[str, Any]:
    """Publish a step and take its picture."""
    publisher.publish(torch.zeros(4, side, side), step=step)
    while True:
        header, _ = page.picture(60)
        if header["step"] == step:
            return header


@pytest.mark.slow
def test_a_decoder_that_is_too_slow_is_replaced_for_some_steps(slow_daemon: Daemon) -> None:
    """Over decoder.latency_budget_s a cheaper decoder shows the next step, flagged and said."""
    with (
        LatentPublisher(slow_daemon.broker, stream="late", latent_format="sd1") as publisher,
        PageSocket(slow_daemon) as page,
    ):
        wait_for(lambda: "late" in slow_daemon.streams(), of="the stream")
        page.watch({"late": "thumb"})
        first = publish_and_see(publisher, page, 0, 8)
        second = publish_and_see(publisher, page, 1, 8)
        assert first["decoder"] == "taesd"
        assert second["decoder"] in CHEAPER
        row = wait_for(lambda: (one := slow_daemon.streams()["late"])["note"] and one, of="the note")
        assert "Too slow here" in row["note"]
        assert "degraded" in row["flags"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_short_of_memory_a_step_is_shown_all_the_same(tmp_path: Path, weights: Path) -> None:
    """Under a real limit of its memory the worker shows a step in small pieces or cheaper, flagged; then whole."""
    sets = (f"weights.folder={weights}", "decoder.latency_budget_s=0", "decoder.threads=1", KEEPS_UP)
    with (
        Daemon(tmp_path, *sets) as daemon,
        LatentPublisher(daemon.broker, stream="short", latent_format="sd1") as publisher,
        PageSocket(daemon) as page,
    ):
        wait_for(lambda: "short" in daemon.streams(), of="the stream")
        page.watch({"short": "thumb"})
        assert publish_and_see(publisher, page, 0, SIDE)["decoder"] == "taesd"
        assert daemon.streams()["short"]["note"] is None
        pid = daemon.pid_of("worker 0")
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        unlimited = resource.prlimit(pid, resource.RLIMIT_AS)
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * 4096 + (200 << 20), unlimited[1]))
        publish_and_see(publisher, page, 1, SIDE)
        row = wait_for(lambda: (one := daemon.streams()["short"])["note"] and one, of="the note")
        assert row["note"].startswith("Short of memory")
        assert "degraded" in row["flags"]
        resource.prlimit(pid, resource.RLIMIT_AS, unlimited)
        steps = iter(range(2, 100))
        wait_for(
            lambda: (
                publish_and_see(publisher, page, next(steps), SIDE)["decoder"] == "taesd"
                and daemon.streams()["short"]["note"] is None
            ),
            60,
            of="whole pictures",
        )
        assert daemon.log().count("picture_degraded") == 1
        assert "worker_gone" not in daemon.log()
