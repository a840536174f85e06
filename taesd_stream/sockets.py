"""ZeroMQ sockets as this project sets them, the wake-up of a poller, and the offset between two hosts' clocks."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import socket as os_socket
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final, cast

import zmq

from taesd_stream.keys import Keys
from taesd_stream.messages import Part
from taesd_stream.wire import MAX_MESSAGE_BYTES

HEARTBEAT_MS: Final = 2000
HEARTBEAT_TIMEOUT_MS: Final = 6000
MAX_PORT: Final = 65535
DIALLED_HWM: Final = 10_000  # messages that wait to be read where this side has dialled
COPIED_BYTES: Final = 256 << 10  # sending more than these uncopied costs less than the thread that pyzmq wakes for it


def prepare(socket: zmq.Socket[bytes], *, hwm: int) -> None:
    """Options that every socket gets, before it binds or connects.

    No heartbeats here: they are the dialling side's alone, see `dial`. The side that binds learns by TCP's own, within
    a minute, that a host is gone; who must know earlier has HELLO, each second.
    """
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, hwm)
    socket.setsockopt(zmq.RCVHWM, hwm)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)


def dial(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    address: str,
    *,
    hwm: int = 64,
    identity: bytes | None = None,
    keys: Keys | None = None,
    watched_events: int = 0,
) -> zmq.Socket[bytes]:
    """A DEALER or PUSH that takes messages only while connected, so that nothing stale waits for a broker to come.

    keys: asked of tcp alone; a socket file is guarded by its folder.
    watched_events: what its get_monitor_socket() tells, from the first connection on.
    Raises: zmq.ZMQError for an address that is none.

    This side sends the heartbeats. One that binds must send none: libzmq 4.3.5 ends its process (`Assertion failed:
    !_io_error`, stream_engine_base.cpp:310) when a heartbeat is due on a connection that was closed while more waited
    on it than RCVHWM. Here as good as none waits.
    """
    socket = context.socket(kind)
    prepare(socket, hwm=hwm)
    socket.setsockopt(zmq.RCVHWM, DIALLED_HWM)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.copy_threshold = COPIED_BYTES
    if identity is not None:
        socket.setsockopt(zmq.IDENTITY, identity)
    if keys is not None and is_tcp(address):
        keys.put_on_client(socket)
    if watched_events:
        socket.get_monitor_socket(watched_events)
    try:
        _check_port(address)
        socket.connect(address)
    except zmq.ZMQError:
        close(socket)
        raise
    return socket


def bind(
    context: zmq.Context[zmq.Socket[bytes]],
    kind: int,
    address: str,
    *,
    hwm: int = 1000,
    send_hwm: int | None = None,
    keys: Keys | None = None,
    domain: str = "",
    watched_events: int = 0,
) -> zmq.Socket[bytes]:
    """A ROUTER that says when a peer is gone or full, and lets a peer that came back take its id again; or a PULL.

    Without MANDATORY 270 of 300 messages were dropped in silence; without HANDOVER a peer that dropped stays deaf.
    send_hwm: another than `hwm` for what goes out. keys, watched_events: as in `dial`. domain: see Keys.put_on_server.
    Raises: zmq.ZMQError when the address is in use or none.
    """
    socket = context.socket(kind)
    prepare(socket, hwm=hwm)
    if send_hwm is not None:
        socket.setsockopt(zmq.SNDHWM, send_hwm)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    if keys is not None and is_tcp(address):
        keys.put_on_server(socket, domain)
    if watched_events:
        socket.get_monitor_socket(watched_events)
    try:
        _check_port(address)
        socket.bind(address)
    except zmq.ZMQError:
        close(socket)
        raise
    return socket


def close(socket: zmq.Socket[bytes], linger_ms: int = 0) -> None:
    """Close a socket and the one that tells of its events, which would keep the context from its end."""
    monitor = socket._monitor_socket
    if monitor is not None:
        socket.disable_monitor()  # pyzmq's own forgets the other end, unclosed
        monitor.close(linger=0)
    socket.close(linger=linger_ms)


def _check_port(address: str) -> None:
    """Raises: zmq.ZMQError for a port over 65535, which libzmq takes for what is left of it in 16 bits."""
    port = address.rpartition(":")[2]
    if is_tcp(address) and port.isdecimal() and int(port) > MAX_PORT:
        raise zmq.ZMQError(errno.EINVAL, f"port {port} is over {MAX_PORT}")


def is_tcp(address: str) -> bool:
    """Whether others than this host's users could speak there."""
    return address.startswith("tcp://")


