"""Who may connect to a role's sockets: the handshakes' answers (ZAP), and whose each message is.

Source of the handler: ZeroMQ RFC 27 (ZAP 1.0). It runs in the role's own loop; libzmq waits for its answer elsewhere.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from taesd_stream.config import Config
from taesd_stream.keys import Keys, load_keys
from taesd_stream.sockets import bind, is_tcp
from taesd_stream_workers.role.key_files import PURPOSES, AllowList, Purpose
from taesd_stream_workers.role.seldom import Seldom

logger = logging.getLogger(__name__)

ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
OWN_NAME: Final = "(this daemon)"  # no client's: it has brackets
MAX_ANSWERS: Final = 64  # a turn
MAX_SAID: Final = 100  # a stranger with ever new keys must not fill the disk by our log
_MECHANISM = zmq.Event.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
_FAILED: Final = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # not NO_DETAIL: a client that left in the midst of it


class Gate:
    """One role's. Without keys in the configuration every client is let in, and told by its host. One thread's."""

    def __init__(self, config: Config) -> None:
        """Raises: ConfigError for key files that cannot be used."""
        folder = config.keys_folder
        self.keys: Keys | None = load_keys(folder) if folder is not None else None
        self._allowed = AllowList(folder) if folder is not None else None
        self.counts: Counter[str] = Counter()
        self._zap: zmq.Socket[bytes] | None = None
        self._monitors: list[zmq.Socket[bytes]] = []
        self._seldom = Seldom(MAX_SAID)

    def open(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        """Take the handshakes of this context; before a socket of it is bound."""
        if self.keys is not None:
            self._zap = context.socket(zmq.REP)
            self._zap.bind(ZAP_ADDRESS)

    def bind(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        kind: int,
        address: str,
        purpose: Purpose,
        *,
        hwm: int,
        send_hwm: int | None = None,
    ) -> Door:
        """A bound socket of this gate. Raises: zmq.ZMQError when the address is in use or none."""
        is_guarded = self.keys is not None and is_tcp(address)
        watched = _FAILED if is_guarded else 0
        socket = bind(
            context,
            kind,
            address,
            hwm=hwm,
            send_hwm=send_hwm,
            keys=self.keys,
            domain=purpose,
            watched_events=watched,
        )
        if is_guarded:
            self._monitors.append(socket.get_monitor_socket())
        return Door(self, socket, purpose, is_guarded=is_guarded, is_local=not is_tcp(address))

    def waited_for(self) -> Iterator[zmq.Socket[bytes]]:
        """What a poller must wait for, so that `attend` is called in time."""
        if self._zap is not None:
            yield self._zap
        yield from self._monitors

    def attend(self) -> None:
        """Answer handshakes, count those that failed, read the list of keys again. Once a turn of the loop."""
        if self._zap is None or self._allowed is None:
            return
        self._allowed.look()
        for _ in range(MAX_ANSWERS):
            if not self._zap.poll(0):
                break
            self._zap.send_multipart(self._answer(self._zap.recv_multipart()))
        for monitor in self._monitors:
            for _ in range(MAX_ANSWERS):
                if not monitor.poll(0):
                    break
                self._on_failed(recv_monitor_message(monitor))

    def name_of(self, purpose: Purpose, public: bytes) -> str | None:
        """Whose key it is; None when it is not allowed."""
        assert self.keys is not None
        assert self._allowed is not None
        return OWN_NAME if public == self.keys.server else self._allowed.name_of(purpose, public)

    def count(self, what: str, key: Any, text: str) -> None:
        """Count it; say it once, and again when a minute has passed; of very many keys in a minute not of each."""
        self.counts[what] += 1
        if self._seldom.may_say(key):
            logger.warning("%s all=%d %s", what, self.counts[what], text)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        version, request_id, domain, address, _, mechanism, *credentials = request
        public = z85.encode(credentials[0]) if mechanism == b"CURVE" and len(credentials[0]) == 32 else b""
        purpose = next((one for one in PURPOSES if one.encode() == domain), None)
        if purpose is not None and self._is_allowed(purpose, public):
            return [version, request_id, b"200", b"OK", public, b""]
        shown = public.decode()
        text = f"address={address.decode('ascii', 'replace')} key={shown} is not allowed among the {purpose}"
        self.count("refused_key", public, text)
        return [version, request_id, b"400", b"this key is not allowed", b"", b""]

    def _is_allowed(self, purpose: Purpose, public: bytes) -> bool:
        if self._allowed is not None and self.name_of(purpose, public) is None:
            self._allowed.look_for_stranger()
        return self.name_of(purpose, public) is not None

    def _on_failed(self, event: Any) -> None:
        if event["value"] == _MECHANISM:
            self.count("refused_without_key", _MECHANISM, "a client that has no key, or does not encrypt")
        else:
            self.count(
                "refused_handshake", "handshake", "a client that has another daemon's server.pub, or none of ours"
            )


class Door:
    """One bound socket, and who speaks there.

    is_amid: the next part to be read is within a message of which nothing more is wanted.
    """

    def __init__(
        self, gate: Gate, socket: zmq.Socket[bytes], purpose: Purpose, *, is_guarded: bool, is_local: bool
    ) -> None:
        self.socket = socket
        self.is_amid = False
        self._is_local = is_local
        self._gate = gate
        self._purpose: Purpose = purpose
        self._is_guarded = is_guarded

    @property
    def has_keys(self) -> bool:
        """Whether clients are told by their keys; else by their hosts."""
        return self._is_guarded

    def pass_over(self, most: int) -> bool:
        """Read on to the end of a message of which nothing more is wanted: ZeroMQ gives no other one before it.

        Returns: whether it has come, within `most` parts.
        """
        for _ in range(most):
            if not self.is_amid:
                return True
            self.is_amid = self.socket.recv(copy=False).more
        return not self.is_amid

    def client_of(self, frame: zmq.Frame) -> str | None:
        """Who sent it: the name of its key, checked anew, for a key may be revoked while its connection stands.

        Returns: None for a key that is no longer allowed. Without keys: its host's address, "" for a socket file's.
        """
        if not self._is_guarded:
            return "" if self._is_local else str(frame.get("Peer-Address"))
        public = str(frame.get("User-Id")).encode()
        name = self._gate.name_of(self._purpose, public)
        if name is None:
            self._gate.count("refused_revoked", public, f"key={public.decode()} was revoked: its messages are dropped")
        return name
