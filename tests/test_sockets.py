"""Sockets as this project sets them, the wake-up of a poller, the offset of two clocks: all with real ones."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from taesd_stream.sockets import ClockOffset, WakePipe, bind, dial, receive_parts
from taesd_stream.wire import MAX_MESSAGE_BYTES
from tests.daemon import wait_for

Context = zmq.Context[zmq.Socket[bytes]]


class Sockets:
    """Makes sockets of one context, and closes them with it."""

    def __init__(self) -> None:
        self.context: Context = zmq.Context()
        self._made: list[zmq.Socket[bytes]] = []

    def router(self, address: str = "tcp://127.0.0.1:0", *, hwm: int = 1000) -> zmq.Socket[bytes]:
        """Ours, bound."""
        self._made.append(bind(self.context, zmq.ROUTER, address, hwm=hwm))
        return self._made[-1]

    def dealer(self, address: str, *, hwm: int = 64, identity: bytes | None = None) -> zmq.Socket[bytes]:
        """Ours, connected."""
        self._made.append(dial(self.context, zmq.DEALER, address, hwm=hwm, identity=identity))
        return self._made[-1]

    def keep(self, socket: zmq.Socket[bytes]) -> None:
        """Close this one too."""
        self._made.append(socket)

    def close(self) -> None:
        """Close all; hangs where one was left open behind our back."""
        for socket in self._made:
            socket.close(linger=0)
        self.context.term()


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    """Sockets of the test."""
    one = Sockets()
    yield one
    one.close()


def endpoint(socket: zmq.Socket[bytes]) -> str:
    """Where it is bound."""
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def test_a_dealer_takes_nothing_before_it_is_connected(sockets: Sockets, tmp_path: Path) -> None:
    """Without a peer a message is not queued, so that nothing stale waits for a broker to come."""
    dealer = sockets.dealer(f"ipc://{tmp_path}/nobody")
    with pytest.raises(zmq.Again):
        dealer.send(b"stale", zmq.NOBLOCK)


def test_a_dealer_says_when_it_can_send(sockets: Sockets, tmp_path: Path) -> None:
    """The poller wakes a sender as soon as the peer is there."""
    address = f"ipc://{tmp_path}/late"
    dealer = sockets.dealer(address)
    router = sockets.router(address)
    assert dealer.poll(20_000, zmq.POLLOUT)
    dealer.send(b"fresh", zmq.NOBLOCK)
    assert router.poll(20_000)
    assert router.recv_multipart()[1:] == [b"fresh"]


@pytest.mark.parametrize("address", ["nowhere", "tcp://", "smoke://signal", "tcp://127.0.0.1:99999"])
def test_an_address_that_is_none_leaves_no_socket(sockets: Sockets, address: str) -> None:
    """A bad address is a ZMQError, for either end; no half-made socket keeps the context from its end."""
    with pytest.raises(zmq.ZMQError):
        sockets.dealer(address)
    with pytest.raises(zmq.ZMQError):
        sockets.router(address)


def test_an_address_in_use_is_said(sockets: Sockets) -> None:
    """A second bind of a port is EADDRINUSE."""
    first = sockets.router()
    with pytest.raises(zmq.ZMQError) as caught:
        sockets.router(endpoint(first))
    assert caught.value.errno == zmq.EADDRINUSE


def test_a_peer_that_is_not_there_is_said(sockets: Sockets) -> None:
    """Sending to an unknown id is an error, not a message dropped in silence."""
    router = sockets.router()
    with pytest.raises(zmq.ZMQError) as caught:
        router.send_multipart([b"nobody", b"hello"], zmq.NOBLOCK)
    assert caught.value.errno == zmq.EHOSTUNREACH


def test_a_full_peer_is_said(sockets: Sockets) -> None:
    """A peer that reads nothing makes send say Again; what was accepted before arrives whole."""
    router = sockets.router(hwm=4)
    dealer = sockets.context.socket(zmq.DEALER)  # a foreign one: ours takes more before it is full
    sockets.keep(dealer)
    dealer.setsockopt(zmq.RCVHWM, 4)
    dealer.setsockopt(zmq.IDENTITY, b"slow")
    dealer.connect(endpoint(router))
    assert dealer.poll(20_000, zmq.POLLOUT)
    dealer.send(b"hello")
    assert router.poll(20_000)
    router.recv_multipart()
    accepted = 0
    with contextlib.suppress(zmq.Again):
        while accepted < 1000:
            router.send_multipart([b"slow", bytes(1 << 18)], zmq.NOBLOCK)
            accepted += 1
    assert accepted < 1000
    for _ in range(accepted):
        assert dealer.poll(20_000)
        assert len(dealer.recv()) == 1 << 18


CLOSED_WHILE_FULL = """
import time, zmq
from taesd_stream.sockets import HEARTBEAT_MS, bind, close, dial
context = zmq.Context()
pull = bind(context, zmq.PULL, "tcp://127.0.0.1:0", hwm=4)
push = dial(context, zmq.PUSH, pull.getsockopt_string(zmq.LAST_ENDPOINT), hwm=1000)
for _ in range(500):
    assert push.poll(5000, zmq.POLLOUT)
    push.send(bytes(20_000))
assert pull.poll(5000)
close(push)
until_s = time.monotonic() + 1.5 * HEARTBEAT_MS / 1000
while time.monotonic() < until_s:
    time.sleep(0.05)
