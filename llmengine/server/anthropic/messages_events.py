"""The events of a streamed message, and the message itself, which is what the events add up to.

A message that is not streamed is built by the same code from the same answer, so both have the same content::

    message_start, ping
    for each block: content_block_start, content_block_delta ..., content_block_stop
    message_delta, message_stop
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal

from pydantic_core import from_json

Event = dict[str, Any]

_TEXT_FIELDS = {"text": "text", "thinking": "thinking"}


class MessageEvents:
    """Turns the parts of an answer into events, in order. Each method returns the events to send.

    Args:
        model: the model's name.
        show_thinking: False: blocks of thinking are empty.

    Attributes:
        message: the message so far; its `content` has the blocks that are complete.
    """

    def __init__(self, model: str, *, show_thinking: bool = True) -> None:
        self.message: dict[str, Any] = {
            **{"id": f"msg_{secrets.token_hex(16)}", "type": "message", "role": "assistant", "model": model},
            **{"content": [], "stop_reason": None, "stop_sequence": None, "usage": None},
        }
        self._show_thinking = show_thinking
        self._block: dict[str, Any] | None = None
        self._deltas: list[str] = []

    def begin(self, usage: Mapping[str, Any]) -> list[Event]:
        """The events before the first part of the answer, with the usage so far."""
        return [{"type": "message_start", "message": {**self.message, "content": [], "usage": usage}}, {"type": "ping"}]

    def reasoning(self, delta: str) -> list[Event]:
        """The answer goes on with reasoning."""
        events = self._continue({"type": "thinking", "thinking": "", "signature": ""})
        return [*events, self._delta("thinking_delta", "thinking", delta)] if self._show_thinking else events

    def text(self, delta: str) -> list[Event]:
        """The answer goes on with text."""
        return [*self._continue({"type": "text", "text": ""}), self._delta("text_delta", "text", delta)]

    def call(self, call_id: str, name: str) -> list[Event]:
        """A call of a tool begins."""
        return [*self._close(), *self._open({"type": "tool_use", "id": call_id, "name": name, "input": {}})]

    def arguments(self, delta: str) -> list[Event]:
        """The arguments of the present call go on."""
        assert self._block is not None
        assert self._block["type"] == "tool_use"
        return [self._delta("input_json_delta", "partial_json", delta)]

    def end_call(self, complete: bool) -> list[Event]:
        """The arguments of the present call are over."""
        return self._close()

    def end(self, usage: Mapping[str, Any], stop_reason: str, stop_sequence: str | None = None) -> list[Event]:
        """The answer is complete."""
        events = self._close()
        self.message |= {"stop_reason": stop_reason, "stop_sequence": stop_sequence, "usage": usage}
        delta = {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
        return [*events, {"type": "message_delta", "delta": delta, "usage": usage}, {"type": "message_stop"}]

    def _continue(self, block: dict[str, Any]) -> list[Event]:
        """Events until a delta of this block's kind can follow: none if the present block is of that kind."""
        if self._block is not None and self._block["type"] == block["type"]:
            return []
        return [*self._close(), *self._open(block)]

    def _open(self, block: dict[str, Any]) -> list[Event]:
        self._block, self._deltas = block, []
        return [{"type": "content_block_start", "index": self._index, "content_block": dict(block)}]

    def _close(self) -> list[Event]:
        """Complete the present block, if there is one."""
        block = self._block
        if block is None:
            return []
        text, events = "".join(self._deltas), []
        if block["type"] == "tool_use":
            block["input"] = _as_object(text)
        else:
            block[_TEXT_FIELDS[block["type"]]] = text
        if block["type"] == "thinking":
            # Clients drop blocks without a signature when they send the conversation back. The id is never checked.
            block["signature"] = self.message["id"]
            delta = {"type": "signature_delta", "signature": block["signature"]}
            events.append({"type": "content_block_delta", "index": self._index, "delta": delta})
        events.append({"type": "content_block_stop", "index": self._index})
        self.message["content"].append(block)
        self._block = None
        return events

    @property
    def has_tool_use(self) -> bool:
        """True if a complete block calls a tool, or the present one does."""
        blocks = [*self.message["content"], self._block]
        return any(block is not None and block["type"] == "tool_use" for block in blocks)

    @property
    def _index(self) -> int:
        return len(self.message["content"])

    def _delta(self, kind: str, field: Literal["text", "thinking", "partial_json"], delta: str) -> Event:
        self._deltas.append(delta)
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, field: delta}}


def _as_object(arguments: str) -> dict[str, Any]:
    """The arguments of a call; what there is of them, if `max_tokens` cut their text off."""
    try:
        value = from_json(arguments, allow_partial=True)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
