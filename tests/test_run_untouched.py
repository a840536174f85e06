"""A preview never changes the run: the same seed gives the same latents, whatever happens to the daemon meanwhile."""

from __future__ import annotations

import hashlib
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taesd_stream import LatentPublisher
from tests.daemon import wait_for
from tests.test_publisher_end import BrokerProcess

STEPS = 40
SHAPE = (4, 64, 64)


def sample(publisher: LatentPublisher | None, midway: Callable[[], None] = lambda: None) -> str:
    """A seeded ancestral sampler on torch's global generator, in place. Returns the SHA-256 of its final latents."""
    torch.manual_seed(7)
    weight = torch.randn(4, 4, 3, 3) / 6
    latents = torch.randn(SHAPE)
    for step in range(STEPS):
        if step == STEPS // 2:
            midway()
        sigma = 1 - step / STEPS
        denoised = torch.nn.functional.conv2d(latents[None], weight, padding=1)[0].tanh()
        latents.lerp_(denoised, 0.3).add_(torch.randn(SHAPE), alpha=0.1 * sigma)
        if publisher is not None:
            publisher.publish(latents, step=step, total_steps=STEPS, sigma=sigma)
    return hashlib.sha256(latents.numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def alone() -> str:
    """What the sampler gives without any publisher, each time."""
    alone, again = sample(None), sample(None)
    assert alone == again, "the sampler differs from itself: something else in this process draws random numbers"
    return alone


@pytest.mark.parametrize("record", ["off", "all"])
@pytest.mark.parametrize("fate", ["well", "killed", "stopped"])
def test_the_result_is_the_same_whatever_becomes_of_the_broker(
    tmp_path: Path, alone: str, record: str, fate: str
) -> None:
    """A real broker that lives, is killed or is stopped (SIGSTOP) midway: the final latents are the same bytes."""
    with BrokerProcess(tmp_path) as broker:
        publisher = LatentPublisher(broker.address, stream="a", latent_format="sd1", record=record)  # type: ignore[arg-type]
        wait_for(lambda: publisher._link._clock.offset_ns is not None, of="the broker's answer")
        fates = {"well": lambda: None, "killed": broker.kill, "stopped": lambda: broker.signal(signal.SIGSTOP)}
        assert sample(publisher, fates[fate]) == alone
        publisher.close(0.0)


def test_the_result_is_the_same_before_a_black_hole(alone: str) -> None:
    """Somebody accepts the connection and never reads: the final latents are the same bytes, and closing ends."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        address = f"tcp://127.0.0.1:{hole.getsockname()[1]}"
        publisher = LatentPublisher(address, stream="a", latent_format="sd1", record="all")
        taken, _ = hole.accept()
        with taken:
            assert sample(publisher) == alone
            publisher.close(0.0)


@pytest.mark.faults
def test_a_broker_that_stood_still_for_ten_seconds_gets_everything(tmp_path: Path, alone: str) -> None:
    """SIGSTOP for 10 s in the middle of a kept run: it is the same run, and every frame is in the broker's log."""
    with BrokerProcess(tmp_path) as broker:
        publisher = LatentPublisher(broker.address, stream="a", latent_format="sd1", record="all")
        wait_for(lambda: publisher._link._clock.offset_ns is not None, of="the broker's answer")
        assert sample(publisher, lambda: broker.signal(signal.SIGSTOP)) == alone
        assert not publisher.wait_until_acked(10.0)
        broker.signal(signal.SIGCONT)
        assert publisher.wait_until_acked(30.0), publisher.error
        assert broker.frames(publisher.run) == list(range(STEPS))
        publisher.close()
