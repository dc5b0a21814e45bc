"""A rank's side of a `RankGroup`."""

from __future__ import annotations

from llmengine.backends.ranks.collectives import Collectives
from llmengine.backends.ranks.pipe import Pipe
from llmengine.backends.ranks.progress import Progress
from llmengine.backends.ranks.reports import Report, ReportSender
from llmengine.backends.ranks.ring import RingReader

__all__ = ["RankChannel", "RankClosed"]


class RankClosed(Exception):
    """The group was closed. A target lets it pass, and its process ends."""


class RankChannel:
    """What a target is given: who it is, messages from rank 0, and the collectives.

    Attributes:
        rank: this rank, from 1.
        size: how many ranks there are, rank 0 included.
        collectives: this rank's end of those of its stage, in which ranks are counted from the stage's first.
        pipe: this rank's connections to the stages before and after its own.
        progress: where this rank says how far it is, beyond what it receives and the collectives that it joins.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        collectives: Collectives,
        pipe: Pipe,
        progress: Progress,
        reader: RingReader,
        sender: ReportSender,
    ) -> None:
        self.rank = rank
        self.size = size
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
