"""Long jobs cut in time: clips and dozens of latents in slices, others' jobs between them, with the same pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from taesd_stream import LatentPublisher
from taesd_stream.config import load_config
from taesd_stream.frames import MAX_LATENTS_AT_ONCE, Kind, Packet
from taesd_stream.messages import Job, Progress
from taesd_stream.models import build_decoder
from taesd_stream_workers.worker.degrading import Pace
from taesd_stream_workers.worker.encode_threads import EncodeThreads
from taesd_stream_workers.worker.job_decoder import JobDecoder
from taesd_stream_workers.worker.job_run import JobRun
from tests.daemon import Daemon, wait_for
from tests.golden_messages import JOB_ITEM
from tests.page_socket import PageSocket
from tests.pictures import decode_h264, psnr_db

T, SIZE = MAX_LATENTS_AT_ONCE + 1, (3, 5)
LONG_T = 17
LONGEST_S = "decoder.max_job_s=0.000001"  # no slice is as short: each is one latent


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with decoders of a video and of a picture format, weights of our own."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(3)
    save_file(build_decoder("taew2_1").state_dict(), folder / "taew2_1.safetensors")
    save_file(build_decoder("taesd").state_dict(), folder / "taesd_decoder.safetensors")
    return folder


def latents_of(length: int, channels: int = 16) -> NDArray[np.float16]:
    """(length, channels, h, w), from a seed."""
    noise = torch.randn(length, channels, *SIZE, generator=torch.Generator().manual_seed(length))
    return noise.half().numpy()


def job_of(latent_format: str, latents: NDArray[np.float16], kind: Kind = "clip") -> Job:
    """A frame for viewers and for a file."""
    item = replace(JOB_ITEM, kind=kind, index=0, shape=latents.shape, dtype="float16", renditions=("live", "record"))
    return Job(
        job=1,
        latent_format=latent_format,
        items=(item,),
        packets_to="tcp://127.0.0.1:9",
        payloads=(latents.tobytes(),),
    )


class Decoded:
    """What a worker's decoder says and sends of jobs."""

    def __init__(self, weights: Path, *sets: str) -> None:
        self.said: list[Any] = []
        config = load_config(sets=[f"weights.folder={weights}", "decoder.choice=tiny", *sets])
        self._decoder = JobDecoder(
            config, torch.device("cpu"), time.monotonic_ns, self.said.append, lanes=EncodeThreads(2, 1)
        )
        self._decoder.start()

    def work(self, *jobs: Job) -> None:
        """Hand them over, and wait until all are done."""
        for one in jobs:
            self._decoder.submit(JobRun(one))
        wait_for(lambda: sum(isinstance(one, JobRun) for one in self.said) == len(jobs), 60, of="the jobs")
        self._decoder.close()
        assert not any(one.failed for one in self.said if isinstance(one, JobRun))

    def slices(self) -> int:
        """How many times it said that it goes on."""
        return sum(isinstance(one, Progress) for one in self.said)

    def packets(self) -> dict[tuple[str, int], bytes]:
        """The packets' bytes, by rendition and picture."""
        sent = [one[1] for one in self.said if isinstance(one, tuple)]
        assert all(isinstance(one, Packet) and one.placed_ns == JOB_ITEM.placed_ns for one in sent)
        return {(one.rendition, one.index): bytes(one.payload) for one in sent}


@pytest.mark.parametrize(
    ("kind", "latent_format", "channels", "pictures"),
    [
        ("clip", "wan2_1", 16, 4 * T - 3),
        ("clip", "sd1", 4, T),
        ("live", "wan2_1", 16, 4 * T - 3),
        ("live", "sd1", 4, T),
        ("steps", "wan2_1", 16, 1),
        ("steps", "sd1", 4, 1),
    ],
)
def test_in_slices_the_bytes_are_the_same(
    weights: Path, kind: Kind, latent_format: str, channels: int, pictures: int
) -> None:
    """One latent at a time, or all but the first at once: viewers and file get the same packets, bit for bit."""
    latents = latents_of(T, channels)
    cut, whole = Decoded(weights, LONGEST_S), Decoded(weights, "decoder.max_job_s=10")
    for one in (cut, whole):
        one.work(job_of(latent_format, latents, kind))
    expected = [(rendition, index) for rendition in ("live", "record") for index in range(pictures)]
    assert sorted(cut.packets()) == expected
    assert cut.packets() == whole.packets()
    assert cut.slices() == T
    assert whole.slices() < cut.slices()


def test_a_slice_is_as_long_as_was_measured() -> None:
    """So many latents as fit the time at the pace of the last ones; one while nothing is known, and at the least."""
    pace = Pace()
    assert pace.latents_within("taew2_1", 100, 0.25) == 1
    pace.measured("taew2_1", 400, 0.2)  # 0.05 s a latent of 100 cells
    assert pace.latents_within("taew2_1", 100, 0.25) == 5
    assert pace.latents_within("taew2_1", 1000, 0.25) == 1


@pytest.fixture
def daemon_of_slices(tmp_path: Path, weights: Path) -> Iterator[Daemon]:
    """A daemon whose jobs are as short as can be."""
    with Daemon(tmp_path, f"weights.folder={weights}", "decoder.choice=tiny", "decoder.threads=1", LONGEST_S) as one:
        yield one


@pytest.mark.parametrize("kind", ["clip", "live"])
def test_beside_a_long_job_other_streams_go_on(daemon_of_slices: Daemon, weights: Path, kind: Kind) -> None:
    """Between its first and its last picture another stream shows many; its own are as if alone."""
    daemon, latents = daemon_of_slices, latents_of(LONG_T)
    alone = Decoded(weights)
    alone.work(job_of("wan2_1", latents, kind))
    expected = {index: payload for (rendition, index), payload in alone.packets().items() if rendition == "live"}
    small = np.zeros((4, 2, 2), np.float32)
    with (
        LatentPublisher(daemon.broker, stream="long", latent_format="wan2_1", kind=kind, fps=16) as long,
        LatentPublisher(daemon.broker, stream="beside", latent_format="sd1") as beside,
        PageSocket(daemon) as page,
    ):
        page.watch({"long": "live", "beside": "live"})
        wait_for(lambda: all(row["viewers"] for row in daemon.streams().values()) and len(daemon.streams()) == 2)
        beside.publish(small, step=0)
        assert page.picture(60)[0]["stream"] == "beside"
        long.publish(latents, step=0)
        got: dict[int, bytes] = {}
        between = 0
        beside.publish(small, step=0)
        while len(got) < len(expected):
            header, payload = page.picture(60)
            if header["stream"] == "long":
                got[header["index"]] = payload
            else:
                between += bool(got)
                beside.publish(small, step=0)
    assert list(got) == sorted(expected)
    pictures = [decode_h264([packets[index] for index in sorted(packets)]) for packets in (got, expected)]
    assert min(psnr_db(*pair) for pair in zip(*pictures, strict=True)) >= 40  # each process computes its fastest way
    assert between >= LONG_T // 4
