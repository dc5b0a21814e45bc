"""A rank's side of a `RankGroup`."""

from __future__ import annotations

from typing import Protocol

from llmengine.backends.ranks.collectives import Collectives
from llmengine.backends.ranks.pipe import Pipe
from llmengine.backends.ranks.progress import Progress
from llmengine.backends.ranks.reports import Report, ReportSender

__all__ = ["MessageReader", "RankChannel", "RankClosed"]


class RankClosed(Exception):
    """The group was closed. A target lets it pass, and its process ends."""


class MessageReader(Protocol):
    """Where messages of rank 0 arrive: a `RingReader` or a `SocketReader`."""

    @property
    def closed(self) -> bool:
        """Whether rank 0 has closed or is gone, though there may be messages to read."""

    def read(self) -> bytes | None:
        """The next message, waiting for it; None when rank 0 has closed."""


class RankChannel:
    """What a target is given: who it is, messages from rank 0, and the collectives.

    Attributes:
        rank: this rank, from 1.
        size: how many ranks there are, rank 0 included.
        num_on_host: how many of them are on this rank's host.
        collectives: this rank's end of those of its stage, in which ranks are counted from the stage's first.
        pipe: this rank's connections to the stages before and after its own.
        progress: where this rank says how far it is, beyond what it receives and the collectives that it joins.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        num_on_host: int,
        collectives: Collectives,
        pipe: Pipe,
        progress: Progress,
        reader: MessageReader,
        sender: ReportSender,
    ) -> None:
        self.rank = rank
        self.size = size
        self.num_on_host = num_on_host
        self.collectives = collectives
        self.pipe = pipe
        self.progress = progress
        self._reader = reader
        self._sender = sender

    def receive(self) -> bytes:
        """The next message of rank 0; waits for it. Raises `RankClosed` when there will be none."""
        self.progress.rest()
        message = self._reader.read()
        if message is None:
            raise RankClosed
        self.progress.mark(b"a message")
        return message

    def reply(self, message: bytes) -> None:
        """Send rank 0 a message, which its `RankGroup.replies` waits for."""
        self.progress.rest()
        self._sender.send(Report.REPLY, message)
        self.progress.mark()
