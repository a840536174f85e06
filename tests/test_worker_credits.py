"""A real decode worker gives no credit back while recordings fill its way to the streamer; the test is its daemon."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import zmq

from taesd_stream import wire
from taesd_stream.frames import Packet
from taesd_stream.messages import Done, Echo, Job, WorkerHello
from taesd_stream.sockets import bind
from tests.daemon import clean_environment
from tests.golden_messages import JOB_ITEM

M = TypeVar("M")

BOUND_BYTES = 1 << 20  # of its packets that wait, for this test: its own takes a minute of encoding to fill
SCRIPT = f"""
from taesd_stream_workers.worker import outgoing
outgoing.MAX_BYTES = {BOUND_BYTES}
from taesd_stream_workers.cli import main
main()
"""
SHAPE = (4, 64, 64)
FRAMES = 16
ENCODED_S = 6.0  # by then they are all encoded


class Around:
    """Broker and streamer of one worker: its messages, and its packets once `read_packets` is called."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inside = bind(self._context, zmq.ROUTER, f"ipc://{folder}/inside")
        self.packets_to = f"ipc://{folder}/packets"
        options = [f"broker.workers_bind=ipc://{folder}/inside", "decoder.choice=linear", "decoder.device=cpu"]
        words = [word for one in options for word in ("--set", one)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, "worker", *words], stdout=subprocess.DEVNULL, env=clean_environment(folder)
        )
        self._peer = b""

    def next(self, *kinds: type) -> Any:
        """The worker's next message of these kinds. HELLO is answered."""
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            assert self._inside.poll(60_000), "the worker says nothing"
            self._peer, *parts = self._inside.recv_multipart()
            message = wire.unpack(parts, wire.FROM_INSIDE)
            if isinstance(message, WorkerHello):
                self.say(Echo(echo_ns=message.echo_ns, now_ns=time.monotonic_ns()))
            if isinstance(message, kinds):
                return message
        raise AssertionError(f"no {kinds} in 60 s")

    def say(self, message: Any) -> None:
        """To the worker."""
        self._inside.send_multipart([self._peer, *wire.pack(message)])

    def read_packets(self, count: int) -> list[Packet]:
        """Be the streamer, from now on."""
        got: list[Packet] = []
        with bind(self._context, zmq.PULL, self.packets_to) as reader:
            while len(got) < count:
                assert reader.poll(20_000), f"only {len(got)} packets"
                got.append(wire.unpack(reader.recv_multipart(), wire.FROM_WORKER_TO_STREAMER))
        return got

    def close(self) -> None:
        """End all."""
        self._process.kill()
        self._process.wait()
        self._context.destroy(linger=0)


@pytest.fixture
def around(tmp_path: Path) -> Iterator[Around]:
    """What is around a worker."""
    one = Around(tmp_path)
    yield one
    one.close()


@pytest.mark.slow
def test_no_credit_comes_back_while_recordings_fill_the_way(around: Around) -> None:
    """Without a reader the answer is withheld, HELLO is not; once the packets go, all of them, it comes."""
    around.next(WorkerHello)
    rng = np.random.default_rng(3)
    items = tuple(
        replace(JOB_ITEM, seq=seq, index=seq, shape=SHAPE, renditions=("record",), attempt=seq, pts=seq * 9000)
        for seq in range(FRAMES)  # each an attempt of its own, and so a keyframe
    )
    payloads = tuple((3 * rng.standard_normal(SHAPE)).astype(np.float16).tobytes() for _ in items)
    around.say(Job(job=7, latent_format="sd1", items=items, packets_to=around.packets_to, payloads=payloads))
    since_s = None
    while since_s is None or time.monotonic() - since_s < ENCODED_S:
        message = around.next(WorkerHello, Done)
        assert isinstance(message, WorkerHello)
        if message.encoders and since_s is None:
            since_s = time.monotonic()
    packets = around.read_packets(FRAMES)
    assert [packet.seq for packet in packets] == list(range(FRAMES))
    assert sum(len(packet.payload) for packet in packets) > BOUND_BYTES
    assert around.next(Done).job == 7
