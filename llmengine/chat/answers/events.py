"""Events of an answer as it arrives, and the answer that they add up to: reasoning, text and tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_NO_TOKENS = range(0)


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More reasoning.

    Attributes:
        text: what to append; never empty.
        tokens: positions of the generated tokens whose text begins here. Every token belongs to at most one event; the
            tokens of markers around reasoning belong to none.
    """

    text: str
    tokens: range = _NO_TOKENS


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text for the user; attributes as for `ReasoningDelta`."""

    text: str
    tokens: range = _NO_TOKENS


@dataclass(frozen=True, slots=True)
class ToolCallBegin:
    """A tool call, whose name is known and whose arguments follow.

    Attributes:
        index: number of the call in the answer, from 0.
        id: an id for the call, which the answer of the tool refers to.
        name: name of the function, not necessarily one that was offered.
        tokens: positions of the tokens before the arguments, those of the marker among them.
    """

    index: int
    id: str
    name: str
    tokens: range = _NO_TOKENS


@dataclass(frozen=True, slots=True)
class ToolArgumentsDelta:
    """More of a call's arguments. All of them together are JSON text of an object, if the call ends complete.

    Attributes:
        index: number of the call.
        text: what to append; never empty.
        tokens: as for `ReasoningDelta`.
    """

    index: int
    text: str
    tokens: range = _NO_TOKENS


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The end of a call's arguments.

    Attributes:
        index: number of the call.
        complete: False if the answer ended, or stopped being JSON, within the arguments.
        tokens: as for `ReasoningDelta`.
    """

    index: int
    complete: bool = True
    tokens: range = _NO_TOKENS


AnswerEvent = ReasoningDelta | TextDelta | ToolCallBegin | ToolArgumentsDelta | ToolCallEnd


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function by the model.

    Attributes:
        id: an id for the call.
        name: name of the function.
        arguments: JSON text of an object, or the beginning of it if the call is not complete.
        complete: False if the arguments are not.
    """

    id: str
    name: str
    arguments: str
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer divided into its parts.

    Attributes:
        reasoning: what the model thought; None if it did not.
        content: text for the user; None if there is none.
        tool_calls: in the order in which they began.
    """

    reasoning: str | None = None
    content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()

    @classmethod
    def of(cls, events: Iterable[AnswerEvent]) -> Answer:
        """What the events since the beginning of an answer add up to."""
        reasoning: list[str] = []
        content: list[str] = []
        begun: list[ToolCallBegin] = []
        arguments: list[list[str]] = []
        complete: set[int] = set()
        for event in events:
            match event:
                case ReasoningDelta():
                    reasoning.append(event.text)
                case TextDelta():
                    content.append(event.text)
                case ToolCallBegin():
                    begun.append(event)
                    arguments.append([])
                case ToolArgumentsDelta():
                    arguments[event.index].append(event.text)
                case ToolCallEnd():
                    complete |= {event.index} if event.complete else set()
        calls = [
            ToolCall(call.id, call.name, "".join(texts), call.index in complete)
            for call, texts in zip(begun, arguments, strict=True)
        ]
        return cls("".join(reasoning) or None, "".join(content) or None, tuple(calls))


def merged(events: Iterable[AnswerEvent]) -> list[AnswerEvent]:
    """The events with neighbouring deltas of the same kind put together, which keeps their meaning."""
    result: list[AnswerEvent] = []
    for event in events:
        joined = _together(result[-1], event) if result else None
        if joined is None:
            result.append(event)
        else:
            result[-1] = joined
    return result


def _together(last: AnswerEvent, event: AnswerEvent) -> AnswerEvent | None:
    """Two deltas as one; None if they are not of the same kind."""
    if isinstance(last, ReasoningDelta) and isinstance(event, ReasoningDelta):
        return ReasoningDelta(last.text + event.text, _joined(last.tokens, event.tokens))
    if isinstance(last, TextDelta) and isinstance(event, TextDelta):
        return TextDelta(last.text + event.text, _joined(last.tokens, event.tokens))
    if isinstance(last, ToolArgumentsDelta) and isinstance(event, ToolArgumentsDelta) and last.index == event.index:
        return ToolArgumentsDelta(last.index, last.text + event.text, _joined(last.tokens, event.tokens))
    return None


def _joined(left: range, right: range) -> range:
    """Two neighbouring ranges as one. Tokens of whitespace that was dropped in between come with them."""
    if not left or not right:
        return left or right
    return range(left.start, right.stop)
