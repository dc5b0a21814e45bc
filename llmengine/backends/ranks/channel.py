"""A rank's side of a `RankGroup`."""

from __future__ import annotations

from llmengine.backends.ranks.collectives import Collectives
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
        collectives: this rank's end of the process group.
    """

    def __init__(self, rank: int, collectives: Collectives, reader: RingReader, sender: ReportSender) -> None:
        self.rank = rank
        self.size = collectives.size
        self.collectives = collectives
        self._reader = reader
        self._sender = sender

    def receive(self) -> bytes:
        """The next message of rank 0; waits for it. Raises `RankClosed` when there will be none."""
        message = self._reader.read()
        if message is None:
            raise RankClosed
        return message

    def reply(self, message: bytes) -> None:
        """Send rank 0 a message, which its `RankGroup.replies` waits for."""
        self._sender.send(Report.REPLY, message)
