"""One question to a broker, one answer: is it there, and how is it."""

from __future__ import annotations

import time
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.errors import ConfigError, UnreachableError, WireError
from taesd_stream.messages import Echo, PublisherHello, State, Stats
from taesd_stream.sockets import connect_dealer

ANSWER_S: Final = 5.0


def greet_broker(address: str) -> None:
    """Make sure that a broker takes publishers at `address`.

    Raises: UnreachableError when none answers, ConfigError for what is no address.
    """
    _ask(address, PublisherHello(runs={}, echo_ns=time.monotonic_ns()), Echo)


def broker_state(workers_address: str) -> State:
    """STATS: what the broker knows, asked where its workers connect. Raises: as greet_broker."""
    state: State = _ask(workers_address, Stats(), State)
    return state


def _ask(address: str, question: Any, expected: type) -> Any:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.linger = 0
    try:
        with connect_dealer(context, address) as socket:
            deadline_s = time.monotonic() + ANSWER_S
            if socket.poll(_ms_until(deadline_s), zmq.POLLOUT):
                socket.send_multipart(wire.pack(question))
            while socket.poll(_ms_until(deadline_s)):
                try:
                    return wire.unpack(socket.recv_multipart(), (expected,))
                except WireError:
                    continue  # what else a broker may say
    except zmq.ZMQError as error:
        raise ConfigError(f"{address}: expected an address as {wire.DEFAULT_ADDRESS}: {error.strerror}") from error
    finally:
        context.term()
    raise UnreachableError(f"no broker answers at {address}: start a daemon with `taesd-stream up`")


def _ms_until(deadline_s: float) -> int:
    return max(0, round((deadline_s - time.monotonic()) * 1000))
