"""k-diffusion's callback, and samples of a trainer, against a broker that the test speaks for."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from taesd_stream import LatentPublisher
from taesd_stream.frames import LatentFrame
from taesd_stream.integrations.k_diffusion import SamplingStopped, preview_callback
from taesd_stream.integrations.training import publish_sample
from taesd_stream.messages import StopRun
from tests.broker_peer import BrokerPeer
from tests.daemon import Daemon, wait_for

SIGMAS = torch.tensor([10.0, 4.0, 1.0, 0.0])


def sample_euler(model: Any, x: Tensor, sigmas: Tensor, callback: Any = None) -> Tensor:
    """Euler's method with the callback of k-diffusion's samplers (Karras et al. 2022, algorithm 2, no churn)."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def denoise(x: Tensor, sigma: Tensor) -> Tensor:
    """A model that believes in a smaller x."""
    return x / (1 + sigma**2)


@pytest.mark.parametrize("knows_sigmas", [True, False])
def test_what_is_sent_is_denoised(knows_sigmas: bool, peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Every step's `denoised` arrives with its step and noise level; the last one is what the sampler returns."""
    noise = torch.randn(2, 4, 8, 8) * 10

    def shown() -> Tensor:
        with LatentPublisher(
            peer.address, stream="k", latent_format="sd1", record="all", wire_dtype="float32"
        ) as publisher:
            callback = preview_callback(publisher, sigmas=SIGMAS if knows_sigmas else None)
            return sample_euler(denoise, noise, SIGMAS, callback)

    doing = beside.submit(shown)
    info = peer.opened()
    peer.demand(info.run, "every", record="all")
    peer.finish()
    result = doing.result(30)
    assert torch.equal(result, sample_euler(denoise, noise, SIGMAS))
    frames = [one for one in peer.heard if isinstance(one, LatentFrame)]
    total = 3 if knows_sigmas else None
    assert [(one.step, one.total_steps, one.sigma) for one in frames] == [(0, total, 10), (1, total, 4), (2, total, 1)]
    last = torch.frombuffer(bytearray(frames[-1].payload), dtype=torch.float32).reshape(frames[-1].shape)
    torch.testing.assert_close(last, result)


def test_what_cannot_be_shown_does_not_end_the_sampler(peer: BrokerPeer, caplog: pytest.LogCaptureFixture) -> None:
    """A sampler that says no `denoised`, or a step that is no number, goes on; the log says it once."""
    with LatentPublisher(peer.address, stream="k", latent_format="sd1") as publisher:
        callback = preview_callback(publisher, sigmas=SIGMAS)
        for info in ({"i": 0}, {"i": None}, {}):
            callback(info)
        publisher.close(0.0)
    said = [record.message for record in caplog.records if record.message.startswith("sampler_not_shown")]
    assert said == ["sampler_not_shown stream=k error=KeyError('denoised') (said once; the run goes on)"]


def test_stop_ends_the_sampler(peer: BrokerPeer, beside: ThreadPoolExecutor) -> None:
    """Where it is asked for, Stop on the page raises out of the sampler; else it is not offered."""

    def shown() -> str:
        with LatentPublisher(peer.address, stream="k", latent_format="sd1") as publisher:
            callback = preview_callback(publisher, can_stop=True)
            deadline_s = time.monotonic() + 20
            try:
                while time.monotonic() < deadline_s:
                    sample_euler(denoise, torch.randn(4, 8, 8), SIGMAS, callback)
            except SamplingStopped as stopped:
                return str(stopped)
        return "never stopped"

    doing = beside.submit(shown)
    info = peer.opened()
    peer.demand(info.run)
    peer.send(StopRun(run=info.run))
    assert peer.finish().reason == "stopped"
    assert doing.result(30) == "k"


def test_samples_of_a_trainer_are_a_film(daemon: Daemon) -> None:
    """Each sample is kept under one run, at its global step; the link names the run and the sample.

    One that cannot be taken, of another space, has the link of the one before, and moves no other's.
    """
    links = [
        publish_sample(
            torch.randn(3, 64 if step == 500 else 4, 8, 8),
            step=step,
            stream="train/test",
            latent_format="sd1",
            address=daemon.broker,
            page=daemon.web,
        )
        for step in (0, 500, 800, 1000)
    ]
    row = wait_for(lambda: daemon.streams().get("train/test"), of="the stream")
    assert links == [f"{daemon.web}/#/s/{row['run']}/{place}" for place in (0, 0, 1, 2)]
    wait_for(lambda: daemon.streams()["train/test"]["step"] == 1000, of="the third sample")
    assert daemon.streams()["train/test"]["record"] == "all"


def test_a_trainer_without_a_daemon() -> None:
    """Without a daemon a sample is a call that returns a link, and nothing more."""
    link = publish_sample(
        torch.randn(4, 8, 8), step=1, stream="train/none", latent_format="sd1", address="tcp://127.0.0.1:9"
    )
    assert link.startswith("http://127.0.0.1:8765/#/s/")