class WakePipe:
    """Wakes a zmq.Poller from another thread: an eventfd where there is one, else a socket pair.

    A wake must not meet close(), or the descriptor's number may be another file's: it is freed with the object, not
    before, so that wake() needs no lock.
    signal: wake() at the least cost, which does not look whether it is closed; not to be held longer than this object.
    """

    def __init__(self) -> None:
        self._is_open = True
        self.signal: Callable[[], object]
        if hasattr(os, "eventfd"):
            self._reader = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._pair = None
            self.signal = functools.partial(_holding_gil("eventfd_write"), self._reader, ctypes.c_uint64(1))
            free: weakref.finalize[..., WakePipe] = weakref.finalize(self, os.close, self._reader)
        else:
            self._pair = pair = os_socket.socketpair()
            for end in pair:
                end.setblocking(False)
            self._reader = pair[0].fileno()
            if _has_write():  # full: it will wake anyway
                self.signal = functools.partial(_holding_gil("write"), pair[1].fileno(), b"1", 1)
            else:
                self.signal = functools.partial(_send, pair[1])
            free = weakref.finalize(self, _close_all, pair)
        free.atexit = False  # whoever waits on it may still wait

    def fileno(self) -> int:
        """What the poller waits on."""
        return self._reader

    def wake(self) -> None:
        """Make the poller return; any thread, and after close(), when it does nothing."""
        if self._is_open:
            self.signal()

    def drain(self) -> None:
        """Forget past wakes; the polling thread alone."""
        with contextlib.suppress(OSError):
            if self._pair is None:
                os.eventfd_read(self._reader)
            else:
                while self._pair[0].recv(4096):
                    pass

    def close(self) -> None:
        """Later wakes do nothing."""
        self._is_open = False


@functools.cache
def _holding_gil(name: str) -> Callable[..., int]:
    """A function of the C library, called without letting go of the GIL.

    os.eventfd_write, os.write and socket.send let it go around the call, and the thread that they wake takes it: then
    whoever wakes has to wait until that one is done. Measured: 0.26 ms instead of 0.06 where it works for 0.2 ms.
    """
    # without argtypes, which cost 12 us in cold caches: bytes go as a pointer, libffi widens ints to whole registers
    return cast("Callable[..., int]", getattr(ctypes.PyDLL(None), name))


def _has_write() -> bool:
    """Whether sockets are files: on Windows they are not."""
    return os.name == "posix"


def _send(end: os_socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.send(b"1")


def _close_all(ends: Iterable[os_socket.socket]) -> None:
    for end in ends:
        end.close()


class ClockOffset:
    """A peer's monotonic clock minus ours, from the shortest of the last 16 round trips.

    Source: the symmetric-delay estimate of RFC 5905 (NTP), without its filters.
    """

    def __init__(self) -> None:
        self._trips: deque[tuple[int, int]] = deque(maxlen=16)  # (round trip, offset)

    def add(self, sent_ns: int, peer_ns: int, received_ns: int) -> None:
        """One round trip: our clock when it left, the peer's when it was there, ours when it was back."""
        self._trips.append((received_ns - sent_ns, peer_ns - (sent_ns + received_ns) // 2))

    @property
    def offset_ns(self) -> int | None:
        """Add this to our clock to get the peer's; None before the first round trip."""
        return min(self._trips)[1] if self._trips else None


def receive_parts(socket: zmq.Socket[bytes]) -> list[Part]:
    """One whole message: its header as bytes, its payloads as views of the received memory, uncopied.

    Raises: zmq.Again when none waits.
    """
    head, *payloads = socket.recv_multipart(zmq.NOBLOCK, copy=False)
    return [head.bytes, *(payload.buffer for payload in payloads)]