pull.recv()
close(pull)
context.term()
print("alive")
"""


@pytest.mark.faults
def test_a_connection_closed_while_much_waits_on_it_ends_no_process() -> None:
    """Whoever sends more than is read and goes: libzmq would abort the process at its next heartbeat, had it one."""
    done = subprocess.run(
        [sys.executable, "-c", CLOSED_WHILE_FULL], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "alive"), done.stderr


def test_a_peer_that_came_back_takes_its_id_again(sockets: Sockets) -> None:
    """A second connection with the same id is the one that is answered: the first may be dead."""
    router = sockets.router()
    for word in (b"first", b"second"):
        dealer = sockets.dealer(endpoint(router), identity=b"worker")
        assert dealer.poll(20_000, zmq.POLLOUT)
        dealer.send(word)
        assert router.poll(20_000)
        assert router.recv_multipart() == [b"worker", word]
        router.send_multipart([b"worker", word])
        assert dealer.poll(20_000)
        assert dealer.recv() == word


def test_an_oversized_message_does_not_come_in(sockets: Sockets) -> None:
    """A message over MAXMSGSIZE ends its connection; the next one on a new connection arrives."""
    router = sockets.router()
    dealer = sockets.dealer(endpoint(router))
    assert dealer.poll(20_000, zmq.POLLOUT)
    dealer.send(bytes(MAX_MESSAGE_BYTES + 1))

    def sent_again() -> bool:
        try:
            dealer.send(b"small", zmq.NOBLOCK)
        except zmq.Again:
            return False
        return bool(router.poll(200))

    wait_for(sent_again, of="the small message")
    assert router.recv_multipart()[1:] == [b"small"]


def test_parts_are_received_whole_and_uncopied(sockets: Sockets) -> None:
    """A message comes as its header in bytes and views of its payloads; with none waiting it is zmq.Again."""
    router = sockets.router()
    dealer = sockets.dealer(endpoint(router), identity=b"me")
    with pytest.raises(zmq.Again):
        receive_parts(dealer)
    assert dealer.poll(20_000, zmq.POLLOUT)
    dealer.send(b"hello")
    router.recv()
    router.send_multipart([b"me", b"head", b"payload", b""])
    assert dealer.poll(20_000)
    head, *payloads = receive_parts(dealer)
    assert type(head) is bytes
    assert all(type(payload) is memoryview for payload in payloads)
    assert [head, *map(bytes, payloads)] == [b"head", b"payload", b""]


# --- the wake-up ---


def woken(pipe: WakePipe, timeout_ms: int) -> bool:
    """Whether a poller that waits on it returns with it."""
    poller = zmq.Poller()
    poller.register(pipe.fileno(), zmq.POLLIN)
    return bool(poller.poll(timeout_ms))


@pytest.fixture(params=["eventfd", "pair", "pair of windows"])
def pipe(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[WakePipe]:
    """All forms: Linux's, macOS's and that of Windows."""
    if request.param != "eventfd":
        monkeypatch.delattr(os, "eventfd", raising=False)
        if request.param == "pair of windows":
            monkeypatch.setattr("taesd_stream.sockets._has_write", lambda: False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("no eventfd on this system")
    one = WakePipe()
    yield one
    one.close()


def test_a_wake_ends_the_poll(pipe: WakePipe) -> None:
    """wake() from another thread ends a poll long before its time."""
    thread = threading.Thread(target=pipe.wake)
    thread.start()
    assert woken(pipe, 20_000)
    thread.join()


def test_a_drain_forgets_all_wakes(pipe: WakePipe) -> None:
    """However often it was woken, after drain() the poll waits again; and a later wake counts."""
    for _ in range(100_000):
        pipe.wake()
    pipe.drain()
    assert not woken(pipe, 0)
    pipe.wake()
    assert woken(pipe, 0)


def test_a_wake_after_close_does_nothing(pipe: WakePipe, tmp_path: Path) -> None:
    """A wake that comes after close() writes nothing, and no file can have got the number as long as one may come."""
    number = pipe.fileno()
    pipe.close()
    opened = [os.open(tmp_path / str(name), os.O_WRONLY | os.O_CREAT) for name in range(number + 1)]
    pipe.wake()
    for one in opened:
        os.close(one)
    assert number not in opened
    assert not any(path.read_bytes() for path in tmp_path.iterdir())
    assert not woken(pipe, 0)


def descriptors() -> int:
    """How many this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux to count descriptors")
def test_a_wake_up_frees_its_descriptors(pipe: WakePipe) -> None:
    """What close() leaves open goes with the object."""
    before = descriptors()
    others = [WakePipe() for _ in range(10)]
    assert descriptors() >= before + 10
    del others
    assert descriptors() == before


def test_wakes_and_close_may_meet(pipe: WakePipe) -> None:
    """Threads that wake while another closes raise nothing."""
    is_closed = threading.Event()

    def wake() -> None:
        while not is_closed.is_set():
            pipe.wake()
        pipe.wake()

    with ThreadPoolExecutor(4) as pool:
        waking = [pool.submit(wake) for _ in range(4)]
        pipe.close()
        is_closed.set()
        assert [one.result(20) for one in waking] == [None] * 4


# --- the clocks ---


def test_no_round_trip_gives_no_offset() -> None:
    """Before the first answer the offset is not known."""
    assert ClockOffset().offset_ns is None


@given(st.integers(-(10**15), 10**15), st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1))
def test_the_offset_is_right_to_half_the_shortest_trip(offset_ns: int, delays: list[tuple[int, int]]) -> None:
    """Whatever the delays there and back, the error is at most half of the shortest of the last 16 round trips."""
    clock = ClockOffset()
    now = 0
    for there, back in delays:
        clock.add(now, now + there + offset_ns, now + there + back)
        now += there + back + 1
    assert clock.offset_ns is not None
    assert abs(clock.offset_ns - offset_ns) <= min(there + back for there, back in delays[-16:]) / 2 + 1
