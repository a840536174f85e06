"""One question to a broker, one answer: is it there, and how is it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final

import zmq

from taesd_stream import wire
from taesd_stream.errors import ConfigError, UnreachableError, WireError
from taesd_stream.keys import Keys
from taesd_stream.line import Line
from taesd_stream.messages import Echo, PublisherHello, State, Stats

ANSWER_S: Final = 5.0
LOOK_MS: Final = 200


def greet_broker(address: str, keys: Keys | None = None) -> None:
    """Make sure that a broker takes publishers at `address`.

    Raises: UnreachableError when none answers or lets us in, ConfigError for what is no address.
    """
    _ask(address, PublisherHello(runs={}, echo_ns=time.monotonic_ns()), Echo, keys)


def greet_any_broker(addresses: Iterable[str], keys: Keys | None = None) -> None:
    """Make sure that one of several brokers takes publishers. Raises: as greet_broker, when none does."""
    silent: list[str] = []
    for address in addresses:
        try:
            return greet_broker(address, keys)
        except UnreachableError as error:
            silent.append(str(error))
    raise UnreachableError("; ".join(silent))


def broker_state(workers_address: str, keys: Keys | None = None) -> State:
    """STATS: what the broker knows, asked where its workers connect. Raises: as greet_broker."""
    state: State = _ask(workers_address, Stats(), State, keys)
    return state


def _ask(address: str, question: Any, expected: type, keys: Keys | None) -> Any:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    context.linger = 0
    try:
        line = Line(context, zmq.DEALER, address, keys=keys)
        try:
            answer = _answer(line, question, expected)
        finally:
            line.close()
    except zmq.ZMQError as error:
        raise ConfigError(f"{address}: expected an address as {wire.DEFAULT_ADDRESS}: {error.strerror}") from error
    finally:
        context.term()
    if answer is None:
        silent = f"no broker answers at {address}: start a daemon with `taesd-stream up`"
        raise UnreachableError(line.error or silent)
    return answer


def _answer(line: Line, question: Any, expected: type) -> Any:
    """The answer; None when none came, or nobody let us in."""
    deadline_s = time.monotonic() + ANSWER_S
    while not line.socket.poll(min(LOOK_MS, _ms_until(deadline_s)), zmq.POLLOUT):
        line.look()
        if line.error is not None or time.monotonic() > deadline_s:
            return None
    line.socket.send_multipart(wire.pack(question))
    while line.socket.poll(_ms_until(deadline_s)):
        try:
            return wire.unpack(line.socket.recv_multipart(), (expected,))
        except WireError:
            continue  # what else a broker may say
    return None


def _ms_until(deadline_s: float) -> int:
    return max(0, round((deadline_s - time.monotonic()) * 1000))
