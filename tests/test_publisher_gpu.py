"""Publishing latents that live on a GPU: the right bytes, and nothing that its sampler has to wait for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from taesd_stream import LatentPublisher
from taesd_stream.frames import WireDtype
from taesd_stream.latent_snapshot import snapshot_of
from taesd_stream.messages import PublisherHello
from tests.broker_peer import BrokerPeer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]

Stream: Any = torch.cuda.Stream  # torch has no types for these
keep_busy: Any = torch.cuda._sleep
LONG_CYCLES = 2_000_000_000  # about a second of a GPU's time
SHAPE = (4, 96, 100)


def values(dtype: torch.dtype) -> torch.Tensor:
    """Latents in the host's memory, of a normal distribution."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("wire_dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_device_converts_as_the_host_does(dtype: torch.dtype, wire_dtype: WireDtype | None) -> None:
    """Every float dtype, on the device and off it, becomes the same bytes."""
    host = values(dtype)
    sent = []
    for latents in (host, host.cuda()):
        snapshot = snapshot_of(latents, wire_dtype, 3.0)
        sent.append((snapshot.dtype, bytes(snapshot.to_bytes(snapshot.take(latents)))))
    assert sent[0] == sent[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_uint8_is_made_on_the_device_too(dtype: torch.dtype) -> None:
    """uint8 of the device is that of the host, to one step; what is past the magnitude is its end."""
    host = values(dtype) * 2
    pictures = []
    for latents in (host, host.cuda()):
        snapshot = snapshot_of(latents, "uint8", 3.0)
        pictures.append(np.frombuffer(snapshot.to_bytes(snapshot.take(latents)), np.uint8).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert (pictures[1].min(), pictures[1].max()) == (0, 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_value_is_copied_as_it_is(dtype: torch.dtype) -> None:
    """Zeros of both signs, the smallest and the largest there are, infinities and NaN; a thread new to CUDA, too."""
    facts = torch.finfo(dtype)
    odd = [0.0, -0.0, facts.smallest_normal / 4, -facts.smallest_normal / 4, facts.max, -facts.max]
    host = torch.tensor([*odd, float("inf"), float("-inf"), float("nan")], dtype=dtype)[:, None, None]
    wire_dtype: Any = str(dtype).removeprefix("torch.")
    latents = host.cuda()
    snapshot: Any = snapshot_of(latents, wire_dtype, 3.0)
    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(snapshot.take, latents).result(60)
    words = host if dtype == torch.float32 else host.view(torch.int16)
    sent = np.frombuffer(snapshot.to_bytes(taken), words.numpy().dtype)
    if dtype == torch.float32:
        sent, words = sent.view(np.int32), words.view(torch.int32)
    assert sent[:-1].tolist() == words.flatten().tolist()[:-1]
    assert np.isnan(torch.from_numpy(sent.copy()).view(dtype).float().numpy()[-1])


def test_memory_order_does_not_matter() -> None:
    """Transposed and channels_last latents travel in C order."""
    host = values(torch.float32)
    for latents in (host.cuda().permute(2, 0, 1), host.cuda()[None].to(memory_format=torch.channels_last)[0]):
        snapshot = snapshot_of(latents, "float32", 3.0)
        assert snapshot.to_bytes(snapshot.take(latents)) == latents.cpu().numpy().tobytes()


def test_taking_waits_for_nothing_and_what_is_written_later_does_not_show() -> None:
    """With a second of work queued before it, take() is back at once, with the values of that moment."""
    host = values(torch.float16)
    latents = host.cuda()
    snapshot = snapshot_of(latents, None, 3.0)
    snapshot.to_bytes(snapshot.take(latents))  # warm: whatever is loaded or allocated first waits for the device
    latents.zero_()
    latents.copy_(host)
    keep_busy(LONG_CYCLES)
    taken = snapshot.take(latents)
    latents.zero_()
    assert not snapshot.is_ready(taken)
    assert snapshot.to_bytes(taken) == host.numpy().tobytes()
    assert snapshot.is_ready(taken)


def test_a_stream_of_its_own_is_followed() -> None:
    """Latents that are made on a stream that is not the default one are copied after they are made."""
    host = values(torch.float16)
    stream = Stream()
    with torch.cuda.stream(stream):
        latents = torch.zeros(SHAPE, dtype=torch.float16, device="cuda")
        keep_busy(LONG_CYCLES // 10)
        latents.copy_(host)
        snapshot = snapshot_of(latents, None, 3.0)
        taken = snapshot.take(latents)
    assert snapshot.to_bytes(taken) == host.numpy().tobytes()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one_is_followed() -> None:
    """Latents on another device than the current one are copied after they are made there."""
    host = values(torch.float16)
    with torch.cuda.device(1):
        latents = torch.zeros(SHAPE, dtype=torch.float16, device="cuda:1")
        keep_busy(LONG_CYCLES // 10)
        latents.copy_(host)
    snapshot = snapshot_of(latents, None, 3.0)
    assert snapshot.to_bytes(snapshot.take(latents)) == host.numpy().tobytes()
    with torch.cuda.device(1):
        assert snapshot.to_bytes(snapshot.take(latents)) == host.numpy().tobytes()


def test_one_staged_copy_is_all_the_memory_that_it_takes() -> None:
    """Its memory is used again for each frame, and is gone with the snapshot."""
    latents = torch.zeros((16, 128, 128), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    snapshot = snapshot_of(latents, None, 3.0)
    for _ in range(20):
        snapshot.to_bytes(snapshot.take(latents))
    assert torch.cuda.max_memory_allocated() == before + 16 * 128 * 128 * 2
    del snapshot
    assert torch.cuda.memory_allocated() == before


def test_after_many_at_once_little_memory_is_held() -> None:
    """Ten frames that were taken before the first was fetched leave no more than four copies' memory behind."""
    latents = torch.zeros((16, 128, 128), device="cuda")
    before = torch.cuda.memory_allocated()
    snapshot = snapshot_of(latents, None, 3.0)
    taken = [snapshot.take(latents) for _ in range(10)]
    while taken:
        snapshot.to_bytes(taken.pop(0))
    assert torch.cuda.memory_allocated() <= before + 4 * 16 * 128 * 128 * 2


def test_what_is_dropped_is_used_again_on_its_stream() -> None:
    """A sampler that is faster than its frames are sent needs one copy's memory for all that is dropped meanwhile."""
    host = values(torch.float16)
    latents = host.cuda()
    snapshot = snapshot_of(latents, None, 3.0)
    keep_busy(LONG_CYCLES // 4)
    first = snapshot.take(latents)
    snapshot.drop(first)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        taken = snapshot.take(latents)
        assert taken[0].data_ptr() == first[0].data_ptr()
        snapshot.drop(taken)
    assert torch.cuda.memory_allocated() == before
    with torch.cuda.stream(Stream()):
        assert snapshot.take(latents)[0].data_ptr() != first[0].data_ptr()
    assert snapshot.to_bytes(snapshot.take(latents)) == host.numpy().tobytes()


def test_what_is_dropped_is_held_until_its_copy_is_made() -> None:
    """Memory of a frame that nobody fetches is not given back while a copy to it is due; later it is used again."""
    latents = torch.zeros(SHAPE, device="cuda")
    snapshot = snapshot_of(latents, None, 3.0)
    snapshot.to_bytes(snapshot.take(latents))
    keep_busy(LONG_CYCLES // 4)
    dropped, fetched = snapshot.take(latents), snapshot.take(latents)
    pointers = {dropped[0].data_ptr(), fetched[0].data_ptr()}
    snapshot.drop(dropped)
    held = torch.cuda.memory_allocated()
    del dropped
    assert torch.cuda.memory_allocated() == held
    snapshot.to_bytes(fetched)
    assert {snapshot.take(latents)[0].data_ptr(), snapshot.take(latents)[0].data_ptr()} == pointers


@pytest.mark.parametrize("is_inference_first", [True, False])
def test_modes_of_autograd_do_not_matter(is_inference_first: bool) -> None:
    """The same memory takes latents of inference mode, of a graph, and plain ones; no graph is held."""
    host = values(torch.float32)
    snapshot = snapshot_of(host.cuda(), "float32", 3.0)
    for is_inference in (is_inference_first, not is_inference_first):
        with torch.inference_mode(is_inference):
            latents = host.cuda()
            taken = snapshot.take(latents if is_inference else latents.requires_grad_() * 1)
        assert taken is not None
        assert not taken[0].requires_grad
        assert snapshot.to_bytes(taken) == host.numpy().tobytes()


def test_a_busy_device_does_not_silence_the_publisher(peer: BrokerPeer) -> None:
    """A step of several seconds on the GPU: HELLO goes on each second, and the frame comes when it is there."""
    latents = values(torch.float16).cuda()
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    try:
        publisher.publish(latents, step=0, sigma=torch.tensor(2.5, device="cuda"))
        first = peer.frame(0)
        assert (bytes(first.payload), first.sigma) == (latents.cpu().numpy().tobytes(), 2.5)
        peer.ack(publisher.run, 0)
        keep_busy(4 * LONG_CYCLES)
        publisher.publish(latents, step=1, sigma=torch.tensor(float("nan"), device="cuda"))
        publisher.publish(latents, step=2)
        hellos = 0
        while peer.seqs()[-1] == 0:
            hellos += isinstance(peer.receive(), PublisherHello)
        assert hellos >= 2
        assert not publisher.wait_until_acked(0.0)
        peer.frame(2)
        assert peer.seqs() == [0, 1, 2]
        peer.ack(publisher.run, 2)
        assert publisher.wait_until_acked(20.0), publisher.error
    finally:
        publisher.close(0.0)


def test_a_graph_that_is_captured_meanwhile_is_whole(peer: BrokerPeer) -> None:
    """The side thread asks the device and fetches a frame while the sampler captures a CUDA graph: both have theirs."""
    latents = values(torch.float16).cuda()
    doubled, graph, stream = torch.zeros_like(latents), torch.cuda.CUDAGraph(), Stream()
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    try:
        keep_busy(LONG_CYCLES // 4)
        publisher.publish(latents, step=0)
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="global")
            try:
                torch.mul(latents, 2, out=doubled)
                frame = peer.frame(0)
            finally:
                graph.capture_end()
        peer.ack(publisher.run, 0)
        assert bytes(frame.payload) == latents.cpu().numpy().tobytes()
        graph.replay()
        assert torch.equal(doubled, latents * 2)
    finally:
        publisher.close(0.0)


def test_a_noise_level_on_the_device_is_read_while_a_graph_is_captured(peer: BrokerPeer) -> None:
    """Latents in the host's memory, their sigma on the GPU: the side thread reads it, and the capture is whole."""
    latents, sigma = values(torch.float16), torch.tensor(2.5, device="cuda")
    ones, doubled, graph, stream = (
        torch.ones(8, device="cuda"),
        torch.zeros(8, device="cuda"),
        torch.cuda.CUDAGraph(),
        Stream(),
    )
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    try:
        peer.receive()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="global")
            try:
                torch.mul(ones, 2, out=doubled)
                publisher.publish(latents, step=0, sigma=sigma)
                frame = peer.frame(0)
            finally:
                graph.capture_end()
        peer.ack(publisher.run, 0)
        assert frame.sigma == 2.5
        graph.replay()
        assert torch.equal(doubled, ones * 2)
    finally:
        publisher.close(0.0)


def test_what_is_captured_is_not_published(peer: BrokerPeer) -> None:
    """Within a capture there is nothing to show yet: it says so, the graph is whole, and the next publish is shown.

    Every frame was to be kept: that one is missing is said until the end.
    """
    latents = values(torch.float16).cuda()
    doubled, graph = torch.zeros_like(latents), torch.cuda.CUDAGraph()
    publisher = LatentPublisher(peer.address, stream="a", latent_format="sd1", record="all")
    try:
        with torch.cuda.graph(graph):
            torch.mul(latents, 2, out=doubled)
            publisher.publish(doubled, step=0)
        assert publisher.error is not None
        assert "CUDA graph" in publisher.error
        graph.replay()
        publisher.publish(doubled, step=1)
        frame = peer.frame(0)
        peer.ack(publisher.run, 0)
        assert (bytes(frame.payload), frame.step) == ((latents * 2).cpu().numpy().tobytes(), 1)
        assert "CUDA graph" in publisher.error
    finally:
        publisher.close(0.0)
