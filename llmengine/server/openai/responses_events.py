"""The events of a streamed response, and the response itself, which is what the events add up to.

A response that is not streamed is built by the same code from the same answer, so both have the same content::

    response.created, response.in_progress
    for each item: response.output_item.added
        reasoning:      content_part.added, reasoning_text.delta ..., reasoning_text.done, content_part.done
        message:        content_part.added, output_text.delta ..., output_text.done, content_part.done
        function_call:  function_call_arguments.delta ..., function_call_arguments.done
    response.output_item.done
    response.completed, or .incomplete, .failed
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


def new_id(prefix: str) -> str:
    """A random id such as "resp_6f...", which cannot be guessed."""
    return f"{prefix}_{secrets.token_hex(16)}"


class ResponseEvents:
    """Turns the parts of an answer into events, in order. Each method returns the events to send.

    Args:
        head: the response's id, and the fields that repeat the request.

    Attributes:
        response: the response so far; its `output` has the items that are complete.
    """

    def __init__(self, head: Mapping[str, Any]) -> None:
        self.response: dict[str, Any] = {
            **{"id": head["id"], "object": "response", "created_at": int(time.time())},
            **{"status": "in_progress", "error": None, "incomplete_details": None, "completed_at": None},
            **head,
            **{"output": [], "usage": None},
        }
        self._num_events = 0
        self._item: dict[str, Any] | None = None
        self._deltas: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    def begin(self) -> list[Event]:
        """The events before the first part of the answer."""
        return [
            self._event("response.created", response=self._snapshot()),
            self._event("response.in_progress", response=self._snapshot()),
        ]

    def reasoning(self, delta: str) -> list[Event]:
        """The answer goes on with reasoning."""
        events = self._continue("reasoning", {"summary": [], "content": []})
        events.append(self._delta("response.reasoning_text.delta", delta, content_index=0))
        return events

    def text(self, delta: str, logprobs: Sequence[dict[str, Any]] = ()) -> list[Event]:
        """The answer goes on with text, whose tokens have `logprobs`."""
        events = self._continue("message", {"role": "assistant", "content": []})
        self._logprobs += logprobs
        events.append(self._delta("response.output_text.delta", delta, content_index=0, logprobs=list(logprobs)))
        return events

    def call(self, call_id: str, name: str) -> list[Event]:
        """A call of a function begins."""
        events = self._close("completed")
        events += self._open("function_call", {"call_id": call_id, "name": name, "arguments": ""})
        return events

    def arguments(self, delta: str) -> list[Event]:
        """The arguments of the present call go on."""
        assert self._item is not None
        assert self._item["type"] == "function_call"
        return [self._delta("response.function_call_arguments.delta", delta)]

    def end_call(self, complete: bool) -> list[Event]:
        """The arguments of the present call are over."""
        return self._close("completed" if complete else "incomplete")

    def end(self, usage: Mapping[str, Any], incomplete_reason: str | None = None) -> list[Event]:
        """The answer is complete, or `incomplete_reason` says why it is not."""
        status: Status = "completed" if incomplete_reason is None else "incomplete"
        events: list[Event] = []
        if self._item is None and not self.response["output"]:
            events += self._continue("message", {"role": "assistant", "content": []})  # clients expect a message
        events += self._close(status)
        if incomplete_reason is not None:
            self.response["incomplete_details"] = {"reason": incomplete_reason}
        return events + self._finish(status, usage)

    def fail(self, code: str, message: str, usage: Mapping[str, Any] | None = None) -> list[Event]:
        """The answer failed; what there is of it stays in the response."""
        events = self._close("incomplete")
        self.response["error"] = {"code": code, "message": message}
        return events + self._finish("failed", usage)

    def _finish(self, status: str, usage: Mapping[str, Any] | None) -> list[Event]:
        self.response["status"] = status
        self.response["completed_at"] = int(time.time()) if status == "completed" else None
        self.response["usage"] = usage
        return [self._event(f"response.{status}", response=self._snapshot())]

    def _continue(self, kind: Literal["message", "reasoning"], fields: dict[str, Any]) -> list[Event]:
        """Events until a delta of this kind can follow: none if the present item is of this kind."""
        if self._item is not None and self._item["type"] == kind:
            return []
        events = self._close("completed")
        events += self._open(kind, fields)
        part = _part(kind, "", ())
        events.append(self._item_event("response.content_part.added", content_index=0, part=part))
        return events

    def _open(self, kind: str, fields: dict[str, Any]) -> list[Event]:
        self._item = {"id": new_id(_ID_PREFIXES[kind]), "type": kind, "status": "in_progress", **fields}
        self._deltas, self._logprobs = [], []
        return [self._event("response.output_item.added", output_index=self._index, item=dict(self._item))]

    def _close(self, status: Status) -> list[Event]:
        """Complete the present item, if there is one, and move it to the output."""
        item = self._item
        if item is None:
            return []
        text, events = "".join(self._deltas), []
        if item["type"] == "function_call":
            item["arguments"] = text
            events.append(self._item_event("response.function_call_arguments.done", name=item["name"], arguments=text))
        else:
            part = _part(item["type"], text, self._logprobs)
            more = {"logprobs": self._logprobs} if item["type"] == "message" else {}
            done = f"response.{_PARTS[item['type']]}.done"
            events.append(self._item_event(done, content_index=0, text=text, **more))
            events.append(self._item_event("response.content_part.done", content_index=0, part=part))
            item["content"] = [part]
        item["status"] = status
        events.append(self._event("response.output_item.done", output_index=self._index, item=item))
        self.response["output"].append(item)
        self._item = None
        return events

    @property
    def _index(self) -> int:
        return len(self.response["output"])

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": list(self.response["output"])}

    def _delta(self, kind: str, delta: str, **fields: Any) -> Event:
        self._deltas.append(delta)
        return self._item_event(kind, **fields, delta=delta)

    def _item_event(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return event


def _part(kind: str, text: str, logprobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}
