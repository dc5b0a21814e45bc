"""TCP connections between the hosts of ranks, which only those can make who know a group's secret.

Both ends prove that they know the secret (HMAC-SHA256 of two nonces) before either reads anything else. What follows is
neither encrypted nor signed: like that of NCCL and of Ray, the network must be one that strangers cannot listen to.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import pickle
import select
import socket
import threading
from typing import Any

from llmengine.backends.ranks.sockets import SocketReader

__all__ = ["Address", "ControlConnection", "Gate", "connect"]

Address = tuple[str, int]

_NONCE = 32
_MOST_HELLO = 1 << 10
_HANDSHAKE_S = 30.0
# A host that is gone is noticed after IDLE + PROBES * EVERY seconds, or LOST_MS with data under way.
_IDLE_S, _EVERY_S, _PROBES, _LOST_MS = 2, 1, 5, 7000


def connect(address: Address, secret: bytes, hello: bytes, timeout_s: float) -> socket.socket:
    """Connect to a `Gate` and say `hello`, at most 1 KiB. Raises `OSError`; the other end must know the secret too."""
    connection = socket.create_connection(address, timeout_s)
    try:
        _prepare(connection)
        connection.settimeout(min(timeout_s, _HANDSHAKE_S))
        theirs, ours = _receive(connection, _NONCE), os.urandom(_NONCE)
        connection.sendall(ours + _proof(secret, b"in", theirs, ours, hello) + len(hello).to_bytes(2, "little") + hello)
        if not hmac.compare_digest(_receive(connection, 32), _proof(secret, b"out", theirs, ours, hello)):
            raise ConnectionError(f"{address[0]}:{address[1]} does not know the group's secret")
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


class Gate:
    """A port at which those are let in who know the secret. Strangers are turned away unheard.

    Args:
        host: an address of this host; the system chooses the port.
    """

    def __init__(self, host: str, secret: bytes) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=128)
        self.address: Address = (host, self._listener.getsockname()[1])
        self._secret = secret
        self._changed = threading.Condition()
        self._arrived: dict[bytes, socket.socket] = {}
        self._is_closed = False
        self._closing, self._told = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="llmengine-gate", daemon=True)
        self._thread.start()

    def take(self, hello: bytes, timeout_s: float) -> socket.socket | None:
        """The connection of the one that has said `hello`; None if none comes in time."""
        with self._changed:
            self._changed.wait_for(lambda: hello in self._arrived, timeout_s)
            return self._arrived.pop(hello, None)

    def close(self) -> None:
        """Let nobody in any more. Connections that were taken stay open. Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            for connection in self._arrived.values():
                connection.close()
        self._closing.close()
        self._thread.join()
        self._told.close()
        self._listener.close()

    def _run(self) -> None:
        poll = select.poll()
        for each in (self._listener, self._told):
            poll.register(each, select.POLLIN)
        while True:
            if any(fd == self._told.fileno() for fd, _ in poll.poll()):
                return
            with contextlib.suppress(OSError):
                connection, _ = self._listener.accept()
                threading.Thread(target=self._let_in, args=(connection,), name="llmengine-gate", daemon=True).start()

    def _let_in(self, connection: socket.socket) -> None:
        try:
            _prepare(connection)
            connection.settimeout(_HANDSHAKE_S)
            hello = self._greet(connection)
            connection.settimeout(None)
        except OSError:
            connection.close()
            return
        with self._changed:
            if self._is_closed or hello in self._arrived:
                connection.close()
            else:
                self._arrived[hello] = connection
                self._changed.notify_all()

    def _greet(self, connection: socket.socket) -> bytes:
        ours = os.urandom(_NONCE)
        connection.sendall(ours)
        theirs, proof = _receive(connection, _NONCE), _receive(connection, 32)
        size = int.from_bytes(_receive(connection, 2), "little")
        hello = _receive(connection, min(size, _MOST_HELLO))
        if not hmac.compare_digest(proof, _proof(self._secret, b"in", ours, theirs, hello)):
            raise ConnectionError("a stranger")
        connection.sendall(_proof(self._secret, b"out", ours, theirs, hello))
        return hello


class ControlConnection:
    """Objects between an agent and rank 0's process, pickled. Any thread may send, one receives."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._reader = SocketReader(connection)
        self._sending = threading.Lock()
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # both ends read at once, so nothing but a lost host keeps data
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_MS)

    def send(self, message: Any) -> None:
        """Send an object; one that cannot be sent any more is dropped, since `receive` tells why."""
        data = pickle.dumps(message)
        with self._sending, contextlib.suppress(OSError):
            self.connection.sendall(len(data).to_bytes(8, "little") + data)

    def receive(self, timeout_s: float | None = None) -> Any:
        """The next object; None if none comes in time. Raises `EOFError` when the other end is gone."""
        if not self._reader.has_message(timeout_s):
            return None
        message = self._reader.read()
        if message is None:
            raise EOFError(self._reader.why_ended)
        return pickle.loads(message)

    def close(self) -> None:
        """End the connection, also for a thread that receives."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


def _prepare(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _IDLE_S), ("TCP_KEEPINTVL", _EVERY_S), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _proof(secret: bytes, role: bytes, of_gate: bytes, of_visitor: bytes, hello: bytes) -> bytes:
    return hmac.digest(secret, b"|".join((role, of_gate, of_visitor, hello)), "sha256")


def _receive(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("the connection was closed")
        data += part
    return data
