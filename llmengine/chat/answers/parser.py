"""AnswerParser: divides an answer into reasoning, text and tool calls as it arrives."""

from __future__ import annotations

import re
import secrets
import string
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llmengine.chat.answers.call_bodies import MalformedCallError, Reader, call_reader
from llmengine.chat.answers.events import (
    AnswerEvent,
    ReasoningDelta,
    TextDelta,
    ToolArgumentsDelta,
    ToolCallBegin,
    ToolCallEnd,
    merged,
)
from llmengine.chat.answers.formats import AnswerFormat

_ID_CHARS = string.ascii_letters + string.digits


class AnswerParser:
    """Reads an answer piece by piece and returns events.

    The events add up to the same answer however the text is divided into pieces; only text that may still begin a
    marker, and whitespace before such text, is held back.

    - Reasoning is read at the beginning of an answer only, and calls only outside of reasoning.
    - Whitespace around reasoning and calls is left out, that inside of text is kept.
    - A call begins once its name and the beginning of its arguments are read. Text that turns out not to be a call
      before that stays text, its marker included. If a call's arguments stop being JSON, the call ends as not complete,
      and the rest is text.

    Args:
        form: how the model writes answers.
        prompt: the text before the answer, whose end may begin the reasoning.
        tools: the tools that were offered, in OpenAI's form or without its wrapper.
        new_id: makes the ids of calls; None: random ones.
    """

    def __init__(
        self,
        form: AnswerFormat,
        prompt: str = "",
        tools: Sequence[Mapping[str, Any]] = (),
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._form = form
        self._new_id = new_id or (_short_id if form.tools is not None and form.tools.short_ids else _long_id)
        self._tools = _parameters_by_name(tools)
        self._source = _Source()
        self._events: list[AnswerEvent] = []
        self._calls = _Calls(self._source, self._events, self._new_id)
        begins = () if form.tools is None else form.tools.begins
        self._markers = _Markers((*begins, *form.ignored))
        self._reasoning_end = _Markers(() if form.reasoning is None else (form.reasoning.end,))
        self._reader: Reader | None = None
        self._marker = ""
        self._literal = 0
        self._trims = False
        self._may_reason = form.reasoning is not None and not form.ends_reasoning(prompt)
        self._mode: Callable[[bool], bool] = self._read_start
        # What becomes of a piece in which no marker can begin, and the markers; None if that is not so simple.
        self._plain: tuple[type[ReasoningDelta | TextDelta], _Markers] | None = None
        if form.begins_reasoning(prompt):
            self._begin_reasoning()

    def feed(self, piece: str, *, is_token: bool = True) -> list[AnswerEvent]:
        """The events that `piece` completes.

        Args:
            piece: the text that a token added; it may be "".
            is_token: False for text that belongs to no further token.
        """
        if self._plain is not None and is_token:
            kind, markers = self._plain
            if markers.are_absent(piece):
                return [kind(piece, self._source.pass_by(len(piece)))]
        self._source.append(piece, is_token)
        return self._run(final=False)

    def finish(self) -> list[AnswerEvent]:
        """The events of what was held back; the answer is over."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[AnswerEvent]:
        while self._mode(final):
            pass
        events = merged(self._events)
        self._events.clear()
        self._source.compact()
        self._plain = None
        if self._source.is_empty and not self._trims:
            if self._mode == self._read_text:
                self._plain = TextDelta, self._markers
            elif self._mode == self._read_reasoning:
                self._plain = ReasoningDelta, self._reasoning_end
        return events

    # Each mode reads what it can, and returns True if there is more to do, in another mode perhaps.

    def _read_start(self, final: bool) -> bool:
        source, form = self._source, self._form
        if self._trims:
            source.drop(source.num_spaces())
        spaces = source.num_spaces()
        rest = source.rest(spaces)
        if not rest and not final:
            return False
        if self._may_reason and form.reasoning is not None and rest:
            begin = form.reasoning.begin
            if rest.startswith(begin):
                source.drop(spaces + len(begin))
                self._begin_reasoning()
                return True
            if begin.startswith(rest) and not final:
                return False
        self._mode = self._read_text
        if rest[:1] == "{" and form.tools is not None and form.tools.bare:
            self._begin_calls("", spaces)
        return True

    def _begin_reasoning(self) -> None:
        self._mode = self._read_reasoning
        self._trims = True

    def _read_reasoning(self, final: bool) -> bool:
        source = self._source
        if self._trims:
            assert self._form.reasoning is not None
            source.drop(source.num_spaces())
            rest, begin = source.rest(), self._form.reasoning.begin
            if rest.startswith(begin):  # although the prompt had it already
                source.drop(len(begin))
                return True
            if begin.startswith(rest) and not final:
                return False
        num_chars, marker = self._reasoning_end.find(source.rest(), final)
        if num_chars:
            self._trims = False
            self._events.append(ReasoningDelta(*source.take(num_chars)))
        if not marker:
            return False
        source.drop(source.num_spaces() + len(marker))
        self._may_reason = False
        self._trims = True
        self._mode = self._read_start
        return True

    def _read_text(self, final: bool) -> bool:
        source = self._source
        if self._trims:
            source.drop(source.num_spaces())
        num_chars, marker = self._markers.find(source.rest(), final)
        if num_chars:
            self._trims = False
            self._events.append(TextDelta(*source.take(num_chars)))
        if not marker:
            return False
        if marker in self._form.ignored:
            source.drop(source.num_spaces() + len(marker))
            self._trims = True
        else:
            self._begin_calls(marker, source.num_spaces() + len(marker))
        return True

    def _begin_calls(self, marker: str, num_chars: int) -> None:
        """Read calls after the first `num_chars` characters, which stay text until a call is certain."""
        assert self._form.tools is not None
        self._literal = num_chars
        self._calls.open(num_chars)
        self._reader = call_reader(self._form.tools, marker, self._tools, self._calls)
        self._mode = self._read_calls

    def _read_calls(self, final: bool) -> bool:
        calls = self._calls
        assert self._reader is not None
        try:
            for char in self._source.rest(calls.num_read):
                calls.num_read += 1
                self._reader.send(char)
        except StopIteration:
            self._leave_calls()
            return True
        except MalformedCallError:
            self._leave_calls()
            return True
        calls.flush()
        if final:
            if self._form.tools is not None and self._form.tools.body != "xml":
                calls.cut_off(self._source.rest())
            self._leave_calls()
        return final

    def _leave_calls(self) -> None:
        calls = self._calls
        calls.flush()
        self._reader = None
        if not calls.has_begun:
            if self._literal:
                self._trims = False
                self._events.append(TextDelta(*self._source.take(self._literal)))
            self._mode = self._read_text
        elif calls.break_off():
            self._trims = False
            self._mode = self._read_text
        else:
            self._mode = self._read_end

    def _read_end(self, final: bool) -> bool:
        """Read the marker after calls, which may be missing."""
        assert self._form.tools is not None
        source, end = self._source, self._form.tools.end
        spaces = source.num_spaces()
        rest = source.rest(spaces)
        if rest.startswith(end) if end else rest:
            source.drop(spaces + len(end))
        elif end.startswith(rest):
            if final:
                source.drop(spaces + len(rest))
            return False
        self._trims = True
        self._mode = self._read_text
        return True


class _Source:
    """The text that is not yet part of an event, and the tokens that it came from."""

    __slots__ = ("_begin", "_num_taken", "_offset", "_starts", "_text")

    def __init__(self) -> None:
        self._text = ""
        self._begin = 0  # of the text that was not taken
        self._offset = 0  # of that place in the answer
        self._starts: deque[int] = deque()  # where tokens that were not taken begin in the answer
        self._num_taken = 0

    @property
    def is_empty(self) -> bool:
        return self._begin == len(self._text)

    def pass_by(self, num_chars: int) -> range:
        """Count a token whose text is taken at once, of an empty source; returns what `take` would."""
        first = self._num_taken
        self._num_taken += len(self._starts) + 1
        self._starts.clear()
        self._offset += num_chars
        return range(first, self._num_taken)

    def append(self, piece: str, is_token: bool) -> None:
        if is_token:
            self._starts.append(self._offset + len(self._text) - self._begin)
        self._text += piece

    def rest(self, begin: int = 0) -> str:
        """The text from its character `begin` on."""
        return self._text[self._begin + begin :]

    def num_spaces(self) -> int:
        """Number of whitespace characters that it begins with."""
        match = _SPACES.match(self._text, self._begin)
        assert match is not None
        return match.end() - self._begin

    def take(self, num_chars: int) -> tuple[str, range]:
        """Remove characters; returns them and the positions of the tokens that begin there."""
        text = self._text[self._begin : self._begin + num_chars]
        return text, self.drop(num_chars)

    def drop(self, num_chars: int) -> range:
        """Remove characters; returns the positions of the tokens that begin there."""
        self._begin += num_chars
        self._offset += num_chars
        first = self._num_taken
        while self._starts and self._starts[0] < self._offset:
            self._starts.popleft()
            self._num_taken += 1
        return range(first, self._num_taken)

    def compact(self) -> None:
        """Forget what was removed."""
        self._text = self._text[self._begin :]
        self._begin = 0


_SPACES = re.compile(r"\s*")


class _Calls:
    """The sink of the readers of calls: turns their reports into events.

    Attributes:
        num_read: characters of the source that the reader has read.
        has_begun: a call has begun since `open`.
    """

    __slots__ = (
        "_arguments",
        "_confirmed",
        "_events",
        "_index",
        "_is_open",
        "_new_id",
        "_source",
        "has_begun",
        "num_read",
    )

    def __init__(self, source: _Source, events: list[AnswerEvent], new_id: Callable[[], str]) -> None:
        self._source, self._events, self._new_id = source, events, new_id
        self._index = -1
        self._is_open = False
        self._arguments: list[str] = []
        self._confirmed = 0
        self.num_read = 0
        self.has_begun = False

    def open(self, num_chars: int) -> None:
        """Calls may begin after `num_chars` characters."""
        self.num_read, self._confirmed, self.has_begun = num_chars, 0, False

    def begin(self, name: str) -> None:
        self.confirm()
        self.has_begun = self._is_open = True
        self._index += 1
        self._events.append(ToolCallBegin(self._index, self._new_id(), name, self._take()))

    def arguments(self, text: str) -> None:
        self.confirm()
        self._arguments.append(text)

    def end(self) -> None:
        self._end(complete=True)

    def confirm(self) -> None:
        self._confirmed = self.num_read

    def flush(self) -> None:
        """Make an event of the arguments so far, and remove what the reader confirmed."""
        if self._arguments:
            text = "".join(self._arguments)
            self._arguments.clear()
            self._events.append(ToolArgumentsDelta(self._index, text, self._take()))
        self._take()

    def cut_off(self, rest: str) -> None:
        """The answer ends with `rest`, which belongs to the arguments if there is an open call."""
        if self._is_open and rest:
            self._arguments.append(rest)
            self.confirm()

    def break_off(self) -> bool:
        """End the present call as not complete; returns False if there is none."""
        if not self._is_open:
            return False
        self._end(complete=False)
        return True

    def _end(self, complete: bool) -> None:
        if complete:
            self.flush()
            self.confirm()
        self._is_open = False
        self._events.append(ToolCallEnd(self._index, complete, self._take()))

    def _take(self) -> range:
        """Remove what the reader confirmed."""
        tokens = self._source.drop(self._confirmed)
        self.num_read -= self._confirmed
        self._confirmed = 0
        return tokens


class _Markers:
    """Finds markers in text."""

    __slots__ = ("_firsts", "_longest", "_markers", "_pattern")

    def __init__(self, markers: Sequence[str]) -> None:
        self._markers = markers
        self._firsts = {marker[0] for marker in markers}
        self._longest = max(map(len, markers), default=0)
        self._pattern = re.compile("|".join(map(re.escape, markers)))

    def are_absent(self, text: str) -> bool:
        """True if it is certain, at little cost, that `text` is not empty and that no marker begins in it."""
        if not text or (self._markers and text[-1].isspace()):
            return False
        return self._firsts.isdisjoint(text)

    def find(self, text: str, final: bool) -> tuple[int, str]:
        """Number of characters before the first marker and the whitespace before it, and that marker.

        Without a marker, number of the characters that no marker can begin with, and "". If the text is final, all.
        """
        if not self._markers:
            return len(text), ""
        match = self._pattern.search(text)
        if match is not None:
            return len(text[: match.start()].rstrip()), match[0]
        if final:
            return len(text), ""
        end = len(text)
        for begin in range(max(0, end - self._longest + 1), end):
            if text[begin] in self._firsts and any(marker.startswith(text[begin:]) for marker in self._markers):
                end = begin
                break
        return len(text[:end].rstrip()), ""


def _parameters_by_name(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    functions = [tool.get("function", tool) for tool in tools]
    return {str(function.get("name")): function.get("parameters") for function in functions}


def _long_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    return "".join(secrets.choice(_ID_CHARS) for _ in range(9))
