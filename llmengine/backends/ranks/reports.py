"""What a rank tells rank 0 over its socket: that it is ready, replies, and why it ends."""

from __future__ import annotations

import pickle
import socket
import struct
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from llmengine.backends.ranks.collectives import PeerLostError
from llmengine.errors import LLMEngineError

__all__ = ["Raised", "Report", "ReportReader", "ReportSender"]

_HEAD = struct.Struct("<BQ")  # kind, bytes that follow


class Report(IntEnum):
    """Kinds of reports."""

    READY = 1  # the target is imported; a rendezvous comes next
    REPLY = 2
    RAISED = 3  # a `Raised`, the last report


@dataclass(frozen=True)
class Raised:
    """What a target raised.

    Attributes:
        summary: its type and message.
        traceback: as Python prints it.
        error: itself if it is one of llmengine's errors, else None.
        peer_lost: the rank failed because another one did.
    """

    summary: str
    traceback: str
    error: LLMEngineError | None
    peer_lost: bool

    @classmethod
    def of(cls, error: BaseException) -> Raised:
        """Describe an error that was caught."""
        summary = "".join(traceback.format_exception_only(error)).strip()
        text = "".join(traceback.format_exception(error)).rstrip()
        own = error if isinstance(error, LLMEngineError) else None
        return cls(summary, text, own, isinstance(error, PeerLostError))

    def dump(self) -> bytes:
        """Bytes for `load`. An error that cannot be restored there is left out."""
        try:
            data = pickle.dumps(self)
            pickle.loads(data)
        except Exception:
            return pickle.dumps(Raised(self.summary, self.traceback, None, self.peer_lost))
        return data

    @staticmethod
    def load(data: bytes) -> Raised:
        """Inverse of `dump`; only for bytes of a process of ours, for they may run code."""
        raised: Raised = pickle.loads(data)
        return raised


class ReportSender:
    """A rank's end of its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, kind: Report, data: bytes = b"") -> None:
        """Send one report; blocks while rank 0 has many unread."""
        self._connection.sendall(_HEAD.pack(kind, len(data)))
        self._connection.sendall(data)


class ReportReader:
    """Puts the reports of one rank together from what its socket receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()
        self.ended = False

    def read(self) -> Iterator[tuple[Report, bytes]]:
        """Receive once, and yield the reports that are complete; sets `ended` at the end of the stream."""
        try:
            data = self._connection.recv(1 << 16)
        except OSError:  # reset by a process that was killed, or given up by the kernel, since its host is gone
            data = b""
        self.ended = not data
        self._received += data
        while len(self._received) >= _HEAD.size:
            kind, size = _HEAD.unpack_from(self._received)
            end = _HEAD.size + size
            if len(self._received) < end:
                return
            yield Report(kind), bytes(self._received[_HEAD.size : end])
            del self._received[:end]
