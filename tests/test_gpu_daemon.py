"""A whole daemon that decodes and codes on an NVIDIA GPU, and samplers there: what people see is what was published."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from taesd_stream import LatentPublisher
from taesd_stream.models import build_decoder, build_encoder
from taesd_stream.models.checkpoints import load_state_dict
from tests.daemon import Daemon, wait_for
from tests.page_socket import PageSocket
from tests.pictures import Pixels, decode_file, decode_h264, psnr_db, smooth_picture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
STREAMS = 16  # more than are coded by the host
STEPS = 12


@pytest.fixture(scope="module")
def gpu_daemon(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Daemon]:
    """One worker, on the sampler's own GPU, with FLUX.2's real weights."""
    sets = ["decoder.device=cuda:0", "decoder.choice=tiny", f"weights.folder={shared / 'weights'}"]
    with Daemon(tmp_path_factory.mktemp("gpu"), *sets) as one:
        yield one


def latents_of_pictures(shared: Path, count: int) -> torch.Tensor:
    """(count, 32, 32, 32): a picture, moved on a little from each to the next."""
    state = load_state_dict(shared / "weights" / "taef2_encoder.pth", part="encoder")
    encoder = build_encoder("taef2", state).float()
    picture = smooth_picture(256, 256)
    with torch.inference_mode():
        return torch.cat([encoder(picture.roll(8 * number, dims=3)) for number in range(count)])


def shown_exactly(shared: Path, latents: torch.Tensor) -> list[Pixels]:
    """What the decoder makes of latents (n, 32, 32, 32) in float32 on the processor."""
    decoder = build_decoder("taef2", load_state_dict(shared / "weights" / "taef2_decoder.pth")).float()
    with torch.inference_mode():
        rgb = decoder(latents).clamp(0, 1).permute(0, 2, 3, 1)
    return list((rgb * 255).round().to(torch.uint8).numpy())


def test_watched_samplers_are_shown_as_they_are(gpu_daemon: Daemon, shared: Path) -> None:
    """More streams than the host codes: each picture is its own stream's, of the step it says, whoever coded it."""
    wait_for(lambda: "device_coding_" in gpu_daemon.log(), 120, of="the kernels")
    assert "device_coding_used" in gpu_daemon.log()
    latents = latents_of_pictures(shared, STREAMS + STEPS)
    exact = shown_exactly(shared, latents)
    on_gpu = latents.to("cuda", torch.float16)
    names = [f"gpu/{number:02d}" for number in range(STREAMS)]
    payloads: defaultdict[str, list[bytes]] = defaultdict(list)
    steps: defaultdict[str, list[int]] = defaultdict(list)
    with PageSocket(gpu_daemon) as page, ExitStack() as stack:
        page.watch(dict.fromkeys(names, "live"))
        publishers = [
            stack.enter_context(LatentPublisher(gpu_daemon.broker, stream=name, latent_format="flux2", record="off"))
            for name in names
        ]
        for step in range(STEPS):
            for number, publisher in enumerate(publishers):
                publisher.publish(on_gpu[number + step], step=step)  # of how many: then some might only be counted
            # the next step once all have a picture of this one: what nobody waits for may be left out
            while any(steps[name][-1:] != [step] for name in names):
                header, payload = page.picture(60)
                payloads[header["stream"]].append(payload)
                steps[header["stream"]].append(header["step"])
                assert header["decoder"] == "taef2"
        assert [publisher.error for publisher in publishers] == [None] * STREAMS
    for number, name in enumerate(names):
        shown = decode_h264(payloads[name])
        assert len(shown) == len(steps[name])
        for step, picture in zip(steps[name], shown, strict=True):
            assert psnr_db(exact[number + step], picture) >= 30.0, f"{name}, step {step}"
    # x264 signs what it codes
    assert {b"x264 - core" in b"".join(one) for one in payloads.values()} == {True, False}
    workers = gpu_daemon.json("/api/v1/workers")["workers"]
    assert [row["device"].startswith("cuda:0") for row in workers] == [True]


def test_a_kept_run_from_the_workers_own_gpu_is_whole(gpu_daemon: Daemon, shared: Path) -> None:
    """Every frame once, in order, in its pixels; the sampler's latents are what they were."""
    latents = latents_of_pictures(shared, STEPS)
    on_gpu = latents.to("cuda")
    with LatentPublisher(gpu_daemon.broker, stream="kept", latent_format="flux2", record="all") as publisher:
        for step in range(STEPS):
            current = on_gpu[step].clone()
            publisher.publish(current, step=step, total_steps=STEPS)
            assert torch.equal(current, on_gpu[step])
            current.fill_(float("nan"))  # as a sampler that writes over it
        assert publisher.wait_until_acked(60), publisher.error
    recording = gpu_daemon.recording(publisher.run)
    assert (recording["frames"], recording["first_seq"], recording["last_seq"]) == (STEPS, 0, STEPS - 1)
    pictures = decode_file(gpu_daemon.file(recording["id"]))
    assert len(pictures) == STEPS
    for step, (expected, picture) in enumerate(zip(shown_exactly(shared, latents), pictures, strict=True)):
        assert psnr_db(expected, picture) >= 32.0, f"step {step}"
