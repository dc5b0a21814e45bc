"""AnswerLog: the events of one answer, parsed when somebody first reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from llmengine.chat.answers.events import AnswerEvent, merged


class PieceParser(Protocol):
    """Turns the pieces of an answer into events, as `AnswerParser` does."""

    def feed(self, piece: str, *, is_token: bool = True) -> list[AnswerEvent]:
        """The events that `piece` completes; it is the text of a token if `is_token`."""

    def finish(self) -> list[AnswerEvent]:
        """The events of what was held back."""


class AnswerLog:
    """The events of an answer by the piece that completed them. Every reader gets the same ones, on any thread.

    Parsing costs the reader that is first, never the engine, and nothing if nobody asks.

    Args:
        new_parser: makes the parser when events are first read.

    Attributes:
        new_parser: the same, for a log of the same answer in another process; it can be pickled.
    """

    __slots__ = ("_events", "_lock", "_parser", "new_parser")

    def __init__(self, new_parser: Callable[[], PieceParser]) -> None:
        self.new_parser = new_parser
        self._parser: PieceParser | None = None
        self._events: list[list[AnswerEvent]] = []  # by piece; at last those that finish the answer
        self._lock = threading.Lock()

    def events(self, pieces: Sequence[str], begin: int, end: int | None, num_tokens: int) -> list[AnswerEvent]:
        """The events that the pieces from `begin` to `end` completed.

        Args:
            pieces: all pieces so far.
            end: None: the answer is over, and `pieces` is all of it.
            num_tokens: number of the pieces that are tokens.
        """
        with self._lock:
            self._parse(pieces, len(pieces) if end is None else min(end, len(pieces)), num_tokens, end is None)
            found = self._events[begin:end]
        return merged(event for events in found for event in events)

    def _parse(self, pieces: Sequence[str], end: int, num_tokens: int, final: bool) -> None:
        if self._parser is None:
            self._parser = self.new_parser()
        for index in range(len(self._events), end):
            self._events.append(self._parser.feed(pieces[index], is_token=index < num_tokens))
        if final and len(self._events) == len(pieces):
            self._events.append(self._parser.finish())

    def copy(self, pieces: Sequence[str], end: int | None, num_tokens: int) -> AnswerLog:
        """A log of the events up to `end`, for a pickle; see `events`."""
        self.events(pieces, 0, end, num_tokens)
        with self._lock:
            return _known(self._events[:end])

    def __reduce__(self) -> tuple[object, ...]:
        with self._lock:
            return _known, (self._events,)


class _NoParser:
    def feed(self, piece: str, *, is_token: bool = True) -> list[AnswerEvent]:
        raise AssertionError("the events of a copied output are known")

    def finish(self) -> list[AnswerEvent]:
        raise AssertionError("the events of a copied output are known")


def _known(events: list[list[AnswerEvent]]) -> AnswerLog:
    log = AnswerLog(_NoParser)
    log._events = events
    return log
